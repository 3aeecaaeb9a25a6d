//! May a container come to this node?

use std::fs;
use std::os::unix::fs::FileTypeExt as _;
use std::path::{Path, PathBuf};

use containerd_client::services::v1::Container;
use migrate::offer::{self, Facts, Found, Needs, Refusal};
use nodeapi::{ContainerRecord, RunState};
use proto::agent as pb;

use super::plan::{BlobPlan, Plan};
use super::prepare::{INCOMING_LABEL, Made, NETNS_LABEL, take_back};
use crate::containerd::Namespace;
use crate::facts;
use crate::node::Node;
use crate::process;

/// All reasons against this container; leftovers of an earlier attempt are
/// removed first.
pub(crate) async fn refusals(node: &Node, plan: &Plan) -> anyhow::Result<Vec<pb::Reason>> {
    let containerd = node.containerd.namespace(&plan.namespace)?;
    let mut existing = containerd.container(plan.id()).await?;
    if let Some(container) = &existing
        && is_leftover(node, &plan.namespace, container)?
    {
        remove_leftover(node, &plan.namespace, container).await?;
        existing = containerd.container(plan.id()).await?;
    }
    let local = facts::gather(node).await?;
    let found = Found {
        container_exists: existing.is_some(),
        image_present: missing_blobs(node, plan).await?.is_empty(),
        ..find(&plan.needs)
    };
    let mut reasons = match offer::negotiate(&plan.facts, &plan.needs, &local, &found) {
        Ok(_) => Vec::new(),
        Err(refusals) => refusals.iter().map(reason).collect(),
    };
    if existing.is_none() {
        reasons.extend(check_snapshot(&containerd, plan).await?);
    }
    reasons.extend(check_network(node, plan));
    reasons.extend(check_memory_limit(node, plan));
    reasons.extend(check_runtime(&plan.container));
    Ok(reasons)
}

/// The nodes alone, or with a container's needs, without any side effect.
pub(crate) async fn negotiate(
    node: &Node,
    source: &Facts,
    needs: Option<&Needs>,
) -> anyhow::Result<Vec<pb::Reason>> {
    let local = facts::gather(node).await?;
    let (needs, found) = match needs {
        Some(needs) => {
            let containerd = node.containerd.namespace(&needs.namespace)?;
            let container_exists = containerd.container(&needs.id).await?.is_some();
            (
                needs.clone(),
                Found {
                    container_exists,
                    image_present: true,
                    ..find(needs)
                },
            )
        }
        None => (
            no_needs(),
            Found {
                image_present: true,
                ..Found::default()
            },
        ),
    };
    Ok(match offer::negotiate(source, &needs, &local, &found) {
        Ok(_) => Vec::new(),
        Err(refusals) => refusals.iter().map(reason).collect(),
    })
}

/// Of two nodes without a container between them.
fn no_needs() -> Needs {
    Needs {
        namespace: String::new(),
        id: String::new(),
        memory_bytes: 0,
        image: None,
        bind_sources: Vec::new(),
        namespace_paths: Vec::new(),
        devices: Vec::new(),
    }
}

/// A refusal as it goes to people and scripts.
pub(crate) fn reason(refusal: &Refusal) -> pb::Reason {
    let subject = match serde_json::to_value(refusal.code) {
        Ok(serde_json::Value::String(code)) => code,
        _ => String::new(),
    };
    pb::Reason {
        subject,
        text: refusal.sentence.clone(),
    }
}

fn find(needs: &Needs) -> Found {
    let missing = |paths: &[PathBuf]| -> Vec<PathBuf> {
        paths
            .iter()
            .filter(|path| !path.exists())
            .cloned()
            .collect()
    };
    Found {
        missing_bind_sources: missing(&needs.bind_sources),
        missing_namespace_paths: missing(&needs.namespace_paths),
        missing_devices: needs
            .devices
            .iter()
            .filter(|path| !is_device(path))
            .cloned()
            .collect(),
        ..Found::default()
    }
}

fn is_device(path: &Path) -> bool {
    fs::metadata(path).is_ok_and(|metadata| {
        metadata.file_type().is_char_device() || metadata.file_type().is_block_device()
    })
}

