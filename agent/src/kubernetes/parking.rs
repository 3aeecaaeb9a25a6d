//! States of this node's pods that wait here, in their Migrations: that they are here,
//! and when nobody wants them any more.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use jiff::{SignedDuration, Timestamp};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::Time;
use kube::api::{ListParams, Patch, PatchParams};
use kube::{Api, Client};
use migrate::parked::State;
use nodeapi::PodContainer;
use serde_json::json;
use sterna_kube::{
    AGENT, ContainerTransfer, Migration, Transfer as Report, TransferPhase, TransferResult,
};
use tokio::time::{Instant, sleep, timeout};

use crate::node::Node;
use crate::parked::Parked;

const REQUEST_TIMEOUT: Duration = Duration::from_secs(10);

/// It is said until the API server has it.
const TELL_TIMEOUT: Duration = Duration::from_secs(120);
const TELL_PAUSE: Duration = Duration::from_millis(500);

/// Between two looks at what waits here.
const LOOK_PAUSE: Duration = Duration::from_secs(10);

/// Containers whose state was to wait here and does not, by their pod's uid and their
/// name, and why.
#[derive(Debug, Default)]
pub(super) struct Failed(Mutex<HashMap<(String, String), String>>);

impl Failed {
    fn note(&self, container: &PodContainer, outcome: Result<(), &str>) {
        let key = (container.uid.clone(), container.container.clone());
        let mut failed = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        match outcome {
            Ok(()) => failed.remove(&key),
            Err(reason) => failed.insert(key, reason.to_owned()),
        };
    }

    /// Of any container of a pod.
    fn of_pod(&self, uid: &str) -> Option<String> {
        let failed = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let mut failed = failed.iter();
        let found = failed.find(|((pod, _), _)| pod == uid);
        found.map(|((_, container), reason)| format!("container {container}: {reason}"))
    }
}

/// Writes into its Migration that the state of a container waits here, or why not.
pub(super) async fn tell(
    client: &Client,
    parked: &Parked,
    failed: &Failed,
    container: &PodContainer,
    outcome: Result<(), &str>,
) {
    failed.note(container, outcome);
    let reason = failed.of_pod(&container.uid);
    let begun = Instant::now();
    while begun.elapsed() < TELL_TIMEOUT {
        let told = async {
            for migration in of_pod(client, &container.namespace, &container.uid).await? {
                let report = report(parked, &migration, reason.as_deref());
                write(client, &migration, &report).await?;
            }
            Ok::<_, kube::Error>(())
        };
        match timeout(REQUEST_TIMEOUT, told).await {
            Ok(Ok(())) => return,
            Ok(Err(error)) => tracing::warn!(%container, "cannot say that a state waits: {error}"),
            Err(_) => tracing::warn!(%container, "the API server does not answer"),
        }
        sleep(TELL_PAUSE).await;
    }
}

/// The Migrations of a pod that are not over.
async fn of_pod(client: &Client, namespace: &str, uid: &str) -> kube::Result<Vec<Migration>> {
    let migrations: Api<Migration> = Api::namespaced(client.clone(), namespace);
    let all = migrations.list(&ListParams::default()).await?;
    let ours = all.into_iter().filter(|migration| {
        let status = migration.status.as_ref();
        let source = status.and_then(|status| status.source_pod.as_ref());
        source.is_some_and(|source| source.uid == uid)
            && status.is_some_and(|status| !status.phase.is_final())
    });
    Ok(ours.collect())
}

/// What there is to say of a pod's containers. One that is lost is all lost: a part
/// of a pod's state is none.
fn report(parked: &Parked, migration: &Migration, failed: Option<&str>) -> Report {
    let now = Time(Timestamp::now());
    let status = migration.status.clone().unwrap_or_default();
    let uid = status.source_pod.map(|source| source.uid);
    let earlier = status.transfer.and_then(|transfer| transfer.started_at);
    let containers = status.containers.iter().map(|name| {
        let record = uid.as_ref().and_then(|uid| parked.find(uid, name));
        let waits = record.filter(|record| record.state.has_content());
        ContainerTransfer {
            name: name.clone(),
            phase: match (failed, &waits) {
                (Some(_), _) => TransferPhase::Finished,
                (None, Some(_)) => TransferPhase::Parked,
                (None, None) => TransferPhase::Negotiating,
            },
            memory_bytes: waits.map(|record| record.memory_bytes()),
            result: failed.map(|_| TransferResult::Failed),
            reason: failed.map(str::to_owned),
            ..ContainerTransfer::default()
        }
    });
    Report {
        target_uid: None,
        containers: containers.collect(),
        started_at: earlier.or(Some(now.clone())),
        finished_at: failed.map(|_| now),
    }
}

/// Writes our part of a Migration's status.
pub(super) async fn write(
    client: &Client,
    migration: &Migration,
    report: &Report,
) -> kube::Result<()> {
    let namespace = migration.metadata.namespace.as_deref().unwrap_or_default();
    let name = migration.metadata.name.as_deref().unwrap_or_default();
    apply(client, namespace, name, report).await
}

