//! Building a tree from what a scanner sent.

use std::collections::{BTreeMap, BTreeSet};
use std::ffi::OsStr;
use std::fs::File;
use std::os::fd::OwnedFd;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use rustix::fs::{AtFlags, Mode, OFlags, ResolveFlags, linkat, openat, openat2};
use rustix::io::Errno;

use crate::entry::{Entry, Item, Kind};
use crate::error::LayerError;
use crate::inode::Inode;
use crate::meta;

/// How much a peer may place.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Limits {
    /// Most content in all passes together, in bytes.
    pub bytes: u64,
    /// Most entries in all passes together.
    pub entries: u64,
    /// Only regular files and directories, and extended attributes are ignored:
    /// for trees that are no container's.
    pub plain: bool,
}

impl Default for Limits {
    /// For a container's writable layer: against a peer that never ends, not
    /// against a large layer. What the disk takes is the file system's to say.
    fn default() -> Self {
        Self {
            bytes: 1 << 40,
            entries: 1 << 24,
            plain: false,
        }
    }
}

impl Limits {
    /// For a directory of CRIU's images. Images hold what the page engine does
    /// not own, tmpfs content for one, so that they too can be large.
    pub fn images() -> Self {
        Self {
            bytes: 1 << 40,
            entries: 1 << 20,
            plain: true,
        }
    }
}

/// Builds a tree below a directory, and never touches anything outside of it.
///
/// What is there already is replaced where it is in the way; a regular file that
/// gets new content keeps its other names. Modification times of directories
/// are right after [`finish`](Self::finish) only.
///
/// Nobody else may change the tree meanwhile: an overlay is mounted on it later.
#[derive(Debug)]
pub struct Placer {
    root: Arc<OwnedFd>,
    limits: Limits,
    bytes: u64,
    entries: u64,
    /// The regular file whose content is arriving.
    open: Option<Open>,
    /// The last directory that something was placed in.
    parent: Option<(PathBuf, Arc<OwnedFd>)>,
    /// Times of all directories that came.
    times: BTreeMap<PathBuf, (i64, u32)>,
    /// Directories whose time is to be set again.
    touched: BTreeSet<PathBuf>,
    broken: bool,
}

#[derive(Debug)]
struct Open {
    entry: Entry,
    parent: Arc<OwnedFd>,
    file: File,
}

impl Placer {
    /// Builds below `root`, a directory.
    pub fn new(root: &Path, limits: Limits) -> Result<Self, LayerError> {
        let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let root =
            rustix::fs::open(root, flags, Mode::empty()).map_err(LayerError::io("open", root))?;
        Ok(Self::on(root, limits))
    }

    /// Builds below a directory that is open.
    pub(crate) fn on(root: OwnedFd, limits: Limits) -> Self {
        Self {
            root: Arc::new(root),
            limits,
            bytes: 0,
            entries: 0,
            open: None,
            parent: None,
            times: BTreeMap::new(),
            touched: BTreeSet::new(),
            broken: false,
        }
    }

    /// Applies one item. After an error every further call fails with
    /// [`LayerError::Broken`].
    pub fn apply(&mut self, item: Item) -> Result<(), LayerError> {
        self.guarded(|placer| {
            item.validate()?;
            match item {
                Item::Entry(entry) => {
                    placer.close()?;
                    placer.entry(entry)
                }
                Item::Data { offset, content } => placer.data(offset, &content),
                Item::Remove(path) => {
                    placer.close()?;
                    placer.remove(&path)
                }
            }
        })
    }

    /// Completes what the items so far began: the last file, and the times of
    /// directories. To be called after each pass; more items may follow.
    pub fn finish(&mut self) -> Result<(), LayerError> {
        self.guarded(|placer| {
            placer.close()?;
            for path in std::mem::take(&mut placer.touched) {
                if let Some(time) = placer.times.get(&path).copied() {
                    let (parent, name) = placer.parent(&path)?;
                    meta::set_time(parent, name, &path, time)?;
                }
            }
            Ok(())
        })
    }

