//! A state on its way into a container of a pod: its kubelet makes the container,
//! and all that is done here is to let its shim receive.

use std::sync::OnceLock;
use std::time::Duration;

use anyhow::{Context as _, ensure};
use migrate::offer::{self, Found, RefusalCode};
use nodeapi::{ContainerRecord, Incoming, PodContainer, RunState, Ticket};
use proto::agent as pb;

use super::admission::{self, Fate};
use super::plan::Plan;
use super::prepare::{Made, new_ticket};
use crate::facts;
use crate::node::Node;
use crate::pods::{Place, Pods};
use crate::process;

/// From the answer to a shim to its receiving engine, which is a process that
/// starts.
const LISTEN_TIMEOUT: Duration = Duration::from_secs(15);
const LISTEN_PAUSE: Duration = Duration::from_millis(10);

/// All reasons against the state. The container is not looked at: it may not
/// exist yet.
pub(super) async fn refusals(node: &Node, plan: &Plan) -> anyhow::Result<Vec<pb::Reason>> {
    let local = facts::gather(node).await?;
    let found = Found {
        image_present: true,
        ..Found::default()
    };
    let mut reasons = match offer::negotiate(&plan.facts, &plan.needs, &local, &found) {
        Ok(_) => Vec::new(),
        // What waits on this node may be for a pod of it. From where it runs nothing is
        // sent here.
        Err(refusals) => refusals
            .iter()
            .filter(|refusal| refusal.code != RefusalCode::SameNode)
            .map(admission::reason)
            .collect(),
    };
    reasons.extend(admission::check_memory_limit(node, plan));
    Ok(reasons)
}

/// Waits for the shim that makes the container, gives it the permission and waits
/// until its engine listens. `place` is set once the container is known.
pub(super) async fn prepare(
    node: &Node,
    pods: &Pods,
    plan: &Plan,
    container: &PodContainer,
    place: &OnceLock<Place>,
    made: &mut Made,
) -> anyhow::Result<Ticket> {
    // The one who asks may go away meanwhile: then another one comes.
    loop {
        let ask = pods.asked(container).await;
        ensure!(
            ask.place.namespace == plan.namespace,
            "{container} is in containerd's namespace {}, not {}",
            ask.place.namespace,
            plan.namespace
        );
        let at = ask.place.clone();
        let ticket = new_ticket()?;
        let incoming = Incoming {
            migration_id: plan.migration_id.clone(),
            ticket: ticket.clone(),
            source_node: plan.source_node.clone(),
            identity_dir: node.config.identity_dir.clone(),
            network: None,
            memory_limit_bytes: admission::memory_limit(node, plan),
            upperdir: at.upperdir.clone(),
        };
        incoming.write(&node.run_dir, &plan.namespace, &at.id)?;
        if !ask.grant() {
            Incoming::remove(&node.run_dir, &plan.namespace, &at.id)?;
            continue;
        }
        made.id.clone_from(&at.id);
        made.incoming = true;
        made.ticket_id = Some(ticket.id.clone());
        made.task = true;
        let id = at.id.clone();
        // One arrival, one place: nothing has set it before.
        drop(place.set(at));
        until_it_listens(node, &plan.namespace, &id).await?;
        return Ok(ticket);
    }
}

async fn until_it_listens(node: &Node, namespace: &str, id: &str) -> anyhow::Result<()> {
    let listens = async {
        loop {
            let record = ContainerRecord::read(&node.run_dir, namespace, id)?;
            if record.is_some_and(|record| record.state == RunState::Receiving) {
                return anyhow::Ok(());
            }
            tokio::time::sleep(LISTEN_PAUSE).await;
        }
    };
    tokio::time::timeout(LISTEN_TIMEOUT, listens)
        .await
        .with_context(|| {
            format!(
                "the shim of container {id} does not listen within {} s",
                LISTEN_TIMEOUT.as_secs()
            )
        })?
}

/// Waits until the container runs or will not; answers its pid, or why not.
pub(super) async fn until_it_runs(node: &Node, namespace: &str, id: &str) -> Result<u32, String> {
    loop {
        match ContainerRecord::read(&node.run_dir, namespace, id) {
            Ok(record) => match admission::fate(node, namespace, id) {
                Ok(Fate::Here) => return Ok(record.map_or(0, |record| record.pid)),
                Ok(Fate::Gone) => return Err(ended(record.as_ref())),
                Ok(Fate::OnItsWay) | Err(_) => {}
            },
            Err(error) => {
                tracing::warn!("cannot tell whether the container has arrived: {error}");
            }
        }
        tokio::time::sleep(LISTEN_PAUSE).await;
    }
}

fn ended(record: Option<&ContainerRecord>) -> String {
    match record {
        Some(record) if !process::is_alive(record.shim_pid) => "its shim died".into(),
        Some(_) => "its shim gave up (the log of the container's start says why)".into(),
        None => "the container was removed".into(),
    }
}
