//! `/proc/PID/smaps`, read while the process runs and given to CRIU when it does not.
//!
//! The kernel walks all page tables to write this text, 10-20 ms per GiB of 4 KiB pages, and CRIU reads it inside the
//! freeze. It uses the addresses, the permissions, the file and `VmFlags`, none of which needs the walk. So we read the
//! text before the freeze and, in it, put it together again for the mappings of then: `/proc/PID/maps` costs no walk.
//!
//! What is given is right in all that CRIU uses, or nothing is given. A mapping counts as known when it shows in `maps`
//! exactly as before, or when it is evidently a known one that grew, shrank or was merged. One that was split is not:
//! pieces that look equal and are yet separate differ in something that only `VmFlags` shows. Sizes and counters in the
//! text are those of the moment it was read. A change of flags that leaves `maps` as it was (`madvise` on a whole
//! mapping within the last moments) goes unseen; for locked memory, the one flag that decides who carries a mapping's
//! content, see [`LockedMemory`].

use std::ops::Range;

use crate::maps::{self, Mapping};
use crate::ranges::overlap;

/// `smaps` of one process at one moment.
#[derive(Debug, Clone)]
pub(crate) struct Smaps {
    text: Vec<u8>,
    sections: Vec<Section>,
}

#[derive(Debug, Clone)]
struct Section {
    mapping: Mapping,
    /// Where in the text everything behind the header line is, with the last line's end.
    body: Range<usize>,
    flags: Flags,
}

/// The `VmFlags` of a mapping: two letters each.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct Flags(Vec<[u8; 2]>);

impl Flags {
    fn parse(line: &[u8]) -> Self {
        let mut flags: Vec<[u8; 2]> = line
            .split(u8::is_ascii_whitespace)
            .filter_map(|flag| flag.try_into().ok())
            // Tracking of writes comes and goes: uffd-wp, uffd-missing, uffd-minor, soft-dirty.
            .filter(|flag: &[u8; 2]| !matches!(flag, b"uw" | b"um" | b"ui" | b"sd"))
            .collect();
        flags.sort_unstable();
        Self(flags)
    }

    fn has(&self, flag: [u8; 2]) -> bool {
        self.0.contains(&flag)
    }

    /// Whether the destination can fill such a mapping through userfaultfd: not locked memory (its pages must be there
    /// before the process runs), not hugetlb, not a shadow stack (mapped by the kernel), nothing that is not memory, and
    /// not memory that the kernel may drop.
    pub(crate) fn can_be_filled_lazily(&self) -> bool {
        ![
            *b"lo", *b"ht", *b"ss", *b"io", *b"pf", *b"mm", *b"dp", *b"gd",
        ]
        .into_iter()
        .any(|flag| self.has(flag))
    }

    /// Whether these are the flags the kernel gives to fresh `brk` memory.
    fn are_those_of_new_heap(&self) -> bool {
        let usual = [*b"rd", *b"wr", *b"mr", *b"mw", *b"me", *b"ac"];
        self.0.iter().all(|flag| usual.contains(flag))
    }
}

impl Smaps {
    /// Parses the text of `/proc/PID/smaps`; `None` where it is not in the form we know.
    pub(crate) fn parse(text: Vec<u8>) -> Option<Self> {
        let mut sections: Vec<Section> = Vec::new();
        let mut offset = 0;
        for line in text.split_inclusive(|byte| *byte == b'\n') {
            let behind = offset + line.len();
            let content = line.trim_ascii_end();
            // Header lines start with an address, all others with a capital letter.
            if line.first().is_some_and(|byte| !byte.is_ascii_uppercase()) {
                let header = line.strip_suffix(b"\n").unwrap_or(line);
                let mapping = maps::parse_line(header)?;
                sections.push(Section {
                    mapping,
                    body: behind..behind,
                    flags: Flags::default(),
                });
            } else {
                let section = sections.last_mut()?;
                section.body.end = behind;
                if let Some(flags) = content.strip_prefix(b"VmFlags:") {
                    section.flags = Flags::parse(flags);
                }
            }
            offset = behind;
        }
        // A section without flags is one we read while it changed, or a kernel that does not tell.
        sections
            .iter()
            .all(|section| !section.flags.0.is_empty())
            .then_some(Self { text, sections })
    }

    /// The flags of a mapping of now, if it is evidently one of then.
    pub(crate) fn flags(&self, mapping: &Mapping, all: &[Mapping]) -> Option<&Flags> {
        self.find(mapping, all).map(|section| &section.flags)
    }

    /// The text for the mappings of now; `None` if one of them is not evidently one of then.
    pub(crate) fn compose(&self, current: &[Mapping]) -> Option<Vec<u8>> {
        let mut text = Vec::with_capacity(self.text.len());
        for mapping in current {
            let section = self.find(mapping, current)?;
            text.extend_from_slice(&mapping.line);
            text.push(b'\n');
            text.extend_from_slice(&self.text[section.body.clone()]);
        }
        Some(text)
    }

