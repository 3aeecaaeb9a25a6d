//! Making files and giving them what their entry says.

use std::ffi::OsStr;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::path::Path;

use rustix::fs::{
    AtFlags, Dir, FileType, Gid, Mode, OFlags, Timespec, Timestamps, UTIME_OMIT, Uid, chmod,
    chownat, makedev, mkdirat, mknodat, openat, symlinkat, unlinkat, utimensat,
};
use rustix::io::Errno;

use crate::entry::{Entry, Kind, MAX_DEPTH};
use crate::error::LayerError;
use crate::inode::{Inode, pin, proc_path};
use crate::xattr;

/// Makes what `entry` describes, which is not there yet; neither a regular file
/// nor another name of one. Only its owner may enter it until it is dressed.
pub(crate) fn make(parent: impl AsFd, name: &OsStr, entry: &Entry) -> Result<(), LayerError> {
    let node = |kind| {
        let (major, minor) = entry.device;
        mknodat(
            &parent,
            name,
            kind,
            Mode::from_raw_mode(0o600),
            makedev(major, minor),
        )
    };
    match entry.kind {
        Kind::Directory => mkdirat(&parent, name, Mode::from_raw_mode(0o700)),
        Kind::Symlink => symlinkat(&*entry.link, &parent, name),
        Kind::CharDevice => node(FileType::CharacterDevice),
        Kind::BlockDevice => node(FileType::BlockDevice),
        Kind::Fifo => node(FileType::Fifo),
        Kind::Socket => node(FileType::Socket),
        Kind::Regular | Kind::Hardlink => unreachable!("{:?} is not made here", entry.kind),
    }
    .map_err(LayerError::io("create", &entry.path))
}

/// Gives a file its owner, mode and attributes, and its times unless it is a
/// directory, whose times change with everything that is placed in it.
pub(crate) fn dress(parent: impl AsFd, name: &OsStr, entry: &Entry) -> Result<(), LayerError> {
    let path = &entry.path;
    let file = pin(&parent, name).map_err(LayerError::io("open", path))?;
    // The order matters: a change of owner takes setuid bits and capabilities
    // away, and a change of mode rewrites an ACL.
    let (uid, gid) = (Uid::from_raw(entry.uid), Gid::from_raw(entry.gid));
    chownat(&file, "", Some(uid), Some(gid), AtFlags::EMPTY_PATH)
        .map_err(LayerError::io("change the owner of", path))?;
    if entry.kind != Kind::Symlink {
        chmod(
            format!("/proc/self/fd/{}", file.as_raw_fd()),
            Mode::from_raw_mode(entry.mode),
        )
        .map_err(LayerError::io("change the mode of", path))?;
    }
    xattr::write(&proc_path(&parent, name), path, &entry.xattrs)?;
    if entry.kind != Kind::Directory {
        set_time(&parent, name, path, entry.mtime)?;
    }
    Ok(())
}

pub(crate) fn set_time(
    parent: impl AsFd,
    name: &OsStr,
    path: &Path,
    mtime: (i64, u32),
) -> Result<(), LayerError> {
    let times = Timestamps {
        last_access: Timespec {
            tv_sec: 0,
            tv_nsec: UTIME_OMIT,
        },
        last_modification: Timespec {
            tv_sec: mtime.0,
            tv_nsec: mtime.1.into(),
        },
    };
    utimensat(parent, name, &times, AtFlags::SYMLINK_NOFOLLOW)
        .map_err(LayerError::io("set the time of", path))
}

/// Removes `name` and everything below it. That it is not there is fine.
pub(crate) fn remove(parent: impl AsFd, name: &OsStr, path: &Path) -> Result<(), LayerError> {
    remove_below(parent.as_fd(), name, 0).map_err(LayerError::io("remove", path))
}

fn remove_below(parent: impl AsFd, name: &OsStr, depth: usize) -> Result<(), Errno> {
    // Two more: a tree of that depth may lie in a directory of ours.
    if depth > MAX_DEPTH + 2 {
        return Err(Errno::NAMETOOLONG);
    }
    let directory = match Inode::at(&parent, name) {
        Ok(inode) => inode.kind == Kind::Directory,
        Err(Errno::NOENT) => return Ok(()),
        Err(errno) => return Err(errno),
    };
    if !directory {
        return unlinkat(parent, name, AtFlags::empty());
    }
    match unlinkat(&parent, name, AtFlags::REMOVEDIR) {
        Err(Errno::NOTEMPTY | Errno::EXIST) => {}
        result => return result,
    }
    let dir = open_directory(&parent, name)?;
    for entry in Dir::read_from(&dir)? {
        let entry = entry?;
        let name = entry.file_name();
        if name != c"." && name != c".." {
            remove_below(
                &dir,
                std::os::unix::ffi::OsStrExt::from_bytes(name.to_bytes()),
                depth + 1,
            )?;
        }
    }
    unlinkat(parent, name, AtFlags::REMOVEDIR)
}

pub(crate) fn open_directory(parent: impl AsFd, name: &OsStr) -> Result<OwnedFd, Errno> {
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    openat(parent, name, flags, Mode::empty())
}
