//! userfaultfd in asynchronous write-protect mode (Linux 6.7): which pages were written since when.
//!
//! The kernel resolves write faults on protected pages itself and only remembers them, so nothing ever waits for whoever
//! holds the descriptor. What was written is read with [`crate::pagemap::Pagemap::scan`].

use std::io;
use std::ops::Range;
use std::os::fd::{AsFd, AsRawFd};

use crate::uffd::Userfaultfd;

/// `UFFD_FEATURE_PAGEFAULT_FLAG_WP`
const FEATURE_PAGEFAULT_FLAG_WP: u64 = 1 << 0;
/// `UFFD_FEATURE_WP_UNPOPULATED`: protection leaves a marker on empty page-table entries too.
const FEATURE_WP_UNPOPULATED: u64 = 1 << 13;
/// `UFFD_FEATURE_WP_ASYNC`
const FEATURE_WP_ASYNC: u64 = 1 << 15;
/// `UFFDIO_REGISTER_MODE_WP`
const REGISTER_WP: u64 = 1 << 1;

#[repr(C)]
struct RegisterArgument {
    start: u64,
    len: u64,
    mode: u64,
    ioctls: u64,
}

#[repr(C)]
struct WriteProtectArgument {
    start: u64,
    len: u64,
    mode: u64,
}

nix::ioctl_readwrite! {
    /// `UFFDIO_REGISTER`
    uffdio_register, 0xaa, 0x00, RegisterArgument
}
nix::ioctl_readwrite! {
    /// `UFFDIO_WRITEPROTECT`
    uffdio_writeprotect, 0xaa, 0x06, WriteProtectArgument
}

impl Userfaultfd {
    /// The handshake for tracking writes. Can be done once, and excludes every other use of the descriptor.
    ///
    /// # Errors
    ///
    /// `InvalidInput` when the kernel cannot track writes (before 6.7, or built without `CONFIG_PTE_MARKER_UFFD_WP`).
    pub fn handshake_tracking(&self) -> io::Result<()> {
        self.handshake(FEATURE_PAGEFAULT_FLAG_WP | FEATURE_WP_UNPOPULATED | FEATURE_WP_ASYNC)?;
        Ok(())
    }

    /// Has writes to `range` tracked from the next protecting scan on.
    ///
    /// Takes microseconds whatever the size. May be repeated. Tracking ends where a mapping is unmapped, moved by
    /// `mremap`, or unregistered, and everywhere when the last duplicate of the descriptor is closed.
    ///
    /// # Errors
    ///
    /// `EBUSY`: another userfaultfd holds a mapping there. `InvalidInput`: nothing is mapped there, or something that
    /// cannot be tracked. `ENOMEM`: the address space is gone, or, rarely, no memory.
    pub fn track(&self, range: Range<u64>) -> io::Result<()> {
        let mut argument = RegisterArgument {
            start: range.start,
            len: range.end.saturating_sub(range.start),
            mode: REGISTER_WP,
            ioctls: 0,
        };
        // SAFETY: the argument has the kernel's layout, is writable and outlives the call. Unlike missing mode this
        // changes neither what memory reads as nor, after `handshake_tracking`, whether an access waits; without that
        // handshake nothing has been protected and no write waits either.
        unsafe { uffdio_register(self.as_fd().as_raw_fd(), &raw mut argument) }?;
        Ok(())
    }

    /// Lifts the protection from all pages in `range`, which then count as written, without ending the tracking.
    ///
    /// # Errors
    ///
    /// `ENOENT` where a mapping is not tracked by this descriptor; `ESRCH` when the address space is gone.
    pub fn lift_protection(&self, range: Range<u64>) -> io::Result<()> {
        let mut argument = WriteProtectArgument {
            start: range.start,
            len: range.end.saturating_sub(range.start),
            mode: 0,
        };
        loop {
            // SAFETY: the argument has the kernel's layout, is writable and outlives the call; content and
            // accessibility of the memory stay as they are.
            match unsafe { uffdio_writeprotect(self.as_fd().as_raw_fd(), &raw mut argument) } {
                Ok(_) => return Ok(()),
                // The mappings changed meanwhile: the kernel asks to try again.
                Err(nix::errno::Errno::EAGAIN) => {}
                Err(errno) => return Err(errno.into()),
            }
        }
    }
}