    fn find(&self, mapping: &Mapping, all: &[Mapping]) -> Option<&Section> {
        let first = self
            .sections
            .partition_point(|section| section.mapping.range.end <= mapping.range.start);
        let overlapping: Vec<&Section> = self.sections[first..]
            .iter()
            .take_while(|section| section.mapping.range.start < mapping.range.end)
            .collect();
        let Some(&section) = overlapping.first() else {
            return self.heap_before(mapping);
        };
        if section.mapping.line == mapping.line {
            return Some(section);
        }
        let same = overlapping.iter().all(|other| {
            other.mapping.attributes == mapping.attributes
                && file_position(&other.mapping) == file_position(mapping)
                && other.flags == section.flags
                // Its other pieces, if there are any, look the same and are not.
                && !is_split(&other.mapping, all)
        });
        same.then_some(section)
    }

    /// New `brk` memory behind the heap of then: not yet tracked, it is a mapping of its own.
    fn heap_before(&self, mapping: &Mapping) -> Option<&Section> {
        let section = self
            .sections
            .iter()
            .rfind(|section| section.mapping.range.end <= mapping.range.start)?;
        (mapping.name() == b"[heap]"
            && section.mapping.attributes == mapping.attributes
            && section.flags.are_those_of_new_heap())
        .then_some(section)
    }
}

/// Where a mapping's file would begin in memory: equal for pieces of one mapping. Anonymous memory has no file.
fn file_position(mapping: &Mapping) -> u64 {
    if mapping.inode == 0 {
        0
    } else {
        mapping.range.start.wrapping_sub(mapping.offset)
    }
}

/// Whether more than one mapping of now lies where this one of then was, looking like it.
fn is_split(then: &Mapping, now: &[Mapping]) -> bool {
    let first = now.partition_point(|mapping| mapping.range.end <= then.range.start);
    now[first..]
        .iter()
        .take_while(|mapping| overlap(&mapping.range, &then.range))
        .filter(|mapping| mapping.attributes == then.attributes)
        .count()
        > 1
}

/// What `/proc/PID/status` says about memory that the kernel treats specially, at the price of no page walk.
///
/// Whether memory is locked decides who carries it, and `maps` does not show it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct LockedMemory {
    /// `VmLck`: locked memory, in KiB, including memory to be locked when touched.
    pub(crate) locked_kib: u64,
    /// Whether the process uses shadow stacks (x86).
    pub(crate) shadow_stacks: bool,
}

impl LockedMemory {
    /// Parses the text of `/proc/PID/status`; `None` for a process without memory of its own (a zombie).
    pub(crate) fn parse(status: &str) -> Option<Self> {
        let field = |name| {
            status
                .lines()
                .find_map(|line: &str| line.strip_prefix(name))
        };
        let locked_kib = field("VmLck:")?.trim().strip_suffix(" kB")?.parse().ok()?;
        let features = field("x86_Thread_features:").unwrap_or_default();
        let shadow_stacks = features
            .split_ascii_whitespace()
            .any(|feature| feature == "shstk");
        Some(Self {
            locked_kib,
            shadow_stacks,
        })
    }

