//! What a scanner saw in a pass, for the next one to compare with.

use std::collections::{BTreeMap, HashMap};
use std::ffi::OsString;
use std::path::{Path, PathBuf};

use crate::content::Digests;
use crate::entry::Kind;
use crate::inode::{Key, Stamp};

/// One name in the tree.
#[derive(Debug)]
pub(crate) struct Node {
    pub(crate) key: Key,
    pub(crate) kind: Kind,
    pub(crate) children: BTreeMap<OsString, Node>,
}

/// One inode, whatever names it has.
#[derive(Debug)]
pub(crate) struct Known {
    pub(crate) stamp: Stamp,
    /// It changed so lately that it can change again without another stamp.
    pub(crate) fresh: bool,
    /// Of a regular file: what the receiver has.
    pub(crate) digests: Digests,
    /// The name that came first in the pass.
    pub(crate) leader: PathBuf,
    /// The receiver's file of that name is still the one that it had, so that
    /// other names of it need not be linked again.
    pub(crate) kept: bool,
}

/// All inodes of a pass.
pub(crate) type Inodes = HashMap<Key, Known>;

/// `path` and everything below it, children before parents.
pub(crate) fn subtree(path: &Path, node: &Node) -> Vec<PathBuf> {
    let mut paths = Vec::new();
    collect(path, node, &mut paths);
    paths
}

fn collect(path: &Path, node: &Node, paths: &mut Vec<PathBuf>) {
    for (name, child) in &node.children {
        collect(&join(path, name), child, paths);
    }
    paths.push(path.to_owned());
}

/// The path of `name` in the directory `path`; the root is `.`.
pub(crate) fn join(path: &Path, name: impl AsRef<Path>) -> PathBuf {
    if path == Path::new(".") {
        name.as_ref().to_owned()
    } else {
        path.join(name)
    }
}
