//! `PAGEMAP_SCAN` without the pages that the engine owns.
//!
//! CRIU asks for one mapping at a time, or for up to 2 MiB with several small ones
//! and the holes between them (`pmc_fill` in criu/pagemap-cache.c). The answer is
//! made of real scans, with CRIU's own selection, of what is left of the range
//! when the owned parts are taken out and the stack pages are put back.

use std::ops::Range;

use sys::pagemap::{Categories, Effect, Pagemap, Region, Selection};

use super::{Memory, PAGE_BYTES};

/// Size of `struct pm_scan_arg`.
const ARGUMENT_BYTES: usize = 96;

/// Offset of its field `walk_end`.
pub(super) const WALK_END_OFFSET: u64 = 32;

/// The fields of a `struct pm_scan_arg` that CRIU fills.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Argument {
    range: (u64, u64),
    vector: u64,
    vector_len: u64,
    selection: Selection,
}

impl Argument {
    /// What CRIU asks for; `None` for a scan that is none of pages with content
    /// (guard regions), that changes something, or that CRIU would not make.
    pub(super) fn from_bytes(bytes: &[u8; ARGUMENT_BYTES]) -> Option<Self> {
        let mut words = [0; ARGUMENT_BYTES / 8];
        for (word, chunk) in words.iter_mut().zip(bytes.chunks_exact(8)) {
            *word = u64::from_ne_bytes(chunk.try_into().ok()?);
        }
        let [
            size,
            flags,
            start,
            end,
            _,
            vector,
            vector_len,
            max_pages,
            inverted,
            all,
            any,
            report,
        ] = words;
        let plain = size == ARGUMENT_BYTES as u64
            && flags == 0
            && max_pages == 0
            && vector != 0
            && vector_len != 0
            && any != 0;
        let aligned = start <= end && start % PAGE_BYTES == 0 && end % PAGE_BYTES == 0;
        (plain && aligned).then_some(Self {
            range: (start, end),
            vector,
            vector_len,
            selection: Selection {
                all: Categories(all),
                any: Categories(any),
                inverted: Categories(inverted),
                report: Categories(report),
            },
        })
    }
}

/// What CRIU is to find in its memory.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Answer {
    /// Where the regions go.
    pub(super) vector: u64,
    pub(super) regions: Vec<Region>,
    pub(super) walk_end: u64,
}

impl Answer {
    /// The regions as an array of `struct page_region`.
    pub(super) fn region_bytes(&self) -> Vec<u8> {
        let words = self
            .regions
            .iter()
            .flat_map(|region| [region.start, region.end, region.categories].map(u64::to_ne_bytes));
        words.flatten().collect()
    }
}

/// The answer to a scan of a process; `None` when the kernel can give it: nothing
/// in the range is owned, or we cannot look (then CRIU will say so).
pub(super) fn answer(pid: i32, asked: &Argument, memory: &dyn Memory) -> Option<Answer> {
    let whole = asked.range.0..asked.range.1;
    let end = whole.end;
    let rest = not_owned(pid, whole.clone(), memory);
    if rest.as_slice() == std::slice::from_ref(&whole) {
        return None;
    }
    if rest.is_empty() {
        return Some(Answer {
            vector: asked.vector,
            regions: Vec::new(),
            walk_end: end,
        });
    }
    let pagemap = Pagemap::open(pid).ok()?;
    let scan = |range: Range<u64>, regions: &mut Vec<Region>| {
        pagemap
            .scan(range, asked.selection, Effect::Look, regions)
            .ok()
    };
    let (regions, walk_end) = collect(&rest, end, asked.vector_len, scan)?;
    Some(Answer {
        vector: asked.vector,
        regions,
        walk_end,
    })
}

/// Scans the ranges one after the other, as one scan of all up to `end` would:
/// it ends early when `room` regions have been found. Returns them, and where it
/// ended.
fn collect(
    ranges: &[Range<u64>],
    end: u64,
    room: u64,
    mut scan: impl FnMut(Range<u64>, &mut Vec<Region>) -> Option<u64>,
) -> Option<(Vec<Region>, u64)> {
    let mut regions: Vec<Region> = Vec::new();
    for range in ranges {
        let left = room - regions.len() as u64;
        if left == 0 {
            // What lies between is owned: CRIU comes back for the rest.
            return Some((regions, range.start));
        }
        let pages = (range.end - range.start) / PAGE_BYTES;
        let mut found = Vec::with_capacity(usize::try_from(left.min(pages)).ok()?);
        let stopped = scan(range.clone(), &mut found)?;
        // An allocation may be larger than asked for, CRIU's array is not.
        if found.len() as u64 > left {
            found.truncate(usize::try_from(left).ok()?);
            let last = found.last()?.end;
            regions.append(&mut found);
            return Some((regions, last));
        }
        regions.append(&mut found);
        if stopped < range.end {
            return Some((regions, stopped));
        }
    }
    Some((regions, end))
}

