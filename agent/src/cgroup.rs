//! Which processes are left in a container's cgroup.

use std::fs;
use std::path::{Path, PathBuf};

const ROOT: &str = "/sys/fs/cgroup";

/// Whether a process is left in the cgroup that a specification names by an
/// absolute path. systemd's names (slice:prefix:name) are no paths: of those
/// containerd alone knows.
pub(crate) fn has_processes(cgroups_path: &Path) -> bool {
    has_processes_under(Path::new(ROOT), cgroups_path)
}

fn has_processes_under(root: &Path, cgroups_path: &Path) -> bool {
    let Ok(relative) = cgroups_path.strip_prefix("/") else {
        return false;
    };
    // v2 has one tree, v1 one for each controller below the root.
    let controllers = fs::read_dir(root).into_iter().flatten().flatten();
    let trees = controllers
        .map(|controller| controller.path())
        .chain([root.to_owned()]);
    trees
        .map(|tree| tree.join(relative))
        .any(|cgroup| is_populated(&cgroup))
}

/// Also looks below: a container may have made cgroups of its own.
fn is_populated(cgroup: &Path) -> bool {
    let processes = fs::read_to_string(cgroup.join("cgroup.procs"));
    if processes.is_ok_and(|processes| !processes.trim().is_empty()) {
        return true;
    }
    let children = fs::read_dir(cgroup).into_iter().flatten().flatten();
    let directories: Vec<PathBuf> = children
        .filter(|child| child.file_type().is_ok_and(|kind| kind.is_dir()))
        .map(|child| child.path())
        .collect();
    directories.iter().any(|child| is_populated(child))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn processes_are_found_in_either_layout_and_in_nested_cgroups() {
        let temp = tempfile::tempdir().unwrap();
        let path = Path::new("/default/web");
        assert!(!has_processes_under(temp.path(), path));
        for cgroup in [
            "default/web",
            "memory/default/web/inner",
            "pids/default/other",
        ] {
            fs::create_dir_all(temp.path().join(cgroup)).unwrap();
        }
        fs::write(temp.path().join("pids/default/other/cgroup.procs"), "7\n").unwrap();
        fs::write(temp.path().join("default/web/cgroup.procs"), "").unwrap();
        assert!(!has_processes_under(temp.path(), path));
        fs::write(
            temp.path().join("memory/default/web/inner/cgroup.procs"),
            "8\n",
        )
        .unwrap();
        assert!(has_processes_under(temp.path(), path));
        assert!(!has_processes_under(
            temp.path(),
            Path::new("system.slice:cri:web")
        ));
    }
}
