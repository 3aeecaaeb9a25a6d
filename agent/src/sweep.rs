//! Logs go with their container.
//!
//! sternad keeps the output of containers that arrived in files of its own, and
//! nobody else knows of them: so it removes them when containerd says that the
//! container was deleted.

use std::collections::HashSet;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use crate::node::Node;

/// While containerd is away.
const RETRY_PAUSE: Duration = Duration::from_secs(5);

/// Where the output of an arrived container is kept.
pub(crate) fn log_file(log_dir: &Path, namespace: &str, id: &str) -> PathBuf {
    log_dir.join(namespace).join(format!("{id}.log"))
}

/// Removes a log; that there is none is fine.
pub(crate) fn remove_log(log_dir: &Path, namespace: &str, id: &str) -> io::Result<()> {
    match fs::remove_file(log_file(log_dir, namespace, id)) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
        _ => Ok(()),
    }
}

/// Runs as long as sternad does.
pub(crate) async fn follow_deletions(node: Arc<Node>) {
    loop {
        // Deletions are lost while nobody listens: everything is looked at then.
        if let Err(error) = follow(&node).await {
            tracing::debug!("cannot follow containerd's events: {error:#}");
        }
        tokio::time::sleep(RETRY_PAUSE).await;
    }
}

async fn follow(node: &Node) -> anyhow::Result<()> {
    let mut deletions = node.containerd.container_deletions().await?;
    sweep(node).await?;
    while let Some((namespace, id)) = deletions.next().await? {
        remove_log(&node.config.log_dir, &namespace, &id)?;
    }
    Ok(())
}

/// Removes logs of containers that are gone.
async fn sweep(node: &Node) -> anyhow::Result<()> {
    // The logs first: whatever has one by now has a container by then.
    let logs = logs(&node.config.log_dir)?;
    let mut known = HashSet::new();
    for namespace in node.containerd.namespaces().await? {
        for id in node
            .containerd
            .namespace(&namespace)?
            .container_ids()
            .await?
        {
            known.insert(log_file(&node.config.log_dir, &namespace, &id));
        }
    }
    for log in logs.difference(&known) {
        fs::remove_file(log)?;
    }
    Ok(())
}

fn logs(log_dir: &Path) -> io::Result<HashSet<PathBuf>> {
    let mut logs = HashSet::new();
    let namespaces = match fs::read_dir(log_dir) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(logs),
        other => other?,
    };
    for namespace in namespaces {
        for file in fs::read_dir(namespace?.path())? {
            let file = file?.path();
            if file.extension().is_some_and(|extension| extension == "log") {
                logs.insert(file);
            }
        }
    }
    Ok(logs)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn logs_are_found_under_their_namespaces_and_removed_by_name() {
        let temp = tempfile::tempdir().unwrap();
        let directory = temp.path().join("default");
        fs::create_dir(&directory).unwrap();
        for name in ["web.log", "notes.txt"] {
            fs::write(directory.join(name), "x").unwrap();
        }
        let web = log_file(temp.path(), "default", "web");
        assert_eq!(logs(temp.path()).unwrap(), HashSet::from([web.clone()]));
        assert!(logs(&temp.path().join("none")).unwrap().is_empty());

        remove_log(temp.path(), "default", "web").unwrap();
        remove_log(temp.path(), "default", "web").unwrap();
        assert!(!web.exists());
    }
}
