//! Makes everything ready for a container that is on its way, and takes it all
//! back if it does not come.

use std::collections::HashMap;
use std::fs;
use std::io;
use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Context as _, ensure};
use containerd_client::services::v1::Image;
use migrate::arrival::ArrivalState;
use nodeapi::{ContainerRecord, Incoming, Ticket};

use super::plan::{self, Plan};
use crate::containerd::{Namespace, snapshot};
use crate::node::Node;
use crate::sweep::log_file;

/// Label of a container that has not arrived yet; its value is the migration.
pub(crate) const INCOMING_LABEL: &str = "sterna.dev/incoming";

/// Label of such a container whose network namespace was made for it: the path.
pub(crate) const NETNS_LABEL: &str = "sterna.dev/incoming-netns";

/// A namespace and a pair of links: 20 ms on an idle node.
const NETWORK_TIMEOUT: Duration = Duration::from_secs(15);

/// From a shim's death to the end of what containerd does about it.
const GONE_TIMEOUT: Duration = Duration::from_secs(30);
const GONE_PAUSE: Duration = Duration::from_millis(50);

/// Name of the lease under which a migration prepares.
pub(crate) fn lease_id(migration_id: &str) -> String {
    format!("sterna-{migration_id}")
}

/// What was made for one container, in the order in which it was made.
#[derive(Debug, Clone, Default)]
pub(crate) struct Made {
    pub(crate) namespace: String,
    pub(crate) id: String,
    pub(crate) migration_id: String,
    pub(crate) lease: bool,
    /// Snapshotter and key.
    pub(crate) snapshot: Option<(String, String)>,
    pub(crate) netns: Option<PathBuf>,
    pub(crate) container: bool,
    pub(crate) incoming: bool,
    pub(crate) ticket_id: Option<String>,
    pub(crate) task: bool,
    /// Where its processes would be.
    pub(crate) cgroup: Option<PathBuf>,
    pub(crate) log: Option<PathBuf>,
    /// The container is its kubelet's: it is not removed, but waited for.
    pub(crate) pod: bool,
}

/// Everything up to the point where the receiving engine listens. What was made
/// before an error is in `made`.
pub(crate) async fn prepare(node: &Node, plan: &Plan, made: &mut Made) -> anyhow::Result<Ticket> {
    let containerd = node.containerd.namespace(&plan.namespace)?;
    made.lease = true;
    let leased = containerd.lease(&lease_id(&plan.migration_id)).await?;
    let snapshotter = &plan.container.snapshotter;
    let parent = prepare_image(&leased, plan).await?;

    let key = &plan.container.snapshot_key;
    let mut labels = plan.snapshot_labels.clone();
    labels.insert(INCOMING_LABEL.into(), plan.migration_id.clone());
    let mounts = leased
        .prepare_snapshot(snapshotter, key, &parent, labels)
        .await?;
    made.snapshot = Some((snapshotter.clone(), key.clone()));
    let upperdir = snapshot::upperdir(&mounts)
        .with_context(|| format!("snapshotter {snapshotter} makes no overlay here"))?;

    let network = prepare_network(node, plan, made).await?;

    let mut container = plan.container.clone();
    container
        .labels
        .insert(INCOMING_LABEL.into(), plan.migration_id.clone());
    if let Some(netns) = &made.netns {
        container
            .labels
            .insert(NETNS_LABEL.into(), netns.display().to_string());
    }
    leased.create_container(container).await?;
    made.container = true;

    let ticket = new_ticket()?;
    let incoming = Incoming {
        migration_id: plan.migration_id.clone(),
        ticket: ticket.clone(),
        source_node: plan.source_node.clone(),
        identity_dir: node.config.identity_dir.clone(),
        network,
        memory_limit_bytes: super::admission::memory_limit(node, plan),
        upperdir: Some(upperdir),
    };
    incoming.write(&node.run_dir, &plan.namespace, plan.id())?;
    made.incoming = true;
    made.ticket_id = Some(ticket.id.clone());

    let stdio = plan::local_stdio(
        &plan.stdio,
        &node.config.log_dir,
        &plan.namespace,
        plan.id(),
    );
    let log = log_file(&node.config.log_dir, &plan.namespace, plan.id());
    if [&stdio.stdout, &stdio.stderr]
        .iter()
        .any(|uri| uri.ends_with(&*log.to_string_lossy()))
    {
        if let Some(parent) = log.parent() {
            fs::create_dir_all(parent)
                .with_context(|| format!("cannot create {}", parent.display()))?;
        }
        made.log = (!log.exists()).then_some(log);
    }
    made.task = true;
    made.cgroup = plan::cgroup(&plan.spec);
    containerd.create_task(plan.id(), mounts, stdio).await?;
    containerd
        .delete_lease(&lease_id(&plan.migration_id))
        .await?;
    made.lease = false;
    Ok(ticket)
}

