//! Moves a container's address between nodes: describe, prepare, attach, announce.

use serde::{Deserialize, Serialize};
use std::path::PathBuf;

/// How a container's address is attached to its node.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Attachment {
    /// The container's network namespace.
    pub netns: PathBuf,
}

/// A network namespace made ready for a container that is on its way.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Prepared {
    /// The container's network namespace.
    pub netns: PathBuf,
}
