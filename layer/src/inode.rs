//! What the kernel says about one file.

use std::ffi::OsStr;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::path::{Path, PathBuf};

use rustix::fs::{
    AtFlags, FileType, Mode, OFlags, Statx, StatxFlags, StatxTimestamp, openat, statx,
};
use rustix::io::Errno;

use crate::entry::{Entry, Kind};

/// Names one inode of a file system, also after it was freed and its number
/// given to another file.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) struct Key {
    ino: u64,
    /// Zero where the file system does not record it.
    born: (i64, u32),
}

/// What differs after anything about a file changed. The change time is the
/// part that a program cannot set back.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Stamp {
    mode: u16,
    uid: u32,
    gid: u32,
    size: u64,
    device: (u32, u32),
    pub(crate) mtime: (i64, u32),
    pub(crate) ctime: (i64, u32),
}

/// One file, as it was when the kernel was asked.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Inode {
    pub(crate) key: Key,
    pub(crate) stamp: Stamp,
    pub(crate) kind: Kind,
    /// Names that the inode has.
    pub(crate) links: u32,
    /// The file system that it is on.
    pub(crate) filesystem: (u32, u32),
}

impl Inode {
    /// The file `name` in `dir`; a symbolic link is not followed.
    pub(crate) fn at(dir: impl AsFd, name: &OsStr) -> Result<Self, Errno> {
        Self::ask(dir, name, AtFlags::SYMLINK_NOFOLLOW | AtFlags::NO_AUTOMOUNT)
    }

    /// The file that is open.
    pub(crate) fn of(file: impl AsFd) -> Result<Self, Errno> {
        Self::ask(file, OsStr::new(""), AtFlags::EMPTY_PATH)
    }

    fn ask(dir: impl AsFd, name: &OsStr, flags: AtFlags) -> Result<Self, Errno> {
        statx(
            dir,
            name,
            flags,
            StatxFlags::BASIC_STATS | StatxFlags::BTIME,
        )
        .map(|stat| Self::from(&stat))
    }

    pub(crate) fn size(&self) -> u64 {
        self.stamp.size
    }

    /// The entry for `path`, without `link` and `xattrs`.
    pub(crate) fn entry(&self, path: &Path) -> Entry {
        let Self { stamp, kind, .. } = self;
        Entry {
            path: path.to_owned(),
            kind: *kind,
            mode: u32::from(stamp.mode) & 0o7777,
            uid: stamp.uid,
            gid: stamp.gid,
            mtime: stamp.mtime,
            size: if *kind == Kind::Regular {
                stamp.size
            } else {
                0
            },
            device: match kind {
                Kind::CharDevice | Kind::BlockDevice => stamp.device,
                _ => (0, 0),
            },
            ..Entry::default()
        }
    }
}

impl From<&Statx> for Inode {
    fn from(stat: &Statx) -> Self {
        let time = |at: StatxTimestamp| (at.tv_sec, at.tv_nsec);
        let has_birth = StatxFlags::from_bits_retain(stat.stx_mask).contains(StatxFlags::BTIME);
        let kind = match FileType::from_raw_mode(stat.stx_mode.into()) {
            FileType::Directory => Kind::Directory,
            FileType::Symlink => Kind::Symlink,
            FileType::CharacterDevice => Kind::CharDevice,
            FileType::BlockDevice => Kind::BlockDevice,
            FileType::Fifo => Kind::Fifo,
            FileType::Socket => Kind::Socket,
            FileType::RegularFile | FileType::Unknown => Kind::Regular,
        };
        let born = if has_birth {
            time(stat.stx_btime)
        } else {
            (0, 0)
        };
        Self {
            key: Key {
                ino: stat.stx_ino,
                born,
            },
            stamp: Stamp {
                mode: stat.stx_mode,
                uid: stat.stx_uid,
                gid: stat.stx_gid,
                // A directory's says nothing that its times do not say.
                size: if kind == Kind::Directory {
                    0
                } else {
                    stat.stx_size
                },
                device: (stat.stx_rdev_major, stat.stx_rdev_minor),
                mtime: time(stat.stx_mtime),
                ctime: time(stat.stx_ctime),
            },
            kind,
            links: stat.stx_nlink,
            filesystem: (stat.stx_dev_major, stat.stx_dev_minor),
        }
    }
}

/// A path for system calls that know no `at` form. It leads through the open
/// directory, whatever became of that directory's own name.
pub(crate) fn proc_path(dir: impl AsFd, name: &OsStr) -> PathBuf {
    PathBuf::from(format!("/proc/self/fd/{}", dir.as_fd().as_raw_fd())).join(name)
}

/// Opens `name` in `dir` without following it and without doing anything to it:
/// opening a device or a FIFO for real may have effects.
pub(crate) fn pin(dir: impl AsFd, name: &OsStr) -> Result<OwnedFd, Errno> {
    openat(
        dir,
        name,
        OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC,
        Mode::empty(),
    )
}

/// Opens the file that [`pin`] pinned.
pub(crate) fn reopen(pinned: impl AsFd, flags: OFlags) -> Result<OwnedFd, Errno> {
    let path = format!("/proc/self/fd/{}", pinned.as_fd().as_raw_fd());
    let open = |flags| rustix::fs::open(path.as_str(), flags | OFlags::CLOEXEC, Mode::empty());
    match open(flags | OFlags::NOATIME) {
        Err(Errno::PERM) => open(flags), // not its owner
        result => result,
    }
}
