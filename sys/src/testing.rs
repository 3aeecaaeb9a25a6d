//! Fixtures for the tests of crates that may not contain unsafe code themselves (feature `testing`).

use std::io;
use std::num::NonZeroUsize;
use std::ops::Range;

use nix::errno::Errno;
use nix::sys::mman::{MapFlags, MmapAdvise, ProtFlags, madvise, mmap_anonymous, munmap};
use nix::unistd::{ForkResult, Pid};

use crate::uffd::Userfaultfd;

/// Private anonymous memory that nothing but this handle knows of and that a userfaultfd may fill: every access goes
/// to the memory itself, nothing about its content is taken for granted.
///
/// Not unmapped when dropped, as it plays the part of a process's memory.
#[derive(Debug)]
pub struct Region {
    start: u64,
    len: u64,
}

impl Region {
    /// Maps `len` bytes at `at` (where nothing may be mapped), or anywhere; small pages, whatever the machine's default.
    ///
    /// # Errors
    ///
    /// Those of mmap(2).
    pub fn map(at: Option<u64>, len: u64) -> io::Result<Self> {
        let reserved = NonZeroUsize::new(len as usize)
            .ok_or_else(|| io::Error::from(io::ErrorKind::InvalidInput))?;
        let mut flags = MapFlags::MAP_PRIVATE | MapFlags::MAP_NORESERVE;
        if at.is_some() {
            flags |= MapFlags::MAP_FIXED_NOREPLACE;
        }
        // SAFETY: no mapping is replaced.
        let start = unsafe {
            mmap_anonymous(
                at.and_then(|at| NonZeroUsize::new(at as usize)),
                reserved,
                ProtFlags::PROT_READ | ProtFlags::PROT_WRITE,
                flags,
            )
        }?;
        let region = Self {
            start: start.as_ptr() as u64,
            len,
        };
        match region.advise(0, len, MmapAdvise::MADV_NOHUGEPAGE) {
            // A kernel without huge pages.
            Err(error) if error.kind() != io::ErrorKind::InvalidInput => Err(error),
            _ => Ok(region),
        }
    }

    /// Where it is.
    pub fn range(&self) -> Range<u64> {
        self.start..self.start + self.len
    }

    /// Reads eight bytes, `offset` bytes from the start and a multiple of eight. May wait for a page.
    pub fn read(&self, offset: u64) -> u64 {
        let word = self.word(offset);
        // SAFETY: `word` is mapped, aligned, and memory that only handles like this one access.
        unsafe { word.read_volatile() }
    }

    /// Writes eight bytes. May wait for a page.
    pub fn write(&self, offset: u64, value: u64) {
        let word = self.word(offset);
        // SAFETY: as in `read`.
        unsafe { word.write_volatile(value) }
    }

    /// Whether the page `offset` bytes from the start is there. Waits for nothing.
    ///
    /// # Errors
    ///
    /// Those of mincore(2).
    pub fn is_resident(&self, offset: u64) -> io::Result<bool> {
        assert!(offset < self.len, "inside of the region");
        let page = (self.start + offset) & !4095;
        let start = std::ptr::with_exposed_provenance_mut(page as usize);
        let mut found = 0;
        // SAFETY: `found` has room for the one byte that one page takes.
        let outcome = unsafe { libc::mincore(start, 4096, &raw mut found) };
        Errno::result(outcome)?;
        Ok(found & 1 == 1)
    }

    /// Lets a userfaultfd of this process decide about the missing pages.
    ///
    /// # Errors
    ///
    /// Those of [`Userfaultfd::register_missing`].
    pub fn register(&self, uffd: &Userfaultfd) -> io::Result<()> {
        // SAFETY: the memory belongs to no Rust object; its readers expect any content.
        unsafe { uffd.register_missing(self.range()) }
    }

    /// `MADV_DONTNEED` on `len` bytes from `offset`. May wait for a reader of events.
    ///
    /// # Errors
    ///
    /// Those of madvise(2).
    pub fn discard(&self, offset: u64, len: u64) -> io::Result<()> {
        self.advise(offset, len, MmapAdvise::MADV_DONTNEED)
    }

