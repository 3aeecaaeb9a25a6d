//! Waking a thread that waits in poll(2).

use std::io;
use std::os::fd::{AsFd, BorrowedFd};

use nix::sys::eventfd::{EfdFlags, EventFd};

/// Raised any number of times, seen once.
#[derive(Debug)]
pub(super) struct Signal(EventFd);

impl Signal {
    pub(super) fn new() -> io::Result<Self> {
        let flags = EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK;
        Ok(Self(EventFd::from_value_and_flags(0, flags)?))
    }

    pub(super) fn raise(&self) {
        // Fails only when it has been raised 2^64 - 2 times without being cleared, and is raised then.
        self.0.write(1).ok();
    }

    pub(super) fn clear(&self) {
        // Fails only when it was not raised.
        self.0.read().ok();
    }
}

impl AsFd for Signal {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}
