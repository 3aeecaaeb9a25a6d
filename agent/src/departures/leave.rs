//! Removes a container that runs on another node from this one.

use std::fs;
use std::io;
use std::os::unix::fs::FileTypeExt as _;
use std::path::Path;
use std::time::Duration;

use anyhow::Context as _;

use super::describe::Described;
use crate::arrivals::plan::log_file;
use crate::arrivals::prepare::remove_network;
use crate::containerd::task::Stdio;
use crate::node::Node;

/// From the engine's last word to the exit that containerd sees.
const EXIT_TIMEOUT: Duration = Duration::from_secs(30);

/// Where containerd's clients make pipes for a container's output.
const FIFO_DIRECTORIES: [&str; 2] = ["/run/containerd/fifo", "/run/containerd/io"];

/// Task, container, snapshot, network namespace and pipes. Every step is tried;
/// returns what failed, for people.
pub(crate) async fn leave(node: &Node, described: &Described) -> Vec<String> {
    let container = &described.container;
    let id = &container.id;
    let mut problems = Vec::new();
    let mut note = |result: anyhow::Result<()>| {
        if let Err(error) = result {
            problems.push(format!("{error:#}"));
        }
    };
    let containerd = match node.containerd.namespace(&described.namespace) {
        Ok(containerd) => containerd,
        Err(error) => return vec![format!("{error:#}")],
    };
    let ended = async {
        containerd.wait_task(id, EXIT_TIMEOUT).await?;
        containerd.delete_task(id).await?;
        remove_pipes(&described.stdio)
    };
    let ended = ended.await;
    let task_gone = ended.is_ok();
    note(ended);
    // A task that does not end keeps what it uses; people decide.
    if task_gone {
        note(containerd.delete_container(id).await.map_err(Into::into));
        note(
            containerd
                .remove_snapshot(&container.snapshotter, &container.snapshot_key)
                .await
                .map_err(Into::into),
        );
        if let Some((_, _, netns)) = &described.network {
            note(remove_network(netns).await);
        }
        note(remove_if_there(&log_file(
            &node.config.log_dir,
            &described.namespace,
            id,
        )));
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

/// Removes logs of containers that are gone: `exists` says which are not.
pub(crate) fn sweep_logs(log_dir: &Path, exists: impl Fn(&str, &str) -> bool) -> io::Result<()> {
    let namespaces = match fs::read_dir(log_dir) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        other => other?,
    };
    for namespace in namespaces {
        let namespace = namespace?;
        for log in fs::read_dir(namespace.path())? {
            let log = log?.path();
            let Some(id) = log.file_stem().and_then(|id| id.to_str()) else {
                continue;
            };
            let known = namespace
                .file_name()
                .to_str()
                .is_none_or(|name| exists(name, id));
            if log.extension().is_some_and(|extension| extension == "log") && !known {
                fs::remove_file(&log)?;
            }
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn logs_of_containers_that_are_gone_are_swept_and_others_stay() {
        let temp = tempfile::tempdir().unwrap();
        let directory = temp.path().join("default");
        fs::create_dir(&directory).unwrap();
        for name in ["web.log", "db.log", "notes.txt"] {
            fs::write(directory.join(name), "x").unwrap();
        }
        sweep_logs(temp.path(), |namespace, id| {
            (namespace, id) == ("default", "web")
        })
        .unwrap();
        let mut left: Vec<_> = fs::read_dir(&directory)
            .unwrap()
            .map(|e| e.unwrap().file_name())
            .collect();
        left.sort();
        assert_eq!(left, ["notes.txt", "web.log"]);
        sweep_logs(&temp.path().join("none"), |_, _| false).unwrap();
    }

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
