//! Images: which blobs make one up, and how its layers are unpacked.

use std::collections::HashMap;

use anyhow::{Context as _, bail, ensure};
use containerd_client::services::v1::{
    CreateImageRequest, GetImageRequest, Image, ListImagesRequest,
};
use containerd_client::types::Descriptor;
use serde::Deserialize;
use sha2::{Digest as _, Sha256};
use tonic::Code;

use super::{CallError, Namespace, QUICK, failed, found};

/// Most layers of an image that we copy: overlayfs takes no more (containerd
/// fails above 128 too).
const LAYER_LIMIT: usize = 128;

/// An image for this node's platform, taken apart.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct ImageContents {
    /// What an image record points at: an index or a manifest.
    pub(crate) target: Descriptor,
    /// The index, where `target` is one.
    index: Option<(String, Vec<Descriptor>)>,
    manifest: Descriptor,
    pub(crate) config: Descriptor,
    pub(crate) layers: Vec<Descriptor>,
    diff_ids: Vec<String>,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct DescriptorJson {
    #[serde(default)]
    media_type: String,
    digest: String,
    size: u64,
    platform: Option<PlatformJson>,
}

#[derive(Deserialize)]
struct PlatformJson {
    architecture: String,
    os: String,
}

/// An index or a manifest: which one says what it has.
#[derive(Deserialize)]
struct DocumentJson {
    manifests: Option<Vec<DescriptorJson>>,
    config: Option<DescriptorJson>,
    layers: Option<Vec<DescriptorJson>>,
}

#[derive(Deserialize)]
struct ConfigJson {
    rootfs: RootfsJson,
}

#[derive(Deserialize)]
struct RootfsJson {
    diff_ids: Vec<String>,
}

impl From<DescriptorJson> for Descriptor {
    fn from(json: DescriptorJson) -> Self {
        Self {
            media_type: json.media_type,
            digest: json.digest,
            size: i64::try_from(json.size).unwrap_or(i64::MAX),
            annotations: HashMap::new(),
        }
    }
}

/// This node's architecture, as images spell it.
pub(crate) fn architecture() -> &'static str {
    match std::env::consts::ARCH {
        "x86_64" => "amd64",
        "aarch64" => "arm64",
        other => other,
    }
}

impl ImageContents {
    /// All blobs, children first.
    pub(crate) fn blobs(&self) -> Vec<Descriptor> {
        let mut blobs = self.layers.clone();
        blobs.push(self.config.clone());
        blobs.push(self.manifest.clone());
        if self.index.is_some() {
            blobs.push(self.target.clone());
        }
        blobs
    }

    /// Name of the snapshot that has all layers.
    pub(crate) fn chain_id(&self) -> String {
        self.chain_ids().pop().unwrap_or_default()
    }

    /// Names of the snapshots, one for each layer with those below it.
    fn chain_ids(&self) -> Vec<String> {
        let mut chain = Vec::<String>::with_capacity(self.diff_ids.len());
        for diff_id in &self.diff_ids {
            let id = match chain.last() {
                None => diff_id.clone(),
                // OCI image specification, config.md, "Layer ChainID".
                Some(below) => sha256(format!("{below} {diff_id}").as_bytes()),
            };
            chain.push(id);
        }
        chain
    }
}

fn sha256(bytes: &[u8]) -> String {
    let hex: String = Sha256::digest(bytes)
        .iter()
        .map(|byte| format!("{byte:02x}"))
        .collect();
    format!("sha256:{hex}")
}

/// `sha256:` and 64 hexadecimal digits: nothing else is accepted from a peer.
pub(crate) fn is_digest(text: &str) -> bool {
    text.strip_prefix("sha256:").is_some_and(|hex| {
        hex.len() == 64
            && hex
                .bytes()
                .all(|b| b.is_ascii_digit() || (b'a'..=b'f').contains(&b))
    })
}

/// The manifest for this platform. An index that names no platforms must have
/// one manifest only.
fn choose(manifests: Vec<DescriptorJson>) -> anyhow::Result<DescriptorJson> {
    let count = manifests.len();
    let mut fitting: Vec<_> = manifests
        .into_iter()
        .filter(|manifest| match &manifest.platform {
            Some(platform) => platform.os == "linux" && platform.architecture == architecture(),
            None => count == 1,
        })
        .collect();
    ensure!(
        !fitting.is_empty(),
        "the image has no manifest for linux/{} among its {count}",
        architecture()
    );
    Ok(fitting.swap_remove(0))
}

impl Namespace {
    pub(crate) async fn image(&self, name: &str) -> Result<Option<Image>, CallError> {
        let request = GetImageRequest { name: name.into() };
        let answer = self
            .client()
            .images()
            .get(self.request(request, QUICK))
            .await
            .map_err(failed(|| format!("look up image {name}")));
        Ok(found(answer)?.and_then(|response| response.into_inner().image))
    }

