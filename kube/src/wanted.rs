//! Whether a pod's owner still wants what the pod holds.
//!
//! An eviction alone does not say so: a Deployment may have a new template by now,
//! a StatefulSet fewer replicas. State that nobody wants is not carried over; a
//! replacement, if one comes, starts from nothing and that is no failure.

use std::fmt;

use k8s_openapi::api::apps::v1::{Deployment, ReplicaSet, StatefulSet};
use k8s_openapi::api::batch::v1::Job;
use k8s_openapi::api::core::v1::Pod;

/// Annotation of a Deployment and its ReplicaSets: which template they have.
const REVISION: &str = "deployment.kubernetes.io/revision";
/// Label of a StatefulSet's pods: which template they have.
const CONTROLLER_REVISION: &str = "controller-revision-hash";

/// A pod as its owner knows it, which may be gone by now.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Member<'a> {
    /// Its name.
    pub name: &'a str,
    /// Which of its owner's templates it is of, if it says so.
    pub revision: Option<&'a str>,
}

impl<'a> Member<'a> {
    /// One that is there.
    #[must_use]
    pub fn of(pod: &'a Pod) -> Self {
        Self {
            name: pod.metadata.name.as_deref().unwrap_or_default(),
            revision: revision(pod),
        }
    }
}

/// Which of its owner's templates a pod is of; only a StatefulSet's says so.
#[must_use]
pub fn revision(pod: &Pod) -> Option<&str> {
    let labels = pod.metadata.labels.as_ref()?;
    labels.get(CONTROLLER_REVISION).map(String::as_str)
}

/// Whether the owner makes the pod that replaces one only once that is gone; `None`
/// where it does not exist any more.
#[must_use]
pub fn replaces_late(owner: &OwnerState) -> Option<bool> {
    match owner {
        OwnerState::Gone => None,
        OwnerState::ReplicaSet(..) => Some(false),
        OwnerState::StatefulSet(_) => Some(true),
        OwnerState::Job(job) => {
            let spec = job.spec.as_ref();
            let policy = spec.and_then(|spec| spec.pod_replacement_policy.as_deref());
            Some(policy == Some("Failed"))
        }
    }
}

/// What is known about a pod's owner.
#[derive(Debug, Clone)]
pub enum OwnerState {
    /// It does not exist any more, or another has its name.
    Gone,
    /// With the Deployment that it belongs to, if any.
    ReplicaSet(Box<ReplicaSet>, Option<Box<Deployment>>),
    /// A StatefulSet.
    StatefulSet(Box<StatefulSet>),
    /// A Job.
    Job(Box<Job>),
}

/// Why a pod's state is not wanted any more.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Unwanted {
    /// Its owner is gone or is being deleted.
    OwnerGone,
    /// Its owner wants fewer pods.
    ScaledDown,
    /// Its owner has another template by now.
    Rollout,
    /// The Job is done, or is suspended.
    JobOver,
}

impl fmt::Display for Unwanted {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::OwnerGone => "its owner is gone",
            Self::ScaledDown => "its owner wants fewer pods",
            Self::Rollout => "its owner has another template by now",
            Self::JobOver => "its Job is over or suspended",
        })
    }
}

