//! Whether this kernel tracks writes as we rely on it to.
//!
//! Tried out rather than derived from a version: distributions backport, and there have been kernels with the interface
//! that lost writes.

use std::io;
use std::ops::Range;

use sys::mapping::Mapping;
use sys::pagemap::{Effect, Pagemap, Region, Selection};
use sys::uffd::Userfaultfd;

use crate::PAGE_BYTES;

/// Why writes cannot be tracked on this machine.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Unsupported {
    /// Pages of another size than [`PAGE_BYTES`].
    #[error("the kernel has pages of {0} bytes")]
    PageSize(i64),
    /// A system call is missing or refused. `InvalidInput` for the handshake means: no asynchronous write protection
    /// (before Linux 6.7); for the scan: no `PAGEMAP_SCAN`.
    #[error("{operation} does not work")]
    Refused {
        /// What was tried.
        operation: &'static str,
        /// Why it failed.
        #[source]
        source: io::Error,
    },
    /// It works, but not as we rely on it to.
    #[error("{0}")]
    Misbehaves(&'static str),
}

const PAGE: u64 = PAGE_BYTES as u64;
/// What one page table covers.
const TABLE_BYTES: usize = 2 << 20;

/// Tries on a few pages of our own what the tracker relies on.
///
/// Takes well under a millisecond and needs no privilege. Whether a system call can be injected into a process is found
/// out on the process.
///
/// # Errors
///
/// What is missing, refused, or different.
#[allow(
    clippy::single_range_in_vec_init,
    reason = "lists of ranges, some of one"
)]
pub fn self_test() -> Result<(), Unsupported> {
    check_page_size()?;
    let refused = |operation| move |source| Unsupported::Refused { operation, source };
    // Two page tables' worth, small pages: huge ones would be split and show other numbers.
    let mut memory = Mapping::new(2 * TABLE_BYTES, TABLE_BYTES).map_err(refused("mmap"))?;
    match memory.advise(sys::mapping::Advice::SmallPages) {
        // A kernel without huge pages.
        Err(error) if error.kind() == io::ErrorKind::InvalidInput => {}
        other => other.map_err(refused("madvise"))?,
    }
    let userfaultfd = Userfaultfd::create(true).map_err(refused("userfaultfd"))?;
    userfaultfd
        .handshake_tracking()
        .map_err(refused("asynchronous write protection"))?;
    let pid = i32::try_from(std::process::id()).unwrap_or(0);
    let pagemap = Pagemap::open(pid).map_err(refused("opening the pagemap"))?;
    let mut probe = Probe {
        pagemap,
        base: memory.as_ptr() as u64,
        regions: Vec::with_capacity(64),
    };

    for page in 0..4 {
        memory[page * PAGE_BYTES] = 1;
    }
    if probe
        .scan(0..8, Selection::WRITTEN, Effect::Protect)
        .is_ok()
    {
        return Err(Unsupported::Misbehaves(
            "memory that is not tracked can be scanned as if it were",
        ));
    }
    let all = probe.base..probe.base + memory.len() as u64;
    userfaultfd
        .track(all.clone())
        .map_err(refused("registering memory"))?;
    let populated = probe.scan(0..8, Selection::POPULATED, Effect::Protect);
    probe.expect(
        populated,
        &[0..4],
        "populated pages are not told from others",
    )?;
    // All entries of the table count once, the empty ones too, and are protected then.
    let written = probe.scan(0..8, Selection::WRITTEN, Effect::Protect);
    probe.expect(written, &[4..8], "new empty pages are not reported")?;
    let written = probe.scan(0..8, Selection::WRITTEN, Effect::Protect);
    probe.expect(written, &[], "pages that were not written are reported")?;

    memory[PAGE_BYTES] = 2;
    memory[5 * PAGE_BYTES] = 2;
    let read = memory[2 * PAGE_BYTES] + memory[6 * PAGE_BYTES];
    if read != 1 {
        return Err(Unsupported::Misbehaves(
            "tracked memory does not keep its content",
        ));
    }
    let written = probe.scan(0..8, Selection::WRITTEN, Effect::LookTracked);
    probe.expect(
        written,
        &[1..2, 5..6],
        "written pages are not told from those read",
    )?;
    let written = probe.scan(0..8, Selection::WRITTEN, Effect::Protect);
    probe.expect(
        written,
        &[1..2, 5..6],
        "looking at written pages changes them",
    )?;
    let written = probe.scan(0..8, Selection::WRITTEN, Effect::Protect);
    probe.expect(written, &[], "pages are not protected again")?;
    memory[PAGE_BYTES] = 3;
    let written = probe.scan(0..8, Selection::WRITTEN, Effect::Protect);
    probe.expect(written, &[1..2], "only the first write is reported")?;

    // Dropping some pages of a table is reported.
    const LARGEST_PAGE: usize = 64 << 10;
    sys::memory::discard(&mut memory[..LARGEST_PAGE]).map_err(refused("MADV_DONTNEED"))?;
    let written = probe.scan(0..4, Selection::WRITTEN, Effect::Protect);
    probe.expect(written, &[0..4], "dropped pages are not reported")?;
    // Dropping all pages of one, which may take the table away, is at least seen when looking at an entry.
    let second = (TABLE_BYTES / PAGE_BYTES) as u64;
    memory[TABLE_BYTES..].fill(4);
    let populated = probe.scan(second..2 * second, Selection::POPULATED, Effect::Protect);
    let all = second..2 * second;
    probe.expect(
        populated,
        &[all],
        "populated pages are not told from others",
    )?;
    sys::memory::discard(&mut memory[TABLE_BYTES..]).map_err(refused("MADV_DONTNEED"))?;
    let populated = probe.scan(second..2 * second, Selection::POPULATED, Effect::Protect);
    probe.expect(populated, &[], "dropped pages count as populated")?;
    let last_page = probe.base + memory.len() as u64 - PAGE;
    match probe.pagemap.has_entry(last_page, PAGE) {
        Ok(false) => Ok(()),
        Ok(true) => Err(Unsupported::Misbehaves(
            "dropped pages have page-table entries",
        )),
        Err(source) => Err(Unsupported::Refused {
            operation: "reading the pagemap",
            source,
        }),
    }
}