    /// Images whose name begins with `prefix`.
    async fn images_named(&self, prefix: &str) -> Result<Vec<Image>, CallError> {
        let request = ListImagesRequest {
            filters: Vec::new(),
        };
        let response = self
            .client()
            .images()
            .list(self.request(request, QUICK))
            .await
            .map_err(failed(|| "list images".into()))?;
        let images = response.into_inner().images;
        Ok(images
            .into_iter()
            .filter(|image| image.name.starts_with(prefix))
            .collect())
    }

    /// Records an image; that there is one of this name already is fine.
    pub(crate) async fn create_image(&self, image: Image) -> Result<(), CallError> {
        let name = image.name.clone();
        let request = CreateImageRequest {
            image: Some(image),
            source_date_epoch: None,
        };
        match self
            .client()
            .images()
            .create(self.request(request, QUICK))
            .await
        {
            Err(status) if status.code() == Code::AlreadyExists => Ok(()),
            other => other
                .map(drop)
                .map_err(failed(|| format!("record image {name}"))),
        }
    }

    /// Takes an image apart, for this platform.
    pub(crate) async fn image_contents(&self, target: Descriptor) -> anyhow::Result<ImageContents> {
        let top: DocumentJson = self.json(&target.digest).await?;
        let (index, manifest_descriptor, manifest) = match top.manifests {
            Some(manifests) => {
                let all = manifests
                    .iter()
                    .map(|m| Descriptor {
                        digest: m.digest.clone(),
                        ..Default::default()
                    })
                    .collect();
                let chosen = Descriptor::from(choose(manifests)?);
                let manifest = self.json(&chosen.digest).await?;
                (Some((target.digest.clone(), all)), chosen, manifest)
            }
            None => (None, target.clone(), top),
        };
        let (Some(config), Some(layers)) = (manifest.config, manifest.layers) else {
            bail!("blob {} is no image manifest", manifest_descriptor.digest);
        };
        let rootfs = self.json::<ConfigJson>(&config.digest).await?.rootfs;
        ensure!(
            layers.len() == rootfs.diff_ids.len()
                && !layers.is_empty()
                && layers.len() <= LAYER_LIMIT,
            "the image has {} layers and {} layer digests (1 to {LAYER_LIMIT} of both are expected)",
            layers.len(),
            rootfs.diff_ids.len(),
        );
        Ok(ImageContents {
            target,
            index,
            manifest: manifest_descriptor,
            config: config.into(),
            layers: layers.into_iter().map(Descriptor::from).collect(),
            diff_ids: rootfs.diff_ids,
        })
    }

    async fn json<T: serde::de::DeserializeOwned>(&self, digest: &str) -> anyhow::Result<T> {
        let text = self
            .document(digest)
            .await?
            .with_context(|| format!("blob {digest} of the image is not in the content store"))?;
        serde_json::from_slice(&text).with_context(|| format!("cannot understand blob {digest}"))
    }

    /// The image that a snapshot on `chain_id` was made from: the one of that
    /// name, or, where the name points elsewhere by now, one that an earlier
    /// migration recorded as NAME@DIGEST.
    pub(crate) async fn image_of_chain(
        &self,
        name: &str,
        chain_id: &str,
    ) -> anyhow::Result<(Image, ImageContents)> {
        let mut reason = None;
        let mut candidates: Vec<_> = self.image(name).await?.into_iter().collect();
        candidates.extend(self.images_named(&format!("{name}@")).await?);
        for image in candidates {
            let Some(target) = image.target.clone() else {
                continue;
            };
            match self.image_contents(target).await {
                Ok(contents) if contents.chain_id() == chain_id => return Ok((image, contents)),
                Ok(_) => {}
                Err(error) => reason = Some(error),
            }
        }
        let error = anyhow::anyhow!(
            "no image named {name} has the layers that the container was made from ({chain_id})"
        );
        Err(match reason {
            Some(reason) => reason.context(error.to_string()),
            None => error,
        })
    }

    /// Unpacks what is missing of an image. Returns the name of the snapshot that
    /// has all layers.
    pub(crate) async fn unpack(
        &self,
        image: &ImageContents,
        snapshotter: &str,
    ) -> anyhow::Result<String> {
        let chain_ids = image.chain_ids();
        let mut parent = String::new();
        for (index, chain_id) in chain_ids.iter().enumerate() {
            if self.snapshot(snapshotter, chain_id).await?.is_none() {
                self.unpack_layer(image, index, snapshotter, &parent, chain_id)
                    .await?;
            }
            parent.clone_from(chain_id);
        }
        Ok(parent)
    }

