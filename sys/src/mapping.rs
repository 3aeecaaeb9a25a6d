//! Anonymous memory that is given back to the kernel when dropped, and only then.
//!
//! What `malloc` frees it may keep; gigabytes that pass through a process once have to be gone when they are done with.

use std::fmt;
use std::io;
use std::num::NonZeroUsize;
use std::ops::{Deref, DerefMut};
use std::ptr::NonNull;
use std::slice;

use nix::errno::Errno;
use nix::sys::mman::{MapFlags, ProtFlags, mmap_anonymous, munmap};

/// Private anonymous memory, zeros at first.
///
/// Address space is reserved at once, memory taken when it is touched. Not inherited by forked children and not in
/// core dumps: it holds the memory of somebody else.
pub struct Mapping {
    start: NonNull<u8>,
    len: usize,
}

// SAFETY: a Mapping owns its memory, nothing about it is bound to a thread, and shared references only read.
unsafe impl Send for Mapping {}
// SAFETY: as above.
unsafe impl Sync for Mapping {}

/// How the kernel should back the memory, see madvise(2).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Advice {
    /// Huge pages on first touch, where the machine allows them.
    HugePages,
    /// Small pages only, whatever the machine's default: untouched pages cost nothing.
    SmallPages,
    /// Make what is touched already into huge pages, now (Linux 6.1).
    Collapse,
}

impl Mapping {
    /// Maps `len` bytes at a multiple of `align`.
    ///
    /// Both have to be multiples of the page size, `len` not zero.
    ///
    /// # Errors
    ///
    /// Those of mmap(2): `InvalidInput` for lengths or alignments that are none, `OutOfMemory` when the address space
    /// or the number of mappings (`vm.max_map_count`) is used up.
    pub fn new(len: usize, align: usize) -> io::Result<Self> {
        let reserved = len
            .checked_add(align)
            .and_then(NonZeroUsize::new)
            .filter(|_| len > 0 && align.is_power_of_two())
            .ok_or_else(|| io::Error::from(io::ErrorKind::InvalidInput))?;
        let flags = MapFlags::MAP_PRIVATE | MapFlags::MAP_NORESERVE;
        // SAFETY: no address is asked for, so that no memory in use is replaced.
        let start = unsafe {
            mmap_anonymous(
                None,
                reserved,
                ProtFlags::PROT_READ | ProtFlags::PROT_WRITE,
                flags,
            )
        }?
        .cast::<u8>();
        let whole = Self {
            start,
            len: reserved.get(),
        };
        let head = start.as_ptr().align_offset(align);
        let mut aligned = if head == 0 {
            whole
        } else {
            whole.split_at(head).1
        };
        if aligned.len > len {
            aligned = aligned.split_at(len).0;
        }
        for advice in [libc::MADV_DONTFORK, libc::MADV_DONTDUMP] {
            aligned.madvise(advice)?;
        }
        Ok(aligned)
    }

    /// Cuts the memory into pieces of `piece` bytes, the last one smaller if it does not divide the length. Each is
    /// given back on its own.
    ///
    /// # Panics
    ///
    /// If `piece` is not a multiple of the page size, or zero.
    pub fn split(self, piece: usize) -> Vec<Self> {
        assert!(piece > 0 && piece.is_multiple_of(4096), "pieces are pages");
        let mut pieces = Vec::with_capacity(self.len.div_ceil(piece));
        let mut rest = self;
        while rest.len > piece {
            let (front, back) = rest.split_at(piece);
            pieces.push(front);
            rest = back;
        }
        pieces.push(rest);
        pieces
    }

    /// Advises the kernel about all of the memory. The content stays.
    ///
    /// # Errors
    ///
    /// Those of madvise(2): `InvalidInput` where the kernel has no huge pages; for [`Advice::Collapse`] also when it
    /// has none to spare just now.
    pub fn advise(&self, advice: Advice) -> io::Result<()> {
        self.madvise(match advice {
            Advice::HugePages => libc::MADV_HUGEPAGE,
            Advice::SmallPages => libc::MADV_NOHUGEPAGE,
            Advice::Collapse => libc::MADV_COLLAPSE,
        })
    }

    fn madvise(&self, advice: libc::c_int) -> io::Result<()> {
        // SAFETY: the range is mapped and ours alone. The one advice used here that changes the content is given when
        // the memory is dropped.
        let outcome = unsafe { libc::madvise(self.start.as_ptr().cast(), self.len, advice) };
        Errno::result(outcome)?;
        Ok(())
    }