    fn guarded(
        &mut self,
        act: impl FnOnce(&mut Self) -> Result<(), LayerError>,
    ) -> Result<(), LayerError> {
        if self.broken {
            return Err(LayerError::Broken);
        }
        let result = act(self);
        self.broken = result.is_err();
        result
    }

    fn entry(&mut self, mut entry: Entry) -> Result<(), LayerError> {
        self.entries += 1;
        if self.entries > self.limits.entries {
            return Err(LayerError::Limit {
                what: "files",
                limit: self.limits.entries,
            });
        }
        if self.limits.plain {
            if !matches!(entry.kind, Kind::Regular | Kind::Directory) {
                return Err(LayerError::Invalid {
                    path: entry.path,
                    reason: "only regular files and directories are expected here",
                });
            }
            entry.xattrs.clear(); // the other node's labels
        }
        match entry.kind {
            Kind::Regular => self.regular(entry),
            Kind::Directory => self.directory(&entry),
            Kind::Hardlink => self.hardlink(&entry),
            _ => {
                let (parent, name) = self.parent(&entry.path)?;
                self.clear(&parent, name, &entry.path)?;
                meta::make(&parent, name, &entry)?;
                meta::dress(&parent, name, &entry)
            }
        }
    }

    fn regular(&mut self, entry: Entry) -> Result<(), LayerError> {
        let (parent, name) = self.parent(&entry.path)?;
        let write = OFlags::WRONLY | OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::CLOEXEC;
        let open = |flags| {
            openat(&parent, name, write | flags, Mode::from_raw_mode(0o600))
                .map_err(LayerError::io("open", &entry.path))
        };
        let there =
            look(&parent, name, &entry.path)?.is_some_and(|inode| inode.kind == Kind::Regular);
        if entry.keep && !there {
            return Err(LayerError::Invalid {
                path: entry.path,
                reason: "it is to keep content that is not here",
            });
        }
        let file = if there {
            open(if entry.keep {
                OFlags::empty()
            } else {
                OFlags::TRUNC
            })?
        } else {
            self.clear(&parent, name, &entry.path)?;
            open(OFlags::CREATE | OFlags::EXCL)?
        };
        let file = File::from(file);
        file.set_len(entry.size).map_err(|source| LayerError::Io {
            action: "set the size of",
            path: entry.path.clone(),
            source,
        })?;
        self.open = Some(Open {
            parent: Arc::clone(&parent),
            entry,
            file,
        });
        Ok(())
    }

    fn data(&mut self, offset: u64, content: &[u8]) -> Result<(), LayerError> {
        let Some(Open { entry, file, .. }) = &self.open else {
            return Err(LayerError::Invalid {
                path: PathBuf::new(),
                reason: "content without a file",
            });
        };
        let length = content.len() as u64;
        if offset
            .checked_add(length)
            .is_none_or(|end| end > entry.size)
        {
            return Err(LayerError::Invalid {
                path: entry.path.clone(),
                reason: "content behind the end of the file",
            });
        }
        self.bytes = self.bytes.saturating_add(length);
        if self.bytes > self.limits.bytes {
            return Err(LayerError::Limit {
                what: "bytes of content",
                limit: self.limits.bytes,
            });
        }
        file.write_all_at(content, offset)
            .map_err(|source| LayerError::Io {
                action: "write",
                path: entry.path.clone(),
                source,
            })
    }

    fn directory(&mut self, entry: &Entry) -> Result<(), LayerError> {
        let (parent, name) = self.parent(&entry.path)?;
        let there =
            look(&parent, name, &entry.path)?.is_some_and(|inode| inode.kind == Kind::Directory);
        if !there {
            self.clear(&parent, name, &entry.path)?;
            meta::make(&parent, name, entry)?;
        }
        meta::dress(&parent, name, entry)?;
        self.times.insert(entry.path.clone(), entry.mtime);
        self.touched.insert(entry.path.clone());
        Ok(())
    }

