//! One bit for each page of a window.

use std::ops::Range;

const WORDS: usize = WINDOW_PAGES / 64;

/// Pages of a window, the 2 MiB that one entry of the second page table level covers.
pub(crate) const WINDOW_PAGES: usize = 512;

/// A set of pages of a window.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct PageBits([u64; WORDS]);

impl PageBits {
    pub(crate) fn insert(&mut self, pages: Range<usize>) {
        for (word, mask) in masks(&pages) {
            self.0[word] |= mask;
        }
    }

    pub(crate) fn remove(&mut self, pages: Range<usize>) {
        for (word, mask) in masks(&pages) {
            self.0[word] &= !mask;
        }
    }

    pub(crate) fn contains(&self, page: usize) -> bool {
        self.0[page / 64] & (1 << (page % 64)) != 0
    }

    pub(crate) fn len(&self) -> usize {
        self.0.iter().map(|word| word.count_ones() as usize).sum()
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.0 == [0; WORDS]
    }

    /// How many of `pages` are in the set.
    pub(crate) fn count(&self, pages: &Range<usize>) -> usize {
        masks(pages)
            .map(|(word, mask)| (self.0[word] & mask).count_ones() as usize)
            .sum()
    }

    pub(crate) fn intersection(&self, other: &Self) -> Self {
        let mut common = *self;
        for (word, with) in common.0.iter_mut().zip(other.0) {
            *word &= with;
        }
        common
    }

    /// The first run of pages at or behind `from`, at most `longest` of them.
    pub(crate) fn next_run(&self, from: usize, longest: usize) -> Option<Range<usize>> {
        let start = (from..WINDOW_PAGES).find(|page| self.contains(*page))?;
        let limit = WINDOW_PAGES.min(start + longest);
        let end = (start..limit)
            .find(|page| !self.contains(*page))
            .unwrap_or(limit);
        Some(start..end)
    }

    /// The run of pages around `page`, which is in the set, as far as it stays in `within`.
    pub(crate) fn run_around(&self, page: usize, within: &Range<usize>) -> Range<usize> {
        let start = (within.start..page)
            .rev()
            .take_while(|page| self.contains(*page))
            .last()
            .unwrap_or(page);
        let end = (page + 1..within.end)
            .find(|page| !self.contains(*page))
            .unwrap_or(within.end.max(page + 1));
        start..end
    }
}

/// The words that hold `pages`, each with the bits of them.
fn masks(pages: &Range<usize>) -> impl Iterator<Item = (usize, u64)> {
    let (start, end) = (pages.start, pages.end.min(WINDOW_PAGES));
    let words = if start < end {
        start / 64..end.div_ceil(64)
    } else {
        0..0
    };
    words.map(move |word| {
        let first = start.saturating_sub(word * 64);
        let behind = (end - word * 64).min(64);
        (word, (u64::MAX << first) & (u64::MAX >> (64 - behind)))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn bits(ranges: &[(usize, usize)]) -> PageBits {
        let mut bits = PageBits::default();
        for (start, end) in ranges {
            bits.insert(*start..*end);
        }
        bits
    }

    #[test]
    fn ranges_are_set_and_cleared_to_the_page_wherever_they_lie() {
        for start in [0, 1, 63, 64, 65, 200, 511] {
            for end in [1, 63, 64, 65, 128, 201, 511, 512] {
                let mut set = bits(&[(start, end)]);
                for page in 0..WINDOW_PAGES {
                    assert_eq!(set.contains(page), (start..end).contains(&page));
                }
                assert_eq!(set.len(), end.saturating_sub(start));
                assert_eq!(set.count(&(start..end)), end.saturating_sub(start));
                set.remove(start..end);
                assert!(set.is_empty());
            }
        }
    }

    #[test]
    fn runs_end_where_the_set_does_or_at_the_limit() {
        let set = bits(&[(3, 5), (70, 200), (511, 512)]);
        assert_eq!(set.next_run(0, 64), Some(3..5));
        assert_eq!(set.next_run(4, 64), Some(4..5));
        assert_eq!(set.next_run(5, 64), Some(70..134));
        assert_eq!(set.next_run(200, 64), Some(511..512));
        assert_eq!(bits(&[(3, 5)]).next_run(5, 64), None);
    }

    #[test]
    fn the_run_around_a_page_stays_within_bounds() {
        let set = bits(&[(10, 30)]);
        assert_eq!(set.run_around(20, &(16..32)), 16..30);
        assert_eq!(set.run_around(10, &(0..16)), 10..16);
        assert_eq!(bits(&[(9, 10)]).run_around(9, &(0..16)), 9..10);
    }
}
