//! What is on disk about a state that waits: `record.json` in its directory.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Write as _};
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::{Path, PathBuf};

use anyhow::Context as _;
use jiff::Timestamp;
use migrate::commit::Format;
use migrate::parked::{Event, State};
use nodeapi::PodContainer;
use serde::{Deserialize, Serialize};

const FILE: &str = "record.json";

/// One container's state.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Record {
    pub(crate) format: Format,
    /// The pod that had it.
    pub(crate) pod: PodName,
    /// containerd's namespace.
    pub(crate) namespace: String,
    /// What this node was when it was written, and what the container needs: for the
    /// node that is to have it.
    pub(crate) facts: serde_json::Value,
    pub(crate) needs: serde_json::Value,
    pub(crate) since: Timestamp,
    pub(crate) state: State,
}

/// As [`PodContainer`], for the disk.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct PodName {
    pub(crate) namespace: String,
    pub(crate) pod: String,
    pub(crate) uid: String,
    pub(crate) container: String,
}

impl From<&PodContainer> for PodName {
    fn from(name: &PodContainer) -> Self {
        Self {
            namespace: name.namespace.clone(),
            pod: name.pod.clone(),
            uid: name.uid.clone(),
            container: name.container.clone(),
        }
    }
}

impl Record {
    /// Memory that the container had, in bytes.
    pub(crate) fn memory_bytes(&self) -> u64 {
        self.needs["memory_bytes"].as_u64().unwrap_or(0)
    }

    /// Moves it on, on disk first: an error means that it is as it was.
    pub(super) fn advance(&mut self, directory: &Path, event: Event) -> anyhow::Result<()> {
        let next = Self {
            state: self.state.step(event)?,
            ..self.clone()
        };
        next.write(directory)?;
        *self = next;
        Ok(())
    }

    /// Puts it in the place of the one that is there, as a whole, and waits until the
    /// disk has it.
    pub(super) fn write(&self, directory: &Path) -> anyhow::Result<()> {
        let path = directory.join(FILE);
        let partial = directory.join("record.partial");
        let write = || -> io::Result<()> {
            let mut file = OpenOptions::new()
                .write(true)
                .create(true)
                .truncate(true)
                .mode(0o600)
                .open(&partial)?;
            file.write_all(&serde_json::to_vec_pretty(self)?)?;
            file.sync_all()?;
            fs::rename(&partial, &path)?;
            File::open(directory)?.sync_all()
        };
        write().with_context(|| format!("cannot write {}", path.display()))
    }

    /// None: there is none.
    pub(super) fn read(directory: &Path) -> anyhow::Result<Option<Self>> {
        let path = directory.join(FILE);
        let text = match fs::read(&path) {
            Ok(text) => text,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(error) => {
                return Err(error).context(format!("cannot read {}", path.display()));
            }
        };
        serde_json::from_slice(&text)
            .map(Some)
            .with_context(|| format!("cannot understand {}", path.display()))
    }
}

/// Removes what a directory has beside its record, which is there at any time.
pub(super) fn remove_all_but_it(directory: &Path) -> anyhow::Result<()> {
    let remove = || -> io::Result<()> {
        for entry in fs::read_dir(directory)? {
            let entry = entry?;
            if entry.file_name() == FILE {
                continue;
            }
            if entry.file_type()?.is_dir() {
                fs::remove_dir_all(entry.path())?;
            } else {
                fs::remove_file(entry.path())?;
            }
        }
        Ok(())
    };
    remove().with_context(|| format!("cannot empty {}", directory.display()))
}

/// Where one container's state lies. The names come from the API server, and become
/// directories' names only if they are plain.
pub(super) fn directory(root: &Path, uid: &str, container: &str) -> anyhow::Result<PathBuf> {
    for name in [uid, container] {
        let plain = |c: char| c.is_ascii_alphanumeric() || c == '-';
        anyhow::ensure!(
            !name.is_empty() && name.len() <= 63 && name.chars().all(plain),
            "{name:?} cannot be a directory's name"
        );
    }
    Ok(root.join(uid).join(container))
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;

    pub(crate) fn record(state: State) -> Record {
        Record {
            format: Format::CURRENT,
            pod: PodName {
                namespace: "shop".into(),
                pod: "cart-0".into(),
                uid: "u-1".into(),
                container: "cache".into(),
            },
            namespace: "k8s.io".into(),
            facts: serde_json::json!({}),
            needs: serde_json::json!({"memory_bytes": 7}),
            since: Timestamp::UNIX_EPOCH,
            state,
        }
    }

    #[test]
    fn a_record_moves_on_only_as_it_may_and_on_disk_first() {
        let temp = tempfile::tempdir().unwrap();
        let mut is = record(State::Parked);
        assert_eq!(is.memory_bytes(), 7);
        is.write(temp.path()).unwrap();
        assert!(is.advance(temp.path(), Event::Ran).is_err());
        assert_eq!(Record::read(temp.path()).unwrap(), Some(is.clone()));
        is.advance(temp.path(), Event::Dropped).unwrap();
        let read = Record::read(temp.path()).unwrap().unwrap();
        assert_eq!(read.state, State::Gone);
        // A disk that takes nothing changes nothing.
        let mut lost = record(State::Parked);
        assert!(
            lost.advance(&temp.path().join("none"), Event::Dropped)
                .is_err()
        );
        assert_eq!(lost.state, State::Parked);
    }

    #[test]
    fn names_that_could_leave_the_directory_are_refused() {
        let root = Path::new("/r");
        assert_eq!(
            directory(root, "3f-1", "cache").unwrap(),
            Path::new("/r/3f-1/cache")
        );
        for name in ["", "..", "a/b", "a.b", &"x".repeat(64)] {
            assert!(directory(root, name, "cache").is_err(), "{name}");
            assert!(directory(root, "u", name).is_err(), "{name}");
        }
    }
}
