//! Which pod takes the state of one that leaves.

use jiff::{SignedDuration, Timestamp};
use k8s_openapi::api::core::v1::Pod;

use crate::annotations::MIGRATION;
use crate::owner::{controller, identity};
use crate::spec_hash::spec_hash;
use crate::{Owner, OwnerRef, leaving};

/// API servers' clocks differ, and their times have whole seconds.
const SKEW: SignedDuration = SignedDuration::from_secs(2);

/// A pod whose state waits for another to take it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Claimant {
    /// Name of its Migration.
    pub migration: String,
    /// Its uid.
    pub uid: String,
    /// Its controller.
    pub owner: OwnerRef,
    /// Which of its controller's pods it is.
    pub identity: String,
    /// What a pod must be like to take its state.
    pub spec_hash: String,
    /// Containers whose state it is.
    pub containers: Vec<String>,
    /// When it began to leave: what was there before does not replace it.
    pub since: Timestamp,
    /// Where it would rather go.
    pub target_node: Option<String>,
}

impl Claimant {
    /// What a pod would be as claimant; `None` for one whose controller makes no
    /// replacements elsewhere.
    #[must_use]
    pub fn of(pod: &Pod, migration: &str, containers: &[String], since: Timestamp) -> Option<Self> {
        let owner = controller(pod)?;
        let kind = Owner::from_kind(&owner.kind)?;
        Some(Self {
            migration: migration.to_owned(),
            uid: pod.metadata.uid.clone()?,
            identity: identity(pod, kind),
            owner,
            spec_hash: spec_hash(pod, containers),
            containers: containers.to_owned(),
            since,
            target_node: None,
        })
    }

    /// Whether this pod may take its state.
    #[must_use]
    pub fn may_claim(&self, pod: &Pod) -> bool {
        let metadata = &pod.metadata;
        let Some(kind) = Owner::from_kind(&self.owner.kind) else {
            return false;
        };
        let claimed_by = metadata
            .annotations
            .as_ref()
            .and_then(|all| all.get(MIGRATION));
        metadata.uid.as_deref() != Some(&self.uid)
            && controller(pod).is_some_and(|owner| owner.uid == self.owner.uid)
            && identity(pod, kind) == self.identity
            && !leaving::is_ending(pod)
            && claimed_by.is_none_or(|name| *name == self.migration)
            && created_since(pod, self.since)
            && !has_started(pod, &self.containers)
            && spec_hash(pod, &self.containers) == self.spec_hash
    }
}

fn created_since(pod: &Pod, since: Timestamp) -> bool {
    let created = pod.metadata.creation_timestamp.as_ref();
    created.is_some_and(|created| created.0 + SKEW >= since)
}

/// What containers are said to have ended by whose start failed: they never ran,
/// and a restore that failed is one of them.
const NEVER_RAN: [&str; 3] = ["StartError", "ContainerCannotRun", "RunContainerError"];

/// Whether one of these containers has run.
#[must_use]
pub fn has_started(pod: &Pod, containers: &[String]) -> bool {
    let statuses = pod
        .status
        .as_ref()
        .and_then(|status| status.container_statuses.as_ref());
    let mut ours = statuses
        .into_iter()
        .flatten()
        .filter(|status| containers.contains(&status.name));
    ours.any(|status| {
        let states = [status.state.as_ref(), status.last_state.as_ref()];
        let mut ends = states
            .iter()
            .flatten()
            .filter_map(|state| state.terminated.as_ref())
            .peekable();
        let runs = states[0].is_some_and(|state| state.running.is_some());
        let restarted = status.restart_count > 0 && ends.peek().is_none();
        let ran = ends.any(|end| {
            let reason = end.reason.as_deref().unwrap_or_default();
            !NEVER_RAN.contains(&reason)
        });
        runs || restarted || ran
    })
}

