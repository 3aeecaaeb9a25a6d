//! What travels: entries, their content, and removals.

use std::os::unix::ffi::OsStrExt;
use std::path::{Component, Path, PathBuf};

use bytes::Bytes;

use crate::content::CHUNK_BYTES;
use crate::error::LayerError;
use crate::xattr;

/// Deepest path below a tree's root, in components. Each level of a walk holds
/// one file descriptor, and 1024 is the usual limit of a process.
pub const MAX_DEPTH: usize = 256;

/// Linux' NAME_MAX, in bytes.
const MAX_COMPONENT_BYTES: usize = 255;

/// Linux' PATH_MAX without the terminating zero, in bytes.
const MAX_PATH_BYTES: usize = 4095;

/// One step in rebuilding a tree. Order matters: parents come before children,
/// content after its entry, a removal before what replaces it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Item {
    /// A file of any kind, new or changed.
    Entry(Entry),
    /// Content of the regular file that was the last [`Item::Entry`].
    Data {
        /// Where it belongs, in bytes from the start of the file.
        offset: u64,
        /// At most [`CHUNK_BYTES`].
        content: Bytes,
    },
    /// A path that is no longer there. Children come before parents.
    Remove(PathBuf),
}

/// A file and everything about it but its content.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Entry {
    /// Relative to the root, without `.` and `..`; the root itself is `.`.
    pub path: PathBuf,
    /// What it is.
    pub kind: Kind,
    /// Permission bits with setuid, setgid and sticky, 12 bits.
    pub mode: u32,
    /// Owner.
    pub uid: u32,
    /// Group.
    pub gid: u32,
    /// Modification time: seconds since the epoch and nanoseconds.
    pub mtime: (i64, u32),
    /// Of a regular file, in bytes. What no [`Item::Data`] covers is a hole.
    pub size: u64,
    /// Of a device, major and minor.
    pub device: (u32, u32),
    /// Target of a symbolic link, or the path (like `path`) of the file that a
    /// hard link is another name of.
    pub link: PathBuf,
    /// Extended attributes: names and values, all of them.
    pub xattrs: xattr::Xattrs,
    /// Of a regular file: the receiver has it with its former content, and what
    /// no [`Item::Data`] covers stays as it was, up to `size`. Otherwise the
    /// file starts empty.
    pub keep: bool,
}

/// Kinds of files.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Hash)]
pub enum Kind {
    /// A regular file.
    #[default]
    Regular,
    /// A directory.
    Directory,
    /// A symbolic link.
    Symlink,
    /// Another name of a file that came before.
    Hardlink,
    /// A character device; with device 0/0 overlayfs' mark that a file of a
    /// lower layer was removed.
    CharDevice,
    /// A block device.
    BlockDevice,
    /// A named pipe.
    Fifo,
    /// A socket's name.
    Socket,
}

impl Item {
    /// Whether this can be what a [`Scanner`](crate::Scanner) sent. Says nothing
    /// about the tree that it is meant for.
    pub fn validate(&self) -> Result<(), LayerError> {
        match self {
            Self::Entry(entry) => entry.validate(),
            Self::Data { content, .. } if content.len() > CHUNK_BYTES => Err(LayerError::Limit {
                what: "bytes of one piece of content",
                limit: CHUNK_BYTES as u64,
            }),
            Self::Data { .. } => Ok(()),
            Self::Remove(path) => validate_path(path, false),
        }
    }
}

impl Entry {
    fn validate(&self) -> Result<(), LayerError> {
        let invalid = |reason| {
            Err(LayerError::Invalid {
                path: self.path.clone(),
                reason,
            })
        };
        validate_path(&self.path, self.kind == Kind::Directory)?;
        if self.mode > 0o7777 {
            return invalid("its mode has more than permission bits");
        }
        if self.mtime.1 >= 1_000_000_000 {
            return invalid("its time has a second or more of nanoseconds");
        }
        match self.kind {
            Kind::Regular if i64::try_from(self.size).is_err() => {
                return invalid("no file can be that large");
            }
            Kind::Hardlink => validate_path(&self.link, false)?,
            Kind::Symlink => {
                let target = self.link.as_os_str().as_bytes();
                if target.is_empty() || target.len() > MAX_PATH_BYTES || target.contains(&0) {
                    return invalid("its target is no path");
                }
            }
            _ => {}
        }
        if self.keep && self.kind != Kind::Regular {
            return invalid("only a regular file can keep its content");
        }
        xattr::validate(&self.path, &self.xattrs)
    }
}

