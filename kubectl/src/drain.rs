//! `drain`: everything of a node whose memory can follow it.

use clap::Args;
use futures::StreamExt as _;
use k8s_openapi::api::core::v1::{Node, Pod};
use kube::Api;
use kube::api::ListParams;
use sterna_kube::{MigrationSpec, PodSettings, Trigger, leaving, owner};

use crate::cluster::{self, Cluster, timed};
use crate::{follow, migrate};

/// What `drain` can be told.
#[derive(Debug, Args)]
pub(crate) struct Arguments {
    /// The node.
    node: String,
    /// How many pods move at a time.
    #[arg(long, default_value_t = 3)]
    parallel: usize,
    /// Give a pod up after so many seconds.
    #[arg(long, value_name = "SECONDS")]
    deadline: Option<u32>,
}

pub(crate) async fn run(cluster: &Cluster, arguments: &Arguments) -> anyhow::Result<bool> {
    let node = &arguments.node;
    let nodes: Api<Node> = Api::all(cluster.client.clone());
    timed(nodes.cordon(node)).await?;
    println!("node/{node} cordoned");

    let pods: Api<Pod> = Api::all(cluster.client.clone());
    let here = ListParams::default().fields(&format!("spec.nodeName={node}"));
    let pods = cluster::list(&pods, &here).await?;
    let (managed, others): (Vec<&Pod>, Vec<&Pod>) = pods
        .iter()
        .filter(|pod| !leaving::is_ending(pod) && !is_of_the_node(pod))
        .partition(|pod| is_managed(pod));
    let moves = managed
        .iter()
        .map(|pod| one(cluster, pod, arguments.deadline));
    let results: Vec<anyhow::Result<bool>> = futures::stream::iter(moves)
        .buffer_unordered(arguments.parallel.max(1))
        .collect()
        .await;
    let mut all = true;
    for result in &results {
        match result {
            Ok(moved) => all &= *moved,
            Err(error) => {
                eprintln!("kubectl sterna: {error:#}");
                all = false;
            }
        }
    }
    let moved = results.iter().filter(|result| matches!(result, Ok(true)));
    println!("{} of {} pods have moved", moved.count(), managed.len());
    if !others.is_empty() {
        println!(
            "{} pods whose memory does not follow them are left: kubectl drain {node}",
            others.len()
        );
    }
    Ok(all)
}

async fn one(cluster: &Cluster, pod: &Pod, deadline: Option<u32>) -> anyhow::Result<bool> {
    let cluster = Cluster {
        namespace: pod.metadata.namespace.clone().unwrap_or_default(),
        ..cluster.clone()
    };
    let spec = MigrationSpec {
        pod_name: pod.metadata.name.clone().unwrap_or_default(),
        pod_uid: pod.metadata.uid.clone(),
        target_node: None,
        deadline_seconds: deadline,
        max_blackout_milliseconds: None,
        trigger: Trigger::Request,
    };
    let name = migrate::create(&cluster, spec).await?;
    follow::follow(&cluster, &name).await
}

fn is_managed(pod: &Pod) -> bool {
    matches!(PodSettings::of(pod), Ok(Some(settings)) if settings.manages_any())
}

/// A DaemonSet's, or a static one: it stays with its node.
fn is_of_the_node(pod: &Pod) -> bool {
    let kind = owner::controller(pod).map(|owner| owner.kind);
    matches!(kind.as_deref(), Some("DaemonSet" | "Node"))
}