/// Whether the owner wants the state of a pod, as far as the owner alone tells.
///
/// # Errors
///
/// Why not.
pub fn owner_wants(owner: &OwnerState, pod: Member<'_>) -> Result<(), Unwanted> {
    match owner {
        OwnerState::Gone => Err(Unwanted::OwnerGone),
        OwnerState::ReplicaSet(set, deployment) => {
            if set.metadata.deletion_timestamp.is_some() {
                return Err(Unwanted::OwnerGone);
            }
            if let Some(deployment) = deployment {
                if deployment.metadata.deletion_timestamp.is_some() {
                    return Err(Unwanted::OwnerGone);
                }
                let revision = |annotations: &Option<std::collections::BTreeMap<_, String>>| {
                    annotations
                        .as_ref()
                        .and_then(|all| all.get(REVISION))
                        .cloned()
                };
                if revision(&set.metadata.annotations) != revision(&deployment.metadata.annotations)
                {
                    return Err(Unwanted::Rollout);
                }
            }
            replicas(owner, 1)
        }
        OwnerState::StatefulSet(set) => {
            if set.metadata.deletion_timestamp.is_some() {
                return Err(Unwanted::OwnerGone);
            }
            let spec = set.spec.as_ref();
            let first = spec
                .and_then(|spec| spec.ordinals.as_ref()?.start)
                .unwrap_or(0);
            let ordinal = pod
                .name
                .rsplit_once('-')
                .and_then(|(_, text)| text.parse::<i32>().ok());
            if let Some(ordinal) = ordinal {
                replicas(owner, ordinal.saturating_sub(first).saturating_add(1))?;
            }
            let newest = set
                .status
                .as_ref()
                .and_then(|status| status.update_revision.as_deref());
            if newest.is_some() && pod.revision != newest {
                return Err(Unwanted::Rollout);
            }
            Ok(())
        }
        OwnerState::Job(job) => {
            if job.metadata.deletion_timestamp.is_some() {
                return Err(Unwanted::OwnerGone);
            }
            let suspended = job.spec.as_ref().and_then(|spec| spec.suspend) == Some(true);
            let over = job
                .status
                .as_ref()
                .is_some_and(|status| status.completion_time.is_some());
            if suspended || over {
                return Err(Unwanted::JobOver);
            }
            Ok(())
        }
    }
}

fn replicas(owner: &OwnerState, at_least: i32) -> Result<(), Unwanted> {
    let wanted = match owner {
        OwnerState::ReplicaSet(set, _) => set.spec.as_ref().and_then(|spec| spec.replicas),
        OwnerState::StatefulSet(set) => set.spec.as_ref().and_then(|spec| spec.replicas),
        OwnerState::Gone | OwnerState::Job(_) => None,
    };
    if wanted.unwrap_or(1) < at_least {
        return Err(Unwanted::ScaledDown);
    }
    Ok(())
}

