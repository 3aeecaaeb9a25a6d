//! The shims' questions, answered by what the API server has.
//!
//! Asked, never watched: a list that is a moment old might miss the very pod whose
//! state a container is to have, and let it start from nothing. A managed
//! container is created and ended seldom enough.

use std::collections::{BTreeMap, HashMap};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use k8s_openapi::api::core::v1::Pod;
use kube::api::ListParams;
use kube::{Api, Client};
use nodeapi::PodContainer;
use sterna_kube::verdict::undecided;
use sterna_kube::{Migration, Phase, Trigger, Verdict, leaving};
use tokio::time::{Instant, sleep, timeout};

use super::parking;
use crate::node::Node;
use crate::pods::{self, Guide, Nothing};

/// Between two looks while nothing is decided.
const LOOK_PAUSE: Duration = Duration::from_millis(250);

/// One look.
const LOOK_TIMEOUT: Duration = Duration::from_secs(10);

/// An evicted pod for which there is no Migration by then gets none: the
/// controller makes it within a second, unless there is none.
const DECISION_TIMEOUT: Duration = Duration::from_secs(15);

/// A pod that may be replaced while it runs is waited for as long: shims hold a signal
/// for 100 s, and what is left is for writing its state to the disk.
const REPLACEMENT_TIMEOUT: Duration = Duration::from_secs(60);

/// Label of a Deployment's pods: narrows down who may replace whom.
const TEMPLATE_HASH: &str = "pod-template-hash";

pub(super) struct ClusterGuide {
    client: Client,
    node: Arc<Node>,
    /// Containers whose state was to wait here and does not, by uid, and why.
    failed: parking::Failed,
    /// Pods whose state ended with a pod that nobody was said to replace, and why:
    /// the API server knows nothing of it any more.
    lost: Mutex<HashMap<String, String>>,
}

/// Pods by uid, and their names.
type Names = BTreeMap<String, String>;

impl std::fmt::Debug for ClusterGuide {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("ClusterGuide")
    }
}

/// Whether a container is on its way out.
#[derive(Debug)]
enum Leaving {
    Yes,
    /// It is, and its state is to wait: no pod takes it yet, and none will soon.
    Late,
    /// It may be: its pod is, and nobody has said where to.
    Undecided,
    No(String),
}

impl ClusterGuide {
    pub(super) fn new(client: Client, node: Arc<Node>) -> Self {
        Self {
            client,
            node,
            failed: parking::Failed::default(),
            lost: Mutex::default(),
        }
    }

    fn lost(&self) -> MutexGuard<'_, HashMap<String, String>> {
        // Every change under the lock is one insertion.
        self.lost.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// `awaited` are those that left at earlier looks and were undecided.
    async fn judge(&self, container: &PodContainer, awaited: &mut Names) -> kube::Result<Verdict> {
        let namespace = &container.namespace;
        let pods: Api<Pod> = Api::namespaced(self.client.clone(), namespace);
        let migrations: Api<Migration> = Api::namespaced(self.client.clone(), namespace);
        let Some(pod) = this_pod(&pods, container).await? else {
            // A pod that only its kubelet knows: nobody replaces it.
            return Ok(Verdict::Fresh);
        };
        let labels = pod.metadata.labels.as_ref();
        let all = match labels.and_then(|labels| labels.get(TEMPLATE_HASH)) {
            Some(hash) => ListParams::default().labels(&format!("{TEMPLATE_HASH}={hash}")),
            None => ListParams::default(),
        };
        // Pods first: one that is gone when they are listed has its Migration.
        let others = pods.list(&all).await?;
        let migrations = migrations.list(&ListParams::default()).await?;
        let verdict = Verdict::of(&pod, &others, &migrations);
        if verdict == Verdict::Fresh
            && let Some(name) = unaccounted(awaited, &others.items, &migrations.items)
        {
            let reason = format!(
                "pod {name} ended before it was decided who takes its state (does sterna-controller run?)"
            );
            self.lost().insert(container.uid.clone(), reason.clone());
            return Ok(Verdict::Lost { reason });
        }
        let undecided = undecided(&pod, &others, &migrations).into_iter();
        awaited.extend(undecided.filter_map(|pod| {
            let metadata = &pod.metadata;
            Some((metadata.uid.clone()?, metadata.name.clone()?))
        }));
        Ok(verdict)
    }

    /// `held` is for how long its signal was.
    async fn judge_leaving(
        &self,
        container: &PodContainer,
        held: Duration,
    ) -> kube::Result<Leaving> {
        let namespace = &container.namespace;
        let pods: Api<Pod> = Api::namespaced(self.client.clone(), namespace);
        let migrations: Api<Migration> = Api::namespaced(self.client.clone(), namespace);
        let pod = this_pod(&pods, container).await?;
        let migrations = migrations.list(&ListParams::default()).await?;
        Ok(leaves(pod.as_ref(), container, &migrations.items, held))
    }
}

