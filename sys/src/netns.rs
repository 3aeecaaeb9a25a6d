//! Work inside another network namespace.
//!
//! A namespace belongs to a thread, and a thread that was elsewhere once should
//! not go back to a pool: [`within`] uses a thread of its own for each visit.

use std::fs::File;
use std::io;
use std::os::unix::fs::MetadataExt;
use std::panic;
use std::path::Path;
use std::thread;

use nix::sched::{CloneFlags, setns};

/// Runs `work` on a new thread inside the network namespace at `path` (such as
/// `/run/netns/NAME` or `/proc/PID/ns/net`) and returns what it returned. A panic
/// in `work` goes on in the caller.
///
/// Blocks until `work` is done. Sockets that it opens and returns stay in that
/// namespace.
///
/// # Errors
///
/// When the path cannot be opened or is no network namespace, when the right
/// (`CAP_SYS_ADMIN`) is missing, when no thread can be started.
pub fn within<T: Send>(path: &Path, work: impl FnOnce() -> T + Send) -> io::Result<T> {
    let namespace = File::open(path)?;
    thread::scope(|scope| {
        let visitor = thread::Builder::new()
            .name("netns".into())
            .spawn_scoped(scope, || {
                setns(&namespace, CloneFlags::CLONE_NEWNET)?;
                Ok(work())
            })?;
        visitor
            .join()
            .unwrap_or_else(|panic| panic::resume_unwind(panic))
    })
}

/// The number that names the namespace at `path`: two paths with the same one are
/// the same namespace.
///
/// # Errors
///
/// When the path does not exist.
pub fn inode(path: &Path) -> io::Result<u64> {
    Ok(path.metadata()?.ino())
}

#[cfg(test)]
mod tests {
    use super::*;

    const OWN: &str = "/proc/thread-self/ns/net";

    #[test]
    fn what_runs_within_returns_its_result_and_leaves_the_caller_where_it_is() {
        let before = inode(Path::new(OWN)).unwrap();
        match within(Path::new(OWN), || inode(Path::new(OWN)).unwrap()) {
            // setns needs a capability even into the same namespace.
            Err(error) if error.kind() == io::ErrorKind::PermissionDenied => return,
            inside => assert_eq!(inside.unwrap(), before),
        }
        assert_eq!(inode(Path::new(OWN)).unwrap(), before);
    }

    #[test]
    fn a_path_that_is_no_network_namespace_is_an_error() {
        assert!(within(Path::new("/proc/self/ns/mnt"), || ()).is_err());
        assert!(within(Path::new("/nowhere"), || ()).is_err());
    }
}