/// How many of those that leave can still have a replacement: as many as may take
/// a state already, and as many as the owner has yet to make.
///
/// `active` are the owner's pods that stay, `free` those among them that may take
/// a state. A ReplicaSet that was scaled down while pods leave makes fewer.
#[must_use]
pub fn places(owner: &OwnerState, active: usize, free: usize) -> usize {
    let OwnerState::ReplicaSet(set, _) = owner else {
        return usize::MAX;
    };
    let wanted = set
        .spec
        .as_ref()
        .and_then(|spec| spec.replicas)
        .unwrap_or(1);
    let wanted = usize::try_from(wanted).unwrap_or(0);
    free.saturating_add(wanted.saturating_sub(active))
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::{Value, json};

    fn member<'a>(name: &'a str, revision: &'a str) -> Member<'a> {
        Member {
            name,
            revision: Some(revision),
        }
    }

    #[test]
    fn a_pod_says_which_template_it_has() {
        let labels = json!({CONTROLLER_REVISION: "r1"});
        let pod = json!({"metadata": {"name": "web-0", "labels": labels}});
        let pod: Pod = serde_json::from_value(pod).unwrap();
        assert_eq!(Member::of(&pod), member("web-0", "r1"));
        assert_eq!(super::revision(&Pod::default()), None);
    }

    #[test]
    fn some_owners_replace_a_pod_only_once_it_is_gone() {
        let job = |policy: Option<&str>| {
            let spec = json!({"podReplacementPolicy": policy, "template": {}});
            OwnerState::Job(serde_json::from_value(json!({"spec": spec})).unwrap())
        };
        assert_eq!(replaces_late(&job(Some("Failed"))), Some(true));
        assert_eq!(
            replaces_late(&job(Some("TerminatingOrFailed"))),
            Some(false)
        );
        assert_eq!(replaces_late(&job(None)), Some(false));
        assert_eq!(replaces_late(&replica_set(json!({}), None)), Some(false));
        assert_eq!(replaces_late(&OwnerState::Gone), None);
    }

    fn replica_set(set: Value, deployment: Option<Value>) -> OwnerState {
        OwnerState::ReplicaSet(
            serde_json::from_value(set).unwrap(),
            deployment.map(|deployment| serde_json::from_value(deployment).unwrap()),
        )
    }

    fn revision(revision: &str) -> Value {
        json!({"metadata": {"annotations": {REVISION: revision}}})
    }

    #[test]
    fn a_replica_sets_pod_is_wanted_until_a_rollout_or_an_end() {
        let deleted = json!({"metadata": {"deletionTimestamp": "2026-01-01T00:00:00Z"}});
        let none = json!({"spec": {"replicas": 0, "selector": {}}});
        for (owner, is) in [
            (replica_set(json!({}), None), Ok(())),
            (replica_set(revision("2"), Some(revision("2"))), Ok(())),
            (
                replica_set(revision("2"), Some(revision("3"))),
                Err(Unwanted::Rollout),
            ),
            (
                replica_set(json!({}), Some(deleted.clone())),
                Err(Unwanted::OwnerGone),
            ),
            (replica_set(deleted, None), Err(Unwanted::OwnerGone)),
            (replica_set(none, None), Err(Unwanted::ScaledDown)),
            (OwnerState::Gone, Err(Unwanted::OwnerGone)),
        ] {
            assert_eq!(owner_wants(&owner, member("web", "")), is, "{owner:?}");
        }
    }

    #[test]
    fn a_stateful_sets_pod_is_wanted_by_its_ordinal_and_revision() {
        for (spec, name, of, is) in [
            (json!({"replicas": 3}), "web-2", "r1", Ok(())),
            (
                json!({"replicas": 2}),
                "web-2",
                "r1",
                Err(Unwanted::ScaledDown),
            ),
            (
                json!({"replicas": 2, "ordinals": {"start": 5}}),
                "web-6",
                "r1",
                Ok(()),
            ),
            (
                json!({"replicas": 3}),
                "web-2",
                "r0",
                Err(Unwanted::Rollout),
            ),
        ] {
            let mut spec = spec;
            spec["selector"] = json!({});
            spec["serviceName"] = json!("web");
            spec["template"] = json!({});
            let set = json!({"spec": spec, "status": {"updateRevision": "r1", "replicas": 3}});
            let owner = OwnerState::StatefulSet(serde_json::from_value(set).unwrap());
            assert_eq!(
                owner_wants(&owner, member(name, of)),
                is,
                "{owner:?} {name} {of}"
            );
        }
    }

    #[test]
    fn a_jobs_pod_is_wanted_while_the_job_goes_on() {
        let job = |job| OwnerState::Job(serde_json::from_value(job).unwrap());
        let pod = member("count-x", "");
        assert_eq!(owner_wants(&job(json!({})), pod), Ok(()));
        let suspended = json!({"spec": {"suspend": true, "template": {}}});
        assert_eq!(owner_wants(&job(suspended), pod), Err(Unwanted::JobOver));
        let done = json!({"status": {"completionTime": "2026-01-01T00:00:00Z"}});
        assert_eq!(owner_wants(&job(done), pod), Err(Unwanted::JobOver));
    }

    #[test]
    fn a_replica_set_that_was_scaled_down_has_fewer_places() {
        let owner = |replicas| {
            replica_set(
                json!({"spec": {"replicas": replicas, "selector": {}}}),
                None,
            )
        };
        // Three leave together, nothing is made yet.
        assert_eq!(places(&owner(3), 0, 0), 3);
        // Two of the replacements are there.
        assert_eq!(places(&owner(3), 2, 2), 3);
        // One leaves, one less is wanted: the other two stay.
        assert_eq!(places(&owner(2), 2, 0), 0);
    }
}
