//! `doctor`: what is in the way of migrations.

use std::collections::BTreeMap;

use k8s_openapi::api::core::v1::Node;
use k8s_openapi::api::node::v1::RuntimeClass;
use kube::Api;
use kube::api::ListParams;
use sterna_kube::annotations::NODE_READY;

use crate::cluster::{self, Cluster};
use crate::table;

/// The handler of our RuntimeClasses.
const HANDLER: &str = "sterna";

pub(crate) async fn run(cluster: &Cluster) -> anyhow::Result<bool> {
    let mut problems = Vec::new();
    let all = ListParams::default();

    let classes: Api<RuntimeClass> = Api::all(cluster.client.clone());
    let classes = cluster::list(&classes, &all).await?;
    let ours = classes.iter().filter(|class| class.handler == HANDLER);
    let names: Vec<String> = ours
        .filter_map(|class| class.metadata.name.clone())
        .collect();
    if names.is_empty() {
        problems.push(
            "there is no RuntimeClass whose handler is ours: is the chart installed?".to_owned(),
        );
    } else {
        println!("RuntimeClasses: {}", names.join(", "));
    }
    match cluster::list(&cluster.migrations(), &all.clone().limit(1)).await {
        Ok(_) => println!("Migrations can be read"),
        Err(error) => problems.push(format!("Migrations cannot be read: {error:#}")),
    }

    let nodes: Api<Node> = Api::all(cluster.client.clone());
    let nodes = cluster::list(&nodes, &all).await?;
    let rows: Vec<Vec<String>> = nodes.iter().map(row).collect();
    println!();
    table::print(
        &["NODE", "STERNA", "HANDLER", "ARCH", "KERNEL", "CONTAINERD"],
        &rows,
    );
    println!();

    let ready: Vec<&Node> = nodes.iter().filter(|node| is_ready(node)).collect();
    if ready.len() < 2 {
        problems.push(format!(
            "Sterna works on {} nodes: moving takes two",
            ready.len()
        ));
    }
    for node in &nodes {
        if is_ready(node) && !has_handler(node) {
            let name = node.metadata.name.as_deref().unwrap_or_default();
            problems.push(format!(
                "node {name} is labelled, but its kubelet does not list the runtime"
            ));
        }
    }
    let mut architectures: BTreeMap<String, usize> = BTreeMap::new();
    for node in &ready {
        *architectures
            .entry(info(node, |info| &info.architecture))
            .or_default() += 1;
    }
    if architectures.len() > 1 {
        problems.push(
            "nodes have different architectures: pods move between like ones only".to_owned(),
        );
    }
    for problem in &problems {
        println!("problem: {problem}");
    }
    if problems.is_empty() {
        println!("nothing is in the way");
    }
    Ok(problems.is_empty())
}

fn row(node: &Node) -> Vec<String> {
    let word = |is: bool| if is { "ready" } else { "-" }.to_owned();
    vec![
        node.metadata.name.clone().unwrap_or_default(),
        word(is_ready(node)),
        word(has_handler(node)),
        info(node, |info| &info.architecture),
        info(node, |info| &info.kernel_version),
        info(node, |info| &info.container_runtime_version),
    ]
}

fn is_ready(node: &Node) -> bool {
    let labels = node.metadata.labels.as_ref();
    labels
        .and_then(|all| all.get(NODE_READY))
        .is_some_and(|value| value == "true")
}

fn has_handler(node: &Node) -> bool {
    let handlers = node
        .status
        .iter()
        .flat_map(|status| status.runtime_handlers.iter().flatten());
    let mut names = handlers.filter_map(|handler| handler.name.as_deref());
    names.any(|name| name == HANDLER)
}

fn info(node: &Node, field: fn(&k8s_openapi::api::core::v1::NodeSystemInfo) -> &String) -> String {
    let info = node
        .status
        .as_ref()
        .and_then(|status| status.node_info.as_ref());
    info.map(field).cloned().unwrap_or_default()
}
