//! Plans each namespace that changed, and does what is planned.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::Duration;

use jiff::{SignedDuration, Timestamp};
use kube::Client;
use tokio::task::JoinSet;

use crate::act::{Actor, Done};
use crate::metrics::Metrics;
use crate::plan::{self, View};
use crate::world::{Dirty, World};
use crate::{Settings, owners};

/// How often a namespace is looked at while a Migration is under way there:
/// owners are asked for, not watched, and deadlines pass by themselves.
const BUSY: Duration = Duration::from_secs(1);
/// How soon after something was decided on what was old, or could not be done.
const AGAIN: Duration = Duration::from_millis(50);
/// How soon after the API server did not answer, or refused.
const LATER: Duration = Duration::from_secs(2);
/// How often everything is looked at, for what is to be forgotten.
const ALL: Duration = Duration::from_secs(300);
/// For all requests of one namespace's round.
const ROUND: Duration = Duration::from_secs(60);

/// Works until a watch ends for good.
pub(crate) async fn run(
    client: Client,
    settings: Settings,
    metrics: Arc<Metrics>,
) -> anyhow::Result<()> {
    let dirty = Arc::new(Dirty::default());
    let (world, watch) = World::watch(&client, &dirty);
    let rounds = async {
        world.ready().await?;
        tracing::info!("knows all pods and Migrations");
        rounds(&client, &settings, &metrics, &world, &dirty).await
    };
    tokio::select! {
        ended = watch => ended,
        ended = rounds => ended,
    }
}

async fn rounds(
    client: &Client,
    settings: &Settings,
    metrics: &Arc<Metrics>,
    world: &World,
    dirty: &Arc<Dirty>,
) -> anyhow::Result<()> {
    let mut running = JoinSet::new();
    // One round at a time for a namespace, so that what it decided is seen by the next.
    let mut busy: BTreeSet<String> = BTreeSet::new();
    let mut pending: BTreeSet<String> = BTreeSet::new();
    let mut everything = tokio::time::interval(ALL);
    loop {
        tokio::select! {
            marked = dirty.take() => pending.extend(marked),
            Some(ended) = running.join_next() => {
                let (namespace, again): (String, Option<Duration>) = ended?;
                busy.remove(&namespace);
                if let Some(again) = again {
                    let dirty = Arc::clone(dirty);
                    tokio::spawn(async move {
                        tokio::time::sleep(again).await;
                        dirty.mark(&namespace);
                    });
                }
            }
            _ = everything.tick() => pending.extend(world.namespaces()),
        }
        metrics.in_flight(world.in_flight());
        for namespace in std::mem::take(&mut pending) {
            if !busy.insert(namespace.clone()) {
                pending.insert(namespace);
                continue;
            }
            let round = Round {
                client: client.clone(),
                settings: settings.clone(),
                world: world.clone(),
                actor: Actor::new(client.clone(), &namespace, Arc::clone(metrics)),
                metrics: Arc::clone(metrics),
            };
            running.spawn(async move {
                let again = tokio::time::timeout(ROUND, round.run(&namespace)).await;
                (namespace, again.unwrap_or(Some(LATER)))
            });
        }
    }
}

struct Round {
    client: Client,
    settings: Settings,
    world: World,
    actor: Actor,
    metrics: Arc<Metrics>,
}

impl Round {
    /// Plans and acts; says when to look again even if nothing changes.
    async fn run(&self, namespace: &str) -> Option<Duration> {
        // Pods last: a target that a Migration names is then known, if it exists.
        let migrations = self.world.migrations(namespace);
        let pods = self.world.pods(namespace);
        let mut again = plan::is_busy(&migrations).then_some(BUSY);

        let mut states = BTreeMap::new();
        for (kind, name, uid) in plan::owners_to_ask(&pods, &migrations) {
            match owners::ask(&self.client, namespace, &kind, &name, &uid).await {
                Ok(state) => {
                    states.insert(uid, state);
                }
                Err(error) => {
                    tracing::warn!(namespace, kind, name, %error, "ask for an owner");
                    self.metrics.error("owner");
                    again = Some(LATER);
                }
            }
        }
        let mut nodes = BTreeMap::new();
        for node in plan::nodes_to_ask(&migrations) {
            match owners::node_is_ready(&self.client, &node).await {
                Ok(ready) => {
                    nodes.insert(node, ready);
                }
                Err(error) => {
                    tracing::warn!(node, %error, "ask for a node");
                    self.metrics.error("node");
                    return Some(LATER);
                }
            }
        }

        let actions = plan::plan(&View {
            now: Timestamp::now(),
            pods: &pods,
            migrations: &migrations,
            owners: &states,
            nodes: &nodes,
            runtime_classes: &self.settings.runtime_classes,
            keep_finished: SignedDuration::from_secs(self.settings.keep_finished_seconds.into()),
        });
        for action in &actions {
            let done = self.actor.act(action, &migrations).await;
            let soon = match done {
                Done::Yes => continue,
                Done::Old => AGAIN,
                Done::No => LATER,
            };
            again = Some(again.map_or(soon, |again| again.min(soon)));
        }
        again
    }
}