    /// Makes this a mapping of its own, apart from its neighbours, by advice that changes nothing else here.
    ///
    /// # Errors
    ///
    /// Those of madvise(2).
    pub fn set_apart(&self) -> io::Result<()> {
        self.advise(0, self.len, MmapAdvise::MADV_DONTDUMP)
    }

    /// Two regions from one.
    #[must_use]
    pub fn split_at(self, offset: u64) -> (Self, Self) {
        assert!(0 < offset && offset < self.len, "inside of the region");
        let front = Self {
            start: self.start,
            len: offset,
        };
        let back = Self {
            start: self.start + offset,
            len: self.len - offset,
        };
        (front, back)
    }

    /// Moves the memory to `to`, where nothing may be mapped. May wait for a reader of events.
    ///
    /// # Errors
    ///
    /// Those of mmap(2) and mremap(2).
    pub fn move_to(self, to: u64) -> io::Result<Self> {
        let target = Self::map(Some(to), self.len)?;
        let old = std::ptr::with_exposed_provenance_mut(self.start as usize);
        let new = std::ptr::with_exposed_provenance_mut::<libc::c_void>(target.start as usize);
        let len = self.len as usize;
        // SAFETY: both ranges are mapped and belong to no Rust object; the handle to the old one is given up.
        let moved = unsafe {
            libc::mremap(
                old,
                len,
                len,
                libc::MREMAP_MAYMOVE | libc::MREMAP_FIXED,
                new,
            )
        };
        if moved == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        Ok(target)
    }

    /// Unmaps the memory. May wait for a reader of events.
    ///
    /// # Errors
    ///
    /// Those of munmap(2).
    pub fn unmap(self) -> io::Result<()> {
        let start = std::ptr::with_exposed_provenance_mut(self.start as usize);
        let start = std::ptr::NonNull::new(start)
            .ok_or_else(|| io::Error::from(io::ErrorKind::InvalidInput))?;
        // SAFETY: the memory belongs to no Rust object and the handle to it is given up.
        unsafe { munmap(start, self.len as usize) }?;
        Ok(())
    }

    fn advise(&self, offset: u64, len: u64, advice: MmapAdvise) -> io::Result<()> {
        assert!(offset + len <= self.len, "inside of the region");
        let start = std::ptr::with_exposed_provenance_mut((self.start + offset) as usize);
        let start = std::ptr::NonNull::new(start)
            .ok_or_else(|| io::Error::from(io::ErrorKind::InvalidInput))?;
        // SAFETY: the memory belongs to no Rust object.
        unsafe { madvise(start, len as usize, advice) }?;
        Ok(())
    }

    fn word(&self, offset: u64) -> *mut u64 {
        assert!(
            offset.is_multiple_of(8) && offset + 8 <= self.len,
            "inside of the region"
        );
        std::ptr::with_exposed_provenance_mut((self.start + offset) as usize)
    }
}

/// Forks this process; the child runs `child` and exits with what that returns.
///
/// The child has one thread. Locks that others held stay taken in it, except `malloc`'s, which the C library sees to;
/// so it should do no more than compute, touch memory and make system calls.
///
/// # Errors
///
/// Those of fork(2).
pub fn fork(child: impl FnOnce() -> i32) -> io::Result<Pid> {
    // SAFETY: the child runs what is stated above, and ends without returning.
    match unsafe { nix::unistd::fork() }? {
        ForkResult::Parent { child } => Ok(child),
        ForkResult::Child => {
            let code = child();
            // SAFETY: ends the process at once; nothing runs after it.
            unsafe { libc::_exit(code) }
        }
    }
}

/// Whether an error means that this machine does not let us do it, so that a test has to be skipped.
pub fn not_permitted(error: &io::Error) -> bool {
    matches!(
        error.raw_os_error().map(Errno::from_raw),
        Some(Errno::EPERM | Errno::EACCES | Errno::ENOSYS)
    )
}
