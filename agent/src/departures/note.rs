//! What sternad must remember of a migration to tidy up after it, even if it is
//! restarted meanwhile: `departures/MIGRATION.json` in the run directory.
//!
//! Written before the engine starts, removed when this node has nothing left to do.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::Context as _;
use identity::NodeName;
use nodeapi::ContainerRecord;
use serde::{Deserialize, Serialize};

use super::Order;
use crate::containerd::task::Stdio;
use crate::node::Node;

/// One migration under way.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Note {
    pub(crate) migration_id: String,
    pub(crate) record: ContainerRecord,
    pub(crate) destination: String,
    pub(crate) snapshotter: String,
    pub(crate) snapshot_key: String,
    pub(crate) stdio: Stdio,
    /// The network namespace, if its address moves.
    pub(crate) netns: Option<PathBuf>,
    /// Uid of the pod that gets its state: the container here is its kubelet's to
    /// remove.
    #[serde(default)]
    pub(crate) into_pod: Option<String>,
}

impl Note {
    pub(crate) fn write(&self, node: &Node) -> anyhow::Result<()> {
        let path = path(node, &self.migration_id);
        let attempt = || -> io::Result<()> {
            if let Some(parent) = path.parent() {
                fs::create_dir_all(parent)?;
            }
            let partial = path.with_extension("partial");
            fs::write(&partial, serde_json::to_vec_pretty(self)?)?;
            fs::rename(&partial, &path)
        };
        attempt().with_context(|| format!("cannot write {}", path.display()))
    }

    pub(crate) fn remove(&self, node: &Node) {
        let path = path(node, &self.migration_id);
        if let Err(error) = fs::remove_file(&path) {
            tracing::warn!(%error, "cannot remove {}", path.display());
        }
    }

    /// All notes of an earlier sternad. One that cannot be understood is left for
    /// people to look at.
    pub(crate) fn list(node: &Node) -> Vec<Self> {
        let Ok(files) = fs::read_dir(directory(node)) else {
            return Vec::new();
        };
        let files = files.flatten().map(|file| file.path());
        files
            .filter(|file| {
                file.extension()
                    .is_some_and(|extension| extension == "json")
            })
            .filter_map(|file| match read(&file) {
                Ok(note) => Some(note),
                Err(error) => {
                    tracing::warn!("{error:#}");
                    None
                }
            })
            .collect()
    }

    /// The order that it came from, as far as it still matters.
    pub(crate) fn order(&self) -> anyhow::Result<Order> {
        Ok(Order {
            migration_id: self.migration_id.clone(),
            record: self.record.clone(),
            destination: self.destination.parse::<NodeName>()?,
            max_blackout: Duration::ZERO,
            deadline: None,
            into_pod: self.into_pod.clone(),
        })
    }
}

fn read(path: &Path) -> anyhow::Result<Note> {
    let text = fs::read(path).with_context(|| format!("cannot read {}", path.display()))?;
    serde_json::from_slice(&text).with_context(|| format!("cannot understand {}", path.display()))
}

fn directory(node: &Node) -> PathBuf {
    node.run_dir.path().join("departures")
}

fn path(node: &Node, migration_id: &str) -> PathBuf {
    directory(node).join(format!("{migration_id}.json"))
}