/// Refuses whatever could lead out of the tree.
fn validate_path(path: &Path, may_be_root: bool) -> Result<(), LayerError> {
    let invalid = |reason| {
        Err(LayerError::Invalid {
            path: path.to_owned(),
            reason,
        })
    };
    let bytes = path.as_os_str().as_bytes();
    if bytes == b"." && may_be_root {
        return Ok(());
    }
    if bytes.len() > MAX_PATH_BYTES || bytes.contains(&0) {
        return invalid("it is no path");
    }
    // By bytes, because `Path::components` forgives `a//b`, `a/.` and `a/`, and
    // two spellings of one file would be two files to whoever keeps a record.
    for component in bytes.split(|byte| *byte == b'/') {
        match component {
            b"" | b"." | b".." => return invalid("it is not a plain relative path"),
            _ if component.len() > MAX_COMPONENT_BYTES => {
                return invalid("a name in it is too long");
            }
            _ => {}
        }
    }
    if path.components().count() > MAX_DEPTH {
        return Err(LayerError::Limit {
            what: "directories below each other",
            limit: MAX_DEPTH as u64,
        });
    }
    debug_assert!(
        path.components()
            .all(|part| matches!(part, Component::Normal(_)))
    );
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn refused(change: impl FnOnce(&mut Entry)) -> LayerError {
        let mut entry = Entry {
            path: "a".into(),
            ..Entry::default()
        };
        assert!(Item::Entry(entry.clone()).validate().is_ok());
        change(&mut entry);
        Item::Entry(entry).validate().unwrap_err()
    }

    #[test]
    fn paths_that_could_leave_the_tree_are_refused() {
        for path in [
            "", "/", "/etc", "..", "a/../b", "a/..", "./a", "a/.", "a//b", "a/", "a\0b", ".",
        ] {
            assert!(validate_path(Path::new(path), false).is_err(), "{path:?}");
            assert!(Item::Remove(path.into()).validate().is_err(), "{path:?}");
        }
        for path in ["a", "a/b", "...", "..a/b.."] {
            validate_path(Path::new(path), false).unwrap();
        }
        validate_path(Path::new("."), true).unwrap();
    }

    #[test]
    fn paths_that_no_kernel_takes_are_refused() {
        assert!(validate_path(Path::new(&"n".repeat(255)), false).is_ok());
        assert!(validate_path(Path::new(&"n".repeat(256)), false).is_err());
        assert!(validate_path(Path::new(&vec!["nnnnnnnnnnnnnnnn"; 256].join("/")), false).is_err());
        assert!(validate_path(Path::new(&vec!["n"; 257].join("/")), false).is_err());
    }

    #[test]
    fn entries_that_no_scanner_sends_are_refused() {
        refused(|e| e.path = "../a".into());
        refused(|e| e.mode = 0o10644);
        refused(|e| e.mtime.1 = 1_000_000_000);
        refused(|e| e.size = u64::MAX);
        refused(|e| (e.kind, e.link) = (Kind::Hardlink, "../etc/shadow".into()));
        refused(|e| (e.kind, e.link) = (Kind::Hardlink, "/etc/shadow".into()));
        refused(|e| e.kind = Kind::Symlink);
        refused(|e| (e.kind, e.link) = (Kind::Symlink, "t".repeat(4096).into()));
        refused(|e| (e.kind, e.keep) = (Kind::Directory, true));
        refused(|e| e.xattrs.push((b"user.a\0b".to_vec(), vec![])));
    }

    #[test]
    fn a_piece_of_content_is_limited() {
        let data = |length| Item::Data {
            offset: 0,
            content: vec![0; length].into(),
        };
        data(CHUNK_BYTES).validate().unwrap();
        data(CHUNK_BYTES + 1).validate().unwrap_err();
    }
}
