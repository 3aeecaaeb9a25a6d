//! Reading a tree: first as a whole, then what changed.

use std::collections::{BTreeMap, HashSet};
use std::ffi::{OsStr, OsString};
use std::fs::File;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use rustix::fs::{Dir, Mode, OFlags, ResolveFlags, openat2, readlinkat};
use rustix::io::Errno;

use crate::content::Digests;
use crate::entry::{Entry, Item, Kind, MAX_DEPTH};
use crate::error::{LayerError, Stopped};
use crate::inode::{Inode, Key, Stamp, pin, proc_path, reopen};
use crate::output::{Output, Sending, Unread};
use crate::tree::{Inodes, Known, Node, join, subtree};
use crate::xattr;

/// A file that changed this long before a pass began, or later, may change
/// again without getting another time: the kernel takes file times from a clock
/// that moves once in a tick, at the slowest every 10 ms.
const TICK: Duration = Duration::from_millis(20);

/// The same for a file system that keeps whole seconds (ext4 with inodes of 128
/// bytes).
const SECOND: Duration = Duration::from_millis(1020);

/// Reads a tree, again and again, and tells what is there or what changed.
///
/// What a file holds is compared by its times, its size and the like; files
/// that changed are read and compared, chunk by chunk, with what was sent.
///
/// Stores through shared mappings change a file's times only when a page is
/// written for the first time since it was last clean; the content that `read`
/// shows is always current. Hence two rules: files that somebody has mapped are
/// read in every pass ([`Scanner::suspect`]), and so are those whose time is not
/// clearly before the former pass. What escapes both: on tmpfs, which never
/// cleans pages, a mapping that comes and goes between two passes and writes
/// only to pages that it had read before.
///
/// Memory follows the number of files and 16 bytes for each 256 KiB they hold.
#[derive(Debug)]
pub struct Scanner {
    root: OwnedFd,
    filesystem: (u32, u32),
    tree: Option<Node>,
    inodes: Inodes,
    suspects: HashSet<PathBuf>,
    suspect_inodes: HashSet<Key>,
    broken: bool,
}

/// What one pass did.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct PassReport {
    /// Entries sent: files of any kind that are new or changed.
    pub files: u64,
    /// Content sent, in bytes.
    pub bytes: u64,
    /// Paths that are no longer there.
    pub removed: u64,
    /// How long it took.
    pub duration: Duration,
}

impl Scanner {
    /// Starts with the tree below `root`, a directory; reads nothing yet.
    pub fn new(root: &Path) -> Result<Self, LayerError> {
        let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let root_fd =
            rustix::fs::open(root, flags, Mode::empty()).map_err(LayerError::io("open", root))?;
        let inode = Inode::of(&root_fd).map_err(LayerError::io("look at", root))?;
        Ok(Self {
            root: root_fd,
            filesystem: inode.filesystem,
            tree: None,
            inodes: Inodes::new(),
            suspects: HashSet::new(),
            suspect_inodes: HashSet::new(),
            broken: false,
        })
    }

    /// Reads these files in every pass from now on, whatever their times say.
    /// Paths are relative to the root or absolute as seen from inside of it;
    /// that there is no such file is fine.
    ///
    /// Call it before every pass with [`shared_writable`](crate::shared_writable)
    /// of every process that can write to the tree.
    pub fn suspect(&mut self, paths: impl IntoIterator<Item = PathBuf>) {
        let relative = |path: PathBuf| path.strip_prefix("/").map(Path::to_owned).unwrap_or(path);
        self.suspects.extend(paths.into_iter().map(relative));
    }

    /// As [`suspect`](Self::suspect), for a tree that the processes see somewhere
    /// else, or in several places: paths are as seen from `root`, a process's root
    /// directory. What they lead to outside of the tree does not matter.
    pub fn suspect_seen_from(&mut self, root: &Path, paths: impl IntoIterator<Item = PathBuf>) {
        let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
        // A process that has ended changes nothing any more.
        let Ok(root) = rustix::fs::open(root, flags, Mode::empty()) else {
            return;
        };
        let resolve = ResolveFlags::IN_ROOT | ResolveFlags::NO_MAGICLINKS;
        for path in paths {
            let flags = OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC;
            let file = openat2(&root, path, flags, Mode::empty(), resolve);
            if let Ok(inode) = file.and_then(Inode::of)
                && inode.filesystem == self.filesystem
            {
                self.suspect_inodes.insert(inode.key);
            }
        }
    }

