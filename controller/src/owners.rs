//! Asks for the owners of pods.

use k8s_openapi::api::apps::v1::{Deployment, ReplicaSet, StatefulSet};
use k8s_openapi::api::batch::v1::Job;
use k8s_openapi::api::core::v1::Node;
use kube::api::Api;
use kube::{Client, ResourceExt as _};
use sterna_kube::annotations::NODE_READY;
use sterna_kube::wanted::OwnerState;

/// An owner's state.
///
/// Owners are asked for, not watched: pods leave rarely, and a cluster has many.
///
/// # Errors
///
/// The API server's.
pub(crate) async fn ask(
    client: &Client,
    namespace: &str,
    kind: &str,
    name: &str,
    uid: &str,
) -> Result<OwnerState, kube::Error> {
    let is = |of: &Option<String>| of.as_deref() == Some(uid);
    Ok(match kind {
        "ReplicaSet" => {
            let sets: Api<ReplicaSet> = Api::namespaced(client.clone(), namespace);
            let Some(set) = sets
                .get_opt(name)
                .await?
                .filter(|set| is(&set.metadata.uid))
            else {
                return Ok(OwnerState::Gone);
            };
            let deployment = set
                .owner_references()
                .iter()
                .find(|owner| owner.controller == Some(true) && owner.kind == "Deployment");
            let deployment = match deployment {
                None => None,
                Some(owner) => {
                    let all: Api<Deployment> = Api::namespaced(client.clone(), namespace);
                    let found = all.get_opt(&owner.name).await?;
                    match found.filter(|one| one.metadata.uid.as_ref() == Some(&owner.uid)) {
                        None => return Ok(OwnerState::Gone),
                        found => found.map(Box::new),
                    }
                }
            };
            OwnerState::ReplicaSet(Box::new(set), deployment)
        }
        "StatefulSet" => {
            let sets: Api<StatefulSet> = Api::namespaced(client.clone(), namespace);
            let set = sets
                .get_opt(name)
                .await?
                .filter(|set| is(&set.metadata.uid));
            set.map_or(OwnerState::Gone, |set| {
                OwnerState::StatefulSet(Box::new(set))
            })
        }
        "Job" => {
            let jobs: Api<Job> = Api::namespaced(client.clone(), namespace);
            let job = jobs
                .get_opt(name)
                .await?
                .filter(|job| is(&job.metadata.uid));
            job.map_or(OwnerState::Gone, |job| OwnerState::Job(Box::new(job)))
        }
        _ => OwnerState::Gone,
    })
}

/// Whether Sterna works on a node.
///
/// # Errors
///
/// The API server's.
pub(crate) async fn node_is_ready(client: &Client, name: &str) -> Result<bool, kube::Error> {
    let nodes: Api<Node> = Api::all(client.clone());
    let node = nodes.get_opt(name).await?;
    Ok(node.is_some_and(|node| {
        let labels = node.metadata.labels.unwrap_or_default();
        labels.get(NODE_READY).is_some_and(|value| value == "true")
    }))
}
