//! What the engine owns of frozen processes.

use std::ops::Range;
use std::sync::Arc;

use crate::SpaceId;
use crate::maps::{self, Mapping};
use crate::ranges::overlap;
use crate::smaps::{LockedMemory, Smaps};

/// Runs of adjacent private anonymous mappings smaller than this are left to CRIU, in bytes.
///
/// Owning one costs a registration, a scan in every lap and an answer to CRIU, some ten microseconds; CRIU dumps 32
/// pages in about as much. Below, there is nothing to gain, and most such mappings are tiny.
pub(crate) const MIN_OWNED_BYTES: u64 = 128 << 10;

/// The memory that the engine carries, decided while the processes are frozen. The rest is CRIU's.
///
/// Owned are readable private anonymous mappings: ordinary heaps, arenas, thread stacks and code that a program
/// generated, writable just now or not. Left to CRIU are file mappings (their private copies too), shared memory,
/// special mappings, the main stack, locked memory and shadow stacks (the destination cannot fill them lazily), memory
/// that is not readable (neither can we read it), small mappings, and the first executable mapping of a process, which
/// is where CRIU lets a process make its system calls and pokes code for that.
#[derive(Debug, Default)]
pub struct Claims {
    processes: Vec<ProcessClaim>,
}

/// The claims on one process.
#[derive(Debug)]
pub(crate) struct ProcessClaim {
    pub(crate) pid: i32,
    pub(crate) space: SpaceId,
    /// Ascending, one for each mapping.
    pub(crate) owned: Vec<Range<u64>>,
    /// All other mappings, ascending.
    pub(crate) foreign: Vec<Range<u64>>,
    /// Pages within `owned` that stack pointers point into, ascending.
    pub(crate) stack_pages: Vec<u64>,
    /// The text of `/proc/PID/maps` that all this was decided by.
    pub(crate) maps: Vec<u8>,
    pub(crate) smaps: Option<Arc<Smaps>>,
}

impl Claims {
    pub(crate) fn new(processes: Vec<ProcessClaim>) -> Self {
        Self { processes }
    }

    /// The owned ranges of each address space, ascending. Spaces of which nothing is owned are among them.
    pub fn spaces(&self) -> impl Iterator<Item = (SpaceId, &[Range<u64>])> {
        self.processes
            .iter()
            .map(|process| (process.space, process.owned.as_slice()))
    }

    /// Whether everything mapped in a range of a process's memory is owned, and something is.
    ///
    /// The range may extend over several mappings and over places where nothing is mapped.
    pub fn owns(&self, pid: i32, range: Range<u64>) -> bool {
        let Some(process) = self.process(pid) else {
            return false;
        };
        first_overlap(&process.foreign, &range).is_none()
            && first_overlap(&process.owned, &range).is_some()
    }

    /// Whether anything in a range of a process's memory is owned.
    pub fn may_own(&self, pid: i32, range: Range<u64>) -> bool {
        self.process(pid)
            .is_some_and(|process| first_overlap(&process.owned, &range).is_some())
    }

    /// The owned pages that stack pointers of the process's threads point into, ascending.
    ///
    /// CRIU wants to see them whoever owns their mapping. They are sent as well, with the same content.
    pub fn stack_pages(&self, pid: i32) -> &[u64] {
        self.process(pid)
            .map_or(&[], |process| &process.stack_pages)
    }

    /// A text for `/proc/PID/smaps` whose mappings are those of `/proc/PID/maps` at this moment; `None` where there is
    /// none, and the real one must be read.
    pub fn smaps(&self, pid: i32) -> Option<Vec<u8>> {
        let process = self.process(pid)?;
        let smaps = process.smaps.as_ref()?;
        // CRIU asks before it maps anything into the process. Were it later, this would notice.
        if maps::read(pid).ok()? != process.maps {
            return None;
        }
        smaps.compose(&maps::parse(&process.maps).ok()?)
    }

    pub(crate) fn processes(&self) -> &[ProcessClaim] {
        &self.processes
    }

    fn process(&self, pid: i32) -> Option<&ProcessClaim> {
        self.processes.iter().find(|process| process.pid == pid)
    }
}

/// The first of ascending, disjoint ranges that overlaps another.
fn first_overlap<'a>(ranges: &'a [Range<u64>], range: &Range<u64>) -> Option<&'a Range<u64>> {
    let first = ranges.partition_point(|other| other.end <= range.start);
    ranges.get(first).filter(|other| overlap(other, range))
}

