//! What single processes hold that CRIU cannot dump.

use std::collections::BTreeSet;
use std::fs;
use std::os::unix::fs::{FileTypeExt as _, MetadataExt as _};
use std::path::Path;

use super::Findings;

/// Anonymous files that CRIU dumps (criu/files.c); others it does not know.
const KNOWN_ANONYMOUS: [&str; 7] = [
    "[eventfd]",
    "[eventpoll]",
    "[fanotify]",
    "[pidfd]",
    "[signalfd]",
    "[timerfd]",
    "inotify",
];

/// Protocols of sockets that CRIU refuses, as `system.sockprotoname` spells them.
const UNKNOWN_PROTOCOLS: [&str; 8] = [
    "MPTCP", "MPTCPv6", "SCTP", "SCTPv6", "AF_VSOCK", "ALG", "TIPC", "XDP",
];

/// Looks at one process; one that ends meanwhile is no finding.
pub(super) fn examine(pid: u32, findings: &mut Findings) {
    let root = Path::new("/proc").join(pid.to_string());
    let name = fs::read_to_string(root.join("comm")).unwrap_or_default();
    let process = format!("process {pid} ({})", name.trim());
    let mut problems = BTreeSet::new();
    for entry in fs::read_dir(root.join("fd"))
        .into_iter()
        .flatten()
        .flatten()
    {
        let path = entry.path();
        let Ok(target) = fs::read_link(&path) else {
            continue;
        };
        let target = target.to_string_lossy();
        problems.extend(match target.strip_prefix("anon_inode:") {
            Some(kind) => anonymous(kind),
            None if target.starts_with("socket:") => socket(&path),
            None => device(&path, &target),
        });
    }
    problems.extend(mapped_devices(&root));
    for (subject, text) in problems {
        findings.problem(subject, format!("{process} {text}"));
    }
}

type Problem = (&'static str, String);

fn anonymous(kind: &str) -> Option<Problem> {
    if KNOWN_ANONYMOUS.contains(&kind) {
        return None;
    }
    Some(match kind {
        "[io_uring]" => (
            "io_uring",
            "uses io_uring: start it again under Sterna without the annotation sterna.dev/keep-io-uring".into(),
        ),
        other => ("file", format!("has a {other} file, which CRIU cannot dump")),
    })
}

fn socket(path: &Path) -> Option<Problem> {
    let mut buffer = [0; 32];
    // A kernel without this attribute: nothing can be said.
    let length = rustix::fs::getxattr(path, "system.sockprotoname", &mut buffer[..]).ok()?;
    let name = buffer.get(..length)?;
    let name = String::from_utf8_lossy(name.strip_suffix(&[0]).unwrap_or(name));
    if !UNKNOWN_PROTOCOLS.contains(&&*name) {
        return None;
    }
    let remedy = if name.starts_with("MPTCP") {
        ": start it again under Sterna without the annotation sterna.dev/keep-mptcp"
    } else {
        ", which CRIU cannot dump"
    };
    Some(("socket", format!("has a {name} socket{remedy}")))
}

/// Open devices other than those that are the same everywhere.
fn device(path: &Path, target: &str) -> Option<Problem> {
    let metadata = fs::metadata(path).ok()?;
    let kind = metadata.file_type();
    if !kind.is_char_device() && !kind.is_block_device() {
        return None;
    }
    let number = metadata.rdev();
    let (major, minor) = (rustix::fs::major(number), rustix::fs::minor(number));
    (kind.is_block_device() || !is_common(major, minor)).then(|| {
        (
            "device",
            format!("has {target:?} open ({major}:{minor}), a device that CRIU cannot dump"),
        )
    })
}

/// Documentation/admin-guide/devices.txt: memory devices, terminals, tun.
fn is_common(major: u32, minor: u32) -> bool {
    matches!((major, minor), (1 | 4 | 5 | 136..=143, _) | (10, 200))
}

/// Memory of devices.
fn mapped_devices(root: &Path) -> Vec<Problem> {
    let maps = fs::read_to_string(root.join("maps")).unwrap_or_default();
    let devices: BTreeSet<&str> = maps
        .lines()
        .filter_map(|line| line.split_once('/').map(|(head, _)| &line[head.len()..]))
        .filter(|path| path.starts_with("/dev/"))
        .filter(|path| {
            let harmless = ["/dev/zero", "/dev/shm/"];
            !harmless.iter().any(|prefix| path.starts_with(prefix))
        })
        .collect();
    devices
        .into_iter()
        .map(|path| {
            (
                "device",
                format!("has memory of {path:?} mapped, which CRIU cannot dump"),
            )
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn known_files_pass_and_io_uring_is_named() {
        assert_eq!(anonymous("[eventfd]"), None);
        assert_eq!(anonymous("inotify"), None);
        assert_eq!(anonymous("[io_uring]").unwrap().0, "io_uring");
        assert!(anonymous("[perf_event]").unwrap().1.contains("perf_event"));
    }

    #[test]
    fn common_devices_are_no_problem() {
        assert!(is_common(1, 3) && is_common(5, 0) && is_common(136, 7) && is_common(10, 200));
        assert!(!is_common(10, 232) && !is_common(226, 0));
    }

    #[test]
    fn this_process_has_nothing_against_it() {
        let _socket = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let mut findings = Findings::new("test".into());
        examine(std::process::id(), &mut findings);
        assert!(findings.list.is_empty(), "{:?}", findings.list);
    }
}