    /// Walks the tree and emits what the receiver does not have: in the first
    /// pass everything, later what changed since the pass before.
    ///
    /// While the tree is in use, files that change or vanish under the walk are
    /// left to the next pass. A `strict` pass, the last one, is for a tree that
    /// stands still: there they are errors.
    ///
    /// After an error every further pass fails with [`LayerError::Broken`].
    pub fn pass(
        &mut self,
        strict: bool,
        emit: &mut dyn FnMut(Item) -> Result<(), Stopped>,
    ) -> Result<PassReport, LayerError> {
        if std::mem::replace(&mut self.broken, true) {
            return Err(LayerError::Broken);
        }
        let began = Instant::now();
        let mut pass = Pass {
            strict,
            began: SystemTime::now(),
            filesystem: self.filesystem,
            former: std::mem::take(&mut self.inodes),
            inodes: Inodes::new(),
            suspects: self
                .suspects
                .iter()
                .filter_map(|path| self.resolve(path))
                .chain(self.suspect_inodes.iter().copied())
                .collect(),
            output: Output::new(emit),
        };
        let tree = pass.root(self.root.as_fd(), self.tree.take())?;
        let (inodes, mut report) = (pass.inodes, pass.output.report);
        self.tree = Some(tree);
        self.inodes = inodes;
        self.broken = false;
        report.duration = began.elapsed();
        Ok(report)
    }

    fn resolve(&self, path: &Path) -> Option<Key> {
        let flags = OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let resolve = ResolveFlags::BENEATH | ResolveFlags::NO_SYMLINKS;
        let file = openat2(&self.root, path, flags, Mode::empty(), resolve).ok()?;
        Inode::of(file).ok().map(|inode| inode.key)
    }
}

/// One walk over the tree.
struct Pass<'a> {
    strict: bool,
    began: SystemTime,
    filesystem: (u32, u32),
    former: Inodes,
    inodes: Inodes,
    suspects: HashSet<Key>,
    output: Output<'a>,
}

/// Where a file is: its directory, its name there, its path.
#[derive(Clone, Copy)]
struct Place<'a> {
    dir: BorrowedFd<'a>,
    name: &'a OsStr,
    path: &'a Path,
    depth: usize,
}

