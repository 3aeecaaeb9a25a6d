//! What a shim publishes about each of its containers.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use crate::rundir::{self, FileError, RunDir};

/// What Sterna is doing with a container; finer than containerd's task status.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum RunState {
    /// Created, not started.
    Created,
    /// Its processes run.
    Running,
    /// A client paused it.
    Paused,
    /// Its first process ended.
    Stopped,
    /// A checkpoint is being written.
    Checkpointing,
    /// It is on its way to another node, and runs or is frozen here.
    Sending,
    /// It stands still: another node may have it, and has not said yet.
    Undecided,
    /// It is expected from another node.
    Receiving,
    /// It runs here while its memory is still being filled in.
    Settling,
}

impl RunState {
    /// The word shown to people and in `--json`.
    pub fn name(self) -> &'static str {
        match self {
            Self::Created => "created",
            Self::Running => "running",
            Self::Paused => "paused",
            Self::Stopped => "stopped",
            Self::Checkpointing => "checkpointing",
            Self::Sending => "sending",
            Self::Undecided => "undecided",
            Self::Receiving => "receiving",
            Self::Settling => "settling",
        }
    }
}

/// One container under Sterna on this node. Its shim is the only writer.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ContainerRecord {
    /// containerd's namespace.
    pub namespace: String,
    /// containerd's container id.
    pub id: String,
    /// The OCI bundle.
    pub bundle: PathBuf,
    /// The shim that owns it.
    pub shim_pid: u32,
    /// The unix socket where that shim serves the task service and `sterna.shim.v1`.
    pub shim_socket: PathBuf,
    /// Its first process; 0 before start.
    pub pid: u32,
    /// What is happening to it.
    pub state: RunState,
}

impl ContainerRecord {
    /// Publishes this record in place of an older one.
    pub fn write(&self, dir: &RunDir) -> Result<(), FileError> {
        rundir::write_json(&dir.container(&self.namespace, &self.id), self)
    }

    /// Reads one record.
    pub fn read(dir: &RunDir, namespace: &str, id: &str) -> Result<Option<Self>, FileError> {
        rundir::read_json(&dir.container(namespace, id))
    }

    /// Takes the record away.
    pub fn remove(dir: &RunDir, namespace: &str, id: &str) -> Result<(), FileError> {
        rundir::remove(&dir.container(namespace, id))
    }

    /// All records, ordered by namespace and id. Records whose shim is dead are
    /// included: the caller sees that by `shim_pid`.
    pub fn list(dir: &RunDir) -> Result<Vec<Self>, FileError> {
        let mut records = Vec::new();
        for namespace in rundir::entries(&dir.containers())? {
            records.extend(rundir::read_all::<Self>(&namespace)?);
        }
        records.sort_by(|a, b| (&a.namespace, &a.id).cmp(&(&b.namespace, &b.id)));
        Ok(records)
    }
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;

    fn record(namespace: &str, id: &str) -> ContainerRecord {
        ContainerRecord {
            namespace: namespace.into(),
            id: id.into(),
            bundle: "/bundle".into(),
            shim_pid: 7,
            shim_socket: "/run/s".into(),
            pid: 8,
            state: RunState::Running,
        }
    }

    #[test]
    fn a_list_holds_what_was_written_and_not_what_was_removed() {
        let temp = tempfile::tempdir().unwrap();
        let dir = RunDir::at(temp.path().join("sterna"));
        assert_eq!(ContainerRecord::list(&dir).unwrap(), []);

        let (web, db) = (record("default", "web"), record("default", "db"));
        web.write(&dir).unwrap();
        db.write(&dir).unwrap();
        assert_eq!(ContainerRecord::list(&dir).unwrap(), [db.clone(), web]);

        ContainerRecord::remove(&dir, "default", "web").unwrap();
        ContainerRecord::remove(&dir, "default", "web").unwrap();
        assert_eq!(ContainerRecord::list(&dir).unwrap(), [db]);
    }

    #[test]
    fn a_record_that_is_not_ours_is_an_error_that_names_the_file() {
        let temp = tempfile::tempdir().unwrap();
        let dir = RunDir::at(temp.path());
        let path = dir.container("default", "web");
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(&path, "{").unwrap();
        let error = ContainerRecord::read(&dir, "default", "web").unwrap_err();
        assert!(error.to_string().contains("web.json"), "{error}");
    }
}
