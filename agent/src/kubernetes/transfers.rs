//! The Migrations whose source is a pod of this node.

use std::collections::HashMap;
use std::sync::Arc;

use futures::StreamExt as _;
use kube::runtime::WatchStreamExt as _;
use kube::runtime::watcher::{self, Event, watcher};
use kube::{Api, Client};
use sterna_kube::Migration;
use tokio_util::sync::CancellationToken;
use tracing::Instrument as _;

use super::transfer::{Plan, Transfer};
use crate::departures::Departures;
use crate::node::Node;

/// One under way.
struct Active {
    target_uid: String,
    stop: CancellationToken,
}

/// Runs as long as sternad does.
pub(super) async fn follow(
    client: Client,
    name: String,
    node: Arc<Node>,
    departures: Arc<Departures>,
) {
    let migrations: Api<Migration> = Api::all(client.clone());
    let events = watcher(migrations, watcher::Config::default()).default_backoff();
    let mut events = std::pin::pin!(events);
    let mut active: HashMap<String, Active> = HashMap::new();
    while let Some(event) = events.next().await {
        let migration = match event {
            Ok(Event::Apply(migration) | Event::InitApply(migration)) => migration,
            Ok(Event::Delete(migration)) => {
                let uid = migration.metadata.uid.unwrap_or_default();
                if let Some(active) = active.remove(&uid) {
                    active.stop.cancel();
                }
                continue;
            }
            Ok(Event::Init | Event::InitDone) => continue,
            Err(error) => {
                tracing::warn!("cannot watch Migrations: {error}");
                continue;
            }
        };
        let uid = migration.metadata.uid.clone().unwrap_or_default();
        let plan = Plan::of(&migration, &name);
        let same = |active: &Active| {
            let target = plan.as_ref().map(|plan| &plan.target.uid);
            target == Some(&active.target_uid)
        };
        if active.get(&uid).is_some_and(same) {
            continue;
        }
        // It is over, or goes somewhere else.
        if let Some(active) = active.remove(&uid) {
            active.stop.cancel();
        }
        let Some(plan) = plan else { continue };
        let stop = CancellationToken::new();
        let target_uid = plan.target.uid.clone();
        let span = tracing::info_span!(
            "transfer",
            migration = plan.name,
            namespace = plan.namespace,
            pod = plan.source.name,
            to = plan.target.node,
        );
        let transfer = Transfer::new(
            plan,
            client.clone(),
            Arc::clone(&node),
            Arc::clone(&departures),
            stop.clone(),
        );
        tokio::spawn(transfer.run().instrument(span));
        active.insert(uid, Active { target_uid, stop });
    }
}
