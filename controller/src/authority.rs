//! The authority that names nodes: made once, and kept in a Secret.
//!
//! The Secret is the chart's, which makes it empty: so its name is all that the
//! controller has a right to. Each node's sternad makes itself a certificate with
//! what is in it; whoever can read it can be any node.

use std::collections::BTreeMap;
use std::path::Path;
use std::time::Duration;

use anyhow::Context as _;
use k8s_openapi::ByteString;
use k8s_openapi::api::core::v1::Secret;
use kube::Client;
use kube::api::{Api, Patch, PatchParams};
use serde_json::json;
use tokio::time::timeout;

const FILES: [&str; 2] = ["ca.crt", "ca.key"];
const AGAIN: Duration = Duration::from_secs(5);
/// For one request.
const TIMEOUT: Duration = Duration::from_secs(10);

/// Makes sure that there is one; tries until it knows.
pub(crate) async fn keep(client: Client, namespace: &str, name: &str) {
    let secrets: Api<Secret> = Api::namespaced(client, namespace);
    loop {
        match ensure(&secrets, name).await {
            Ok(true) => {
                tracing::info!(namespace, name, "made an authority");
                return;
            }
            Ok(false) => return,
            Err(error) => {
                tracing::warn!(
                    namespace,
                    name,
                    error = format!("{error:#}"),
                    "the authority"
                );
            }
        }
        tokio::time::sleep(AGAIN).await;
    }
}

/// Whether one was made.
async fn ensure(secrets: &Api<Secret>, name: &str) -> anyhow::Result<bool> {
    let secret = timeout(TIMEOUT, secrets.get(name))
        .await?
        .context("get the Secret")?;
    let data = secret.data.unwrap_or_default();
    if FILES.iter().all(|file| data.contains_key(*file)) {
        return Ok(false);
    }
    let data = tokio::task::spawn_blocking(make).await??;
    // Against the version that was seen to be empty: of two replicas one is faster.
    let patch = json!({
        "metadata": {"resourceVersion": secret.metadata.resource_version},
        "immutable": true,
        "data": data,
    });
    let params = PatchParams::default();
    let patch = Patch::Merge(patch);
    timeout(TIMEOUT, secrets.patch(name, &params, &patch))
        .await?
        .context("fill the Secret")?;
    Ok(true)
}

fn make() -> anyhow::Result<BTreeMap<String, ByteString>> {
    let directory = std::env::temp_dir().join(format!("authority-{}", std::process::id()));
    let made = make_in(&directory);
    // The key is nowhere but in the Secret.
    std::fs::remove_dir_all(&directory)
        .with_context(|| format!("remove {}", directory.display()))?;
    made
}

fn make_in(directory: &Path) -> anyhow::Result<BTreeMap<String, ByteString>> {
    identity::Authority::init(directory)?;
    FILES
        .iter()
        .map(|file| {
            let content =
                std::fs::read(directory.join(file)).with_context(|| format!("read {file}"))?;
            Ok(((*file).to_owned(), ByteString(content)))
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_kept_is_what_a_node_enrolls_with() {
        let data = make().unwrap();
        let directory = tempfile::tempdir().unwrap();
        for (file, content) in data {
            std::fs::write(directory.path().join(file), content.0).unwrap();
        }
        let authority = identity::Authority::load(directory.path()).unwrap();
        let out = directory.path().join("node");
        assert_eq!(
            authority.enroll(&"a".parse().unwrap(), &out).unwrap().len(),
            3
        );
    }
}
