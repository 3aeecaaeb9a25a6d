//! What a node needs to send and receive containers.

use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use identity::NodeIdentity;
use proto::agent as pb;

use super::Findings;
use crate::facts;
use crate::node::Node;
use crate::probe::Probe;

/// The runtime that containerd starts, by the name it looks for.
const SHIM: &str = "containerd-shim-sterna-v1";

/// Where containerd finds it, whatever PATH sternad has.
const SHIM_DIRECTORIES: [&str; 4] = ["/usr/local/bin", "/usr/bin", "/usr/local/sbin", "/usr/sbin"];

/// Certificates are renewed with this much time left at the latest.
const RENEW_BEFORE: Duration = Duration::from_secs(30 * 24 * 60 * 60);

pub(super) async fn examine(node: &Node) -> Vec<pb::Finding> {
    let mut findings = Findings::new(format!("node {}", node.name));
    let (probe, runc, containerd) = tokio::join!(
        Probe::ask(),
        facts::runc_version(),
        node.containerd.version()
    );
    match probe {
        Ok(probe) => kernel_and_criu(&probe, &mut findings),
        Err(error) => findings.problem("self-test", format!("{error:#}")),
    }
    match runc {
        Some(version) if version < migrate::offer::OLDEST_RUNC => findings.problem(
            "runc",
            format!(
                "runc is {version}: {} or newer is needed",
                migrate::offer::OLDEST_RUNC
            ),
        ),
        Some(version) => findings.ok("runc", format!("runc {version}")),
        None => findings.problem("runc", "there is no runc in PATH: install it"),
    }
    match containerd {
        Ok(version) => findings.ok("containerd", format!("containerd {version}")),
        Err(error) => findings.problem(
            "containerd",
            format!(
                "{error} ({}): is it running?",
                node.config.containerd.display()
            ),
        ),
    }
    shim(&mut findings);
    bridge(node, &mut findings);
    certificates(&node.config.identity_dir, SystemTime::now(), &mut findings);
    findings.list
}

fn kernel_and_criu(probe: &Probe, findings: &mut Findings) {
    match &probe.no_tracking {
        None => findings.ok("tracking", "the kernel tracks writes: memory is copied while containers run"),
        Some(reason) => findings.warning(
            "tracking",
            format!("writes cannot be tracked, so all memory moves while a container stands still: {reason}"),
        ),
    }
    match &probe.userfaultfd {
        Ok(_) => findings.ok("userfaultfd", "userfaultfd works"),
        Err(reason) => findings.problem(
            "userfaultfd",
            format!("no userfaultfd ({reason}): containers cannot arrive; use a kernel with CONFIG_USERFAULTFD"),
        ),
    }
    match &probe.criu {
        Ok(version) => findings.ok("criu", format!("criu {version}")),
        Err(reason) => findings.problem("criu", reason.clone()),
    }
}

fn shim(findings: &mut Findings) {
    let path = std::env::var_os("PATH").unwrap_or_default();
    let found = std::env::split_paths(&path)
        .chain(SHIM_DIRECTORIES.map(PathBuf::from))
        .map(|directory| directory.join(SHIM))
        .find(|file| file.is_file());
    match found {
        Some(file) => findings.ok("shim", file.display().to_string()),
        None => findings.problem(
            "shim",
            format!(
                "{SHIM} is neither in PATH nor in {}: install it",
                SHIM_DIRECTORIES.join(", ")
            ),
        ),
    }
}

fn bridge(node: &Node, findings: &mut Findings) {
    match &node.config.network.bridge {
        None => findings.warning(
            "bridge",
            "network.bridge is not configured: containers with an address of their own cannot arrive",
        ),
        Some(bridge) if Path::new("/sys/class/net").join(bridge).join("bridge").is_dir() => {
            findings.ok("bridge", format!("bridge {bridge}"));
        }
        Some(bridge) => findings.problem(
            "bridge",
            format!("the configured bridge {bridge:?} is not there: make it, or change network.bridge"),
        ),
    }
}

/// As they are on disk now: the ones in use may have been replaced.
fn certificates(directory: &Path, now: SystemTime, findings: &mut Findings) {
    let identity = match NodeIdentity::load(directory) {
        Ok(identity) => identity,
        Err(error) => return findings.problem("certificate", error.to_string()),
    };
    let renew = "sternad enroll makes a new one";
    for (subject, certificate, remedy) in [
        ("certificate", identity.certificate(), renew),
        (
            "authority",
            identity.authority(),
            "sternad init-ca elsewhere, then enroll all nodes",
        ),
    ] {
        let until = crate::clock::date(certificate.not_after);
        let file = certificate.path.display();
        match certificate.remaining(now) {
            _ if certificate.not_before > now => findings.problem(
                subject,
                format!(
                    "{file} is good from {} only: check the clock",
                    crate::clock::date(certificate.not_before)
                ),
            ),
            None => findings.problem(subject, format!("{file} expired on {until}: {remedy}")),
            Some(left) if left < RENEW_BEFORE => {
                findings.warning(subject, format!("{file} expires on {until}: {remedy}"));
            }
            Some(_) => findings.ok(subject, format!("{file} is good until {until}")),
        }
    }
}

#[cfg(test)]
mod tests {
    use identity::{Authority, NODE_VALIDITY};
    use proto::agent::Severity;

    use super::*;

    fn certificate_severity(at: SystemTime) -> Severity {
        let temp = tempfile::tempdir().unwrap();
        let authority = Authority::init(temp.path()).unwrap();
        authority
            .enroll(&"a".parse().unwrap(), temp.path())
            .unwrap();
        let mut findings = Findings::new("node a".into());
        certificates(temp.path(), at, &mut findings);
        findings.list[0].severity()
    }

    #[test]
    fn certificates_are_complained_about_before_they_expire() {
        let now = SystemTime::now();
        assert_eq!(certificate_severity(now), Severity::Ok);
        assert_eq!(
            certificate_severity(now + NODE_VALIDITY - RENEW_BEFORE / 2),
            Severity::Warning
        );
        assert_eq!(
            certificate_severity(now + NODE_VALIDITY * 2),
            Severity::Problem
        );
        assert_eq!(certificate_severity(now - NODE_VALIDITY), Severity::Problem);
    }

    #[test]
    fn what_the_probe_lacks_is_a_problem_and_missing_tracking_is_not() {
        let mut findings = Findings::new("node a".into());
        let probe = Probe {
            no_tracking: Some("too old".into()),
            userfaultfd: Err("not permitted".into()),
            criu: Err("criu is not installed".into()),
        };
        kernel_and_criu(&probe, &mut findings);
        let severities: Vec<_> = findings.list.iter().map(pb::Finding::severity).collect();
        assert_eq!(
            severities,
            [Severity::Warning, Severity::Problem, Severity::Problem]
        );
    }
}
