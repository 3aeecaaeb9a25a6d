//! What another node says about a container that it wants to send, checked.

use std::collections::HashMap;
use std::path::{Path, PathBuf};

use anyhow::{Context as _, bail, ensure};
use containerd_client::services::v1::Container;
use containerd_client::types::Descriptor;
use migrate::offer::{Facts, Needs};
use nodeapi::PodContainer;
use oci_spec::runtime::{LinuxNamespaceType, Spec};
use prost::Message as _;
use proto::agent as pb;

use crate::containerd::image::is_digest;
use crate::containerd::task::Stdio;
use crate::pods::service::from_wire;
use crate::sweep::log_file;

/// A container with its specification; those of large pods have a few 10 KiB.
const CONTAINER_LIMIT_BYTES: usize = 2 << 20;
/// Facts, needs and networks are lists of a few 100 short entries at most.
const JSON_LIMIT_BYTES: usize = 256 << 10;
/// More than any image has (128 layers, configuration, manifest, index).
const BLOB_LIMIT: usize = 256;
/// A URI or a path: `PATH_MAX` and a scheme.
const STDIO_LIMIT_BYTES: usize = 4200;
/// Longest name in Kubernetes: a DNS subdomain.
const POD_NAME_LIMIT_BYTES: usize = 253;
/// containerd's own limit for identifiers (pkg/identifiers).
const IDENTIFIER_LIMIT: usize = 76;

/// An incoming container, as its source describes it. Sizes and names are
/// checked; whether it fits this node is another question.
#[derive(Debug)]
pub(crate) struct Plan {
    pub(crate) migration_id: String,
    pub(crate) source_node: String,
    pub(crate) namespace: String,
    pub(crate) container: Container,
    pub(crate) spec: Spec,
    pub(crate) facts: Facts,
    pub(crate) needs: Needs,
    pub(crate) image: ImagePlan,
    pub(crate) snapshot_labels: HashMap<String, String>,
    pub(crate) stdio: Stdio,
    pub(crate) network: Option<network::Description>,
    /// The container of a pod of this node that is to have the state. It is made
    /// by its kubelet: what this says of a container, its image and its network
    /// is empty then.
    pub(crate) pod: Option<PodContainer>,
}

/// The image, as the source has it.
#[derive(Debug, Default)]
pub(crate) struct ImagePlan {
    pub(crate) name: String,
    pub(crate) target: Descriptor,
    pub(crate) chain_id: String,
    pub(crate) labels: HashMap<String, String>,
    pub(crate) blobs: Vec<BlobPlan>,
}

#[derive(Debug, Clone)]
pub(crate) struct BlobPlan {
    pub(crate) digest: String,
    pub(crate) size: u64,
    /// Only needed to unpack: not asked for where that is done.
    pub(crate) layer: bool,
}

impl Plan {
    pub(crate) fn parse(source_node: &str, request: pb::BeginRequest) -> anyhow::Result<Self> {
        let migration_id = request.migration_id;
        ensure!(
            uuid::Uuid::try_parse(&migration_id).is_ok_and(|id| id.to_string() == migration_id),
            "the migration id is no UUID"
        );
        let namespace = request.namespace;
        check_identifier(&namespace).context("the namespace cannot be used")?;
        if let Some(name) = request.pod {
            return Ok(Self {
                migration_id,
                source_node: source_node.to_owned(),
                namespace,
                container: Container::default(),
                spec: Spec::default(),
                facts: json("facts", &request.facts_json)?.context("the offer has no facts")?,
                needs: json("needs", &request.needs_json)?.context("the offer has no needs")?,
                image: ImagePlan::default(),
                snapshot_labels: HashMap::new(),
                stdio: Stdio::default(),
                network: None,
                pod: Some(pod(name)?),
            });
        }
        ensure!(
            request.container.len() <= CONTAINER_LIMIT_BYTES,
            "the container's description has {} bytes: at most {CONTAINER_LIMIT_BYTES} are taken",
            request.container.len()
        );
        let container = Container::decode(request.container.as_ref())
            .context("cannot understand the container's description")?;
        check_identifier(&container.id).context("the container's id cannot be used")?;
        ensure!(
            !container.snapshotter.is_empty() && !container.snapshot_key.is_empty(),
            "the container has no snapshot"
        );
        let spec = spec(&container)?;
        let network: Option<network::Description> = json("network", &request.network_json)?;
        if let Some(network) = &network {
            network
                .validate()
                .context("the container's network cannot be used")?;
        }
        let stdio = request.stdio.unwrap_or_default();
        for uri in [&stdio.stdin, &stdio.stdout, &stdio.stderr] {
            ensure!(
                uri.len() <= STDIO_LIMIT_BYTES,
                "a path of the container's input or output is too long"
            );
        }
        Ok(Self {
            migration_id,
            source_node: source_node.to_owned(),
            namespace,
            spec,
            facts: json("facts", &request.facts_json)?.context("the offer has no facts")?,
            needs: json("needs", &request.needs_json)?.context("the offer has no needs")?,
            image: image(request.image.context("the offer has no image")?)?,
            snapshot_labels: request.snapshot_labels,
            stdio: Stdio {
                stdin: stdio.stdin,
                stdout: stdio.stdout,
                stderr: stdio.stderr,
                terminal: stdio.terminal,
            },
            network,
            container,
            pod: None,
        })
    }

