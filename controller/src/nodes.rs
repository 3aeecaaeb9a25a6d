//! The label `sterna.dev/ready`: where pods of our RuntimeClasses may go.
//!
//! Here and not on the nodes, so that no node may write what schedules pods.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use anyhow::Context as _;
use k8s_openapi::api::core::v1::{Node, Pod};
use kube::Client;
use kube::api::{Api, ListParams, Patch, PatchParams};
use serde_json::json;
use sterna_kube::annotations::NODE_READY;

/// The handler of our RuntimeClasses.
const HANDLER: &str = "sterna";
/// The argument of a sternad that takes its node's installation away.
pub(crate) const REMOVE: &str = "remove";
const EVERY: Duration = Duration::from_secs(5);

/// Keeps the label, until it is dropped.
pub(crate) async fn keep(client: Client, namespace: &str, selector: &str) {
    let pods: Api<Pod> = Api::namespaced(client.clone(), namespace);
    let nodes: Api<Node> = Api::all(client);
    loop {
        if let Err(error) = round(&pods, &nodes, selector).await {
            tracing::warn!(error = format!("{error:#}"), "label nodes");
        }
        tokio::time::sleep(EVERY).await;
    }
}

async fn round(pods: &Api<Pod>, nodes: &Api<Node>, selector: &str) -> anyhow::Result<()> {
    // From the API server's cache: it may be a little old.
    let cached = ListParams::default().match_any();
    let sternads = sternads(
        &pods
            .list(&cached.clone().labels(selector))
            .await
            .context("list sternads")?
            .items,
    );
    for node in nodes.list(&cached).await.context("list nodes")?.items {
        let name = node.metadata.name.clone().unwrap_or_default();
        let Some(ready) = change(&node, &sternads) else {
            continue;
        };
        let value = ready.then_some("true");
        let patch = json!({"metadata": {"labels": {NODE_READY: value}}});
        nodes
            .patch(&name, &PatchParams::default(), &Patch::Merge(patch))
            .await
            .with_context(|| format!("label node {name}"))?;
        tracing::info!(node = name, ready, "node");
    }
    Ok(())
}

/// Nodes with a sternad, and whether it is ready. One that takes the installation
/// away is none.
fn sternads(pods: &[Pod]) -> BTreeMap<String, bool> {
    let mut all = BTreeMap::new();
    for pod in pods.iter().filter(|pod| !removes(pod)) {
        let Some(node) = pod.spec.as_ref().and_then(|spec| spec.node_name.clone()) else {
            continue;
        };
        let conditions = pod
            .status
            .as_ref()
            .and_then(|status| status.conditions.as_ref());
        let ready = conditions
            .into_iter()
            .flatten()
            .any(|condition| condition.type_ == "Ready" && condition.status == "True");
        *all.entry(node).or_insert(false) |= ready;
    }
    all
}

fn removes(pod: &Pod) -> bool {
    let containers = pod.spec.iter().flat_map(|spec| &spec.containers);
    let mut args = containers.flat_map(|container| container.args.iter().flatten());
    args.any(|arg| arg == REMOVE)
}

/// Whether to set or to remove the label; `None` if it is right.
///
/// It is set once sternad is ready and the kubelet lists our handler. It stays while
/// a sternad is replaced: what runs there goes on, and new pods can wait for it.
fn change(node: &Node, sternads: &BTreeMap<String, bool>) -> Option<bool> {
    let labels = node.metadata.labels.as_ref();
    let is = labels
        .and_then(|all| all.get(NODE_READY))
        .is_some_and(|value| value == "true");
    let name = node.metadata.name.as_deref().unwrap_or_default();
    let handlers: BTreeSet<&str> = node
        .status
        .iter()
        .flat_map(|status| status.runtime_handlers.iter().flatten())
        .filter_map(|handler| handler.name.as_deref())
        .collect();
    // Before Kubernetes 1.30 a kubelet lists none.
    let has_handler = handlers.is_empty() || handlers.contains(HANDLER);
    let should = match sternads.get(name) {
        None => false,
        Some(ready) => has_handler && (*ready || is),
    };
    (is != should).then_some(should)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn node(label: Option<&str>, handlers: &[&str]) -> Node {
        let handlers: Vec<_> = handlers.iter().map(|name| json!({"name": name})).collect();
        serde_json::from_value(json!({
            "metadata": {"name": "a", "labels": {NODE_READY: label}},
            "status": {"runtimeHandlers": handlers},
        }))
        .unwrap()
    }

    #[test]
    fn a_node_is_ready_once_sternad_is_and_the_handler_is_listed() {
        let of = |ready| BTreeMap::from([("a".to_owned(), ready)]);
        let unlabelled = Some("");
        let labelled = Some("true");
        for (label, handlers, sternads, is) in [
            (unlabelled, vec!["", "sterna"], of(true), Some(true)),
            (unlabelled, vec![""], of(true), None),
            (unlabelled, vec!["", "sterna"], of(false), None),
            (unlabelled, vec![], of(true), Some(true)),
            (labelled, vec!["", "sterna"], of(false), None),
            (labelled, vec![""], of(true), Some(false)),
            (labelled, vec!["", "sterna"], BTreeMap::new(), Some(false)),
        ] {
            let change = change(&node(label, &handlers), &sternads);
            assert_eq!(change, is, "{label:?} {handlers:?} {sternads:?}");
        }
    }

    #[test]
    fn one_ready_sternad_on_a_node_is_enough() {
        let pod = |status| {
            serde_json::from_value(json!({"spec": {"nodeName": "a", "containers": []},
                "status": {"conditions": [{"type": "Ready", "status": status}]}}))
            .unwrap()
        };
        let all = sternads(&[pod("False"), pod("True"), pod("False")]);
        assert_eq!(all, BTreeMap::from([("a".to_owned(), true)]));
    }
}