async fn this_pod(pods: &Api<Pod>, container: &PodContainer) -> kube::Result<Option<Pod>> {
    let pod = pods.get_opt(&container.pod).await?;
    Ok(pod.filter(|pod| pod.metadata.uid.as_ref() == Some(&container.uid)))
}

/// One that left, is gone, and has no Migration: its state is lost.
fn unaccounted<'a>(awaited: &'a Names, pods: &[Pod], migrations: &[Migration]) -> Option<&'a str> {
    let has_migration = |uid: &String| {
        migrations.iter().any(|migration| {
            let status = migration.status.as_ref();
            let source = status.and_then(|status| status.source_pod.as_ref());
            source
                .map(|source| &source.uid)
                .or(migration.spec.pod_uid.as_ref())
                == Some(uid)
        })
    };
    // One that is there may have been called off.
    let is_there = |uid: &String| {
        pods.iter()
            .any(|pod| pod.metadata.uid.as_ref() == Some(uid))
    };
    let mut awaited = awaited.iter();
    let found = awaited.find(|(uid, _)| !is_there(uid) && !has_migration(uid));
    found.map(|(_, name)| name.as_str())
}

fn leaves(
    pod: Option<&Pod>,
    container: &PodContainer,
    migrations: &[Migration],
    held: Duration,
) -> Leaving {
    let own = migrations.iter().filter(|migration| {
        let status = migration.status.as_ref();
        let source = status.and_then(|status| status.source_pod.as_ref());
        let uid = source
            .map(|source| &source.uid)
            .or(migration.spec.pod_uid.as_ref());
        uid == Some(&container.uid)
    });
    let phase = |migration: &Migration| {
        let status = migration.status.as_ref();
        status.map(|status| status.phase).unwrap_or_default()
    };
    // One that goes on decides, should there be an older one.
    let Some(migration) = own.min_by_key(|migration| phase(migration).is_final()) else {
        return match pod {
            None => Leaving::No("its pod is gone".into()),
            Some(pod) if leaving::cause(pod).is_some() => Leaving::Undecided,
            Some(_) => Leaving::No("its pod is not moved".into()),
        };
    };
    // One that its kubelet ends, as the node shuts down, say, is not deleted.
    let ends = pod.is_none_or(|pod| leaving::is_ending(pod) || leaving::cause(pod).is_some());
    match phase(migration) {
        Phase::Failed | Phase::Cancelled => {
            let status = migration.status.as_ref();
            let message = status.and_then(|status| status.message.clone());
            Leaving::No(message.unwrap_or_else(|| "its migration came to nothing".into()))
        }
        // The end of a container that runs elsewhere is about to be seen.
        Phase::Succeeded => Leaving::Yes,
        _ if ends && is_late(migration, held) => Leaving::Late,
        _ if ends => Leaving::Yes,
        // Its kubelet starts it anew in the same pod.
        _ => Leaving::No("its pod stays".into()),
    }
}

/// Whether a state is to wait for a pod, rather than its container.
fn is_late(migration: &Migration, held: Duration) -> bool {
    let Some(status) = migration.status.as_ref() else {
        return false;
    };
    let target = status.target_pod.as_ref();
    let is_sent = target.is_some_and(|target| target.node.is_some());
    let comes_late =
        status.replaced_late == Some(true) || migration.spec.trigger == Trigger::Kubelet;
    status.phase.is_before_commit()
        && status.source_pod.is_some()
        && !is_sent
        && (comes_late || held >= REPLACEMENT_TIMEOUT)
}

#[tonic::async_trait]
impl Guide for ClusterGuide {
    async fn nothing_comes(&self, container: &PodContainer) -> Nothing {
        let known = self.lost().get(&container.uid).cloned();
        if let Some(reason) = known {
            return Nothing::Lost(reason);
        }
        let mut awaited = Names::new();
        loop {
            match timeout(LOOK_TIMEOUT, self.judge(container, &mut awaited)).await {
                Ok(Ok(Verdict::Fresh)) => return Nothing::Fresh,
                Ok(Ok(Verdict::Lost { reason })) => return Nothing::Lost(reason),
                Ok(Ok(Verdict::Comes { .. } | Verdict::Undecided)) => {}
                Ok(Err(error)) => tracing::warn!(%container, "cannot ask the API server: {error}"),
                Err(_) => tracing::warn!(%container, "the API server does not answer"),
            }
            sleep(LOOK_PAUSE).await;
        }
    }

    async fn leaves(&self, container: &PodContainer) -> pods::Leaving {
        let since = Instant::now();
        loop {
            let look = self.judge_leaving(container, since.elapsed());
            match timeout(LOOK_TIMEOUT, look).await {
                Ok(Ok(Leaving::No(reason))) => return pods::Leaving::Stays(reason),
                Ok(Ok(Leaving::Late)) => return pods::Leaving::Waits,
                Ok(Ok(Leaving::Undecided)) if since.elapsed() > DECISION_TIMEOUT => {
                    return pods::Leaving::Stays(format!(
                        "within {} s no Migration was made for its pod (does sterna-controller run?)",
                        DECISION_TIMEOUT.as_secs()
                    ));
                }
                Ok(Ok(Leaving::Yes | Leaving::Undecided)) => {}
                Ok(Err(error)) => tracing::warn!(%container, "cannot ask the API server: {error}"),
                Err(_) => tracing::warn!(%container, "the API server does not answer"),
            }
            sleep(LOOK_PAUSE).await;
        }
    }

