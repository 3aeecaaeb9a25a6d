//! The control group of a container, in either version.

use std::collections::BTreeMap;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use crate::rootfs::unescape;

/// Where a container's processes are accounted.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Cgroup {
    /// One directory for each controller.
    V1(BTreeMap<String, PathBuf>),
    /// One directory.
    V2(PathBuf),
}

/// How long a process may take to go after SIGKILL: one in a long system call
/// goes when that ends.
const KILL_LIMIT: Duration = Duration::from_secs(20);

impl Cgroup {
    /// That of a process, which has to live.
    pub(crate) fn of(pid: u32) -> io::Result<Self> {
        let mounts = fs::read_to_string("/proc/self/mountinfo")?;
        let groups = fs::read_to_string(format!("/proc/{pid}/cgroup"))?;
        find(&mounts, &groups).ok_or_else(|| io::ErrorKind::NotFound.into())
    }

    /// Directory of a controller; in version 2 that of all of them.
    pub(crate) fn directory(&self, controller: &str) -> Option<&Path> {
        match self {
            Self::V1(controllers) => controllers.get(controller).map(PathBuf::as_path),
            Self::V2(path) => Some(path),
        }
    }

    /// The directory whose processes are the container's.
    fn tasks(&self) -> Option<&Path> {
        match self {
            Self::V1(controllers) => ["freezer", "pids", "memory", "devices"]
                .iter()
                .find_map(|name| controllers.get(*name))
                .or_else(|| controllers.values().next())
                .map(PathBuf::as_path),
            Self::V2(path) => Some(path),
        }
    }

    /// All processes, those of groups below it too.
    pub(crate) fn processes(&self) -> io::Result<Vec<u32>> {
        let mut pids = Vec::new();
        if let Some(path) = self.tasks() {
            collect(path, &mut pids)?;
        }
        pids.sort_unstable();
        pids.dedup();
        Ok(pids)
    }

    /// Kills every process and waits until they are gone. None of them runs
    /// another instruction of its own: the signal is there before a frozen one
    /// is let go.
    pub(crate) async fn kill(&self) -> io::Result<()> {
        let deadline = Instant::now() + KILL_LIMIT;
        loop {
            let pids = match self.processes() {
                Ok(pids) => pids,
                Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
                Err(error) => return Err(error),
            };
            if pids.is_empty() {
                return Ok(());
            }
            if Instant::now() > deadline {
                return Err(io::ErrorKind::TimedOut.into());
            }
            self.kill_once(&pids);
            self.thaw();
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    }

    /// As [`kill`](Self::kill), however long it takes: for whoever then vouches
    /// that nothing is left.
    pub(crate) async fn kill_for_good(&self) {
        while let Err(error) = self.kill().await {
            tracing::error!(%error, cgroup = ?self, "processes outlive SIGKILL");
            tokio::time::sleep(Duration::from_secs(1)).await;
        }
    }

    fn kill_once(&self, pids: &[u32]) {
        if let Self::V2(path) = self
            && fs::write(path.join("cgroup.kill"), "1").is_ok()
        {
            return;
        }
        for pid in pids {
            if let Err(error) = sys::signal::send(pid.cast_signed(), libc::SIGKILL)
                && error.raw_os_error() != Some(libc::ESRCH)
            {
                tracing::warn!(%error, pid, "cannot kill a process");
            }
        }
    }

    /// Lets frozen processes go; those that are not are not disturbed.
    fn thaw(&self) {
        let (file, word) = match self {
            Self::V1(controllers) => match controllers.get("freezer") {
                Some(path) => (path.join("freezer.state"), "THAWED"),
                None => return,
            },
            // Version 2 lets frozen processes die.
            Self::V2(_) => return,
        };
        if let Err(error) = fs::write(&file, word) {
            tracing::debug!(%error, file = %file.display(), "cannot thaw");
        }
    }

    /// Removes the directories of a group without processes.
    pub(crate) fn remove(&self) {
        let paths: Vec<&PathBuf> = match self {
            Self::V1(controllers) => controllers.values().collect(),
            Self::V2(path) => vec![path],
        };
        for path in paths {
            if let Err(error) = fs::remove_dir(path) {
                tracing::debug!(%error, path = %path.display(), "a control group is left");
            }
        }
    }

    /// In version 2, has every controller of the root passed down to this
    /// group, so that its files are there. Best effort, as in the Go shim.
    pub(crate) fn enable_controllers(&self) {
        let Self::V2(path) = self else {
            return;
        };
        let root = Path::new("/sys/fs/cgroup");
        let Ok(controllers) = fs::read_to_string(root.join("cgroup.controllers")) else {
            return;
        };
        let Some(parent) = path.parent() else {
            return;
        };
        let wanted: Vec<String> = controllers
            .split_whitespace()
            .map(|controller| format!("+{controller}"))
            .collect();
        let mut ancestors: Vec<&Path> = parent
            .ancestors()
            .take_while(|ancestor| ancestor.starts_with(root))
            .collect();
        ancestors.reverse();
        for ancestor in ancestors {
            for controller in &wanted {
                if let Err(error) = fs::write(ancestor.join("cgroup.subtree_control"), controller) {
                    tracing::debug!(%error, controller, "cannot pass a controller down");
                }
            }
        }
    }
}

/// Kills every process in the group `path` of every hierarchy and waits until they
/// are gone. Blocks.
pub(crate) fn kill_in(path: &Path) -> io::Result<()> {
    let relative = path
        .strip_prefix("/")
        .map_err(|_| io::ErrorKind::InvalidInput)?;
    let mounts = fs::read_to_string("/proc/self/mountinfo")?;
    let groups: Vec<PathBuf> = mount_points(&mounts)
        .into_iter()
        .map(|point| point.join(relative))
        .filter(|group| group.is_dir())
        .collect();
    let deadline = Instant::now() + KILL_LIMIT;
    loop {
        let mut pids = Vec::new();
        for group in &groups {
            match collect(group, &mut pids) {
                Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
                _ => {}
            }
        }
        if pids.is_empty() {
            return Ok(());
        }
        if Instant::now() > deadline {
            return Err(io::ErrorKind::TimedOut.into());
        }
        for pid in pids {
            // One that is gone is what is wanted; the others are met again.
            drop(sys::signal::send(pid.cast_signed(), libc::SIGKILL));
        }
        for group in &groups {
            // Frozen ones of version 1 die when they are let go.
            drop(fs::write(group.join("freezer.state"), "THAWED"));
        }
        std::thread::sleep(Duration::from_millis(5));
    }
}

/// Removes the group `path` of every hierarchy, also of a version 2 that has no
/// controllers beside those of version 1: of a container that runc had not finished.
pub(crate) fn remove_in(path: &Path) {
    let mounts = fs::read_to_string("/proc/self/mountinfo").unwrap_or_default();
    let Ok(relative) = path.strip_prefix("/") else {
        return;
    };
    for group in mount_points(&mounts)
        .iter()
        .map(|point| point.join(relative))
    {
        match fs::remove_dir(&group) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => {
                tracing::debug!(%error, group = %group.display(), "a control group is left");
            }
            _ => {}
        }
    }
}