fn check_page_size() -> Result<(), Unsupported> {
    let size = nix::unistd::sysconf(nix::unistd::SysconfVar::PAGE_SIZE)
        .ok()
        .flatten();
    match size {
        Some(size) if usize::try_from(size) == Ok(PAGE_BYTES) => Ok(()),
        other => Err(Unsupported::PageSize(other.unwrap_or(0))),
    }
}

/// Scans by page number.
struct Probe {
    pagemap: Pagemap,
    base: u64,
    regions: Vec<Region>,
}

impl Probe {
    fn scan(
        &mut self,
        pages: Range<u64>,
        selection: Selection,
        effect: Effect,
    ) -> io::Result<Vec<Range<u64>>> {
        let range = self.base + pages.start * PAGE..self.base + pages.end * PAGE;
        self.pagemap
            .scan(range, selection, effect, &mut self.regions)?;
        let page = |addr: u64| (addr - self.base) / PAGE;
        Ok(self
            .regions
            .iter()
            .map(|region| page(region.start)..page(region.end))
            .collect())
    }

    fn expect(
        &self,
        found: io::Result<Vec<Range<u64>>>,
        expected: &[Range<u64>],
        otherwise: &'static str,
    ) -> Result<(), Unsupported> {
        match found {
            Ok(found) if found == expected => Ok(()),
            Ok(_) => Err(Unsupported::Misbehaves(otherwise)),
            Err(source) => Err(Unsupported::Refused {
                operation: "PAGEMAP_SCAN",
                source,
            }),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_self_test_decides_without_harm() {
        match self_test() {
            Ok(()) => {}
            Err(Unsupported::Refused { operation, source }) => {
                println!("skipped: {operation} does not work here: {source}");
            }
            Err(error) => panic!("{error}"),
        }
        // And again: nothing of the first is left.
        assert_eq!(self_test().is_ok(), self_test().is_ok());
    }
}
