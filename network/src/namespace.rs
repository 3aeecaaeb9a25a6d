//! Named network namespaces, as `ip netns` makes them.

use std::fs::{DirBuilder, File, OpenOptions};
use std::io;
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::Path;
use std::thread;

use nix::errno::Errno;
use nix::fcntl::{Flock, FlockArg};
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::sched::{CloneFlags, unshare};

use crate::error::NetworkError;

/// Makes a namespace that `path` keeps alive: an empty file with the namespace
/// mounted on it. Fails if there is something already.
pub(crate) fn create(path: &Path) -> Result<(), NetworkError> {
    let Some(dir) = path.parent().filter(|_| path.is_absolute()) else {
        return Err(NetworkError::Invalid {
            reason: "the path of a namespace is not absolute",
        });
    };
    DirBuilder::new()
        .recursive(true)
        .mode(0o755)
        .create(dir)
        .map_err(NetworkError::kernel("create", dir.display()))?;
    share(dir).map_err(NetworkError::kernel("share mounts below", dir.display()))?;
    let file = OpenOptions::new()
        .read(true)
        .write(true)
        .create_new(true)
        .mode(0o444)
        .open(path);
    match file {
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {
            return Err(NetworkError::Exists {
                netns: path.to_owned(),
            });
        }
        file => file
            .map(drop)
            .map_err(NetworkError::kernel("create", path.display()))?,
    }
    mount_new(path).map_err(|error| {
        std::fs::remove_file(path).ok(); // the first error says more
        NetworkError::kernel("make a network namespace at", path.display())(error)
    })
}

/// A namespace that is mounted here must show in every mount namespace (that of
/// containerd, of runc, of a shim), and its removal too: the directory becomes a
/// mount of its own that shares what happens below it. Locked, because two who
/// do this at once would mount it twice.
fn share(dir: &Path) -> io::Result<()> {
    let _lock = Flock::lock(File::open(dir)?, FlockArg::LockExclusive)
        .map_err(|(_, errno)| io::Error::from(errno))?;
    let change = |source: Option<&Path>, flags| {
        mount(
            source,
            dir,
            Some("none"),
            flags | MsFlags::MS_REC,
            None::<&str>,
        )
    };
    match change(None, MsFlags::MS_SHARED) {
        Err(Errno::EINVAL) => {
            // Not a mount of its own yet.
            change(Some(dir), MsFlags::MS_BIND)?;
            change(None, MsFlags::MS_SHARED)?;
        }
        result => result?,
    }
    Ok(())
}

/// On a thread of its own, which ends in the new namespace.
fn mount_new(path: &Path) -> io::Result<()> {
    thread::scope(|scope| {
        let maker = thread::Builder::new()
            .name("netns".into())
            .spawn_scoped(scope, || {
                unshare(CloneFlags::CLONE_NEWNET)?;
                let own = Path::new("/proc/thread-self/ns/net");
                mount(
                    Some(own),
                    path,
                    Some("none"),
                    MsFlags::MS_BIND,
                    None::<&str>,
                )?;
                Ok(())
            })?;
        maker
            .join()
            .unwrap_or_else(|panic| std::panic::resume_unwind(panic))
    })
}

/// Takes the namespace's name away; it goes when nobody is in it any more. That
/// there is none is fine.
pub(crate) fn remove(path: &Path) -> Result<(), NetworkError> {
    match umount2(path, MntFlags::MNT_DETACH | MntFlags::UMOUNT_NOFOLLOW) {
        // EINVAL: nothing is mounted there.
        Ok(()) | Err(Errno::ENOENT | Errno::EINVAL) => {}
        Err(errno) => {
            return Err(NetworkError::kernel("unmount", path.display())(
                errno.into(),
            ));
        }
    }
    match std::fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => {
            Err(NetworkError::kernel("remove", path.display())(error))
        }
        _ => Ok(()),
    }
}