/// Moves a process of ours to the group `path` of every hierarchy that has it.
pub(crate) fn join(pid: u32, path: &str) -> io::Result<()> {
    let path = path.trim_start_matches('/');
    let mut joined = false;
    for point in mount_points(&fs::read_to_string("/proc/self/mountinfo")?) {
        let procs = point.join(path).join("cgroup.procs");
        if procs.exists() {
            fs::write(&procs, pid.to_string())?;
            joined = true;
        }
    }
    match joined {
        true => Ok(()),
        false => Err(io::ErrorKind::NotFound.into()),
    }
}

fn mount_points(mountinfo: &str) -> Vec<PathBuf> {
    mountinfo
        .lines()
        .filter(|line| line.contains(" - cgroup"))
        .filter_map(|line| line.split(' ').nth(4))
        .map(|point| PathBuf::from(unescape(point)))
        .collect()
}

fn collect(path: &Path, pids: &mut Vec<u32>) -> io::Result<()> {
    let procs = match fs::read_to_string(path.join("cgroup.procs")) {
        Ok(procs) => procs,
        // A threaded group of version 2 has none; its processes are listed above it.
        Err(error) if error.raw_os_error() == Some(libc::EOPNOTSUPP) => String::new(),
        Err(error) if error.raw_os_error() == Some(libc::ENODEV) => return Ok(()),
        Err(error) => return Err(error),
    };
    pids.extend(procs.lines().filter_map(|line| line.parse::<u32>().ok()));
    for entry in fs::read_dir(path)? {
        let entry = entry?;
        if entry.file_type()?.is_dir() {
            match collect(&entry.path(), pids) {
                Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
                _ => {}
            }
        }
    }
    Ok(())
}

