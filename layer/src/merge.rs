//! A tree that comes into a directory which others use as well.

use std::ffi::{OsStr, OsString};
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};

use rustix::fs::{AtFlags, Mode, OFlags, RenameFlags, mkdirat, renameat_with, unlinkat};

use crate::entry::{Entry, Kind, MAX_DEPTH};
use crate::error::LayerError;
use crate::inode::{Inode, proc_path};
use crate::meta;
use crate::place::{Limits, Placer, look, name_of, open_below};
use crate::scan::names;
use crate::tree::join;
use crate::xattr;

/// Below a hidden directory that nobody else may enter: the tree itself, whose root
/// has the mode that it had elsewhere.
const TREE: &str = "tree";

/// Which of two files of one name stays.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Wins {
    /// The one that comes.
    Arriving,
    /// The one that was modified later; of equals, the one that is there.
    Newer,
}

/// A tree on its way into a directory in which others may have files, and may make
/// some meanwhile: built in a hidden place of the same file system, then put among
/// them at once. Until then nothing but the hidden place is there, so that an
/// arrival that is given up leaves nothing.
///
/// Files that are there and do not come stay. Directories on both sides become one,
/// with the owner, mode and time of the one that came.
///
/// Whoever can write into the directory can spoil what comes, but lead nothing out of
/// it: the kernel is asked to refuse symbolic links on the way.
#[derive(Debug)]
pub struct Merge {
    directory: OwnedFd,
    shown: PathBuf,
    name: OsString,
}

/// What [`Merge::put_in_place`] did, for [`Merge::take_back`].
#[derive(Debug, Default)]
pub struct InPlace(Vec<Step>);

#[derive(Debug)]
enum Step {
    /// It was not there.
    Added(PathBuf),
    /// What was there is in the hidden place.
    Exchanged(PathBuf),
    /// A directory that was there, as it was.
    Dressed(Entry),
}

impl Merge {
    /// Makes the hidden place `name` in `directory`; what is there of that name is
    /// removed.
    pub fn prepare(directory: &Path, name: &str) -> Result<Self, LayerError> {
        let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let merge = Self {
            directory: rustix::fs::open(directory, flags, Mode::empty())
                .map_err(LayerError::io("open", directory))?,
            shown: directory.to_owned(),
            name: name.into(),
        };
        merge.unseen(|| merge.make())?;
        Ok(merge)
    }

    fn make(&self) -> Result<(), LayerError> {
        meta::remove(&self.directory, &self.name, &self.path())?;
        let private = Mode::from_raw_mode(0o700);
        mkdirat(&self.directory, &*self.name, private)
            .map_err(LayerError::io("create", &self.path()))?;
        let above = open_below(&self.directory, Path::new(&self.name))
            .map_err(LayerError::io("open", &self.path()))?;
        mkdirat(&above, TREE, private).map_err(LayerError::io("create", &self.path()))
    }

    /// Makes or removes the hidden place so that the directory's time does not show it.
    fn unseen(&self, act: impl FnOnce() -> Result<(), LayerError>) -> Result<(), LayerError> {
        let path = Path::new(".");
        let about = Inode::of(&self.directory).map_err(LayerError::io("look at", path))?;
        act()?;
        meta::set_time(&self.directory, path.as_os_str(), path, about.stamp.mtime)
    }

    fn path(&self) -> PathBuf {
        self.shown.join(&self.name)
    }

    fn tree(&self) -> Result<OwnedFd, LayerError> {
        open_below(&self.directory, &Path::new(&self.name).join(TREE))
            .map_err(LayerError::io("open", &self.path()))
    }

    /// Builds the tree in its hidden place.
    pub fn placer(&self, limits: Limits) -> Result<Placer, LayerError> {
        Ok(Placer::on(self.tree()?, limits))
    }

    /// Puts what was built where it belongs: one rename for each file or directory
    /// that is new there. On error everything is as it was.
    pub fn put_in_place(&self, wins: Wins) -> Result<InPlace, LayerError> {
        let mut walk = Walk {
            taken: &self.name,
            wins,
            done: InPlace::default(),
        };
        match walk.directory(&self.tree()?, &self.directory, Path::new("."), 0) {
            Ok(()) => {
                // Stays, hidden, where something was in the way.
                self.unseen(|| self.remove_empty()).ok();
                Ok(walk.done)
            }
            Err(error) => {
                self.take_back(walk.done)?;
                Err(error)
            }
        }
    }

    fn remove_empty(&self) -> Result<(), LayerError> {
        let io = |errno| LayerError::io("remove", &self.path())(errno);
        let above = open_below(&self.directory, Path::new(&self.name)).map_err(io)?;
        unlinkat(&above, TREE, AtFlags::REMOVEDIR).map_err(io)?;
        unlinkat(&self.directory, &*self.name, AtFlags::REMOVEDIR).map_err(io)
    }