impl Pass<'_> {
    fn root(&mut self, root: BorrowedFd<'_>, old: Option<Node>) -> Result<Node, LayerError> {
        let path = Path::new(".");
        let place = Place {
            dir: root,
            name: OsStr::new("."),
            path,
            depth: 0,
        };
        let gone = || LayerError::io("read", path)(Errno::NOENT);
        self.visit(place, old)?.ok_or_else(gone)
    }

    /// Emits what the receiver lacks of one file and what is below it; `old` is
    /// what was there in the former pass. `None` if there is no such file (any
    /// more), which the receiver then knows too.
    fn visit(&mut self, place: Place<'_>, old: Option<Node>) -> Result<Option<Node>, LayerError> {
        let inode = match Inode::at(place.dir, place.name) {
            Ok(inode) => inode,
            Err(errno) => return self.vanished(place, old.as_ref(), "look at", errno),
        };
        if inode.filesystem != self.filesystem {
            return Err(LayerError::Unsupported {
                path: place.path.to_owned(),
                reason: "another file system is mounted there",
            });
        }
        let old = match old {
            Some(node) if node.key == inode.key && node.kind == inode.kind => Some(node),
            Some(node) => {
                // Never written into in place: the receiver's file may have
                // other names that still belong to the former inode.
                self.remove(place.path, &node)?;
                None
            }
            None => None,
        };
        if inode.kind == Kind::Directory {
            return self.directory(place, inode, old);
        }
        let had = old.is_some();
        let node = Node {
            key: inode.key,
            kind: inode.kind,
            children: BTreeMap::new(),
        };
        if inode.links > 1
            && let Some(known) = self.inodes.get(&inode.key)
        {
            if !(had && known.kept) {
                let link = known.leader.clone();
                self.output.entry(Entry {
                    kind: Kind::Hardlink,
                    path: place.path.to_owned(),
                    link,
                    ..Entry::default()
                })?;
            }
            return Ok(Some(node));
        }
        let former = if had {
            self.former.remove(&inode.key)
        } else {
            None
        };
        let known = match inode.kind {
            Kind::Regular => self.regular(place, inode, former),
            _ => self.special(place, inode, former),
        };
        match known {
            Ok(known) => {
                self.inodes.insert(inode.key, known);
                Ok(Some(node))
            }
            Err(Failure::Vanished(action, errno)) => {
                self.vanished(place, had.then_some(&node), action, errno)
            }
            Err(Failure::Error(error)) => Err(error),
        }
    }

    /// The file went away under our hands.
    fn vanished(
        &mut self,
        place: Place<'_>,
        old: Option<&Node>,
        action: &'static str,
        errno: Errno,
    ) -> Result<Option<Node>, LayerError> {
        // LOOP and NOTDIR: something of another kind took its place.
        if !matches!(
            errno,
            Errno::NOENT | Errno::LOOP | Errno::NOTDIR | Errno::STALE
        ) {
            return Err(LayerError::io(action, place.path)(errno));
        }
        if self.strict {
            return Err(LayerError::Changed {
                path: place.path.to_owned(),
            });
        }
        if let Some(old) = old {
            self.remove(place.path, old)?;
        }
        Ok(None)
    }

    fn directory(
        &mut self,
        place: Place<'_>,
        inode: Inode,
        old: Option<Node>,
    ) -> Result<Option<Node>, LayerError> {
        if place.depth >= MAX_DEPTH {
            return Err(LayerError::Unsupported {
                path: place.path.to_owned(),
                reason: "too many directories below each other",
            });
        }
        let opened = pin(place.dir, place.name).and_then(|pinned| {
            let same = Inode::of(&pinned)?.key == inode.key;
            let dir = reopen(pinned, OFlags::RDONLY | OFlags::DIRECTORY)?;
            if same {
                Ok((names(&dir)?, dir))
            } else {
                Err(Errno::NOENT)
            }
        });
        let (names, dir) = match opened {
            Ok(opened) => opened,
            Err(errno) => return self.vanished(place, old.as_ref(), "open", errno),
        };
        let former = old.as_ref().and_then(|_| self.former.remove(&inode.key));
        if former.is_none_or(|former| former.fresh || former.stamp != inode.stamp) {
            let entry = match self.described(place, inode) {
                Ok(entry) => entry,
                Err(Failure::Vanished(action, errno)) => {
                    return self.vanished(place, old.as_ref(), action, errno);
                }
                Err(Failure::Error(error)) => return Err(error),
            };
            self.output.entry(entry)?;
        }
        let mut before = old.map(|node| node.children).unwrap_or_default();
        for (name, node) in &before {
            if names.binary_search(name).is_err() {
                self.remove(&join(place.path, name), node)?;
            }
        }
        let mut children = BTreeMap::new();
        for name in names {
            let path = join(place.path, &name);
            let child = Place {
                dir: dir.as_fd(),
                name: &name,
                path: &path,
                depth: place.depth + 1,
            };
            if let Some(node) = self.visit(child, before.remove(&name))? {
                children.insert(name, node);
            }
        }
        self.check_still(place, &dir, inode)?;
        let known = self.known(place, inode, Digests::new(), true);
        self.inodes.insert(inode.key, known);
        Ok(Some(Node {
            key: inode.key,
            kind: inode.kind,
            children,
        }))
    }

    /// Anything but a directory or a regular file.
    fn special(
        &mut self,
        place: Place<'_>,
        inode: Inode,
        former: Option<Known>,
    ) -> Result<Known, Failure> {
        if let Some(former) = former
            && !former.fresh
            && former.stamp == inode.stamp
        {
            return Ok(self.known(place, inode, Digests::new(), true));
        }
        let mut entry = self.described(place, inode)?;
        if inode.kind == Kind::Symlink {
            let target =
                readlinkat(place.dir, place.name, Vec::new()).map_err(|errno| match errno {
                    Errno::INVAL => Failure::Vanished("read the link", Errno::NOENT), // no link any more
                    errno => Failure::Vanished("read the link", errno),
                })?;
            entry.link = PathBuf::from(OsStr::from_bytes(target.as_bytes()));
        }
        self.output.entry(entry)?;
        Ok(self.known(place, inode, Digests::new(), false))
    }

    fn regular(
        &mut self,
        place: Place<'_>,
        inode: Inode,
        former: Option<Known>,
    ) -> Result<Known, Failure> {
        let keep = former.is_some();
        let (before, doubtful) = match former {
            Some(former) => {
                let changed = former.fresh || former.stamp != inode.stamp;
                if !changed && !self.suspects.contains(&inode.key) {
                    return Ok(self.known(place, inode, former.digests, true));
                }
                (former.digests, !changed)
            }
            None => (Digests::new(), false),
        };
        let file = open(place, inode)?;
        let entry = Entry {
            keep,
            ..self.described(place, inode)?
        };
        let mut sending = Sending::new(&mut self.output, entry);
        if !doubtful {
            sending.announce()?;
        }
        let digests =
            sending
                .content(&file, inode.size(), &before)
                .map_err(|error| match error {
                    Unread::Read(source) => LayerError::Io {
                        action: "read",
                        path: place.path.to_owned(),
                        source,
                    },
                    Unread::Stopped(stopped) => stopped.into(),
                })?;
        self.check_still(place, &file, inode)?;
        Ok(self.known(place, inode, digests, keep))
    }

    /// In a strict pass: nobody changed the file while we read it.
    fn check_still(
        &self,
        place: Place<'_>,
        file: impl AsFd,
        inode: Inode,
    ) -> Result<(), LayerError> {
        if !self.strict {
            return Ok(());
        }
        let now = Inode::of(file).map_err(LayerError::io("look at", place.path))?;
        if now.stamp != inode.stamp {
            return Err(LayerError::Changed {
                path: place.path.to_owned(),
            });
        }
        Ok(())
    }

    fn known(&self, place: Place<'_>, inode: Inode, digests: Digests, kept: bool) -> Known {
        Known {
            stamp: inode.stamp,
            fresh: is_fresh(inode.stamp, self.began),
            digests,
            leader: place.path.to_owned(),
            kept,
        }
    }

    /// The file's entry, all but the target of a link.
    fn described(&self, place: Place<'_>, inode: Inode) -> Result<Entry, Failure> {
        let xattrs = match xattr::read(&proc_path(place.dir, place.name), place.path) {
            Err(LayerError::Io { action, source, .. })
                if Errno::from_io_error(&source) == Some(Errno::NOENT) =>
            {
                return Err(Failure::Vanished(action, Errno::NOENT));
            }
            result => result?,
        };
        Ok(Entry {
            xattrs,
            ..inode.entry(place.path)
        })
    }

    fn remove(&mut self, path: &Path, node: &Node) -> Result<(), LayerError> {
        for path in subtree(path, node) {
            self.output.remove(path)?;
        }
        Ok(())
    }
}

