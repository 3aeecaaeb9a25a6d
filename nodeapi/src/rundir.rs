//! The directory where Sterna's processes of one node meet.

use std::fs::{self, DirBuilder, File, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use serde::{Serialize, de::DeserializeOwned};

/// Layout of `/run/sterna`.
///
/// ```text
/// containers/NAMESPACE/ID.json   one record per container, written by its shim
/// incoming/NAMESPACE/ID.json     permission to receive it, written by sternad, taken by the shim
/// engine/MIGRATION.sock          sterna.engine.v1 of a running migration
/// tickets/TICKET.sock            where sternad hands over accepted connections
/// commits/MIGRATION.json         commit records of outgoing migrations
/// arrivals/TICKET.json, .decided arrival records: what became of tickets used here
/// staging/MIGRATION/             CRIU images of an incoming container
/// sternad.sock                   sterna.agent.v1 for the command line
/// ```
#[derive(Debug, Clone)]
pub struct RunDir(PathBuf);

impl Default for RunDir {
    fn default() -> Self {
        Self(PathBuf::from("/run/sterna"))
    }
}

impl RunDir {
    /// A run directory elsewhere, for tests.
    pub fn at(path: impl Into<PathBuf>) -> Self {
        Self(path.into())
    }

    /// The directory itself.
    pub fn path(&self) -> &Path {
        &self.0
    }

    /// Record of one container.
    pub fn container(&self, namespace: &str, id: &str) -> PathBuf {
        self.0
            .join("containers")
            .join(namespace)
            .join(format!("{id}.json"))
    }

    /// Where records of containers lie, one directory per namespace.
    pub fn containers(&self) -> PathBuf {
        self.0.join("containers")
    }

    /// Permission to receive one container.
    pub fn incoming(&self, namespace: &str, id: &str) -> PathBuf {
        self.0
            .join("incoming")
            .join(namespace)
            .join(format!("{id}.json"))
    }

    /// Socket of a running migration's engine.
    pub fn engine_socket(&self, migration_id: &str) -> PathBuf {
        self.0.join("engine").join(format!("{migration_id}.sock"))
    }

    /// Socket to which sternad hands the connections of one ticket.
    pub fn ticket_socket(&self, ticket_id: &str) -> PathBuf {
        self.0.join("tickets").join(format!("{ticket_id}.sock"))
    }

    /// Commit record of an outgoing migration.
    pub fn commit_record(&self, migration_id: &str) -> PathBuf {
        self.commits().join(format!("{migration_id}.json"))
    }

    /// Where commit records lie.
    pub fn commits(&self) -> PathBuf {
        self.0.join("commits")
    }

    /// What became of a ticket that was to be used here.
    pub fn arrival_record(&self, ticket_id: &str) -> PathBuf {
        self.arrivals().join(format!("{ticket_id}.json"))
    }

    /// Where arrival records lie.
    pub fn arrivals(&self) -> PathBuf {
        self.0.join("arrivals")
    }

    /// Where an incoming container's CRIU images are collected.
    pub fn staging(&self, migration_id: &str) -> PathBuf {
        self.0.join("staging").join(migration_id)
    }

    /// sternad's socket for the command line.
    pub fn agent_socket(&self) -> PathBuf {
        self.0.join("sternad.sock")
    }
}

/// A file of the run directory that could not be used.
#[derive(Debug, thiserror::Error)]
pub enum FileError {
    /// The file system said no.
    #[error("cannot {action} {path}")]
    Io {
        /// What was tried: read, write, remove, list.
        action: &'static str,
        /// The file.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// The content is not what this version of Sterna writes.
    #[error("cannot understand {path}")]
    Format {
        /// The file.
        path: PathBuf,
        /// Where it goes wrong.
        #[source]
        source: serde_json::Error,
    },
}

pub(crate) fn io_error<'a>(
    action: &'static str,
    path: &'a Path,
) -> impl FnOnce(io::Error) -> FileError + 'a {
    move |source| FileError::Io {
        action,
        path: path.to_owned(),
        source,
    }
}

/// Makes the directory of `path`, readable by root alone.
pub(crate) fn make_parent(path: &Path) -> Result<(), FileError> {
    let Some(parent) = path.parent() else {
        return Ok(());
    };
    DirBuilder::new()
        .recursive(true)
        .mode(0o700)
        .create(parent)
        .map_err(io_error("create", parent))
}

/// Replaces `path` as a whole or not at all: readers never see half a file.
pub(crate) fn write_json<T: Serialize>(path: &Path, value: &T) -> Result<(), FileError> {
    make_parent(path)?;
    let text = serde_json::to_vec_pretty(value).map_err(|source| FileError::Format {
        path: path.to_owned(),
        source,
    })?;
    let partial = path.with_extension("json.partial");
    let write = || -> io::Result<()> {
        let mut file: File = OpenOptions::new()
            .write(true)
            .create(true)
            .truncate(true)
            .mode(0o600)
            .open(&partial)?;
        file.write_all(&text)?;
        fs::rename(&partial, path)
    };
    write().map_err(io_error("write", path))
}

/// Reads `path`; `None` where there is no such file.
pub(crate) fn read_json<T: DeserializeOwned>(path: &Path) -> Result<Option<T>, FileError> {
    let text = match fs::read(path) {
        Ok(text) => text,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(io_error("read", path)(error)),
    };
    serde_json::from_slice(&text)
        .map(Some)
        .map_err(|source| FileError::Format {
            path: path.to_owned(),
            source,
        })
}

/// Reads every `.json` of a directory, which may not be there.
pub(crate) fn read_all<T: DeserializeOwned>(directory: &Path) -> Result<Vec<T>, FileError> {
    let mut all = Vec::new();
    for path in entries(directory)? {
        if path
            .extension()
            .is_some_and(|extension| extension == "json")
        {
            // One may vanish between listing and reading.
            all.extend(read_json::<T>(&path)?);
        }
    }
    Ok(all)
}

/// What is in a directory, which may not be there.
pub(crate) fn entries(directory: &Path) -> Result<Vec<PathBuf>, FileError> {
    let listing = match fs::read_dir(directory) {
        Ok(listing) => listing,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(error) => return Err(io_error("list", directory)(error)),
    };
    listing
        .map(|entry| {
            entry
                .map(|entry| entry.path())
                .map_err(io_error("list", directory))
        })
        .collect()
}

/// Removes `path`; that it was not there is fine.
pub(crate) fn remove(path: &Path) -> Result<(), FileError> {
    match fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => {
            Err(io_error("remove", path)(error))
        }
        _ => Ok(()),
    }
}