    async fn waits(&self, container: &PodContainer, outcome: Result<(), &str>) {
        parking::tell(
            &self.client,
            &self.node.parked,
            &self.failed,
            container,
            outcome,
        )
        .await;
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn container() -> PodContainer {
        PodContainer {
            namespace: "shop".into(),
            pod: "cart".into(),
            uid: "s".into(),
            container: "cache".into(),
        }
    }

    fn pod(evicted: bool) -> Pod {
        let conditions = json!([{"type": "DisruptionTarget", "status": "True",
            "reason": "EvictionByEvictionAPI"}]);
        serde_json::from_value(json!({
            "metadata": {"name": "cart", "uid": "s",
                "deletionTimestamp": evicted.then_some("2026-01-01T00:00:00Z")},
            "status": {"conditions": if evicted { conditions } else { json!([]) }},
        }))
        .unwrap()
    }

    fn migration(phase: &str) -> Migration {
        serde_json::from_value(json!({
            "apiVersion": "sterna.dev/v1alpha1", "kind": "Migration",
            "metadata": {"name": "m"}, "spec": {"podName": "cart", "podUid": "s"},
            "status": {"phase": phase, "message": "the link broke",
                "sourcePod": {"name": "cart", "uid": "s", "node": "a"}},
        }))
        .unwrap()
    }

    fn word(pod: Option<&Pod>, migrations: &[Migration]) -> &'static str {
        match leaves(pod, &container(), migrations, Duration::ZERO) {
            Leaving::Late => "late",
            Leaving::Yes => "yes",
            Leaving::Undecided => "undecided",
            Leaving::No(_) => "no",
        }
    }

    #[test]
    fn what_ended_undecided_is_lost_and_what_was_called_off_is_not() {
        let awaited = Names::from([("s".to_owned(), "cart".to_owned())]);
        assert_eq!(unaccounted(&awaited, &[], &[]), Some("cart"));
        assert_eq!(unaccounted(&awaited, &[pod(false)], &[]), None);
        assert_eq!(unaccounted(&awaited, &[], &[migration("Cancelled")]), None);
        assert_eq!(unaccounted(&Names::new(), &[], &[]), None);
    }

    #[test]
    fn a_state_waits_for_a_pod_that_comes_late_and_for_one_that_does_not_come_in_time() {
        let late = |change: &dyn Fn(&mut serde_json::Value), held| {
            let mut object = serde_json::to_value(migration("Pending")).unwrap();
            change(&mut object);
            let migration = serde_json::from_value(object).unwrap();
            let held = Duration::from_secs(held);
            let leaves = leaves(Some(&pod(true)), &container(), &[migration], held);
            matches!(leaves, Leaving::Late)
        };
        assert!(!late(&|_| {}, 59));
        assert!(late(&|_| {}, 60));
        assert!(late(&|one| one["status"]["replacedLate"] = json!(true), 0));
        assert!(!late(
            &|one| one["status"]["replacedLate"] = json!(false),
            0
        ));
        assert!(late(&|one| one["spec"]["trigger"] = json!("Kubelet"), 0));
        let unbound = json!({"name": "r", "uid": "r"});
        assert!(late(
            &|one| one["status"]["targetPod"] = unbound.clone(),
            60
        ));
        let bound = json!({"name": "r", "uid": "r", "node": "b"});
        assert!(!late(&|one| one["status"]["targetPod"] = bound.clone(), 60));
        assert!(!late(
            &|one| one["status"]["phase"] = json!("Committed"),
            60
        ));
        assert!(!late(
            &|one| one["status"]["phase"] = json!("Cancelled"),
            60
        ));
    }

    #[test]
    fn a_signal_is_held_for_a_pod_that_moves_and_no_other() {
        let (evicted, stays) = (pod(true), pod(false));
        for (pod, migrations, expected) in [
            (Some(&stays), vec![], "no"),
            (Some(&evicted), vec![], "undecided"),
            (Some(&evicted), vec![migration("Pending")], "yes"),
            (Some(&evicted), vec![migration("Transferring")], "yes"),
            (Some(&evicted), vec![migration("Failed")], "no"),
            (Some(&evicted), vec![migration("Cancelled")], "no"),
            (
                Some(&evicted),
                vec![migration("Cancelled"), migration("Matched")],
                "yes",
            ),
            // Its liveness probe failed while memory was copied.
            (Some(&stays), vec![migration("Transferring")], "no"),
            // A StatefulSet's, whose pod was removed by force.
            (None, vec![migration("Transferring")], "yes"),
            (None, vec![], "no"),
        ] {
            assert_eq!(word(pod, &migrations), expected, "{migrations:?}");
        }
    }
}