    pub(crate) fn id(&self) -> &str {
        &self.container.id
    }

    /// The network namespace that the container expects by path.
    pub(crate) fn netns(&self) -> Option<PathBuf> {
        netns(&self.spec)
    }
}

/// JSON from a peer; nothing where nothing was sent.
pub(crate) fn json<T: serde::de::DeserializeOwned>(
    what: &'static str,
    bytes: &[u8],
) -> anyhow::Result<Option<T>> {
    if bytes.is_empty() {
        return Ok(None);
    }
    ensure!(
        bytes.len() <= JSON_LIMIT_BYTES,
        "the {what} are longer than {JSON_LIMIT_BYTES} bytes"
    );
    serde_json::from_slice(bytes)
        .map(Some)
        .with_context(|| format!("cannot understand the {what}"))
}

/// The OCI specification inside a container.
pub(crate) fn spec(container: &Container) -> anyhow::Result<Spec> {
    let any = container
        .spec
        .as_ref()
        .context("the container has no specification")?;
    serde_json::from_slice(&any.value).context("cannot understand the container's specification")
}

/// The network namespace that a specification names by path.
pub(crate) fn netns(spec: &Spec) -> Option<PathBuf> {
    spec.linux()
        .as_ref()?
        .namespaces()
        .iter()
        .flatten()
        .find(|namespace| namespace.typ() == LinuxNamespaceType::Network)?
        .path()
        .as_ref()
        .filter(|path| path.is_absolute())
        .cloned()
}

/// The cgroup that a specification names.
pub(crate) fn cgroup(spec: &Spec) -> Option<PathBuf> {
    spec.linux().as_ref()?.cgroups_path().clone()
}

/// What containerd takes as namespace or id (pkg/identifiers): safe in a path.
pub(crate) fn check_identifier(text: &str) -> anyhow::Result<()> {
    let alphanumeric = |b: Option<&u8>| b.is_some_and(u8::is_ascii_alphanumeric);
    let bytes = text.as_bytes();
    ensure!(
        bytes.len() <= IDENTIFIER_LIMIT
            && alphanumeric(bytes.first())
            && alphanumeric(bytes.last())
            && bytes
                .windows(2)
                .all(|pair| alphanumeric(pair.first()) || alphanumeric(pair.last()))
            && bytes
                .iter()
                .all(|b| b.is_ascii_alphanumeric() || b"._-".contains(b)),
        "{text:?} is no containerd identifier"
    );
    Ok(())
}

fn pod(name: pb::PodContainer) -> anyhow::Result<PodContainer> {
    for part in [&name.namespace, &name.pod, &name.uid, &name.container] {
        ensure!(
            part.len() <= POD_NAME_LIMIT_BYTES && part.bytes().all(|b| b.is_ascii_graphic()),
            "{part:?} is no name in Kubernetes"
        );
    }
    from_wire(name).context("the offer names no pod")
}

fn image(image: pb::Image) -> anyhow::Result<ImagePlan> {
    ensure!(!image.name.is_empty(), "the container's image has no name");
    ensure!(
        image.blobs.len() <= BLOB_LIMIT,
        "the image has {} blobs: at most {BLOB_LIMIT} are taken",
        image.blobs.len()
    );
    let target = image.target.context("the image has no target")?;
    for digest in image
        .blobs
        .iter()
        .map(|blob| &blob.digest)
        .chain([&target.digest, &image.chain_id])
    {
        if !is_digest(digest) {
            bail!("{digest:?} is no sha256 digest");
        }
    }
    let size = i64::try_from(target.size).context("the image's size is impossible")?;
    Ok(ImagePlan {
        name: image.name,
        target: Descriptor {
            media_type: target.media_type,
            digest: target.digest,
            size,
            ..Default::default()
        },
        chain_id: image.chain_id,
        labels: image.labels,
        blobs: image
            .blobs
            .into_iter()
            .map(|blob| BlobPlan {
                digest: blob.digest,
                size: blob.size,
                layer: blob.layer,
            })
            .collect(),
    })
}

