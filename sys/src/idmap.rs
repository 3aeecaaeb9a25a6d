//! Mounts that show the owners of their files through a user namespace (mount_setattr(2), Linux 5.12).

use std::fs::{self, File};
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};

use nix::sys::signal::{SigSet, SigmaskHow, pthread_sigmask};

use crate::signal;

/// `struct mount_attr` of include/uapi/linux/mount.h.
#[repr(C)]
struct MountAttr {
    attr_set: u64,
    attr_clr: u64,
    propagation: u64,
    userns_fd: u64,
}

const MOUNT_ATTR_RDONLY: u64 = 0x1;
const MOUNT_ATTR_IDMAP: u64 = 0x0010_0000;

/// A user namespace that no process is in.
#[derive(Debug)]
pub struct UserNamespace(File);

impl UserNamespace {
    /// Makes one with these maps, in the form of /proc/PID/uid_map: lines of first id inside, first id outside, and
    /// how many.
    ///
    /// # Errors
    ///
    /// When the kernel refuses the namespace (`ENOSPC`: there are as many as sysctl allows) or a map (`EINVAL`).
    pub fn new(uid_map: &str, gid_map: &str) -> io::Result<Self> {
        let holder = Holder::start()?;
        let proc = format!("/proc/{}", holder.0);
        fs::write(format!("{proc}/uid_map"), uid_map)?;
        fs::write(format!("{proc}/gid_map"), gid_map)?;
        Ok(Self(File::open(format!("{proc}/ns/user"))?))
    }
}

impl AsFd for UserNamespace {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

/// Maps the owners of a mount that is not attached anywhere yet (open_tree(2) with `OPEN_TREE_CLONE`), read-only if
/// wanted.
///
/// # Errors
///
/// `EINVAL` when its file system cannot do that or the mount is attached.
pub fn map_owners(mount: impl AsFd, namespace: &UserNamespace, read_only: bool) -> io::Result<()> {
    let attributes = MountAttr {
        attr_set: MOUNT_ATTR_IDMAP | if read_only { MOUNT_ATTR_RDONLY } else { 0 },
        attr_clr: 0,
        propagation: 0,
        userns_fd: u64::from(namespace.0.as_raw_fd().unsigned_abs()),
    };
    // SAFETY: the path is an empty string that ends with zero, the attributes are a struct of the size that is given;
    // the kernel reads both and keeps neither. Both descriptors are open as long as the call.
    let result = unsafe {
        libc::syscall(
            libc::SYS_mount_setattr,
            mount.as_fd().as_raw_fd(),
            c"".as_ptr(),
            libc::AT_EMPTY_PATH,
            &raw const attributes,
            size_of::<MountAttr>(),
        )
    };
    match result {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

/// A child in a user namespace of its own that does nothing, until it is dropped. It sends no SIGCHLD, so that
/// whoever waits for children of any kind does not find it.
struct Holder(libc::pid_t);

impl Holder {
    fn start() -> io::Result<Self> {
        // No handler of ours may run in the child: it would use what it shares with us.
        let mut before = SigSet::empty();
        pthread_sigmask(
            SigmaskHow::SIG_SETMASK,
            Some(&SigSet::all()),
            Some(&mut before),
        )?;
        let flags = libc::c_long::from(libc::CLONE_NEWUSER);
        // SAFETY: without CLONE_VM and with no stack this is fork(2): the child has a copy of our memory and this
        // thread only. It may therefore make system calls and nothing else, and that is all it does.
        let pid = unsafe { libc::syscall(libc::SYS_clone, flags, 0, 0, 0, 0) };
        if pid == 0 {
            loop {
                // SAFETY: in the child; pause waits and touches no memory.
                unsafe { libc::syscall(libc::SYS_ppoll, 0, 0, 0, 0, 0) };
            }
        }
        let started = match libc::pid_t::try_from(pid) {
            Ok(pid) if pid > 0 => Ok(Self(pid)),
            _ => Err(io::Error::last_os_error()),
        };
        pthread_sigmask(SigmaskHow::SIG_SETMASK, Some(&before), None)?;
        started
    }
}

impl Drop for Holder {
    fn drop(&mut self) {
        // It is our child and not reaped: the pid is its own.
        drop(signal::send(self.0, libc::SIGKILL));
        // SAFETY: waitpid takes integers, and a null pointer for a status that we do not want.
        unsafe { libc::waitpid(self.0, std::ptr::null_mut(), libc::__WCLONE) };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_namespace_has_the_maps_and_leaves_no_process() {
        if !nix::unistd::geteuid().is_root() {
            return;
        }
        let namespace = UserNamespace::new("0 1000 10\n10 5000 5\n", "0 2000 10\n").unwrap();
        let inode = std::os::unix::fs::MetadataExt::ino(&namespace.0.metadata().unwrap());
        assert_ne!(
            inode,
            std::os::unix::fs::MetadataExt::ino(&fs::metadata("/proc/self/ns/user").unwrap())
        );
        let children = fs::read_to_string(format!(
            "/proc/self/task/{}/children",
            nix::unistd::gettid()
        ))
        .unwrap_or_default();
        assert_eq!(children.trim(), "");
    }

    #[test]
    fn a_map_that_overlaps_is_refused() {
        if !nix::unistd::geteuid().is_root() {
            return;
        }
        let refused = UserNamespace::new("0 1000 10\n5 5000 5\n", "0 2000 10\n").unwrap_err();
        assert_eq!(refused.raw_os_error(), Some(libc::EINVAL));
    }
}