    async fn unpack_layer(
        &self,
        image: &ImageContents,
        index: usize,
        snapshotter: &str,
        parent: &str,
        chain_id: &str,
    ) -> anyhow::Result<()> {
        let key = format!("sterna-extract-{} {chain_id}", uuid::Uuid::new_v4());
        let labels =
            HashMap::from([("containerd.io/snapshot.ref".to_owned(), chain_id.to_owned())]);
        let mounts = self
            .prepare_snapshot(snapshotter, &key, parent, labels.clone())
            .await?;
        let layer = image.layers[index].clone();
        let unpacked = async {
            let diff_id = self.apply_layer(layer.clone(), mounts).await?;
            ensure!(
                diff_id == image.diff_ids[index],
                "layer {} unpacks to {diff_id}, not to {} as the image says",
                layer.digest,
                image.diff_ids[index],
            );
            match self
                .commit_snapshot(snapshotter, &key, chain_id, labels)
                .await
            {
                // Somebody else unpacked the same layer meanwhile.
                Err(error) if error.code() == Code::AlreadyExists => {
                    self.remove_snapshot(snapshotter, &key).await?;
                    Ok(())
                }
                other => Ok(other?),
            }
        };
        let result = unpacked.await;
        if result.is_err() {
            // The first error is the one that matters; the lease ends the rest.
            drop(self.remove_snapshot(snapshotter, &key).await);
        }
        result
    }

    /// Labels by which containerd's collector finds what belongs to an image:
    /// those that `ctr images pull` would have set.
    pub(crate) async fn link_image(
        &self,
        image: &ImageContents,
        snapshotter: &str,
    ) -> Result<(), CallError> {
        if let Some((digest, manifests)) = &image.index {
            let labels = manifests.iter().enumerate().map(|(n, m)| {
                (
                    format!("containerd.io/gc.ref.content.m.{n}"),
                    m.digest.clone(),
                )
            });
            self.label_blob(digest, labels.collect()).await?;
        }
        let mut labels: HashMap<_, _> = image
            .layers
            .iter()
            .enumerate()
            .map(|(n, l)| {
                (
                    format!("containerd.io/gc.ref.content.l.{n}"),
                    l.digest.clone(),
                )
            })
            .collect();
        labels.insert(
            "containerd.io/gc.ref.content.config".into(),
            image.config.digest.clone(),
        );
        self.label_blob(&image.manifest.digest, labels).await?;
        let snapshot = (
            format!("containerd.io/gc.ref.snapshot.{snapshotter}"),
            image.chain_id(),
        );
        self.label_blob(&image.config.digest, HashMap::from([snapshot]))
            .await
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn descriptor(digest: &str) -> Descriptor {
        Descriptor {
            digest: digest.into(),
            ..Default::default()
        }
    }

    #[test]
    fn chain_ids_are_those_of_the_image_specification() {
        let image = ImageContents {
            target: descriptor("t"),
            index: None,
            manifest: descriptor("t"),
            config: descriptor("c"),
            layers: vec![descriptor("a"), descriptor("b")],
            diff_ids: vec!["sha256:aa".into(), "sha256:bb".into()],
        };
        let chain = image.chain_ids();
        assert_eq!(chain[0], "sha256:aa");
        // printf 'sha256:aa sha256:bb' | sha256sum
        assert_eq!(
            chain[1],
            "sha256:b68ad689d6d1ec110ea1c13617437ad6f3766d4b3b309f6a603a222e07a0164f"
        );
        let order: Vec<_> = image.blobs().into_iter().map(|b| b.digest).collect();
        assert_eq!(order, ["a", "b", "c", "t"]);
    }

    #[test]
    fn the_manifest_of_this_platform_is_chosen() {
        let index = format!(
            r#"{{"manifests": [
                {{"digest": "other", "size": 1, "platform": {{"os": "linux", "architecture": "s390x"}}}},
                {{"digest": "attestation", "size": 1, "platform": {{"os": "unknown", "architecture": "unknown"}}}},
                {{"digest": "ours", "size": 1, "platform": {{"os": "linux", "architecture": "{}"}}}}]}}"#,
            architecture()
        );
        let index: DocumentJson = serde_json::from_str(&index).unwrap();
        assert_eq!(choose(index.manifests.unwrap()).unwrap().digest, "ours");

        let single = r#"{"manifests": [{"digest": "only", "size": 1}]}"#;
        let single: DocumentJson = serde_json::from_str(single).unwrap();
        assert_eq!(choose(single.manifests.unwrap()).unwrap().digest, "only");
        assert!(choose(Vec::new()).is_err());
    }

    #[test]
    fn a_digest_is_sha256_in_lower_case() {
        assert!(is_digest(&sha256(b"")));
        for bad in ["", "sha256:", "sha512:00", "sha256:../../etc/passwd"] {
            assert!(!is_digest(bad), "{bad}");
        }
        assert!(!is_digest(&sha256(b"").to_uppercase()));
    }
}
