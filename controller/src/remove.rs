//! Takes Sterna off the nodes before its objects go: a Job of the chart's, with
//! rights that nobody has at other times.
//!
//! Refuses while pods need the runtime. Else every sternad is replaced by one that
//! removes what was installed, and is ready once that is done.

use std::time::Duration;

use anyhow::{Context as _, bail, ensure};
use clap::Args;
use k8s_openapi::api::apps::v1::DaemonSet;
use k8s_openapi::api::core::v1::{Node, Pod};
use kube::Client;
use kube::api::{Api, ListParams, Patch, PatchParams};
use serde_json::json;
use sterna_kube::annotations::NODE_READY;
use tokio::time::{Instant, sleep, timeout};

use crate::nodes::REMOVE;

/// For one request.
const TIMEOUT: Duration = Duration::from_secs(20);
const POLL: Duration = Duration::from_secs(1);

/// What `remove` can be told.
#[derive(Debug, Clone, Args)]
pub(crate) struct Settings {
    /// Names of the RuntimeClasses whose pods are ours.
    #[arg(long, env = "STERNA_RUNTIME_CLASSES", value_delimiter = ',')]
    runtime_classes: Vec<String>,
    /// Namespace of the DaemonSet.
    #[arg(long, env = "POD_NAMESPACE")]
    namespace: String,
    /// The DaemonSet that runs sternad.
    #[arg(long)]
    daemonset: String,
    /// How long the nodes may take, in seconds.
    #[arg(long, default_value_t = 240)]
    patience_seconds: u64,
}

pub(crate) async fn run(settings: Settings) -> anyhow::Result<()> {
    let client = Client::try_default().await.context("find the API server")?;
    refuse_while_needed(&client, &settings.runtime_classes).await?;
    let sets: Api<DaemonSet> = Api::namespaced(client.clone(), &settings.namespace);
    let nodes: Api<Node> = Api::all(client);
    if timeout(TIMEOUT, sets.get_opt(&settings.daemonset))
        .await??
        .is_none()
    {
        tracing::info!("there is no DaemonSet {}", settings.daemonset);
        return Ok(());
    }
    // All nodes at once: what runs on them is not touched.
    let patch = Patch::Strategic(json!({"spec": {
        "updateStrategy": {"type": "RollingUpdate", "rollingUpdate": {"maxUnavailable": "100%"}},
        "template": {"spec": {"containers": [{"name": "sternad", "args": [REMOVE]}]}},
    }}));
    let params = PatchParams::default();
    timeout(TIMEOUT, sets.patch(&settings.daemonset, &params, &patch))
        .await?
        .context("tell the nodes to remove it")?;

    let begun = Instant::now();
    loop {
        let left = left(&sets, &nodes, &settings.daemonset).await?;
        let Some(left) = left else {
            tracing::info!("nothing of Sterna is left on the nodes");
            return Ok(());
        };
        ensure!(
            begun.elapsed() < Duration::from_secs(settings.patience_seconds),
            "not removed within {} s: {left}",
            settings.patience_seconds
        );
        tracing::info!(left, "waits");
        sleep(POLL).await;
    }
}

async fn refuse_while_needed(client: &Client, classes: &[String]) -> anyhow::Result<()> {
    let pods: Api<Pod> = Api::all(client.clone());
    let pods = timeout(TIMEOUT, pods.list(&ListParams::default()))
        .await?
        .context("list pods")?;
    let names: Vec<String> = pods
        .items
        .iter()
        .filter(|pod| needs(pod, classes))
        .map(|pod| {
            let metadata = &pod.metadata;
            let name = metadata.name.as_deref().unwrap_or_default();
            format!(
                "{}/{name}",
                metadata.namespace.as_deref().unwrap_or_default()
            )
        })
        .collect();
    if names.is_empty() {
        return Ok(());
    }
    let some = names.iter().take(5).cloned().collect::<Vec<_>>().join(", ");
    let more = match names.len() {
        0..=5 => String::new(),
        all => format!(" and {} more", all - 5),
    };
    bail!("pods need the runtime: {some}{more}; delete them first");
}

/// Whether a pod's containers are, or may yet be, our runtime's.
fn needs(pod: &Pod, classes: &[String]) -> bool {
    let class = pod
        .spec
        .as_ref()
        .and_then(|spec| spec.runtime_class_name.as_ref());
    let phase = pod
        .status
        .as_ref()
        .and_then(|status| status.phase.as_deref());
    let over = matches!(phase, Some("Succeeded" | "Failed"));
    class.is_some_and(|class| classes.contains(class)) && !over
}

/// What is still to be done, in words.
async fn left(
    sets: &Api<DaemonSet>,
    nodes: &Api<Node>,
    name: &str,
) -> anyhow::Result<Option<String>> {
    let set = timeout(TIMEOUT, sets.get(name))
        .await?
        .context("get the DaemonSet")?;
    let status = set.status.unwrap_or_default();
    let wanted = status.desired_number_scheduled;
    let done = match status.observed_generation >= set.metadata.generation {
        // Those that are ready have removed it.
        true => status
            .updated_number_scheduled
            .unwrap_or(0)
            .min(status.number_ready),
        false => 0,
    };
    if done < wanted || status.observed_generation < set.metadata.generation {
        return Ok(Some(format!("{done} of {wanted} nodes are done")));
    }
    // The controller takes the label away.
    let labelled = ListParams::default().labels(NODE_READY);
    let labelled = timeout(TIMEOUT, nodes.list(&labelled))
        .await?
        .context("list nodes")?;
    let count = labelled.items.len();
    Ok((count > 0).then(|| format!("{count} nodes have the label {NODE_READY}")))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pods_that_run_or_may_run_need_the_runtime() {
        let classes = ["sterna".to_owned()];
        for (class, phase, expected) in [
            ("sterna", "Running", true),
            ("sterna", "Pending", true),
            ("sterna", "Succeeded", false),
            ("runc", "Running", false),
        ] {
            let pod = json!({
                "spec": {"runtimeClassName": class, "containers": []},
                "status": {"phase": phase},
            });
            let pod: Pod = serde_json::from_value(pod).unwrap();
            assert_eq!(needs(&pod, &classes), expected, "{class} {phase}");
        }
    }
}