    fn hardlink(&mut self, entry: &Entry) -> Result<(), LayerError> {
        let (from, from_name) = self.parent(&entry.link)?;
        let target = look(&from, from_name, &entry.link)?;
        let Some(target) = target.filter(|inode| inode.kind != Kind::Directory) else {
            return Err(LayerError::Invalid {
                path: entry.path.clone(),
                reason: "it is to be a link to a file that is not here",
            });
        };
        let (parent, name) = self.parent(&entry.path)?;
        if look(&parent, name, &entry.path)?.is_some_and(|inode| inode.key == target.key) {
            return Ok(());
        }
        self.clear(&parent, name, &entry.path)?;
        linkat(&from, from_name, &parent, name, AtFlags::empty())
            .map_err(LayerError::io("link", &entry.path))
    }

    fn remove(&mut self, path: &Path) -> Result<(), LayerError> {
        match self.parent(path) {
            Ok((parent, name)) => self.clear(&parent, name, path),
            Err(LayerError::Io { source, .. }) if source.kind() == std::io::ErrorKind::NotFound => {
                Ok(())
            }
            Err(error) => Err(error),
        }
    }

    /// Makes room for `path`, whose directory is going to change anyway.
    fn clear(&mut self, parent: &OwnedFd, name: &OsStr, path: &Path) -> Result<(), LayerError> {
        if let Some(above) = path.parent() {
            self.touched.insert(root_or(above).to_owned());
        }
        while let Some(below) = self.times.range(path.to_owned()..).next()
            && below.0.starts_with(path)
        {
            let below = below.0.clone();
            self.times.remove(&below);
            self.touched.remove(&below);
        }
        if self
            .parent
            .as_ref()
            .is_some_and(|(cached, _)| cached.starts_with(path))
        {
            self.parent = None;
        }
        meta::remove(parent, name, path)
    }

    /// Gives the last file its owner, mode, attributes and time.
    fn close(&mut self) -> Result<(), LayerError> {
        match self.open.take() {
            Some(Open { entry, parent, .. }) => meta::dress(parent, name_of(&entry.path), &entry),
            None => Ok(()),
        }
    }

    /// The directory that `path` is in, and its name there.
    fn parent<'a>(&mut self, path: &'a Path) -> Result<(Arc<OwnedFd>, &'a OsStr), LayerError> {
        let above = path.parent().unwrap_or(Path::new(""));
        if above.as_os_str().is_empty() {
            return Ok((Arc::clone(&self.root), name_of(path)));
        }
        let dir = match &self.parent {
            Some((cached, dir)) if cached == above => Arc::clone(dir),
            _ => {
                let dir =
                    Arc::new(open_below(&self.root, above).map_err(LayerError::io("open", above))?);
                self.parent = Some((above.to_owned(), Arc::clone(&dir)));
                dir
            }
        };
        Ok((dir, name_of(path)))
    }
}

/// The kernel refuses any way out: symbolic links, `..`, mounts.
pub(crate) fn open_below(root: &OwnedFd, path: &Path) -> Result<OwnedFd, Errno> {
    let resolve = ResolveFlags::BENEATH
        | ResolveFlags::NO_SYMLINKS
        | ResolveFlags::NO_MAGICLINKS
        | ResolveFlags::NO_XDEV;
    openat2(
        root,
        path,
        OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC,
        Mode::empty(),
        resolve,
    )
}

pub(crate) fn look(
    parent: &OwnedFd,
    name: &OsStr,
    path: &Path,
) -> Result<Option<Inode>, LayerError> {
    match Inode::at(parent, name) {
        Ok(inode) => Ok(Some(inode)),
        Err(Errno::NOENT) => Ok(None),
        Err(errno) => Err(LayerError::io("look at", path)(errno)),
    }
}

/// The last name of a valid path; the root's is `.`.
pub(crate) fn name_of(path: &Path) -> &OsStr {
    path.file_name().unwrap_or(OsStr::new("."))
}

fn root_or(path: &Path) -> &Path {
    if path.as_os_str().is_empty() {
        Path::new(".")
    } else {
        path
    }
}
