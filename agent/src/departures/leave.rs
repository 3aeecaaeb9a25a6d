//! Removes a container that runs on another node from this one.

use std::fs;
use std::io;
use std::os::unix::fs::FileTypeExt as _;
use std::path::Path;
use std::time::Duration;

use anyhow::Context as _;

use super::note::Note;
use crate::arrivals::prepare::remove_network;
use crate::containerd::task::Stdio;
use crate::node::Node;
use crate::sweep::remove_log;

/// From the engine's last word to the exit that containerd sees.
const EXIT_TIMEOUT: Duration = Duration::from_secs(30);

/// Where containerd's clients make pipes for a container's output.
const FIFO_DIRECTORIES: [&str; 2] = ["/run/containerd/fifo", "/run/containerd/io"];

/// Task, container, snapshot, network namespace and pipes. Every step is tried;
/// returns what failed, for people.
pub(crate) async fn leave(node: &Node, note: &Note) -> Vec<String> {
    let (namespace, id) = (&note.record.namespace, &note.record.id);
    let mut problems = Vec::new();
    let mut tried = |result: anyhow::Result<()>| {
        if let Err(error) = result {
            problems.push(format!("{error:#}"));
        }
    };
    let containerd = match node.containerd.namespace(namespace) {
        Ok(containerd) => containerd,
        Err(error) => return vec![format!("{error:#}")],
    };
    let ended = async {
        containerd.wait_task(id, EXIT_TIMEOUT).await?;
        containerd.delete_task(id).await?;
        remove_pipes(&note.stdio)
    };
    let ended = ended.await;
    let task_gone = ended.is_ok();
    tried(ended);
    // A task that does not end keeps what it uses; people decide.
    if task_gone {
        tried(containerd.delete_container(id).await.map_err(Into::into));
        tried(
            containerd
                .remove_snapshot(&note.snapshotter, &note.snapshot_key)
                .await
                .map_err(Into::into),
        );
        if let Some(netns) = &note.netns {
            tried(remove_network(netns).await);
        }
        tried(
            remove_log(&node.config.log_dir, namespace, id)
                .context("cannot remove the container's log"),
        );
    }
    problems
}

/// What the client that started the container would have removed, had it deleted
/// the task itself.
fn remove_pipes(stdio: &Stdio) -> anyhow::Result<()> {
    for path in [&stdio.stdin, &stdio.stdout, &stdio.stderr].map(Path::new) {
        let ours = FIFO_DIRECTORIES
            .iter()
            .any(|directory| path.starts_with(directory));
        let is_pipe = fs::symlink_metadata(path).is_ok_and(|m| m.file_type().is_fifo());
        if !ours || !is_pipe {
            continue;
        }
        remove_if_there(path)?;
        if let Some(parent) = path.parent()
            && !FIFO_DIRECTORIES
                .iter()
                .any(|directory| parent == Path::new(directory))
        {
            // Still holds another stream's pipe: the last one takes it along.
            drop(fs::remove_dir(parent));
        }
    }
    Ok(())
}

fn remove_if_there(path: &Path) -> anyhow::Result<()> {
    match fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => {
            Err(error).with_context(|| format!("cannot remove {}", path.display()))
        }
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_pipes_in_containerds_directories_are_removed() {
        let temp = tempfile::tempdir().unwrap();
        let file = temp.path().join("out");
        fs::write(&file, "x").unwrap();
        let stdio = Stdio {
            stdout: file.display().to_string(),
            ..Stdio::default()
        };
        remove_pipes(&stdio).unwrap();
        assert!(file.exists());
    }
}