/// Blobs that the source has to send: layers only where they are not unpacked.
pub(crate) async fn missing_blobs(node: &Node, plan: &Plan) -> anyhow::Result<Vec<BlobPlan>> {
    let containerd = node.containerd.namespace(&plan.namespace)?;
    let snapshotter = &plan.container.snapshotter;
    let unpacked = containerd
        .snapshot(snapshotter, &plan.image.chain_id)
        .await?
        .is_some();
    let mut missing = Vec::new();
    for blob in &plan.image.blobs {
        if blob.layer && unpacked {
            continue;
        }
        if containerd.blob_size(&blob.digest).await?.is_none() {
            missing.push(blob.clone());
        }
    }
    Ok(missing)
}

/// Staged memory that the receiving engine accepts.
pub(crate) fn memory_limit(node: &Node, plan: &Plan) -> u64 {
    // The container may grow while it is copied: what it needs now is no limit,
    // twice that is, and it never has to be less than a gigabyte.
    let generous = plan.needs.memory_bytes.saturating_mul(2).max(1 << 30);
    node.config
        .limits
        .memory_bytes
        .map_or(generous, |limit| limit.min(generous))
}

pub(super) fn check_memory_limit(node: &Node, plan: &Plan) -> Option<pb::Reason> {
    let limit = node.config.limits.memory_bytes?;
    (plan.needs.memory_bytes > limit).then(|| pb::Reason {
        subject: "memory".into(),
        text: format!(
            "the container has {} MiB of memory, node {:?} takes at most {} MiB (limits.memory_bytes)",
            plan.needs.memory_bytes >> 20,
            node.name.as_str(),
            limit >> 20
        ),
    })
}

/// A snapshot that belongs to no container of ours must not be taken over.
async fn check_snapshot(containerd: &Namespace, plan: &Plan) -> anyhow::Result<Option<pb::Reason>> {
    let (snapshotter, key) = (&plan.container.snapshotter, &plan.container.snapshot_key);
    let Some(info) = containerd.snapshot(snapshotter, key).await? else {
        return Ok(None);
    };
    if info.labels.contains_key(INCOMING_LABEL) {
        containerd.remove_snapshot(snapshotter, key).await?;
        return Ok(None);
    }
    Ok(Some(pb::Reason {
        subject: "snapshot".into(),
        text: format!("there is a snapshot {key:?} already; remove it (ctr snapshots rm)"),
    }))
}

fn check_network(node: &Node, plan: &Plan) -> Option<pb::Reason> {
    let netns = plan.netns()?;
    let text = if plan.network.is_none() {
        // An address that does not move needs a namespace that is there.
        if netns.exists() {
            return None;
        }
        format!("the network namespace {netns:?} is not there; make it")
    } else if netns.exists() {
        format!("there is a network namespace {netns:?} already; remove it (ip netns delete)")
    } else {
        match &node.config.network.bridge {
            None => "no bridge is configured for containers with an address (network.bridge in sternad.toml)".into(),
            Some(bridge) if !Path::new("/sys/class/net").join(bridge).join("bridge").is_dir() => {
                format!("the configured bridge {bridge:?} is not there; make it")
            }
            Some(_) => return None,
        }
    };
    Some(pb::Reason {
        subject: "network".into(),
        text: format!("node {:?}: {text}", node.name.as_str()),
    })
}

/// A runtime that is named by path must be there; one that is named otherwise
/// containerd finds, or says that it does not.
fn check_runtime(container: &Container) -> Option<pb::Reason> {
    let name = &container.runtime.as_ref()?.name;
    let path = Path::new(name);
    (path.is_absolute() && !path.exists()).then(|| pb::Reason {
        subject: "runtime".into(),
        text: format!("the container's runtime {name:?} is not installed there; install Sterna at the same path"),
    })
}

/// What has become of a container that was expected here, by its shim's word.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Fate {
    /// Its engines are still at it.
    OnItsWay,
    /// It ran here, whatever became of it since: it is not ours to remove.
    Here,
    /// It never ran here and will not.
    Gone,
}