/// Which of a process's mappings the engine would own. Ascending.
///
/// `Err` if that depends on flags that `smaps` does not know: it has to be read again.
pub(crate) fn ownable(
    mappings: &[Mapping],
    locked: LockedMemory,
    smaps: Option<&Smaps>,
) -> Result<Vec<Range<u64>>, FlagsUnknown> {
    let first_executable = mappings.iter().find(|mapping| mapping.executable);
    let candidate = |mapping: &&Mapping| {
        mapping.is_private_anonymous()
            && mapping.readable
            && first_executable.is_none_or(|first| first.range != mapping.range)
    };
    let mut owned = Vec::new();
    let mut run: Vec<&Mapping> = Vec::new();
    let mut close = |run: &mut Vec<&Mapping>| -> Result<(), FlagsUnknown> {
        let bytes: u64 = run.iter().map(|mapping| mapping.len_bytes()).sum();
        for mapping in run.drain(..).filter(|_| bytes >= MIN_OWNED_BYTES) {
            let flags = smaps.and_then(|smaps| smaps.flags(mapping, mappings));
            let fillable = match flags {
                Some(flags) => flags.can_be_filled_lazily(),
                None if !locked.all_is_ordinary() => return Err(FlagsUnknown),
                // It may be memory that the kernel drops when it likes, which is
                // not restored: a page or two (the state of getrandom in the vdso).
                None => mapping.len_bytes() >= MIN_OWNED_BYTES || mapping.line.ends_with(b"[heap]"),
            };
            if fillable {
                owned.push(mapping.range.clone());
            }
        }
        Ok(())
    };
    for mapping in mappings.iter().filter(candidate) {
        if run
            .last()
            .is_some_and(|last| last.range.end != mapping.range.start)
        {
            close(&mut run)?;
        }
        run.push(mapping);
    }
    close(&mut run)?;
    Ok(owned)
}

/// The flags of a mapping matter and are not known.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct FlagsUnknown;

#[cfg(test)]
#[allow(
    clippy::single_range_in_vec_init,
    reason = "lists of ranges, some of one"
)]
mod tests {
    use super::*;

    const ORDINARY: LockedMemory = LockedMemory {
        locked_kib: 0,
        shadow_stacks: false,
    };
    const LOCKED: LockedMemory = LockedMemory {
        locked_kib: 64,
        shadow_stacks: false,
    };

    const MAPS: &str = "\
400000-401000 r-xp 00000000 08:01 9 /bin/tern
401000-402000 rw-p 00000000 08:01 9 /bin/tern
500000-600000 rw-p 00000000 00:00 0 [heap]
600000-601000 rw-p 00000000 00:00 0 [heap]
700000-710000 rw-p 00000000 00:00 0 
7f0000000000-7f0000100000 r--p 00000000 00:00 0 
7f0000100000-7f0000200000 ---p 00000000 00:00 0 
7f0000200000-7f0000300000 r-xp 00000000 00:00 0 
7f0010000000-7f0010100000 rw-s 00000000 00:01 2048 /dev/zero (deleted)
7ffd0a200000-7ffd0a300000 rw-p 00000000 00:00 0 [stack]
";

    fn owned_of(text: &str, locked: LockedMemory) -> Result<Vec<Range<u64>>, FlagsUnknown> {
        ownable(&maps::parse(text.as_bytes()).unwrap(), locked, None)
    }

    #[test]
    fn readable_private_anonymous_memory_of_some_size_is_owned() {
        assert_eq!(
            owned_of(MAPS, ORDINARY).unwrap(),
            [
                0x50_0000..0x60_0000,
                // Small itself, but it continues the heap.
                0x60_0000..0x60_1000,
                0x7f00_0000_0000..0x7f00_0010_0000,
                0x7f00_0020_0000..0x7f00_0030_0000,
            ]
        );
    }

    #[test]
    fn where_criu_pokes_code_is_left_to_criu() {
        let text = "\
10000-200000 rwxp 00000000 00:00 0 
400000-401000 r-xp 00000000 08:01 9 /bin/tern
500000-600000 rwxp 00000000 00:00 0 
";
        assert_eq!(
            owned_of(text, ORDINARY).unwrap(),
            vec![0x50_0000..0x60_0000]
        );
    }

    #[test]
    fn where_memory_is_locked_the_flags_decide() {
        assert_eq!(owned_of(MAPS, LOCKED), Err(FlagsUnknown));
        let mappings = maps::parse(MAPS.as_bytes()).unwrap();
        let mut text = Vec::new();
        for mapping in &mappings {
            text.extend_from_slice(&mapping.line);
            let locked = mapping.range.start == 0x50_0000;
            text.extend_from_slice(if locked {
                b"\nVmFlags: rd lo\n"
            } else {
                b"\nVmFlags: rd\n"
            });
        }
        let smaps = Smaps::parse(text).unwrap();
        let owned = ownable(&mappings, LOCKED, Some(&smaps)).unwrap();
        assert_eq!(owned.first(), Some(&(0x60_0000..0x60_1000)));
        assert_eq!(owned.len(), 3);
    }

    #[test]
    fn a_range_is_owned_if_nothing_else_is_mapped_in_it() {
        let claims = Claims::new(vec![ProcessClaim {
            pid: 7,
            space: SpaceId(1),
            owned: vec![0x1000..0x3000, 0x5000..0x6000],
            foreign: vec![0x3000..0x4000, 0x8000..0x9000],
            stack_pages: vec![0x2000],
            maps: Vec::new(),
            smaps: None,
        }]);
        for (range, owned) in [
            (0x1000..0x3000, true),
            (0x2000..0x3000, true),
            (0x2000..0x4000, false),
            (0x4000..0x8000, true),
            (0x4000..0x8001, false),
            (0x6000..0x8000, false),
        ] {
            assert_eq!(claims.owns(7, range.clone()), owned, "{range:x?}");
        }
        assert!(!claims.owns(8, 0x1000..0x2000));
        assert_eq!(claims.stack_pages(7), [0x2000]);
        assert!(claims.stack_pages(8).is_empty());
        assert_eq!(claims.smaps(7), None);
    }
}
