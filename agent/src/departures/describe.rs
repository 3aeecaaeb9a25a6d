//! What a container is, for the node that is to have it.

use std::collections::HashMap;
use std::fs;
use std::path::{Path, PathBuf};

use anyhow::Context as _;
use containerd_client::services::v1::{Container, Image};
use containerd_client::types::Descriptor;
use containerd_client::types::v1::Process;
use migrate::offer::{Facts, ImageNeed, Needs};
use nodeapi::{ContainerRecord, PodAnnotations, PodContainer};
use oci_spec::runtime::{LinuxNamespaceType, Spec};
use prost::Message as _;
use proto::agent as pb;

use super::Order;
use super::note::Note;
use crate::arrivals::plan;
use crate::containerd::image::ImageContents;
use crate::containerd::task::Stdio;
use crate::containerd::{Namespace, snapshot};
use crate::node::Node;
use crate::pods::service::to_wire;
use crate::side::{Failure, Side};

/// Label by which containerd's CRI plugin marks what belongs to the kubelet.
const CRI_KIND_LABEL: &str = "io.cri-containerd.kind";

/// Snapshot labels that say how a snapshot is mounted (containerd's
/// core/snapshots): with them the writable layer means the same there.
const SNAPSHOT_LABEL_PREFIX: &str = "containerd.io/snapshot/";

/// Why a container is not described.
#[derive(Debug)]
pub(crate) enum Stop {
    /// It cannot be moved.
    Refused(Vec<pb::Reason>),
    /// It could not be found out.
    Failed(Failure),
}

impl From<anyhow::Error> for Stop {
    fn from(error: anyhow::Error) -> Self {
        Self::Failed(Failure::local(&error, Side::Source, Side::SourceContainerd))
    }
}

impl From<crate::containerd::CallError> for Stop {
    fn from(error: crate::containerd::CallError) -> Self {
        anyhow::Error::from(error).into()
    }
}

/// A container on this node, as far as another one must know it.
#[derive(Debug)]
pub(crate) struct Described {
    pub(crate) namespace: String,
    pub(crate) container: Container,
    pub(crate) spec: Spec,
    pub(crate) stdio: Stdio,
    pub(crate) pids: Vec<u32>,
    pub(crate) needs: Needs,
    /// Its address and how it is attached, if that can move; and the namespace.
    pub(crate) network: Option<(network::Description, network::Attachment, PathBuf)>,
    /// Where its state goes, if not the container itself moves.
    pod: Option<PodContainer>,
    /// None where it is not the source's to bring.
    image: Option<(Image, ImageContents)>,
    snapshot_labels: HashMap<String, String>,
}

/// Finds everything out; all reasons against moving the container at once.
/// `into_pod`: uid of the pod that is to have its state.
pub(crate) async fn describe(
    node: &Node,
    record: &ContainerRecord,
    into_pod: Option<&str>,
) -> Result<Described, Stop> {
    let containerd = node.containerd.namespace(&record.namespace)?;
    let gone = || anyhow::anyhow!("containerd does not know container {:?}", record.id);
    let container = containerd.container(&record.id).await?.ok_or_else(gone)?;
    let task = containerd.task(&record.id).await?.ok_or_else(gone)?;
    let pids = containerd.pids(&record.id).await?;
    let spec = plan::spec(&container)?;

    if let Some(uid) = into_pod {
        return describe_state(record, container, &task, pids, spec, uid, &containerd).await;
    }

    let mut reasons = Vec::new();
    check_owner(&container, &mut reasons);
    check_namespaces(&spec, &mut reasons);
    let (network, snapshot, image) = tokio::join!(
        describe_network(&spec),
        describe_snapshot(&containerd, &container),
        async {
            let parent = parent(&containerd, &container).await?;
            containerd.image_of_chain(&container.image, &parent).await
        },
    );
    let network = take(network, "network", &mut reasons);
    let snapshot_labels = take(snapshot, "snapshot", &mut reasons);
    let image = take(image, "image", &mut reasons);
    let (Some(network), Some(snapshot_labels), Some((image, contents))) =
        (network, snapshot_labels, image)
    else {
        return Err(Stop::Refused(reasons));
    };
    if !reasons.is_empty() {
        return Err(Stop::Refused(reasons));
    }
    let sendable = has_all(&containerd, &contents.blobs()).await?;
    let needs = needs(
        record,
        &container,
        &spec,
        &contents,
        sendable,
        &pids,
        network.is_some(),
    );
    Ok(Described {
        namespace: record.namespace.clone(),
        stdio: stdio(&task),
        container,
        spec,
        pids,
        needs,
        network,
        pod: None,
        image: Some((image, contents)),
        snapshot_labels,
    })
}