/// Puts /proc/PID/cgroup and our mounts together. A version 2 hierarchy counts
/// only where no version 1 controller is mounted: beside these it has none.
fn find(mountinfo: &str, groups: &str) -> Option<Cgroup> {
    let mut v1 = BTreeMap::new();
    let mut v2 = None;
    for line in mountinfo.lines() {
        let mut halves = line.split(" - ");
        let (Some(first), Some(second)) = (halves.next(), halves.next()) else {
            continue;
        };
        let first: Vec<&str> = first.split(' ').collect();
        let second: Vec<&str> = second.split(' ').collect();
        let (Some(root), Some(point)) = (first.get(3), first.get(4)) else {
            continue;
        };
        let (root, point) = (unescape(root), PathBuf::from(unescape(point)));
        match second.first() {
            Some(&"cgroup2") => {
                if let Some(path) = group_path(groups, "") {
                    v2 = v2.or_else(|| Some(below(&point, &root, path)));
                }
            }
            Some(&"cgroup") => {
                for name in second.get(2).unwrap_or(&"").split(',') {
                    if let Some(path) = group_path(groups, name) {
                        v1.entry(name.to_owned())
                            .or_insert_with(|| below(&point, &root, path));
                    }
                }
            }
            _ => {}
        }
    }
    if v1.keys().any(|name| !name.starts_with("name=")) {
        return Some(Cgroup::V1(v1));
    }
    v2.map(Cgroup::V2)
}

/// The path of a controller in /proc/PID/cgroup; of version 2 for no name.
fn group_path<'a>(groups: &'a str, controller: &str) -> Option<&'a str> {
    groups.lines().find_map(|line| {
        let mut fields = line.splitn(3, ':');
        let (_, names, path) = (fields.next()?, fields.next()?, fields.next()?);
        names
            .split(',')
            .any(|name| name == controller)
            .then_some(path)
    })
}

/// A mount shows only what is below its root, and so does the path when we
/// share its control group namespace.
fn below(point: &Path, root: &str, path: &str) -> PathBuf {
    let path = match path.strip_prefix(root) {
        Some(rest) if root != "/" && (rest.is_empty() || rest.starts_with('/')) => rest,
        _ => path,
    };
    point.join(path.trim_start_matches('/'))
}

#[cfg(test)]
mod tests {
    use super::*;

    const V1: &str = "\
30 25 0:26 / /sys/fs/cgroup ro - tmpfs tmpfs ro
31 30 0:27 / /sys/fs/cgroup/unified rw - cgroup2 cgroup2 rw
32 30 0:28 / /sys/fs/cgroup/cpu,cpuacct rw - cgroup cgroup rw,cpu,cpuacct
33 30 0:29 / /sys/fs/cgroup/memory rw - cgroup cgroup rw,memory
34 30 0:30 /node/a /sys/fs/cgroup/freezer rw shared:9 - cgroup cgroup rw,freezer
35 30 0:31 / /sys/fs/cgroup/systemd rw - cgroup cgroup rw,name=systemd
";

    #[test]
    fn version_1_has_a_directory_for_each_controller() {
        let groups = "4:cpu,cpuacct:/default/web\n3:memory:/default/web\n\
                      2:freezer:/node/a/default/web\n1:name=systemd:/x\n0::/\n";
        let cgroup = find(V1, groups).unwrap();
        for (controller, path) in [
            ("cpuacct", "/sys/fs/cgroup/cpu,cpuacct/default/web"),
            ("memory", "/sys/fs/cgroup/memory/default/web"),
            ("freezer", "/sys/fs/cgroup/freezer/default/web"),
        ] {
            assert_eq!(cgroup.directory(controller), Some(Path::new(path)));
        }
        assert_eq!(cgroup.directory("pids"), None);
        assert_eq!(
            cgroup.tasks(),
            Some(Path::new("/sys/fs/cgroup/freezer/default/web"))
        );
    }

    #[test]
    fn version_2_alone_has_one_directory() {
        let mounts = "30 25 0:26 / /sys/fs/cgroup rw - cgroup2 cgroup2 rw\n";
        let cgroup = find(mounts, "0::/default/web\n").unwrap();
        assert_eq!(
            cgroup,
            Cgroup::V2(PathBuf::from("/sys/fs/cgroup/default/web"))
        );
        assert_eq!(find("", "0::/default/web\n"), None);
    }

    #[test]
    fn processes_of_groups_below_count() {
        let dir = tempfile::tempdir().unwrap();
        fs::create_dir(dir.path().join("below")).unwrap();
        fs::write(dir.path().join("cgroup.procs"), "5\n3\n").unwrap();
        fs::write(dir.path().join("below/cgroup.procs"), "4\n").unwrap();
        let cgroup = Cgroup::V2(dir.path().to_owned());
        assert_eq!(cgroup.processes().unwrap(), [3, 4, 5]);
    }
}
