//! Where a restore stands still until the commit.
//!
//! Starting runc and CRIU takes longer than all that they do then, so that both
//! are started while the container still runs on the source. The first image that
//! a restoring CRIU opens is its inventory (criu/cr-restore.c, `cr_restore_tasks`):
//! before it has made or joined anything. In its place lies a FIFO, of which this
//! process holds the only writing end.
//!
//! ```text
//!  make -- CRIU opens it: reached -- hold(inventory) -- open: CRIU reads it and goes on
//!                 |                        |
//!                 '------------------------'--- dropped, or this process dies: CRIU reads
//!                                               the end of file, fails, and runs nothing
//! ```

use std::fs::{File, OpenOptions};
use std::io::{self, Write};
use std::os::fd::OwnedFd;
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;

use nix::sys::stat::Mode;
use rustix::fs::inotify::{CreateFlags, WatchFlags};
use tokio::io::unix::AsyncFd;

/// CRIU's name for the image that it opens first.
pub(crate) const INVENTORY: &str = "inventory.img";

/// Most that a FIFO takes while nobody reads (`PIPE_BUF` is written as one). CRIU
/// writes 100 to 300 bytes.
const INVENTORY_BYTES: usize = 4096;

/// A gate that is closed until [`open`](Self::open).
#[derive(Debug)]
pub(crate) struct Gate {
    fifo: File,
    watch: AsyncFd<OwnedFd>,
    inventory: Vec<u8>,
}

impl Gate {
    /// Closes the way into the images in `directory`. In a runtime.
    pub(crate) fn make(directory: &Path) -> io::Result<Self> {
        let path = directory.join(INVENTORY);
        nix::unistd::mkfifo(&path, Mode::S_IRUSR | Mode::S_IWUSR)?;
        // Open for both, so that opening waits for nobody, here or there.
        let fifo = OpenOptions::new()
            .read(true)
            .write(true)
            .custom_flags(libc::O_NONBLOCK)
            .open(&path)?;
        let watch = rustix::fs::inotify::init(CreateFlags::NONBLOCK | CreateFlags::CLOEXEC)?;
        rustix::fs::inotify::add_watch(&watch, &path, WatchFlags::OPEN)?;
        Ok(Self {
            fifo,
            watch: watched(watch)?,
            inventory: Vec::new(),
        })
    }

    /// Waits until CRIU stands before it.
    pub(crate) async fn reached(&self) -> io::Result<()> {
        self.watch.readable().await.map(drop)
    }

    /// Takes the image that CRIU waits for, without giving it yet.
    pub(crate) fn hold(&mut self, inventory: Vec<u8>) -> io::Result<()> {
        if inventory.is_empty() || inventory.len() > INVENTORY_BYTES {
            return Err(io::ErrorKind::InvalidData.into());
        }
        self.inventory = inventory;
        Ok(())
    }

    /// Lets CRIU go on: only ever after the commit.
    pub(crate) fn open(mut self) -> io::Result<()> {
        self.fifo.write_all(&self.inventory)
    }
}

#[allow(
    deprecated,
    reason = "its replacement is unsafe for types whose descriptor may change; this one's does not"
)]
fn watched(file: OwnedFd) -> io::Result<AsyncFd<OwnedFd>> {
    AsyncFd::new(file)
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::thread;

    use super::*;

    #[tokio::test]
    async fn a_reader_waits_until_the_gate_is_opened() {
        let directory = tempfile::tempdir().unwrap();
        let mut gate = Gate::make(directory.path()).unwrap();
        let path = directory.path().join(INVENTORY);
        let reader = thread::spawn(move || fs::read(path).unwrap());
        gate.reached().await.unwrap();
        gate.hold(b"image".to_vec()).unwrap();
        assert!(!reader.is_finished());
        gate.open().unwrap();
        assert_eq!(reader.join().unwrap(), b"image");
    }

    #[tokio::test]
    async fn a_gate_that_is_given_up_reads_as_empty() {
        let directory = tempfile::tempdir().unwrap();
        let mut gate = Gate::make(directory.path()).unwrap();
        let path = directory.path().join(INVENTORY);
        let reader = thread::spawn(move || fs::read(path).unwrap());
        gate.reached().await.unwrap();
        gate.hold(b"image".to_vec()).unwrap();
        drop(gate);
        assert_eq!(reader.join().unwrap(), b"");
    }

    #[tokio::test]
    async fn an_image_that_does_not_fit_is_refused_while_that_is_possible() {
        for length in [0, INVENTORY_BYTES + 1] {
            let directory = tempfile::tempdir().unwrap();
            let mut gate = Gate::make(directory.path()).unwrap();
            assert!(gate.hold(vec![0; length]).is_err());
        }
    }
}