/// The image's record, its layers unpacked. Returns the snapshot that has them.
async fn prepare_image(containerd: &Namespace, plan: &Plan) -> anyhow::Result<String> {
    let contents = containerd.image_contents(plan.image.target.clone()).await?;
    ensure!(
        contents.chain_id() == plan.image.chain_id,
        "the image's layers make {}, but the container was made from {}",
        contents.chain_id(),
        plan.image.chain_id
    );
    let snapshotter = &plan.container.snapshotter;
    let parent = containerd.unpack(&contents, snapshotter).await?;
    containerd.link_image(&contents, snapshotter).await?;

    // A name that means something else here stays what it is.
    let name = match containerd.image(&plan.image.name).await? {
        None => plan.image.name.clone(),
        Some(image)
            if image
                .target
                .as_ref()
                .is_some_and(|t| t.digest == contents.target.digest) =>
        {
            return Ok(parent);
        }
        Some(_) => format!("{}@{}", plan.image.name, contents.target.digest),
    };
    let image = Image {
        name,
        labels: plan.image.labels.clone(),
        target: Some(contents.target),
        ..Default::default()
    };
    containerd.create_image(image).await?;
    Ok(parent)
}

async fn prepare_network(
    node: &Node,
    plan: &Plan,
    made: &mut Made,
) -> anyhow::Result<Option<network::Prepared>> {
    let (Some(description), Some(netns)) = (&plan.network, plan.netns()) else {
        return Ok(None);
    };
    let bridge = node
        .config
        .network
        .bridge
        .as_deref()
        .context("no network.bridge is configured")?;
    // Even a half-made one is removed.
    made.netns = Some(netns.clone());
    let prepared = tokio::time::timeout(
        NETWORK_TIMEOUT,
        network::prepare(&netns, description, bridge),
    )
    .await
    .context("preparing the container's network takes too long")??;
    Ok(Some(prepared))
}

