//! What stands against moving one container, and what it will cost.

use std::fs;
use std::path::{Path, PathBuf};

use oci_spec::runtime::{LinuxNamespaceType, Spec};

use super::{Findings, processes};
use crate::departures::Described;

/// Shared memory and tmpfs content are copied in the freeze: below this it does
/// not show (some 30 ms).
const NOTABLE_FROZEN_BYTES: u64 = 64 << 20;

/// File systems that CRIU knows how to mount again, or that runc mounts for it.
const KNOWN_FILE_SYSTEMS: [&str; 17] = [
    "autofs",
    "binfmt_misc",
    "cgroup",
    "cgroup2",
    "debugfs",
    "devpts",
    "devtmpfs",
    "fusectl",
    "mqueue",
    "overlay",
    "proc",
    "pstore",
    "securityfs",
    "sysfs",
    "tmpfs",
    "tracefs",
    "bpf",
];

pub(super) fn examine(described: &Described, findings: &mut Findings) {
    let before = findings.list.len();
    namespaces(&described.spec, findings);
    if described.stdio.terminal {
        findings.warning(
            "terminal",
            "the container has a terminal: it gets a new one there, with nobody at it",
        );
    }
    for source in crate::departures::bind_sources(&described.spec) {
        findings.warning(
            "mount",
            format!("{source:?} is mounted from this node: the other node's own content will be seen there"),
        );
    }
    for pid in &described.pids {
        processes::examine(*pid, findings);
    }
    if let Some(init) = described.pids.first() {
        mounts(*init, &described.spec, findings);
    }
    if findings.list.len() == before {
        findings.ok(
            "container",
            format!(
                "{} processes, {} MiB of memory, nothing known that could not be moved",
                described.pids.len(),
                described.needs.memory_bytes >> 20
            ),
        );
    }
}

fn namespaces(spec: &Spec, findings: &mut Findings) {
    let namespaces = spec
        .linux()
        .as_ref()
        .and_then(|linux| linux.namespaces().as_ref());
    let own = |kind: LinuxNamespaceType| {
        namespaces
            .into_iter()
            .flatten()
            .any(|namespace| namespace.typ() == kind)
    };
    if !own(LinuxNamespaceType::Pid) {
        findings.problem(
            "namespace",
            "the container shares the node's process ids: they cannot be had again",
        );
    }
    if !own(LinuxNamespaceType::Mount) {
        findings.problem("namespace", "the container shares the node's mounts");
    }
    if !own(LinuxNamespaceType::Ipc) {
        findings.warning(
            "namespace",
            "the container shares the node's System V IPC: objects in use stay here",
        );
    }
    if !own(LinuxNamespaceType::Network) {
        findings.warning(
            "network",
            "the container uses the node's network: its connections are closed, listeners come back",
        );
    }
}

/// Mounts that the container made itself, and memory that lies in files.
fn mounts(pid: u32, spec: &Spec, findings: &mut Findings) {
    let root = Path::new("/proc").join(pid.to_string());
    let Ok(mountinfo) = fs::read_to_string(root.join("mountinfo")) else {
        return; // it has just ended
    };
    let expected: Vec<&PathBuf> = spec
        .mounts()
        .iter()
        .flatten()
        .map(|mount| mount.destination())
        .collect();
    let mut in_memory = 0;
    for mount in mountinfo.lines().filter_map(Mount::parse) {
        if mount.kind == "tmpfs"
            && let Ok(usage) = rustix::fs::statvfs(root.join("root").join(mount.relative()))
        {
            in_memory += usage.f_blocks.saturating_sub(usage.f_bfree) * usage.f_frsize;
        }
        let of_spec = expected
            .iter()
            .any(|path| Path::new(&mount.point) == path.as_path());
        if !of_spec && mount.point != "/" && !KNOWN_FILE_SYSTEMS.contains(&mount.kind.as_str()) {
            findings.problem(
                "mount",
                format!(
                    "{:?} is a {} mount that CRIU cannot make again",
                    mount.point, mount.kind
                ),
            );
        }
    }
    if in_memory > NOTABLE_FROZEN_BYTES {
        findings.warning(
            "tmpfs",
            format!(
                "{} MiB in tmpfs are copied while the container stands still",
                in_memory >> 20
            ),
        );
    }
}

struct Mount {
    point: String,
    kind: String,
}

impl Mount {
    /// proc(5): id parent major:minor root point options [fields...] - type source super
    fn parse(line: &str) -> Option<Self> {
        let (left, right) = line.split_once(" - ")?;
        Some(Self {
            point: unescape(left.split(' ').nth(4)?),
            kind: right.split(' ').next()?.to_owned(),
        })
    }

    fn relative(&self) -> &Path {
        let path = Path::new(&self.point);
        path.strip_prefix("/").unwrap_or(path)
    }
}

/// The kernel writes blanks and backslashes of names in octal.
fn unescape(text: &str) -> String {
    [
        ("\\040", " "),
        ("\\011", "\t"),
        ("\\012", "\n"),
        ("\\134", "\\"),
    ]
    .iter()
    .fold(text.to_owned(), |text, (escaped, plain)| {
        text.replace(escaped, plain)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_mount_is_read_as_the_kernel_prints_it() {
        let line =
            "36 35 98:0 /mnt1 /a\\040b rw,noatime master:1 - ext3 /dev/root rw,errors=continue";
        let mount = Mount::parse(line).unwrap();
        assert_eq!(
            (mount.point.as_str(), mount.kind.as_str()),
            ("/a b", "ext3")
        );
        assert_eq!(mount.relative(), Path::new("a b"));
        assert!(Mount::parse("garbage").is_none());
    }

    #[test]
    fn shared_namespaces_are_told_apart_by_what_they_cost() {
        let spec: Spec = serde_json::from_str(
            r#"{"ociVersion": "1.0.0", "linux": {"namespaces": [{"type": "mount"}, {"type": "ipc"}]}}"#,
        )
        .unwrap();
        let mut findings = Findings::new("container default/web".into());
        namespaces(&spec, &mut findings);
        let subjects: Vec<_> = findings.list.iter().map(|f| f.subject.as_str()).collect();
        assert_eq!(subjects, ["namespace", "network"]);
    }
}