/// As [`write`], by name. That it was deleted is no error: nobody reads it.
pub(super) async fn apply(
    client: &Client,
    namespace: &str,
    name: &str,
    report: &Report,
) -> kube::Result<()> {
    let migrations: Api<Migration> = Api::namespaced(client.clone(), namespace);
    let patch = Patch::Apply(json!({
        "apiVersion": "sterna.dev/v1alpha1",
        "kind": "Migration",
        "status": {"transfer": report},
    }));
    let params = PatchParams::apply(AGENT).force();
    match migrations.patch_status(name, &params, &patch).await {
        Err(kube::Error::Api(status)) if status.code == 404 => Ok(()),
        written => written.map(drop),
    }
}

/// Removes what nobody wants any more, or has waited too long. Runs as long as sternad
/// does.
pub(super) async fn follow(client: Client, node: Arc<Node>) {
    loop {
        for record in node.parked.all() {
            let looked = look(&client, &node, &record);
            match timeout(REQUEST_TIMEOUT, looked).await {
                Ok(Ok(())) => {}
                Ok(Err(error)) => {
                    tracing::warn!(
                        pod = record.pod.pod,
                        "cannot tell whether a state is wanted: {error:#}"
                    );
                }
                Err(_) => tracing::warn!("the API server does not answer"),
            }
        }
        sleep(LOOK_PAUSE).await;
    }
}

async fn look(client: &Client, node: &Node, record: &crate::parked::Record) -> anyhow::Result<()> {
    let pod = &record.pod;
    if matches!(record.state, State::Coming { .. } | State::Taken(_)) {
        return Ok(());
    }
    let wanted = of_pod(client, &pod.namespace, &pod.uid).await?;
    if wanted.is_empty() {
        // Its Migration is over, or was deleted: nothing that is begun now names it.
        node.parked.discard(&pod.uid, &pod.container)?;
        return Ok(());
    }
    if record.state == State::Parked {
        // Whoever should have said so was restarted.
        for migration in wanted.iter().filter(|one| !says_so(one, &pod.container)) {
            let report = report(&node.parked, migration, None);
            write(client, migration, &report).await?;
        }
    }
    let keep = i64::try_from(node.config.parked.keep_seconds).unwrap_or(i64::MAX);
    let expired = record.since.checked_add(SignedDuration::from_secs(keep));
    let is_expired = expired.is_ok_and(|expired| Timestamp::now() >= expired);
    if is_expired
        && record.state == State::Parked
        && node.parked.discard(&pod.uid, &pod.container)?
    {
        let reason = format!("no pod took its state within {keep} s: it was removed");
        tracing::warn!(pod = pod.pod, container = pod.container, reason);
        for migration in wanted {
            let report = report(&node.parked, &migration, Some(&reason));
            write(client, &migration, &report).await?;
        }
    }
    Ok(())
}

/// Whether a Migration says of a container that its state waits, or what came of it.
fn says_so(migration: &Migration, container: &str) -> bool {
    let transfer = migration
        .status
        .as_ref()
        .and_then(|status| status.transfer.as_ref());
    let mut told = transfer
        .into_iter()
        .flat_map(|transfer| &transfer.containers);
    told.any(|told| {
        let waits = told.phase == TransferPhase::Parked;
        told.name == container && (waits || told.result.is_some())
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn container(name: &str) -> PodContainer {
        PodContainer {
            namespace: "shop".into(),
            pod: "cart-0".into(),
            uid: "u-1".into(),
            container: name.into(),
        }
    }

    fn migration() -> Migration {
        serde_json::from_value(json!({
            "apiVersion": "sterna.dev/v1alpha1", "kind": "Migration",
            "metadata": {"name": "m"}, "spec": {"podName": "cart-0"},
            "status": {"containers": ["cache", "index"],
                "sourcePod": {"name": "cart-0", "uid": "u-1", "node": "a"}},
        }))
        .unwrap()
    }

    #[test]
    fn a_part_of_a_pods_state_is_none() {
        let temp = tempfile::tempdir().unwrap();
        let run_dir = nodeapi::RunDir::at(temp.path().join("run"));
        let parked = Parked::new(&temp.path().join("parked"), &run_dir, 1);
        let failed = Failed::default();
        failed.note(&container("cache"), Ok(()));
        assert_eq!(failed.of_pod("u-1"), None);
        let told = report(&parked, &migration(), None);
        assert!(told.containers.iter().all(|one| one.result.is_none()));

        failed.note(&container("index"), Err("the disk is full"));
        let reason = failed.of_pod("u-1");
        let told = report(&parked, &migration(), reason.as_deref());
        for one in &told.containers {
            assert_eq!(one.result, Some(TransferResult::Failed));
            let reason = one.reason.as_deref();
            assert_eq!(reason, Some("container index: the disk is full"));
        }
        assert_eq!(failed.of_pod("u-2"), None);
        let mut migration = migration();
        assert!(!says_so(&migration, "cache"));
        if let Some(status) = &mut migration.status {
            status.transfer = Some(told);
        }
        assert!(says_so(&migration, "cache"));
    }
}