/// The parts of `range` that CRIU has to look at, in order and apart.
fn not_owned(pid: i32, range: Range<u64>, memory: &dyn Memory) -> Vec<Range<u64>> {
    let mut parts = Vec::new();
    take_apart(pid, range.clone(), memory, &mut parts);
    let stacks = memory
        .stack_pages(pid)
        .iter()
        .filter(|page| range.contains(page));
    parts.extend(stacks.map(|&page| page..page + PAGE_BYTES));
    merged(parts)
}

/// Halves the range until each part is owned or is not.
fn take_apart(pid: i32, range: Range<u64>, memory: &dyn Memory, parts: &mut Vec<Range<u64>>) {
    if range.is_empty() || memory.owns(pid, range.clone()) {
        return;
    }
    let pages = (range.end - range.start) / PAGE_BYTES;
    if pages == 1 || !memory.may_own(pid, range.clone()) {
        parts.push(range);
        return;
    }
    let middle = range.start + pages / 2 * PAGE_BYTES;
    take_apart(pid, range.start..middle, memory, parts);
    take_apart(pid, middle..range.end, memory, parts);
}

/// The same addresses in as few ranges as possible.
fn merged(mut parts: Vec<Range<u64>>) -> Vec<Range<u64>> {
    parts.sort_unstable_by_key(|part| part.start);
    let mut merged: Vec<Range<u64>> = Vec::new();
    for part in parts {
        match merged.last_mut() {
            Some(last) if part.start <= last.end => last.end = last.end.max(part.end),
            _ => merged.push(part),
        }
    }
    merged
}