/// As [`describe`], where only the state travels: container, image, mounts and
/// network are the other pod's own.
async fn describe_state(
    record: &ContainerRecord,
    container: Container,
    task: &Process,
    pids: Vec<u32>,
    spec: Spec,
    uid: &str,
    containerd: &Namespace,
) -> Result<Described, Stop> {
    let mut reasons = Vec::new();
    let annotations = spec.annotations().as_ref();
    let pod = PodAnnotations::read(|name| Some(annotations?.get(name)?.as_str()));
    if pod.is_none() {
        let text = "the container belongs to no Kubernetes pod: only between pods can its state alone be sent";
        reasons.push(because("owner", text.into()));
    }
    check_pod_namespaces(&spec, &mut reasons);
    take(
        describe_snapshot(containerd, &container).await,
        "snapshot",
        &mut reasons,
    );
    let Some(pod) = pod.filter(|_| reasons.is_empty()) else {
        return Err(Stop::Refused(reasons));
    };
    Ok(Described {
        namespace: record.namespace.clone(),
        stdio: stdio(task),
        needs: Needs {
            namespace: record.namespace.clone(),
            id: record.id.clone(),
            memory_bytes: pids.iter().map(|pid| resident_bytes(*pid)).sum(),
            image: None,
            bind_sources: Vec::new(),
            namespace_paths: Vec::new(),
            devices: Vec::new(),
        },
        container,
        spec,
        pids,
        network: None,
        pod: Some(PodContainer {
            uid: uid.to_owned(),
            ..pod.name
        }),
        image: None,
        snapshot_labels: HashMap::new(),
    })
}

fn stdio(task: &Process) -> Stdio {
    Stdio {
        stdin: task.stdin.clone(),
        stdout: task.stdout.clone(),
        stderr: task.stderr.clone(),
        terminal: task.terminal,
    }
}

/// The value, or its absence as one more reason.
fn take<T>(result: anyhow::Result<T>, subject: &str, reasons: &mut Vec<pb::Reason>) -> Option<T> {
    match result {
        Ok(value) => Some(value),
        Err(error) => {
            reasons.push(because(subject, format!("{error:#}")));
            None
        }
    }
}

fn because(subject: &str, text: String) -> pb::Reason {
    pb::Reason {
        subject: subject.into(),
        text,
    }
}

fn check_owner(container: &Container, reasons: &mut Vec<pb::Reason>) {
    if container.labels.contains_key(CRI_KIND_LABEL) {
        reasons.push(because(
            "owner",
            "the container belongs to a Kubernetes pod, which the kubelet would start anew here"
                .into(),
        ));
    }
}

/// Namespaces by path belong to something that stays here.
fn check_namespaces(spec: &Spec, reasons: &mut Vec<pb::Reason>) {
    let namespaces = spec
        .linux()
        .as_ref()
        .and_then(|linux| linux.namespaces().as_ref());
    for namespace in namespaces.into_iter().flatten() {
        if let Some(path) = namespace.path()
            && namespace.typ() != LinuxNamespaceType::Network
        {
            reasons.push(because(
                "namespace",
                format!(
                    "the container shares the {} namespace {path:?}, which stays on this node",
                    namespace.typ()
                ),
            ));
        }
    }
}

/// A pod's containers share namespaces, and those of the other pod take their
/// place. Not with processes: they keep their numbers, which others may have there.
fn check_pod_namespaces(spec: &Spec, reasons: &mut Vec<pb::Reason>) {
    let namespaces = spec
        .linux()
        .as_ref()
        .and_then(|linux| linux.namespaces().as_ref());
    for namespace in namespaces.into_iter().flatten() {
        let shared = namespace.typ() == LinuxNamespaceType::Pid && namespace.path().is_some();
        if shared {
            let text = "the pod's containers share their processes (shareProcessNamespace)";
            reasons.push(because("namespace", text.into()));
        }
    }
}

async fn describe_network(
    spec: &Spec,
) -> anyhow::Result<Option<(network::Description, network::Attachment, PathBuf)>> {
    let Some(netns) = plan::netns(spec) else {
        return Ok(None);
    };
    let (description, attachment) = network::describe(&netns).await?;
    Ok(Some((description, attachment, netns)))
}