/// Where the output of a container goes that arrives from `from`. Pipes have
/// their readers at home; here the output is kept in a file instead.
pub(crate) fn local_stdio(from: &Stdio, log_dir: &Path, namespace: &str, id: &str) -> Stdio {
    let log = format!("file://{}", log_file(log_dir, namespace, id).display());
    let redirect = |uri: &str| match uri {
        "" => String::new(),
        uri if uri.starts_with("file://") || uri.starts_with("binary://") => uri.to_owned(),
        _ => log.clone(),
    };
    Stdio {
        // Nobody here writes to it.
        stdin: String::new(),
        stdout: redirect(&from.stdout),
        stderr: redirect(&from.stderr),
        terminal: from.terminal,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn identifiers_are_containerds() {
        for good in ["web", "a", "web-1", "k8s.io", "a_b.c-d", "0"] {
            assert!(check_identifier(good).is_ok(), "{good}");
        }
        let long = "x".repeat(77);
        for bad in [
            "", ".", "..", "../x", "a/b", "a..b", "-a", "a-", "a b", "a\0", &long,
        ] {
            assert!(check_identifier(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn pipes_become_a_file_and_files_stay_what_they_are() {
        let from = Stdio {
            stdin: "/run/containerd/fifo/1/web-stdin".into(),
            stdout: "/run/containerd/fifo/1/web-stdout".into(),
            stderr: String::new(),
            terminal: false,
        };
        let here = local_stdio(&from, Path::new("/logs"), "default", "web");
        assert_eq!(here.stdin, "");
        assert_eq!(here.stdout, "file:///logs/default/web.log");
        assert_eq!(here.stderr, "");
        // On the next journey it is a file already.
        assert_eq!(
            local_stdio(&here, Path::new("/other"), "default", "web"),
            here
        );
        let binary = Stdio {
            stdout: "binary:///usr/bin/log?x=1".into(),
            ..Stdio::default()
        };
        assert_eq!(
            local_stdio(&binary, Path::new("/logs"), "d", "w").stdout,
            binary.stdout
        );
    }

    #[test]
    fn an_offer_that_is_not_one_is_refused_and_never_panics() {
        let good_id = "00000000-0000-4000-8000-000000000000";
        let request = |f: &dyn Fn(&mut pb::BeginRequest)| {
            let mut request = pb::BeginRequest {
                migration_id: good_id.into(),
                namespace: "default".into(),
                ..Default::default()
            };
            f(&mut request);
            format!("{:#}", Plan::parse("a", request).unwrap_err())
        };
        assert!(request(&|r| r.migration_id = "../x".into()).contains("UUID"));
        assert!(request(&|r| r.namespace = "../x".into()).contains("namespace"));
        assert!(request(&|r| r.container = vec![0xff; 9].into()).contains("understand"));
        assert!(request(&|r| r.container = vec![0; 3 << 20].into()).contains("at most"));
        let container = Container {
            id: "..".into(),
            ..Default::default()
        };
        assert!(request(&|r| r.container = container.encode_to_vec().into()).contains("id"));
        let container = Container {
            id: "web".into(),
            ..Default::default()
        };
        assert!(request(&|r| r.container = container.encode_to_vec().into()).contains("snapshot"));
    }

    #[test]
    fn a_network_namespace_is_one_with_a_path() {
        let spec = |namespaces: &str| -> Spec {
            serde_json::from_str(&format!(
                r#"{{"ociVersion": "1.0.0", "linux": {{"namespaces": {namespaces}}}}}"#
            ))
            .unwrap()
        };
        assert_eq!(netns(&spec("[]")), None);
        assert_eq!(netns(&spec(r#"[{"type": "network"}]"#)), None);
        assert_eq!(
            netns(&spec(r#"[{"type": "pid", "path": "/proc/1/ns/pid"}]"#)),
            None
        );
        assert_eq!(
            netns(&spec(r#"[{"type": "network", "path": "/run/netns/x"}]"#)),
            Some("/run/netns/x".into())
        );
    }
}
