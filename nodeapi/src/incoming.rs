//! The permission to receive one container, once.

use std::fmt;
use std::fs;
use std::io;
use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use crate::rundir::{self, FileError, RunDir, io_error};

/// The right to receive one container once.
///
/// The id is public (it is the TLS server name of the connections that belong
/// to it), the secret is not: it never appears in `Debug` output.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Ticket {
    /// Public name: lower-case letters, digits and dashes, valid as a DNS label.
    pub id: String,
    /// 32 random bytes in hexadecimal.
    pub secret: String,
}

impl fmt::Debug for Ticket {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Ticket")
            .field("id", &self.id)
            .finish_non_exhaustive()
    }
}

/// What sternad leaves for the shim that is about to create the container.
///
/// The shim's `Create` for the same namespace and id takes it and prepares to
/// receive instead of starting from nothing.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Incoming {
    /// The migration.
    pub migration_id: String,
    /// Who may send.
    pub ticket: Ticket,
    /// Name in the certificate of the node that may send.
    pub source_node: String,
    /// Directory with this node's certificate and key and the CA.
    pub identity_dir: PathBuf,
    /// The container's address, prepared but not attached; none where it does
    /// not move.
    pub network: Option<network::Prepared>,
    /// Most memory that may be staged, in bytes.
    pub memory_limit_bytes: u64,
    /// Directory where the container's writable layer lies (overlay upperdir);
    /// none where the root file system is read-only.
    pub upperdir: Option<PathBuf>,
}

impl Incoming {
    /// Leaves the permission for `namespace`/`id`.
    pub fn write(&self, dir: &RunDir, namespace: &str, id: &str) -> Result<(), FileError> {
        rundir::write_json(&dir.incoming(namespace, id), self)
    }

    /// Takes the permission, if there is one; a second caller gets none.
    pub fn take(dir: &RunDir, namespace: &str, id: &str) -> Result<Option<Self>, FileError> {
        let path = dir.incoming(namespace, id);
        let taken = path.with_extension("json.taken");
        match fs::rename(&path, &taken) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(io_error("take", &path)(error)),
            Ok(()) => {}
        }
        let incoming = rundir::read_json(&taken);
        rundir::remove(&taken)?;
        incoming
    }

    /// Withdraws a permission that nobody took.
    pub fn remove(dir: &RunDir, namespace: &str, id: &str) -> Result<(), FileError> {
        rundir::remove(&dir.incoming(namespace, id))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_permission_is_taken_once_and_hides_its_secret() {
        let temp = tempfile::tempdir().unwrap();
        let dir = RunDir::at(temp.path());
        let incoming = Incoming {
            migration_id: "m".into(),
            ticket: Ticket {
                id: "t".into(),
                secret: "hush".into(),
            },
            source_node: "a".into(),
            identity_dir: "/etc/sterna/pki".into(),
            network: None,
            memory_limit_bytes: 1,
            upperdir: None,
        };
        assert!(!format!("{incoming:?}").contains("hush"));
        incoming.write(&dir, "default", "web").unwrap();
        let taken = Incoming::take(&dir, "default", "web").unwrap().unwrap();
        assert_eq!(taken.ticket, incoming.ticket);
        assert!(Incoming::take(&dir, "default", "web").unwrap().is_none());
    }
}
