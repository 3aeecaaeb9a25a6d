//! A second opinion on what is in a tree: plain paths and the standard library,
//! nothing of the code under test.

#![allow(dead_code, reason = "each test file uses a part")]

use std::collections::BTreeMap;
use std::ffi::{CString, OsStr};
use std::fs;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};

use rustix::fs::{XattrFlags, lgetxattr, llistxattr, lsetxattr};
use sterna_layer::{Item, LayerError, Limits, PassReport, Placer, Scanner};
use tempfile::TempDir;

/// Everything about a file that has to arrive.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct File {
    pub(crate) mode: u32,
    pub(crate) owner: (u32, u32),
    pub(crate) mtime: (i64, i64),
    pub(crate) device: u64,
    pub(crate) content: Content,
    /// All names of the same inode in this tree.
    pub(crate) names: Vec<PathBuf>,
    pub(crate) xattrs: BTreeMap<Vec<u8>, Vec<u8>>,
}

#[derive(PartialEq, Eq)]
pub(crate) enum Content {
    Bytes(Vec<u8>),
    /// Of a file too large to read: its size and its ends.
    Sparse(u64, Vec<u8>, Vec<u8>),
    Target(PathBuf),
    None,
}

impl std::fmt::Debug for Content {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Bytes(bytes) => write!(f, "{} bytes", bytes.len()),
            Self::Sparse(size, ..) => write!(f, "{size} bytes, sparse"),
            Self::Target(target) => write!(f, "-> {target:?}"),
            Self::None => write!(f, "-"),
        }
    }
}

/// A tree, file by file.
pub(crate) fn walk(root: &Path) -> BTreeMap<PathBuf, File> {
    let mut files = BTreeMap::new();
    let mut names: BTreeMap<u64, Vec<PathBuf>> = BTreeMap::new();
    visit(root, root, &mut files, &mut names);
    for file in files.values_mut() {
        let ino = file
            .names
            .pop()
            .unwrap()
            .to_string_lossy()
            .parse::<u64>()
            .unwrap();
        file.names = names[&ino].clone();
    }
    files
}

fn visit(
    root: &Path,
    path: &Path,
    files: &mut BTreeMap<PathBuf, File>,
    names: &mut BTreeMap<u64, Vec<PathBuf>>,
) {
    let about = fs::symlink_metadata(path).unwrap();
    let relative = path.strip_prefix(root).unwrap().to_owned();
    names.entry(about.ino()).or_default().push(relative.clone());
    let content = if about.is_file() && about.len() > 64 << 20 {
        use std::os::unix::fs::FileExt;
        let file = fs::File::open(path).unwrap();
        let (mut head, mut tail) = (vec![0; 1 << 20], vec![0; 1 << 20]);
        file.read_exact_at(&mut head, 0).unwrap();
        file.read_exact_at(&mut tail, about.len() - (1 << 20))
            .unwrap();
        Content::Sparse(about.len(), head, tail)
    } else if about.is_file() {
        Content::Bytes(fs::read(path).unwrap())
    } else if about.is_symlink() {
        Content::Target(fs::read_link(path).unwrap())
    } else {
        Content::None
    };
    let kind = about.file_type();
    let is_device = kind.is_char_device() || kind.is_block_device();
    files.insert(
        relative,
        File {
            mode: about.mode(),
            owner: (about.uid(), about.gid()),
            mtime: (about.mtime(), about.mtime_nsec()),
            device: if is_device { about.rdev() } else { 0 },
            content,
            names: vec![about.ino().to_string().into()],
            xattrs: xattrs(path),
        },
    );
    if about.is_dir() {
        for entry in fs::read_dir(path).unwrap() {
            visit(root, &entry.unwrap().path(), files, names);
        }
    }
}

pub(crate) fn xattrs(path: &Path) -> BTreeMap<Vec<u8>, Vec<u8>> {
    let mut names = vec![0; 65536];
    let length = llistxattr(path, &mut names[..]).unwrap_or(0);
    let mut all = BTreeMap::new();
    for name in names[..length]
        .split(|byte| *byte == 0)
        .filter(|name| !name.is_empty())
    {
        let mut value = vec![0; 65536];
        let length = lgetxattr(path, name, &mut value[..]).unwrap();
        value.truncate(length);
        all.insert(name.to_vec(), value);
    }
    all
}

pub(crate) fn set_xattr(path: &Path, name: &str, value: &[u8]) {
    let name = CString::new(name).unwrap();
    lsetxattr(path, &name, value, XattrFlags::empty()).unwrap();
}

/// Trees are equal, with a message that names the file.
pub(crate) fn assert_equal(source: &Path, copy: &Path) {
    let (mut left, mut right) = (walk(source), walk(copy));
    for (path, file) in std::mem::take(&mut left) {
        let copied = right.remove(&path);
        assert_eq!(Some(file), copied, "{path:?}");
    }
    assert!(
        right.is_empty(),
        "more than there should be: {:?}",
        right.keys()
    );
}

/// A source, its copy, and what connects them.
pub(crate) struct Pair {
    pub(crate) source: TempDir,
    pub(crate) copy: TempDir,
    pub(crate) scanner: Scanner,
    pub(crate) placer: Placer,
}

impl Pair {
    pub(crate) fn new() -> Self {
        let (source, copy) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        let scanner = Scanner::new(source.path()).unwrap();
        let placer = Placer::new(copy.path(), Limits::default()).unwrap();
        Self {
            source,
            copy,
            scanner,
            placer,
        }
    }

    pub(crate) fn at(&self, path: impl AsRef<Path>) -> PathBuf {
        self.source.path().join(path)
    }

    /// One pass, placed at once. Returns what went over as well.
    pub(crate) fn pass(&mut self, strict: bool) -> (PassReport, Vec<Item>) {
        let (scanner, placer) = (&mut self.scanner, &mut self.placer);
        let mut items = Vec::new();
        let report = scanner
            .pass(strict, &mut |item| {
                placer.apply(item.clone()).unwrap();
                items.push(item);
                Ok(())
            })
            .unwrap();
        placer.finish().unwrap();
        (report, items)
    }

    pub(crate) fn assert_equal(&self) {
        assert_equal(self.source.path(), self.copy.path());
    }
}

/// Paths of what a pass sent, with a mark of what was done to them.
pub(crate) fn told(items: &[Item]) -> Vec<String> {
    let told = |item: &Item| match item {
        Item::Entry(entry) if entry.keep => Some(format!("~{}", entry.path.display())),
        Item::Entry(entry) => Some(format!("+{}", entry.path.display())),
        Item::Remove(path) => Some(format!("-{}", path.display())),
        Item::Data { .. } => None,
    };
    items.iter().filter_map(told).collect()
}

pub(crate) fn is_root() -> bool {
    rustix::process::geteuid().is_root()
}

/// Says that a test did not run.
pub(crate) fn skipped(reason: &str) {
    eprintln!("skipped: {reason}");
}

pub(crate) fn apply_all(placer: &mut Placer, items: Vec<Item>) -> Result<(), LayerError> {
    items.into_iter().try_for_each(|item| placer.apply(item))?;
    placer.finish()
}

pub(crate) fn name(bytes: &[u8]) -> &OsStr {
    OsStr::from_bytes(bytes)
}