/// Reads the shim's record.
pub(crate) fn fate(node: &Node, namespace: &str, id: &str) -> Result<Fate, nodeapi::FileError> {
    let record = ContainerRecord::read(&node.run_dir, namespace, id)?;
    Ok(record.as_ref().map_or(Fate::Gone, fate_of))
}

fn fate_of(record: &ContainerRecord) -> Fate {
    match record.state {
        RunState::Receiving if process::is_alive(record.shim_pid) => Fate::OnItsWay,
        RunState::Receiving | RunState::Created => Fate::Gone,
        // A pid is given when the container runs for the first time.
        RunState::Stopped if record.pid == 0 => Fate::Gone,
        RunState::Stopped
        | RunState::Running
        | RunState::Paused
        | RunState::Checkpointing
        | RunState::Sending
        | RunState::Undecided
        | RunState::Settling => Fate::Here,
    }
}

/// Whether a container is one that never arrived: nobody is bringing it any more.
fn is_leftover(node: &Node, namespace: &str, container: &Container) -> anyhow::Result<bool> {
    Ok(container.labels.contains_key(INCOMING_LABEL)
        && fate(node, namespace, &container.id)? == Fate::Gone)
}

/// Removes a container that never arrived, and what was made for it.
pub(crate) async fn remove_leftover(
    node: &Node,
    namespace: &str,
    container: &Container,
) -> anyhow::Result<()> {
    // It names directories: a label that somebody else wrote must not.
    let migration_id = container
        .labels
        .get(INCOMING_LABEL)
        .and_then(|label| uuid::Uuid::try_parse(label).ok())
        .unwrap_or_default()
        .to_string();
    tracing::info!(
        namespace,
        container = container.id,
        migration_id,
        "removing a container that never arrived"
    );
    let made = Made {
        namespace: namespace.to_owned(),
        id: container.id.clone(),
        migration_id,
        lease: true,
        snapshot: Some((
            container.snapshotter.clone(),
            container.snapshot_key.clone(),
        )),
        netns: container.labels.get(NETNS_LABEL).map(PathBuf::from),
        container: true,
        incoming: true,
        ticket_id: None,
        task: true,
        cgroup: super::plan::spec(container)
            .ok()
            .and_then(|spec| super::plan::cgroup(&spec)),
        log: None,
        pod: false,
    };
    take_back(node, &made).await
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_missing_is_found_missing() {
        let needs = Needs {
            bind_sources: vec!["/".into(), "/nonexistent/data".into()],
            devices: vec![
                "/dev/null".into(),
                "/etc/hostname".into(),
                "/dev/none".into(),
            ],
            namespace_paths: vec!["/proc/self/ns/net".into(), "/run/netns/none".into()],
            ..no_needs()
        };
        let found = find(&needs);
        assert_eq!(
            found.missing_bind_sources,
            [PathBuf::from("/nonexistent/data")]
        );
        assert_eq!(
            found.missing_devices,
            ["/etc/hostname", "/dev/none"].map(PathBuf::from)
        );
        assert_eq!(
            found.missing_namespace_paths,
            [PathBuf::from("/run/netns/none")]
        );
    }

    #[test]
    fn a_container_that_ever_ran_here_is_never_taken_for_a_leftover() {
        let record = |state, pid, shim_pid| ContainerRecord {
            namespace: "default".into(),
            id: "web".into(),
            bundle: "/b".into(),
            shim_pid,
            shim_socket: "/s".into(),
            pid,
            state,
        };
        let (alive, dead) = (std::process::id(), 0);
        assert_eq!(
            fate_of(&record(RunState::Receiving, 0, alive)),
            Fate::OnItsWay
        );
        assert_eq!(fate_of(&record(RunState::Receiving, 0, dead)), Fate::Gone);
        assert_eq!(fate_of(&record(RunState::Stopped, 0, alive)), Fate::Gone);
        assert_eq!(fate_of(&record(RunState::Stopped, 7, alive)), Fate::Here);
        assert_eq!(fate_of(&record(RunState::Settling, 7, dead)), Fate::Here);
    }

    #[test]
    fn a_refusal_keeps_its_code() {
        let refusal = Refusal {
            code: offer::RefusalCode::CpuFlags,
            sentence: "x".into(),
        };
        assert_eq!(reason(&refusal).subject, "cpu-flags");
    }
}