    /// `at` is a multiple of the page size, more than 0 and less than the length.
    fn split_at(self, at: usize) -> (Self, Self) {
        let (start, len) = (self.start, self.len);
        std::mem::forget(self);
        // SAFETY: `at` is inside of the memory.
        let middle = unsafe { start.add(at) };
        let front = Self { start, len: at };
        let back = Self {
            start: middle,
            len: len - at,
        };
        (front, back)
    }
}

impl Deref for Mapping {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        // SAFETY: the memory is mapped readable for `len` bytes and initialised (anonymous memory is zeros) until
        // self is dropped, which the borrow outlives not; nobody writes while self is borrowed shared.
        unsafe { slice::from_raw_parts(self.start.as_ptr(), self.len) }
    }
}

impl DerefMut for Mapping {
    fn deref_mut(&mut self) -> &mut [u8] {
        // SAFETY: as in `deref`, and the memory is writable and self borrowed exclusively.
        unsafe { slice::from_raw_parts_mut(self.start.as_ptr(), self.len) }
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        // SAFETY: the range is ours alone and no borrow of it is left. Giving back a part of what was mapped at once
        // is what munmap allows.
        let outcome = unsafe { munmap(self.start.cast(), self.len) };
        if outcome.is_err() {
            // A hole can exceed the limit on the number of mappings. The addresses stay taken then, the memory not.
            let outcome = self.madvise(libc::MADV_DONTNEED);
            debug_assert!(outcome.is_ok(), "a mapping of our own");
        }
    }
}

impl fmt::Debug for Mapping {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Mapping")
            .field("start", &self.start)
            .field("len", &self.len)
            .finish()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const PAGE: usize = 4096;
    const HUGE: usize = 2 << 20;

    /// Whether anything is mapped in the range.
    fn mapped(start: usize, len: usize) -> bool {
        let maps = std::fs::read_to_string("/proc/self/maps").unwrap();
        maps.lines().any(|line| {
            let (from, rest) = line.split_once('-').unwrap();
            let to = rest.split(' ').next().unwrap();
            let from = usize::from_str_radix(from, 16).unwrap();
            let to = usize::from_str_radix(to, 16).unwrap();
            from < start + len && start < to
        })
    }

    #[test]
    fn memory_is_aligned_and_zero_and_can_be_written() {
        let mut memory = Mapping::new(HUGE, HUGE).unwrap();
        assert_eq!(memory.as_ptr() as usize % HUGE, 0);
        assert_eq!(memory.len(), HUGE);
        assert!(memory[..PAGE].iter().all(|byte| *byte == 0));
        memory[HUGE - 1] = 7;
        assert_eq!(memory[HUGE - 1], 7);
    }

    #[test]
    fn pieces_cover_the_whole_and_are_given_back_one_by_one() {
        let memory = Mapping::new(5 * PAGE, PAGE).unwrap();
        let start = memory.as_ptr() as usize;
        let mut pieces = memory.split(2 * PAGE);
        let lengths: Vec<_> = pieces.iter().map(|piece| piece.len()).collect();
        assert_eq!(lengths, [2 * PAGE, 2 * PAGE, PAGE]);
        drop(pieces.remove(1));
        assert!(mapped(start, 2 * PAGE));
        assert!(!mapped(start + 2 * PAGE, 2 * PAGE));
        assert!(mapped(start + 4 * PAGE, PAGE));
    }

    #[test]
    fn advice_keeps_the_content() {
        let mut memory = Mapping::new(HUGE, HUGE).unwrap();
        memory.advise(Advice::SmallPages).unwrap();
        memory[PAGE] = 3;
        if memory.advise(Advice::HugePages).is_err() || memory.advise(Advice::Collapse).is_err() {
            println!("skipped: this machine has no huge page to give");
        }
        assert_eq!(memory[PAGE], 3);
    }

    #[test]
    fn lengths_that_are_none_are_refused() {
        for (len, align) in [(0, PAGE), (PAGE, 0), (PAGE, 3 * PAGE), (usize::MAX, PAGE)] {
            let error = Mapping::new(len, align).unwrap_err();
            assert_eq!(error.kind(), io::ErrorKind::InvalidInput);
        }
    }
}
