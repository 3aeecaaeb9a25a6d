//! What can go wrong.

use std::io;
use std::path::{Path, PathBuf};

/// Whoever takes the items does not want any more.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("the receiver of files is gone")]
pub struct Stopped;

/// A tree that could not be read or built.
#[derive(Debug, thiserror::Error)]
pub enum LayerError {
    /// The file system said no.
    #[error("cannot {action} {path:?}")]
    Io {
        /// What was tried.
        action: &'static str,
        /// On what, relative to the root where it is below it.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// Something about a file cannot be carried.
    #[error("cannot carry {path:?}: {reason}")]
    Unsupported {
        /// The file.
        path: PathBuf,
        /// What about it.
        reason: &'static str,
    },
    /// A file changed during a strict pass, when nothing should run.
    #[error("{path:?} changed while everything should have stood still")]
    Changed {
        /// The file.
        path: PathBuf,
    },
    /// The peer sent what no scanner sends.
    #[error("cannot accept {path:?}: {reason}")]
    Invalid {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        reason: &'static str,
    },
    /// The peer sent more than was agreed.
    #[error("more than {limit} {what}")]
    Limit {
        /// Of what.
        what: &'static str,
        /// How much there may be.
        limit: u64,
    },
    /// An earlier pass or item failed: what the other side has is not known.
    #[error("the tree is in an unknown state after an earlier failure")]
    Broken,
    /// Nobody takes the items any more.
    #[error("the files are not wanted any more")]
    Stopped(#[from] Stopped),
}

impl LayerError {
    pub(crate) fn io(action: &'static str, path: &Path) -> impl FnOnce(rustix::io::Errno) -> Self {
        let path = path.to_owned();
        move |errno| Self::Io {
            action,
            path,
            source: errno.into(),
        }
    }
}