#[cfg(test)]
mod tests {
    #![expect(
        clippy::single_range_in_vec_init,
        reason = "lists of one range are meant"
    )]

    use super::*;

    const PAGE: u64 = PAGE_BYTES;

    /// Owns pages by number.
    struct Fake {
        owned: Vec<Range<u64>>,
        stacks: Vec<u64>,
        knows: bool,
    }

    impl Memory for Fake {
        fn owns(&self, _pid: i32, range: Range<u64>) -> bool {
            self.owned
                .iter()
                .any(|own| own.start <= range.start && range.end <= own.end)
        }
        fn may_own(&self, _pid: i32, range: Range<u64>) -> bool {
            let overlaps = |own: &Range<u64>| own.start < range.end && range.start < own.end;
            !self.knows || self.owned.iter().any(overlaps)
        }
        fn stack_pages(&self, _pid: i32) -> &[u64] {
            &self.stacks
        }
        fn smaps(&self, _pid: i32) -> Option<Vec<u8>> {
            None
        }
    }

    fn pages(range: Range<u64>) -> Range<u64> {
        range.start * PAGE..range.end * PAGE
    }

    fn rest(owned: &[Range<u64>], stacks: &[u64], asked: Range<u64>) -> Vec<Range<u64>> {
        let of = |knows| {
            let fake = Fake {
                owned: owned.iter().cloned().map(pages).collect(),
                stacks: stacks.iter().map(|page| page * PAGE).collect(),
                knows,
            };
            not_owned(1, pages(asked.clone()), &fake)
        };
        assert_eq!(of(true), of(false), "a hint changes nothing");
        of(true)
            .into_iter()
            .map(|part| part.start / PAGE..part.end / PAGE)
            .collect()
    }

    #[test]
    fn what_is_not_owned_is_left_and_what_is_owned_is_taken_out() {
        assert_eq!(rest(&[10..20], &[], 10..20), []);
        assert_eq!(rest(&[10..20], &[], 12..15), []);
        assert_eq!(rest(&[10..20], &[], 30..40), [30..40]);
        assert_eq!(rest(&[10..20], &[], 5..25), [5..10, 20..25]);
        assert_eq!(
            rest(&[10..13, 14..15, 17..30], &[], 9..40),
            [9..10, 13..14, 15..17, 30..40]
        );
    }

    #[test]
    fn stack_pages_are_put_back_once_and_only_inside_the_range() {
        assert_eq!(rest(&[10..20], &[12, 13, 19, 40], 10..20), [12..14, 19..20]);
        assert_eq!(rest(&[10..20], &[9, 10], 5..20), [5..11]);
    }

    /// Every second page has content.
    fn every_second(range: Range<u64>, regions: &mut Vec<Region>) -> Option<u64> {
        let room = regions.capacity();
        for page in (range.start / PAGE..range.end / PAGE).filter(|page| page % 2 == 0) {
            if regions.len() == room {
                return Some(page * PAGE);
            }
            let range = pages(page..page + 1);
            regions.push(Region {
                start: range.start,
                end: range.end,
                categories: 8,
            });
        }
        Some(range.end)
    }

    fn found(regions: &[Region]) -> Vec<u64> {
        regions.iter().map(|region| region.start / PAGE).collect()
    }

    #[test]
    fn scans_of_the_parts_are_one_scan_of_the_whole() {
        let parts = [pages(0..4), pages(8..10)];
        let (regions, end) = collect(&parts, 20 * PAGE, 100, every_second).unwrap();
        assert_eq!((found(&regions), end), (vec![0, 2, 8], 20 * PAGE));
    }

    #[test]
    fn a_full_array_ends_the_walk_where_the_next_one_has_to_begin() {
        let parts = [pages(0..4), pages(8..14)];
        // Full at the end of a part: the next begins at the following part.
        let (regions, end) = collect(&parts, 20 * PAGE, 2, every_second).unwrap();
        assert_eq!((found(&regions), end), (vec![0, 2], 8 * PAGE));
        // Full inside a part. Going on from there finds the rest, nothing twice.
        let (regions, end) = collect(&parts, 20 * PAGE, 3, every_second).unwrap();
        assert_eq!(found(&regions), [0, 2, 8]);
        let (more, end) = collect(&[end..14 * PAGE], 20 * PAGE, 3, every_second).unwrap();
        assert_eq!((found(&more), end), (vec![10, 12], 20 * PAGE));
    }

    #[test]
    fn an_array_is_never_filled_beyond_its_length() {
        let greedy = |range: Range<u64>, regions: &mut Vec<Region>| {
            regions.reserve(10);
            every_second(range, regions)
        };
        let (regions, end) = collect(&[pages(0..20)], 20 * PAGE, 3, greedy).unwrap();
        assert_eq!((found(&regions), end), (vec![0, 2, 4], 5 * PAGE));
    }

    fn argument(words: [u64; 12]) -> Option<Argument> {
        let bytes: Vec<u8> = words.iter().flat_map(|word| word.to_ne_bytes()).collect();
        Argument::from_bytes(&bytes.try_into().unwrap())
    }

    /// The scan of `pmc_fill` in CRIU 4.2.1.
    const CRIU: [u64; 12] = [
        96, 0, 0x1000, 0x5000, 0, 0x7000, 32768, 0, 0x24, 0x24, 0x18, 0x98,
    ];

    #[test]
    fn only_scans_for_content_are_answered() {
        assert!(argument(CRIU).is_some());
        // Size, flags, start, vector, its length, most pages, any-of (guard regions).
        for (index, value) in [
            (0, 104),
            (1, 1),
            (2, 0x6000),
            (5, 0),
            (6, 0),
            (7, 5),
            (10, 0),
        ] {
            let mut other = CRIU;
            other[index] = value;
            assert_eq!(argument(other), None, "{index}");
        }
    }

    #[test]
    fn a_real_scan_sees_only_what_is_not_owned() {
        // Sixteen pages of our own, all written.
        let memory = vec![1u8; 17 * PAGE as usize];
        let first = (memory.as_ptr() as u64).div_ceil(PAGE);
        let fake = Fake {
            owned: vec![pages(first..first + 4), pages(first + 6..first + 16)],
            stacks: vec![(first + 8) * PAGE],
            knows: true,
        };
        let mut words = CRIU;
        (words[2], words[3]) = (first * PAGE, (first + 16) * PAGE);
        let asked = argument(words).unwrap();
        let pid = std::process::id() as i32;
        let Some(answer) = answer(pid, &asked, &fake) else {
            // A kernel before 6.7 has no PAGEMAP_SCAN.
            return;
        };
        let seen: Vec<u64> = answer
            .regions
            .iter()
            .flat_map(|region| region.start / PAGE..region.end / PAGE)
            .map(|page| page - first)
            .collect();
        assert_eq!(seen, [4, 5, 8]);
        assert_eq!(answer.walk_end, (first + 16) * PAGE);
        assert_eq!(answer.region_bytes().len(), answer.regions.len() * 24);
        drop(memory);
    }
}
