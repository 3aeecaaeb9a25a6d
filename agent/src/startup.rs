//! What an earlier sternad left behind, looked at before anything new begins.
//!
//! Containers that were on their way here when it ended are left to their engines:
//! one that arrives is kept, one that does not is removed.

use std::fs;
use std::io;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use containerd_client::services::v1::Container;
use nodeapi::{ContainerRecord, RunState};
use tracing::Instrument as _;

use crate::arrivals::admission::{self, Fate};
use crate::arrivals::prepare;
use crate::node::Node;
use crate::process;

/// containerd may be starting, too.
const CONTAINERD_TIMEOUT: Duration = Duration::from_secs(60);
const CONTAINERD_PAUSE: Duration = Duration::from_millis(500);

/// How often a container that is still on its way is looked at. The engines'
/// timeouts end every migration.
const ARRIVAL_PAUSE: Duration = Duration::from_secs(1);

/// Cleans up in containerd. Nothing that fails here keeps sternad from serving.
/// What was made after `started` is the work of this process.
pub(crate) async fn clean_containerd(node: Arc<Node>, started: SystemTime) {
    let deadline = tokio::time::Instant::now() + CONTAINERD_TIMEOUT;
    while let Err(error) = clean_namespaces(&node, started).await {
        if tokio::time::Instant::now() >= deadline {
            tracing::warn!("cannot look for containers that never arrived: {error:#}");
            return;
        }
        tokio::time::sleep(CONTAINERD_PAUSE).await;
    }
}

/// Sockets that nobody listens on any more, permissions that nobody took, staged
/// files of migrations that are over.
///
/// To be called before anybody can begin a migration.
pub(crate) fn clean_files(node: &Node) -> io::Result<()> {
    let dir = &node.run_dir;
    for name in ["tickets", "engine"] {
        for socket in entries(&dir.path().join(name))? {
            if is_deserted(&socket) {
                fs::remove_file(&socket)?;
            }
        }
    }
    for namespace in entries(&dir.path().join("incoming"))? {
        for permission in entries(&namespace)? {
            fs::remove_file(&permission)?;
        }
    }
    let records = ContainerRecord::list(dir).unwrap_or_default();
    let busy = records.iter().any(|record| {
        matches!(
            record.state,
            RunState::Receiving | RunState::Settling | RunState::Sending | RunState::Undecided
        ) && process::is_alive(record.shim_pid)
    });
    // Whose staged files they are cannot be seen: they wait for a quiet moment.
    if !busy {
        for staged in entries(&dir.path().join("staging"))? {
            fs::remove_dir_all(&staged)?;
        }
    }
    Ok(())
}

/// Nobody listens on this socket any more.
pub(crate) fn is_deserted(socket: &Path) -> bool {
    match UnixStream::connect(socket) {
        Ok(_) => false,
        Err(error) => error.kind() == io::ErrorKind::ConnectionRefused,
    }
}

fn entries(directory: &Path) -> io::Result<Vec<std::path::PathBuf>> {
    match fs::read_dir(directory) {
        Ok(listing) => listing
            .map(|entry| entry.map(|entry| entry.path()))
            .collect(),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(Vec::new()),
        Err(error) => Err(error),
    }
}

async fn clean_namespaces(node: &Arc<Node>, started: SystemTime) -> anyhow::Result<()> {
    let older = |created: Option<prost_types::Timestamp>| {
        let created = created.and_then(|created| SystemTime::try_from(created).ok());
        created.is_none_or(|created| created < started)
    };
    for name in node.containerd.namespaces().await? {
        let containerd = node.containerd.namespace(&name)?;
        for container in containerd
            .containers_with_label(prepare::INCOMING_LABEL)
            .await?
        {
            if !older(container.created_at) {
                continue;
            }
            let span = tracing::info_span!("leftover", namespace = name, container = container.id);
            tokio::spawn(see_through(Arc::clone(node), name.clone(), container).instrument(span));
        }
        for lease in containerd.leases().await? {
            let migration = lease.id.strip_prefix("sterna-");
            let ours = migration.is_some_and(|id| uuid::Uuid::try_parse(id).is_ok());
            if ours && older(lease.created_at) {
                containerd.delete_lease(&lease.id).await?;
            }
        }
    }
    Ok(())
}

/// Waits until a container has arrived or will not.
async fn see_through(node: Arc<Node>, namespace: String, container: Container) {
    loop {
        let result = async {
            match admission::fate(&node, &namespace, &container.id)? {
                Fate::OnItsWay => return anyhow::Ok(false),
                Fate::Gone => admission::remove_leftover(&node, &namespace, &container).await?,
                Fate::Here => {
                    let containerd = node.containerd.namespace(&namespace)?;
                    prepare::mark_arrived(&containerd, &container.id, &container.labels).await?;
                    tracing::info!("arrived");
                }
            }
            Ok(true)
        };
        match result.await {
            Ok(true) => return,
            Ok(false) => {}
            Err(error) => {
                tracing::warn!("cannot decide about a container on its way: {error:#}");
                return;
            }
        }
        tokio::time::sleep(ARRIVAL_PAUSE).await;
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::net::UnixListener;

    use super::*;

    #[test]
    fn a_socket_without_a_listener_is_deserted() {
        let temp = tempfile::tempdir().unwrap();
        let path = temp.path().join("s");
        let listener = UnixListener::bind(&path).unwrap();
        assert!(!is_deserted(&path));
        drop(listener);
        assert!(is_deserted(&path));
        assert!(!is_deserted(&temp.path().join("none")));
    }
}