    /// Undoes [`Merge::put_in_place`]: what was added is removed, what was replaced
    /// is back. Goes on where a step fails; the first error is returned.
    pub fn take_back(&self, done: InPlace) -> Result<(), LayerError> {
        let mut first = Ok(());
        for step in done.0.into_iter().rev() {
            let undone = self.undo(step);
            first = first.and(undone);
        }
        first
    }

    fn undo(&self, step: Step) -> Result<(), LayerError> {
        match step {
            Step::Added(path) => meta::remove(self.above(&path)?, name_of(&path), &path),
            Step::Exchanged(path) => {
                let there = self.above(&path)?;
                let staged = above(&self.tree()?, &path)?;
                exchange(&staged, &there, name_of(&path), &path)
            }
            Step::Dressed(entry) => {
                let (parent, name) = (self.above(&entry.path)?, name_of(&entry.path));
                meta::dress(&parent, name, &entry)?;
                meta::set_time(&parent, name, &entry.path, entry.mtime)
            }
        }
    }

    fn above(&self, path: &Path) -> Result<OwnedFd, LayerError> {
        above(&self.directory, path)
    }

    /// Removes the hidden place and whatever is in it.
    pub fn remove(&self) -> Result<(), LayerError> {
        self.unseen(|| meta::remove(&self.directory, &self.name, &self.path()))
    }
}

/// The directory below `root` that `path` is in.
fn above(root: &OwnedFd, path: &Path) -> Result<OwnedFd, LayerError> {
    let above = path.parent().unwrap_or(Path::new(""));
    let above = if above.as_os_str().is_empty() {
        Path::new(".")
    } else {
        above
    };
    open_below(root, above).map_err(LayerError::io("open", above))
}

fn exchange(from: &OwnedFd, to: &OwnedFd, name: &OsStr, path: &Path) -> Result<(), LayerError> {
    renameat_with(from, name, to, name, RenameFlags::EXCHANGE)
        .map_err(LayerError::io("replace", path))
}

/// Two directories becoming one.
struct Walk<'a> {
    /// The hidden place.
    taken: &'a OsStr,
    wins: Wins,
    done: InPlace,
}

impl Walk<'_> {
    fn directory(
        &mut self,
        from: &OwnedFd,
        to: &OwnedFd,
        path: &Path,
        depth: usize,
    ) -> Result<(), LayerError> {
        if depth > MAX_DEPTH {
            return Err(LayerError::Limit {
                what: "directories below each other",
                limit: MAX_DEPTH as u64,
            });
        }
        // Before anything is moved out of it.
        let (comes, there) = (described(from, path)?, described(to, path)?);
        let wins = self.wins == Wins::Arriving || comes.mtime > there.mtime;
        let time = if wins { comes.mtime } else { there.mtime };
        self.done.0.push(Step::Dressed(there));
        let list = meta::open_directory(from, OsStr::new("."))
            .and_then(|list| names(&list))
            .map_err(LayerError::io("list", path))?;
        for name in list {
            let below = join(path, &name);
            if depth == 0 && name == self.taken {
                return Err(LayerError::Invalid {
                    path: below,
                    reason: "this name is taken",
                });
            }
            self.file(from, to, &name, &below, depth)?;
        }
        if wins {
            meta::dress(to, OsStr::new("."), &comes)?;
        }
        meta::set_time(to, OsStr::new("."), path, time)
    }

    fn file(
        &mut self,
        from: &OwnedFd,
        to: &OwnedFd,
        name: &OsStr,
        path: &Path,
        depth: usize,
    ) -> Result<(), LayerError> {
        let comes = Inode::at(from, name).map_err(LayerError::io("look at", path))?;
        let Some(there) = look(to, name, path)? else {
            renameat_with(from, name, to, name, RenameFlags::NOREPLACE)
                .map_err(LayerError::io("put in place", path))?;
            self.done.0.push(Step::Added(path.to_owned()));
            return Ok(());
        };
        if comes.kind == Kind::Directory && there.kind == Kind::Directory {
            let open = |parent: &OwnedFd| {
                meta::open_directory(parent, name).map_err(LayerError::io("open", path))
            };
            self.directory(&open(from)?, &open(to)?, path, depth + 1)?;
            // Not empty where something was in the way.
            unlinkat(from, name, AtFlags::REMOVEDIR).ok();
        } else if self.wins == Wins::Arriving || comes.stamp.mtime > there.stamp.mtime {
            exchange(from, to, name, path)?;
            self.done.0.push(Step::Exchanged(path.to_owned()));
        }
        Ok(())
    }
}

/// A directory that is open, as an entry.
fn described(dir: &OwnedFd, path: &Path) -> Result<Entry, LayerError> {
    let inode = Inode::of(dir).map_err(LayerError::io("look at", path))?;
    Ok(Entry {
        xattrs: xattr::read(&proc_path(dir, OsStr::new(".")), path)?,
        ..inode.entry(path)
    })
}