/// An id of 128 bits and a secret of 256, both of the system's randomness.
pub(crate) fn new_ticket() -> anyhow::Result<Ticket> {
    let random = rustls::crypto::ring::default_provider().secure_random;
    let (mut id, mut secret) = ([0; 16], [0; 32]);
    random
        .fill(&mut id)
        .and_then(|()| random.fill(&mut secret))
        .map_err(|_| anyhow::anyhow!("the system gives no random numbers"))?;
    Ok(Ticket {
        id: hex(&id),
        secret: hex(&secret),
    })
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

/// Takes back what was made, newest first, and goes on where a step fails: each
/// step is tried, the first error is returned. Can be repeated.
pub(crate) async fn take_back(node: &Node, made: &Made) -> anyhow::Result<()> {
    let containerd = node.containerd.namespace(&made.namespace)?;
    let mut first = Ok(());
    let mut note = |result: anyhow::Result<()>| {
        if first.is_ok() {
            first = result;
        }
    };
    if made.incoming {
        note(Incoming::remove(&node.run_dir, &made.namespace, &made.id).map_err(Into::into));
    }
    let mut task_gone = true;
    if made.task {
        let removed = remove_task(node, &containerd, made).await;
        task_gone = removed.is_ok();
        note(removed);
    }
    // A snapshot or a namespace that is in use must not be pulled away.
    if task_gone {
        if made.task {
            // The shim's to do, and done already unless it was killed. While the
            // container is there, the next sternad finds it, should this one end.
            note(
                nodeapi::arrival::fence_container(&node.run_dir, &made.namespace, &made.id)
                    .map_err(Into::into),
            );
            note(remove_dead_record(node, made));
        }
        if made.container {
            note(
                containerd
                    .delete_container(&made.id)
                    .await
                    .map_err(Into::into),
            );
        }
        if let Some(netns) = &made.netns {
            note(remove_network(netns).await);
        }
        if let Some((snapshotter, key)) = &made.snapshot {
            note(
                containerd
                    .remove_snapshot(snapshotter, key)
                    .await
                    .map_err(Into::into),
            );
        }
    }
    if made.lease {
        note(
            containerd
                .delete_lease(&lease_id(&made.migration_id))
                .await
                .map_err(Into::into),
        );
    }
    if let Some(ticket_id) = &made.ticket_id {
        note(remove_file(&node.run_dir.ticket_socket(ticket_id)));
    }
    note(remove_file(&node.run_dir.engine_socket(&made.migration_id)));
    note(remove_directory(&node.run_dir.staging(&made.migration_id)));
    if let Some(log) = &made.log {
        note(remove_file(log));
    }
    first
}

/// Whether a copy was let go here with the ticket that was made, whatever became of
/// it since: then nobody may say that it was handed back.
pub(crate) fn has_run(node: &Node, made: &Made) -> anyhow::Result<bool> {
    let Some(ticket_id) = &made.ticket_id else {
        return Ok(false);
    };
    let record = nodeapi::arrival::read(&node.run_dir, ticket_id)?;
    Ok(record.is_some_and(|record| record.state == ArrivalState::Ran))
}

/// Removes the task and makes sure that no process is left of it.
///
/// containerd forgets the task of a dead shim before it has cleaned up after it;
/// only the end of the bundle is the end of that.
async fn remove_task(node: &Node, containerd: &Namespace, made: &Made) -> anyhow::Result<()> {
    let record = ContainerRecord::read(&node.run_dir, &made.namespace, &made.id)?;
    if !made.pod {
        containerd.remove_task(&made.id).await?;
    }
    let deadline = tokio::time::Instant::now() + GONE_TIMEOUT;
    loop {
        let bundle = record.as_ref().is_some_and(|record| record.bundle.exists());
        let processes = made
            .cgroup
            .as_deref()
            .is_some_and(crate::cgroup::has_processes);
        if !bundle && !processes {
            return Ok(());
        }
        ensure!(
            tokio::time::Instant::now() < deadline,
            "containerd has not cleaned up after container {}: {} left",
            made.id,
            if processes {
                "processes are"
            } else {
                "its bundle is"
            }
        );
        tokio::time::sleep(GONE_PAUSE).await;
    }
}

/// The record of a shim that was killed; a living one removes its own.
fn remove_dead_record(node: &Node, made: &Made) -> anyhow::Result<()> {
    let record = ContainerRecord::read(&node.run_dir, &made.namespace, &made.id)?;
    if record.is_some_and(|record| !crate::process::is_alive(record.shim_pid)) {
        ContainerRecord::remove(&node.run_dir, &made.namespace, &made.id)?;
    }
    Ok(())
}

pub(crate) async fn remove_network(netns: &std::path::Path) -> anyhow::Result<()> {
    tokio::time::timeout(NETWORK_TIMEOUT, network::remove(netns))
        .await
        .context("removing the container's network takes too long")?
        .with_context(|| format!("cannot remove the network namespace {}", netns.display()))
}

fn remove_file(path: &std::path::Path) -> anyhow::Result<()> {
    match fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => {
            Err(error).with_context(|| format!("cannot remove {}", path.display()))
        }
        _ => Ok(()),
    }
}

fn remove_directory(path: &std::path::Path) -> anyhow::Result<()> {
    match fs::remove_dir_all(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => {
            Err(error).with_context(|| format!("cannot remove {}", path.display()))
        }
        _ => Ok(()),
    }
}

/// Takes a container off the list of those that have not arrived: it has.
pub(crate) async fn mark_arrived(
    containerd: &Namespace,
    id: &str,
    labels: &HashMap<String, String>,
) -> anyhow::Result<()> {
    let mut labels = labels.clone();
    labels.remove(INCOMING_LABEL);
    labels.remove(NETNS_LABEL);
    Ok(containerd.set_container_labels(id, labels).await?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tickets_differ_and_their_id_is_a_server_name() {
        let (one, two) = (new_ticket().unwrap(), new_ticket().unwrap());
        assert_ne!(one, two);
        assert_eq!((one.id.len(), one.secret.len()), (32, 64));
        let name = identity::ticket_server_name(&one.id);
        assert_eq!(identity::parse_ticket_name(&name), Some(&*one.id));
    }
}