/// Labels of the container's snapshot, which must be an overlay: the writable
/// layer is copied from its upper directory.
async fn describe_snapshot(
    containerd: &Namespace,
    container: &Container,
) -> anyhow::Result<HashMap<String, String>> {
    let (snapshotter, key) = (&container.snapshotter, &container.snapshot_key);
    if snapshotter.is_empty() || key.is_empty() {
        anyhow::bail!(
            "the container has no snapshot: its root file system is a directory of this node"
        );
    }
    let info = containerd
        .snapshot(snapshotter, key)
        .await?
        .with_context(|| format!("snapshotter {snapshotter} does not know snapshot {key:?}"))?;
    let mounts = containerd.snapshot_mounts(snapshotter, key).await?;
    snapshot::upperdir(&mounts).with_context(|| {
        format!("snapshotter {snapshotter} makes no overlay: what the container wrote cannot be told from its image")
    })?;
    let keep = |(label, _): &(String, String)| label.starts_with(SNAPSHOT_LABEL_PREFIX);
    Ok(info.labels.into_iter().filter(keep).collect())
}

async fn parent(containerd: &Namespace, container: &Container) -> anyhow::Result<String> {
    let info = containerd
        .snapshot(&container.snapshotter, &container.snapshot_key)
        .await?;
    Ok(info.context("the container has no snapshot")?.parent)
}

async fn has_all(containerd: &Namespace, blobs: &[Descriptor]) -> anyhow::Result<bool> {
    for blob in blobs {
        if containerd.blob_size(&blob.digest).await?.is_none() {
            return Ok(false);
        }
    }
    Ok(true)
}

fn needs(
    record: &ContainerRecord,
    container: &Container,
    spec: &Spec,
    contents: &ImageContents,
    sendable: bool,
    pids: &[u32],
    has_address: bool,
) -> Needs {
    let devices = spec
        .linux()
        .as_ref()
        .and_then(|linux| linux.devices().as_ref());
    let namespace_paths = if has_address { None } else { plan::netns(spec) };
    Needs {
        namespace: record.namespace.clone(),
        id: record.id.clone(),
        memory_bytes: pids.iter().map(|pid| resident_bytes(*pid)).sum(),
        image: Some(ImageNeed {
            name: container.image.clone(),
            digest: contents.target.digest.clone(),
            sendable,
        }),
        bind_sources: bind_sources(spec),
        namespace_paths: namespace_paths.into_iter().collect(),
        devices: devices
            .into_iter()
            .flatten()
            .map(|device| device.path().clone())
            .collect(),
    }
}

/// Directories and files of the node that the container sees.
pub(crate) fn bind_sources(spec: &Spec) -> Vec<PathBuf> {
    spec.mounts()
        .iter()
        .flatten()
        .filter(|mount| {
            let options = mount.options().iter().flatten();
            mount.typ().as_deref() == Some("bind")
                || options
                    .into_iter()
                    .any(|option| option == "bind" || option == "rbind")
        })
        .filter_map(|mount| mount.source().clone())
        .collect()
}

/// Memory that a process holds and that is nobody's file, in bytes. Pages that
/// processes share count for each: so they do when they are staged.
fn resident_bytes(pid: u32) -> u64 {
    let path = Path::new("/proc").join(pid.to_string()).join("status");
    // A process that has just ended holds nothing.
    fs::read_to_string(path)
        .map(|status| anonymous_bytes(&status))
        .unwrap_or(0)
}

fn anonymous_bytes(status: &str) -> u64 {
    status
        .lines()
        .filter_map(|line| line.split_once(':'))
        .filter(|(name, _)| ["RssAnon", "RssShmem", "VmSwap"].contains(name))
        .filter_map(|(_, value)| value.trim().strip_suffix("kB")?.trim().parse::<u64>().ok())
        .map(|kib| kib * 1024)
        .sum()
}

impl Described {
    /// The pod that gets its state, or keeps it.
    pub(crate) fn pod(&self) -> Option<&PodContainer> {
        self.pod.as_ref()
    }

