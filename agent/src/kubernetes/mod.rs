//! What the Kubernetes API says about this node's pods, and what is done about it.
//!
//! Nothing is decided here: the controller matches a pod that leaves with the one
//! that replaces it, and writes that into a Migration. This module
//!
//! * answers the shims' questions by it ([`guide`]),
//! * sends the state of pods of this node to the pods that a Migration names
//!   ([`transfers`], [`transfer`]), and writes into the Migration how that goes,
//! * has states wait here whose pods cannot ([`parking`]).
//!
//! The rules are those of the crate `sterna-kube`, which the controller has too.

mod guide;
mod parking;
mod transfer;
mod transfers;

use std::path::Path;
use std::sync::Arc;

use anyhow::Context as _;
use kube::config::{KubeConfigOptions, Kubeconfig};
use kube::{Client, Config};

use crate::config::KubernetesConfig;
use crate::departures::Departures;
use crate::node::Node;
use crate::pods::Pods;

/// Connects and begins; what fails later is tried again for ever.
pub(crate) async fn start(
    config: &KubernetesConfig,
    node: Arc<Node>,
    pods: &Pods,
    departures: Arc<Departures>,
) -> anyhow::Result<()> {
    let client = client(config.kubeconfig.as_deref())
        .await
        .context("cannot use the Kubernetes API")?;
    let name = config.node.clone().unwrap_or_else(|| node.name.to_string());
    tracing::info!(node = name, "follows Kubernetes");
    pods.follow(Box::new(guide::ClusterGuide::new(
        client.clone(),
        Arc::clone(&node),
    )));
    tokio::spawn(parking::follow(client.clone(), Arc::clone(&node)));
    tokio::spawn(transfers::follow(client, name, node, departures));
    Ok(())
}

async fn client(kubeconfig: Option<&Path>) -> anyhow::Result<Client> {
    let config = match kubeconfig {
        Some(path) => {
            let file = Kubeconfig::read_from(path)
                .with_context(|| format!("cannot read {}", path.display()))?;
            Config::from_custom_kubeconfig(file, &KubeConfigOptions::default()).await?
        }
        None => Config::incluster()?,
    };
    Ok(Client::try_from(config)?)
}