/// Why a file was not carried.
enum Failure {
    /// What was tried, and an error that may mean that the file went away.
    Vanished(&'static str, Errno),
    Error(LayerError),
}

impl From<LayerError> for Failure {
    fn from(error: LayerError) -> Self {
        Self::Error(error)
    }
}

impl From<Stopped> for Failure {
    fn from(stopped: Stopped) -> Self {
        Self::Error(stopped.into())
    }
}

/// Opens a regular file, sure that it is the one that was looked at.
fn open(place: Place<'_>, inode: Inode) -> Result<File, Failure> {
    let pinned = pin(place.dir, place.name).map_err(|errno| Failure::Vanished("open", errno))?;
    let now = Inode::of(&pinned).map_err(LayerError::io("look at", place.path))?;
    if now.key != inode.key {
        return Err(Failure::Vanished("open", Errno::NOENT));
    }
    let file = reopen(pinned, OFlags::RDONLY).map_err(LayerError::io("open", place.path))?;
    Ok(file.into())
}

pub(crate) fn names(dir: &OwnedFd) -> Result<Vec<OsString>, Errno> {
    let mut names = Vec::new();
    for entry in Dir::read_from(dir)? {
        let name = OsStr::from_bytes(entry?.file_name().to_bytes()).to_owned();
        if name != "." && name != ".." {
            names.push(name);
        }
    }
    names.sort();
    Ok(names)
}

fn is_fresh(stamp: Stamp, began: SystemTime) -> bool {
    let whole_seconds = stamp.mtime.1 == 0 && stamp.ctime.1 == 0;
    let margin = if whole_seconds { SECOND } else { TICK };
    let old = began
        .duration_since(UNIX_EPOCH)
        .unwrap_or_default()
        .saturating_sub(margin);
    // A file's modification time is what programs say it is; its change time is
    // the kernel's.
    stamp.ctime
        >= (
            old.as_secs().try_into().unwrap_or(i64::MAX),
            old.subsec_nanos(),
        )
}
