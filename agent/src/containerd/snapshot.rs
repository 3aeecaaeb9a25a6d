//! Snapshots: layers unpacked, and the writable one on top.

use std::collections::HashMap;
use std::path::PathBuf;
use std::time::Duration;

use containerd_client::services::v1::ApplyRequest;
use containerd_client::services::v1::snapshots::{
    CommitSnapshotRequest, Info, MountsRequest, PrepareSnapshotRequest, RemoveSnapshotRequest,
    StatSnapshotRequest,
};
use containerd_client::types::{Descriptor, Mount};

use super::{CallError, Namespace, QUICK, failed, found, gone};

/// One layer: a gigabyte of small files takes a minute on a slow disk.
const APPLY_TIMEOUT: Duration = Duration::from_secs(600);

/// Removing a large writable layer deletes its files.
const REMOVE_TIMEOUT: Duration = Duration::from_secs(120);

impl Namespace {
    pub(crate) async fn snapshot(
        &self,
        snapshotter: &str,
        key: &str,
    ) -> Result<Option<Info>, CallError> {
        let request = StatSnapshotRequest {
            snapshotter: snapshotter.into(),
            key: key.into(),
        };
        let answer = self
            .client()
            .snapshots()
            .stat(self.request(request, QUICK))
            .await
            .map_err(failed(|| format!("look up snapshot {key}")));
        Ok(found(answer)?.and_then(|response| response.into_inner().info))
    }

    pub(crate) async fn prepare_snapshot(
        &self,
        snapshotter: &str,
        key: &str,
        parent: &str,
        labels: HashMap<String, String>,
    ) -> Result<Vec<Mount>, CallError> {
        let request = PrepareSnapshotRequest {
            snapshotter: snapshotter.into(),
            key: key.into(),
            parent: parent.into(),
            labels,
        };
        self.client()
            .snapshots()
            .prepare(self.request(request, QUICK))
            .await
            .map(|response| response.into_inner().mounts)
            .map_err(failed(|| format!("prepare snapshot {key}")))
    }

    pub(crate) async fn snapshot_mounts(
        &self,
        snapshotter: &str,
        key: &str,
    ) -> Result<Vec<Mount>, CallError> {
        let request = MountsRequest {
            snapshotter: snapshotter.into(),
            key: key.into(),
        };
        self.client()
            .snapshots()
            .mounts(self.request(request, QUICK))
            .await
            .map(|response| response.into_inner().mounts)
            .map_err(failed(|| format!("find the mounts of snapshot {key}")))
    }

    pub(crate) async fn commit_snapshot(
        &self,
        snapshotter: &str,
        key: &str,
        name: &str,
        labels: HashMap<String, String>,
    ) -> Result<(), CallError> {
        let request = CommitSnapshotRequest {
            snapshotter: snapshotter.into(),
            name: name.into(),
            key: key.into(),
            labels,
        };
        self.client()
            .snapshots()
            .commit(self.request(request, QUICK))
            .await
            .map(drop)
            .map_err(failed(|| format!("commit snapshot {name}")))
    }

    pub(crate) async fn remove_snapshot(
        &self,
        snapshotter: &str,
        key: &str,
    ) -> Result<(), CallError> {
        let request = RemoveSnapshotRequest {
            snapshotter: snapshotter.into(),
            key: key.into(),
        };
        gone(
            self.client()
                .snapshots()
                .remove(self.request(request, REMOVE_TIMEOUT))
                .await
                .map_err(failed(|| format!("remove snapshot {key}"))),
        )
    }

    /// Unpacks a layer blob into `mounts`; returns the digest of what it unpacked.
    pub(crate) async fn apply_layer(
        &self,
        layer: Descriptor,
        mounts: Vec<Mount>,
    ) -> Result<String, CallError> {
        let digest = layer.digest.clone();
        let request = ApplyRequest {
            diff: Some(layer),
            mounts,
            ..Default::default()
        };
        let response = self
            .client()
            .diff()
            .apply(self.request(request, APPLY_TIMEOUT))
            .await
            .map_err(failed(|| format!("unpack layer {digest}")))?;
        Ok(response
            .into_inner()
            .applied
            .map(|applied| applied.digest)
            .unwrap_or_default())
    }
}

/// The writable directory of an overlay root file system.
pub(crate) fn upperdir(mounts: &[Mount]) -> Option<PathBuf> {
    let [mount] = mounts else {
        return None;
    };
    if mount.r#type != "overlay" {
        return None;
    }
    mount
        .options
        .iter()
        .find_map(|option| option.strip_prefix("upperdir="))
        .map(PathBuf::from)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_upperdir_comes_from_an_overlay_alone() {
        let mount = |r#type: &str, options: &[&str]| Mount {
            r#type: r#type.into(),
            options: options.iter().map(|&o| o.into()).collect(),
            ..Default::default()
        };
        let overlay = mount("overlay", &["workdir=/w", "upperdir=/u", "lowerdir=/l"]);
        assert_eq!(upperdir(std::slice::from_ref(&overlay)), Some("/u".into()));
        assert_eq!(upperdir(&[mount("bind", &["upperdir=/u"])]), None);
        assert_eq!(upperdir(&[mount("overlay", &["lowerdir=/l"])]), None);
        assert_eq!(upperdir(&[overlay.clone(), overlay]), None);
        assert_eq!(upperdir(&[]), None);
    }
}