    /// Nothing is locked and no mapping is a shadow stack: private anonymous memory is ordinary memory, whatever flags
    /// it has. (Memory that the kernel may drop is the one exception; it is not kept anyway.)
    pub(crate) fn all_is_ordinary(&self) -> bool {
        self.locked_kib == 0 && !self.shadow_stacks
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn section(header: &str, flags: &str) -> String {
        format!(
            "{header}\nSize:                  4 kB\nRss:                   4 kB\nVmFlags: {flags}\n"
        )
    }

    const TEXT_LINE: &str =
        "400000-401000 r-xp 00000000 08:01 9                          /bin/tern";
    const HEAP: &str = "500000-600000 rw-p 00000000 00:00 0                          [heap]";
    const ARENA: &str = "7f0000000000-7f0000400000 rw-p 00000000 00:00 0 ";
    const USUAL: &str = "rd wr mr mw me ac sd ";

    fn smaps() -> Smaps {
        let text = [
            section(TEXT_LINE, "rd ex mr mw me sd "),
            section(HEAP, "rd wr mr mw me ac uw sd "),
            section(ARENA, USUAL),
        ]
        .concat();
        Smaps::parse(text.into_bytes()).unwrap()
    }

    fn mappings(lines: &[&str]) -> Vec<Mapping> {
        maps::parse(lines.join("\n").as_bytes()).unwrap()
    }

    /// The header lines of the composed text.
    fn headers(lines: &[&str]) -> Option<Vec<String>> {
        let composed = smaps().compose(&mappings(lines))?;
        let again = Smaps::parse(composed).unwrap();
        assert_eq!(again.sections.len(), lines.len());
        Some(
            again
                .sections
                .iter()
                .map(|section| String::from_utf8(section.mapping.line.clone()).unwrap())
                .collect(),
        )
    }

    #[test]
    fn unchanged_mappings_get_the_text_as_it_was() {
        let smaps = smaps();
        let composed = smaps.compose(&mappings(&[TEXT_LINE, HEAP, ARENA])).unwrap();
        assert_eq!(composed, smaps.text);
    }

    #[test]
    fn mappings_that_grew_shrank_or_went_get_their_new_headers() {
        let grown = "500000-680000 rw-p 00000000 00:00 0                          [heap]";
        let shrunk = "7f0000100000-7f0000300000 rw-p 00000000 00:00 0 ";
        for lines in [
            [TEXT_LINE, grown, shrunk].as_slice(),
            &[TEXT_LINE, grown],
            &[shrunk],
        ] {
            assert_eq!(headers(lines).unwrap(), lines);
        }
    }

    #[test]
    fn heap_that_is_not_tracked_yet_is_known_all_the_same() {
        let more = "600000-621000 rw-p 00000000 00:00 0                          [heap]";
        assert_eq!(headers(&[TEXT_LINE, HEAP, more]).unwrap()[2], more);
        let elsewhere = "600000-621000 rw-p 00000000 00:00 0 ";
        assert_eq!(headers(&[TEXT_LINE, HEAP, elsewhere]), None);
    }

    #[test]
    fn new_or_changed_mappings_are_not_made_up() {
        let new = "7e0000000000-7e0000400000 rw-p 00000000 00:00 0 ";
        let read_only = "7f0000000000-7f0000400000 r--p 00000000 00:00 0 ";
        let other_file = "400000-401000 r-xp 00000000 08:01 10                         /bin/tern";
        let other_offset = "400000-402000 r-xp 00001000 08:01 9                          /bin/tern";
        for changed in [new, read_only, other_file, other_offset] {
            assert_eq!(headers(&[changed]), None, "{changed}");
        }
    }

    #[test]
    fn pieces_of_a_split_mapping_are_not_taken_for_the_whole() {
        let front = "7f0000000000-7f0000200000 rw-p 00000000 00:00 0 ";
        let back = "7f0000200000-7f0000400000 rw-p 00000000 00:00 0 ";
        assert_eq!(headers(&[front, back]), None);
        // One that was made inaccessible in the middle is new; what is around it differs in nothing else, but it could.
        let middle = "7f0000100000-7f0000200000 ---p 00000000 00:00 0 ";
        assert_eq!(
            headers(&["7f0000000000-7f0000100000 rw-p 00000000 00:00 0 ", middle]),
            None
        );
    }

    #[test]
    fn mappings_that_were_merged_are_known_if_they_were_alike() {
        let text = |second| {
            [
                section(
                    "500000-600000 rw-p 00000000 00:00 0 [heap]",
                    "rd wr mr mw me ac uw sd ",
                ),
                section("600000-700000 rw-p 00000000 00:00 0 [heap]", second),
            ]
            .concat()
            .into_bytes()
        };
        let merged = mappings(&["500000-700000 rw-p 00000000 00:00 0 [heap]"]);
        assert!(
            Smaps::parse(text(USUAL))
                .unwrap()
                .compose(&merged)
                .is_some()
        );
        let different = text("rd wr mr mw me ac dc sd ");
        assert!(Smaps::parse(different).unwrap().compose(&merged).is_none());
    }

    #[test]
    fn flags_tell_what_cannot_be_filled_lazily() {
        let current = mappings(&[TEXT_LINE, HEAP, ARENA]);
        let smaps = smaps();
        assert!(
            smaps
                .flags(&current[1], &current)
                .unwrap()
                .can_be_filled_lazily()
        );
        for flag in ["lo", "ht", "ss", "dp", "gd"] {
            assert!(!Flags::parse(format!("rd wr {flag} sd").as_bytes()).can_be_filled_lazily());
        }
    }

    #[test]
    fn a_text_cut_off_in_the_middle_is_not_used() {
        let mut text = section(HEAP, USUAL).into_bytes();
        text.extend_from_slice(ARENA.as_bytes());
        text.push(b'\n');
        assert!(Smaps::parse(text).is_none());
        assert!(Smaps::parse(b"Size: 4 kB\n".to_vec()).is_none());
    }

    #[test]
    fn the_real_text_of_this_process_is_understood() {
        let smaps = Smaps::parse(std::fs::read("/proc/self/smaps").unwrap()).unwrap();
        assert!(smaps.sections.len() > 5);
        let current: Vec<_> = smaps
            .sections
            .iter()
            .map(|section| section.mapping.clone())
            .collect();
        assert_eq!(smaps.compose(&current).unwrap(), smaps.text);
    }

    #[test]
    fn locked_memory_is_read_from_status() {
        let status =
            "Name:\tx\nVmPeak:\t 10 kB\nVmLck:\t      64 kB\nx86_Thread_features:\tshstk wrss\n";
        let locked = LockedMemory::parse(status).unwrap();
        assert_eq!(
            locked,
            LockedMemory {
                locked_kib: 64,
                shadow_stacks: true
            }
        );
        assert!(!locked.all_is_ordinary());
        let own = std::fs::read_to_string("/proc/self/status").unwrap();
        assert_eq!(LockedMemory::parse(&own).unwrap().locked_kib, 0);
        assert_eq!(LockedMemory::parse("Name:\tzombie\n"), None);
    }
}