/// Gives each claimant a pod, and no pod to two.
///
/// Whoever leaves longest chooses first; a pod that already bears a claimant's name
/// goes to it, then one on the node it wants, then the oldest.
#[must_use]
pub fn assign<'a>(claimants: &[Claimant], pods: &[&'a Pod]) -> Vec<(Claimant, &'a Pod)> {
    let mut claimants: Vec<&Claimant> = claimants.iter().collect();
    claimants.sort_by(|a, b| (a.since, &a.uid).cmp(&(b.since, &b.uid)));
    let mut free: Vec<&Pod> = pods.to_vec();
    let mut assigned = Vec::new();
    for claimant in claimants {
        let best = free
            .iter()
            .enumerate()
            .filter(|(_, pod)| claimant.may_claim(pod))
            .min_by_key(|(_, pod)| {
                let metadata = &pod.metadata;
                let bears_its_name = metadata
                    .annotations
                    .as_ref()
                    .is_some_and(|all| all.contains_key(MIGRATION));
                let node = pod.spec.as_ref().and_then(|spec| spec.node_name.as_ref());
                let where_it_wants = node.is_some() && node == claimant.target_node.as_ref();
                let created = metadata.creation_timestamp.as_ref().map(|time| time.0);
                (
                    !bears_its_name,
                    !where_it_wants,
                    created,
                    metadata.uid.clone(),
                )
            })
            .map(|(index, _)| index);
        if let Some(index) = best {
            assigned.push((claimant.clone(), free.remove(index)));
        }
    }
    assigned
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use serde_json::{Value, json};

    /// A replica of one template; `change` is merged into it.
    pub(crate) fn replica(uid: &str, created: &str, change: Value) -> Pod {
        let mut pod = json!({
            "metadata": {
                "name": uid, "uid": uid, "creationTimestamp": created,
                "labels": {"pod-template-hash": "5d4f"},
                "annotations": {"sterna.dev/managed-containers": "[\"cache\"]"},
                "ownerReferences": [{"apiVersion": "apps/v1", "kind": "ReplicaSet",
                    "name": "cart-5d4f", "uid": "rs", "controller": true}],
            },
            "spec": {"containers": [{"name": "cache", "image": "valkey:9"}]},
            "status": {"phase": "Pending"},
        });
        merge(&mut pod, change);
        serde_json::from_value(pod).unwrap()
    }

    fn merge(into: &mut Value, from: Value) {
        match (into, from) {
            (Value::Object(into), Value::Object(from)) => {
                for (key, value) in from {
                    merge(into.entry(key).or_insert(Value::Null), value);
                }
            }
            (into, from) => *into = from,
        }
    }

    pub(crate) const OLD: &str = "2026-01-01T00:00:00Z";
    pub(crate) const NEW: &str = "2026-01-01T01:00:00Z";

    pub(crate) fn claimant(uid: &str) -> Claimant {
        let since = NEW.parse().unwrap();
        let pod = replica(uid, OLD, json!({}));
        Claimant::of(&pod, &format!("m-{uid}"), &["cache".to_owned()], since).unwrap()
    }

    #[test]
    fn only_a_new_pod_that_is_alike_and_free_and_not_started_takes_the_state() {
        let fits = |change| claimant("s").may_claim(&replica("r", NEW, change));
        assert!(fits(json!({})));
        assert!(fits(
            json!({"metadata": {"annotations": {MIGRATION: "m-s"}}})
        ));
        for (why, change) in [
            ("the source itself", json!({"metadata": {"uid": "s"}})),
            (
                "was there before",
                json!({"metadata": {"creationTimestamp": OLD}}),
            ),
            (
                "another template",
                json!({"metadata": {"labels": {"pod-template-hash": "9c1a"}}}),
            ),
            (
                "another owner",
                json!({"metadata": {"ownerReferences": [{"apiVersion": "apps/v1",
                "kind": "ReplicaSet", "name": "cart-5d4f", "uid": "other", "controller": true}]}}),
            ),
            ("no owner", json!({"metadata": {"ownerReferences": []}})),
            (
                "is taken",
                json!({"metadata": {"annotations": {MIGRATION: "m-t"}}}),
            ),
            (
                "is deleted",
                json!({"metadata": {"deletionTimestamp": NEW}}),
            ),
            ("has ended", json!({"status": {"phase": "Failed"}})),
            (
                "another image",
                json!({"spec": {"containers": [{"name": "cache", "image": "v:8"}]}}),
            ),
            (
                "runs",
                json!({"status": {"containerStatuses": [{"name": "cache", "ready": false,
                "restartCount": 0, "image": "", "imageID": "", "state": {"running": {}}}]}}),
            ),
            (
                "has run",
                json!({"status": {"containerStatuses": [{"name": "cache", "ready": false,
                "restartCount": 1, "image": "", "imageID": "", "state": {"waiting": {}}}]}}),
            ),
        ] {
            assert!(!fits(change), "{why}");
        }
    }

    #[test]
    fn a_container_whose_start_failed_has_not_run() {
        let ended = |reason| {
            let end = json!({"terminated": {"exitCode": 128, "reason": reason}});
            let pod = json!({"status": {"containerStatuses": [{"name": "cache", "ready": false,
                "restartCount": 1, "image": "", "imageID": "",
                "state": {"waiting": {"reason": "CrashLoopBackOff"}}, "lastState": end}]}});
            has_started(&replica("r", NEW, pod), &["cache".to_owned()])
        };
        assert!(!ended("StartError"));
        assert!(!ended("ContainerCannotRun"));
        assert!(ended("Error"));
        assert!(ended("Completed"));
    }

    #[test]
    fn a_sidecar_that_runs_already_does_not_matter() {
        let sidecar = json!({"status": {"containerStatuses": [{"name": "exporter", "ready": true,
            "restartCount": 0, "image": "", "imageID": "", "state": {"running": {}}}]}});
        assert!(claimant("s").may_claim(&replica("r", NEW, sidecar)));
    }

    #[test]
    fn each_of_three_that_leave_together_gets_a_pod_of_its_own() {
        let claimants = ["s1", "s2", "s3"].map(claimant);
        let pods = ["r1", "r2", "r3", "r4"].map(|uid| replica(uid, NEW, json!({})));
        let pods: Vec<&Pod> = pods.iter().collect();
        let assigned = assign(&claimants, &pods);
        let names: Vec<(&str, &str)> = assigned
            .iter()
            .map(|(claimant, pod)| (claimant.uid.as_str(), pod.metadata.uid.as_deref().unwrap()))
            .collect();
        assert_eq!(names, [("s1", "r1"), ("s2", "r2"), ("s3", "r3")]);
    }

    #[test]
    fn who_leaves_longest_chooses_first_and_the_others_wait() {
        let mut early = claimant("z");
        early.since -= SignedDuration::from_secs(1);
        let pod = replica("r", NEW, json!({}));
        let assigned = assign(&[claimant("a"), early], &[&pod]);
        assert_eq!(assigned.len(), 1);
        assert_eq!(assigned[0].0.uid, "z");
    }

    #[test]
    fn a_pod_that_bears_a_claimants_name_goes_to_it() {
        let ours = json!({"metadata": {"annotations": {MIGRATION: "m-s2"}}});
        let pods = [replica("r1", NEW, ours), replica("r2", NEW, json!({}))];
        let pods: Vec<&Pod> = pods.iter().collect();
        let assigned = assign(&["s1", "s2"].map(claimant), &pods);
        let target = |index: usize| assigned[index].1.metadata.uid.as_deref();
        assert_eq!((target(0), target(1)), (Some("r2"), Some("r1")));
    }

    #[test]
    fn the_node_that_was_asked_for_is_preferred() {
        let mut wanted = claimant("s");
        wanted.target_node = Some("b".to_owned());
        let pods = [
            replica("r1", NEW, json!({"spec": {"nodeName": "a"}})),
            replica("r2", NEW, json!({"spec": {"nodeName": "b"}})),
        ];
        let pods: Vec<&Pod> = pods.iter().collect();
        let assigned = assign(&[wanted], &pods);
        assert_eq!(assigned[0].1.metadata.uid.as_deref(), Some("r2"));
    }
}