    /// The offer to the destination.
    pub(crate) fn offer(
        &self,
        migration_id: &str,
        facts: &Facts,
    ) -> anyhow::Result<pb::BeginRequest> {
        let state = pb::BeginRequest {
            migration_id: migration_id.to_owned(),
            namespace: self.namespace.clone(),
            facts_json: serde_json::to_vec(facts)?.into(),
            needs_json: serde_json::to_vec(&self.needs)?.into(),
            pod: self.pod.as_ref().map(to_wire),
            ..Default::default()
        };
        let Some((image, contents)) = &self.image else {
            return Ok(state);
        };
        let layers: Vec<&str> = contents.layers.iter().map(|l| l.digest.as_str()).collect();
        let blob = |descriptor: &Descriptor| pb::Blob {
            digest: descriptor.digest.clone(),
            size: u64::try_from(descriptor.size).unwrap_or(0),
            media_type: descriptor.media_type.clone(),
            layer: layers.contains(&descriptor.digest.as_str()),
        };
        let network_json = match &self.network {
            Some((description, _, _)) => serde_json::to_vec(description)?,
            None => Vec::new(),
        };
        Ok(pb::BeginRequest {
            container: self.container.encode_to_vec().into(),
            image: Some(pb::Image {
                name: self.container.image.clone(),
                target: Some(blob(&contents.target)),
                chain_id: contents.chain_id(),
                blobs: contents.blobs().iter().map(blob).collect(),
                labels: image.labels.clone(),
            }),
            stdio: Some(pb::Stdio {
                stdin: self.stdio.stdin.clone(),
                stdout: self.stdio.stdout.clone(),
                stderr: self.stdio.stderr.clone(),
                terminal: self.stdio.terminal,
            }),
            network_json: network_json.into(),
            snapshot_labels: self.snapshot_labels.clone(),
            ..state
        })
    }

    /// What has to be remembered of it.
    pub(crate) fn note(&self, order: &Order) -> Note {
        Note {
            migration_id: order.migration_id.clone(),
            record: order.record.clone(),
            destination: order.destination.to_string(),
            snapshotter: self.container.snapshotter.clone(),
            snapshot_key: self.container.snapshot_key.clone(),
            stdio: self.stdio.clone(),
            netns: self.network.as_ref().map(|(_, _, netns)| netns.clone()),
            into_pod: order.into_pod.clone(),
        }
    }

    /// How the engine takes the address off this node: JSON for the shim.
    pub(crate) fn attachment_json(&self) -> anyhow::Result<String> {
        Ok(match &self.network {
            Some((_, attachment, _)) => serde_json::to_string(attachment)?,
            None => String::new(),
        })
    }

    /// Size of a blob of the image.
    pub(crate) fn blob_size(&self, digest: &str) -> Option<u64> {
        let blobs = self.image.as_ref()?.1.blobs();
        let blob = blobs.iter().find(|blob| blob.digest == digest)?;
        u64::try_from(blob.size).ok()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn spec(text: &str) -> Spec {
        serde_json::from_str(text).unwrap()
    }

    #[test]
    fn bind_mounts_are_found_by_type_and_by_option() {
        let spec = spec(
            r#"{"ociVersion": "1.0.0", "mounts": [
                {"destination": "/proc", "type": "proc", "source": "proc"},
                {"destination": "/a", "type": "bind", "source": "/srv/a"},
                {"destination": "/b", "type": "none", "source": "/srv/b", "options": ["rbind", "ro"]}]}"#,
        );
        assert_eq!(bind_sources(&spec), ["/srv/a", "/srv/b"].map(PathBuf::from));
    }

    #[test]
    fn a_shared_namespace_is_a_reason_and_the_networks_is_not() {
        let spec = spec(
            r#"{"ociVersion": "1.0.0", "linux": {"namespaces": [
                {"type": "network", "path": "/run/netns/x"},
                {"type": "mount"},
                {"type": "ipc", "path": "/proc/1/ns/ipc"}]}}"#,
        );
        let mut reasons = Vec::new();
        check_namespaces(&spec, &mut reasons);
        assert_eq!(reasons.len(), 1);
        assert!(reasons[0].text.contains("ipc"), "{reasons:?}");
    }

    #[test]
    fn memory_is_what_no_file_backs() {
        let status = "VmRSS:\t  100 kB\nRssAnon:\t   60 kB\nRssFile:\t  30 kB\nRssShmem:\t  10 kB\nVmSwap:\t 5 kB\n";
        assert_eq!(anonymous_bytes(status), 75 * 1024);
        assert_eq!(anonymous_bytes(""), 0);
    }

    #[test]
    fn a_pods_container_is_the_kubelets() {
        let mut container = Container::default();
        let mut reasons = Vec::new();
        check_owner(&container, &mut reasons);
        assert!(reasons.is_empty());
        container
            .labels
            .insert(CRI_KIND_LABEL.into(), "container".into());
        check_owner(&container, &mut reasons);
        assert_eq!(reasons.len(), 1);
    }
}
