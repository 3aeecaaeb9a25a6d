//! The Migration object: one move of one pod's state.
//!
//! One writer per part: `spec` is its creator's, `status` the controller's, except
//! for `status.transfer`, which is the source node's agent's. Both write by
//! server-side apply, each under its own name ([`crate::CONTROLLER`],
//! [`crate::AGENT`]), so that neither can undo the other.

use jiff::Timestamp;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::{Condition, Time};
use kube::CustomResource;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// What is to be moved.
#[derive(CustomResource, Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[kube(
    group = "sterna.dev",
    version = "v1alpha1",
    kind = "Migration",
    namespaced,
    shortname = "mig",
    status = "MigrationStatus",
    derive = "PartialEq",
    category = "sterna",
    printcolumn = r#"{"name":"Pod", "type":"string", "jsonPath":".spec.podName"}"#,
    printcolumn = r#"{"name":"From", "type":"string", "jsonPath":".status.sourcePod.node"}"#,
    printcolumn = r#"{"name":"To", "type":"string", "jsonPath":".status.targetPod.node"}"#,
    printcolumn = r#"{"name":"Phase", "type":"string", "jsonPath":".status.phase"}"#,
    printcolumn = r#"{"name":"Blackout", "type":"string", "jsonPath":".status.transfer.containers[*].blackoutMilliseconds", "description":"Milliseconds in which no copy of the container ran"}"#,
    printcolumn = r#"{"name":"Bytes", "type":"string", "jsonPath":".status.transfer.containers[*].sentBytes", "priority":1}"#,
    printcolumn = r#"{"name":"Trigger", "type":"string", "jsonPath":".spec.trigger", "priority":1}"#,
    printcolumn = r#"{"name":"Message", "type":"string", "jsonPath":".status.message", "priority":1}"#,
    printcolumn = r#"{"name":"Age", "type":"date", "jsonPath":".metadata.creationTimestamp"}"#
)]
#[serde(rename_all = "camelCase")]
#[schemars(title = "Migration")]
pub struct MigrationSpec {
    /// The pod whose state is moved.
    #[schemars(length(min = 1, max = 253))]
    pub pod_name: String,
    /// Its uid; whichever pod has the name when the Migration is first seen, if absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub pod_uid: Option<String>,
    /// The node it is to go to; where the scheduler puts its replacement, if absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub target_node: Option<String>,
    /// How long it may take until another pod has its state, in seconds.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 1, max = 86400))]
    pub deadline_seconds: Option<u32>,
    /// How long no copy of a container may run, as far as it can be foreseen, in
    /// milliseconds.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 1, max = 3_600_000))]
    pub max_blackout_milliseconds: Option<u32>,
    /// Why there is a migration.
    #[serde(default)]
    pub trigger: Trigger,
}

impl MigrationSpec {
    /// How long it may take if the object does not say: about as long as an
    /// operator waits for a drain.
    pub const DEFAULT_DEADLINE_SECONDS: u32 = 600;

    /// When it has to be over, if it began at `since`.
    #[must_use]
    pub fn deadline(&self, since: Timestamp) -> Timestamp {
        let seconds = self
            .deadline_seconds
            .unwrap_or(Self::DEFAULT_DEADLINE_SECONDS);
        since
            .checked_add(jiff::SignedDuration::from_secs(seconds.into()))
            .unwrap_or(Timestamp::MAX)
    }
}

/// Why there is a migration.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default, Serialize, Deserialize, JsonSchema)]
pub enum Trigger {
    /// Somebody asked for it.
    #[default]
    Request,
    /// The pod was evicted through the API, as `kubectl drain` does it.
    Eviction,
    /// A pod of higher priority takes its place.
    Preemption,
    /// Its node got a taint that it does not tolerate.
    Taint,
    /// Its kubelet ends it, because of pressure or as the node shuts down.
    Kubelet,
}

/// How far it is, and who takes part in it.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct MigrationStatus {
    /// Where it stands.
    #[serde(default)]
    pub phase: Phase,
    /// Why it stands there, for people.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub message: Option<String>,
    /// The pod that is left.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub source_pod: Option<PodRef>,
    /// What replaces it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub owner: Option<OwnerRef>,
    /// Which of its owner's pods it is.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub identity: Option<String>,
    /// Which of its owner's templates it is of, where the owner is a StatefulSet.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub revision: Option<String>,
    /// Whether its owner makes the pod that replaces it only once it is gone; absent
    /// until that is known.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub replaced_late: Option<bool>,
    /// What a pod must be like to take its state.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub spec_hash: Option<String>,
    /// Containers whose state is moved.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub containers: Vec<String>,
    /// The pod that takes its state; claimed for good, except that a pod that is
    /// gone before the commit is given up for another.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub target_pod: Option<PodRef>,
    /// When it was first seen.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub started_at: Option<Time>,
    /// When it was over.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub finished_at: Option<Time>,
    /// `Matched` and `Succeeded`, as conditions are made.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub conditions: Vec<Condition>,
    /// What the source's node did; the only part that it writes.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub transfer: Option<Transfer>,
}

/// Where a migration stands.
///
/// ```text
///  Pending ──> Matched ──> Transferring ──> Committed ──> Succeeded
///     ^───────────┴─────────────┘ (target gone)     └───> Failed
///  from each of the first three also: ──> Failed, ──> Cancelled
/// ```
///
/// What was called off, or given up, may still turn out to have succeeded: the
/// source's node had committed when it heard of it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default, Serialize, Deserialize, JsonSchema)]
pub enum Phase {
    /// No pod takes the state yet.
    #[default]
    Pending,
    /// One does.
    Matched,
    /// The source's node is sending.
    Transferring,
    /// The target alone may run; the source is frozen for good, unless the target
    /// hands back.
    Committed,
    /// Every container runs in the target.
    Succeeded,
    /// Some container does not.
    Failed,
    /// It was called off: the pod's owner no longer wants it, or the object was
    /// deleted. The target, if there is one, starts from nothing.
    Cancelled,
}

impl Phase {
    /// All of them.
    pub const ALL: [Self; 7] = [
        Self::Pending,
        Self::Matched,
        Self::Transferring,
        Self::Committed,
        Self::Succeeded,
        Self::Failed,
        Self::Cancelled,
    ];

    /// Nothing happens any more.
    #[must_use]
    pub fn is_final(self) -> bool {
        matches!(self, Self::Succeeded | Self::Failed | Self::Cancelled)
    }

    /// It may still be called off.
    #[must_use]
    pub fn is_before_commit(self) -> bool {
        matches!(self, Self::Pending | Self::Matched | Self::Transferring)
    }

    /// Whether it may be followed by another.
    #[must_use]
    pub fn may_become(self, next: Self) -> bool {
        match self {
            Self::Pending | Self::Matched | Self::Transferring => next != self,
            Self::Committed => matches!(next, Self::Succeeded | Self::Failed),
            Self::Failed | Self::Cancelled => next == Self::Succeeded,
            Self::Succeeded => false,
        }
    }
}

/// A pod that takes part.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize, JsonSchema)]
pub struct PodRef {
    /// Its name.
    pub name: String,
    /// Its uid.
    pub uid: String,
    /// Its node; absent until it has one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub node: Option<String>,
}

/// The controller of a pod.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Default, Serialize, Deserialize, JsonSchema)]
pub struct OwnerRef {
    /// `ReplicaSet`, `StatefulSet`, `Job`.
    pub kind: String,
    /// Its name.
    pub name: String,
    /// Its uid.
    pub uid: String,
}

/// What the source's node did.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct Transfer {
    /// The target pod it is about: what is said of another is of the past.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub target_uid: Option<String>,
    /// When it began.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub started_at: Option<Time>,
    /// When it was over.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub finished_at: Option<Time>,
    /// One for each container that is moved.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(extend(
        "x-kubernetes-list-type" = "map",
        "x-kubernetes-list-map-keys" = ["name"]
    ))]
    pub containers: Vec<ContainerTransfer>,
}

/// The transfer of one container.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct ContainerTransfer {
    /// The container's name.
    pub name: String,
    /// Where it stands.
    #[serde(default)]
    pub phase: TransferPhase,
    /// How often memory was gone through.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub laps: Option<u32>,
    /// What was sent over the network, in bytes.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub sent_bytes: Option<u64>,
    /// What the container holds in memory, in bytes.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub memory_bytes: Option<u64>,
    /// From the freeze to the end of the dump.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub freeze_milliseconds: Option<u64>,
    /// From the freeze until the container runs in the target.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub blackout_milliseconds: Option<u64>,
    /// How it ended; absent until it has.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub result: Option<TransferResult>,
    /// Why it ended so.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub reason: Option<String>,
}

/// Where the transfer of a container stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default, Serialize, Deserialize, JsonSchema)]
pub enum TransferPhase {
    /// The two nodes agree on how.
    #[default]
    Negotiating,
    /// The container runs, its memory is copied.
    Copying,
    /// It is frozen, the rest is sent.
    Freezing,
    /// It is held by the source's node, until there is a target to send it to.
    Parked,
    /// The target alone may run.
    Committed,
    /// It is over; see the result.
    Finished,
}

/// How the transfer of a container ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize, JsonSchema)]
pub enum TransferResult {
    /// It runs in the target.
    Succeeded,
    /// It does not; in the source it went on as if nothing had happened, or its
    /// pod was ended as pods are.
    Failed,
}

#[cfg(test)]
mod tests {
    use super::*;
    use kube::CustomResourceExt;

    #[test]
    fn the_definition_has_what_kubectl_shows() {
        let crd = Migration::crd();
        let version = &crd.spec.versions[0];
        let columns = version.additional_printer_columns.as_ref().unwrap();
        assert_eq!(columns.len(), 9);
        assert!(version.subresources.as_ref().unwrap().status.is_some());
        assert_eq!(crd.spec.names.short_names.unwrap(), ["mig"]);
    }

    #[test]
    fn nothing_follows_an_end_but_a_success_that_was_not_known() {
        for from in Phase::ALL {
            for to in Phase::ALL {
                let may = from.may_become(to);
                assert!(!may || from != to, "{from:?} to itself");
                let known_late = from != Phase::Succeeded && to == Phase::Succeeded;
                assert!(!may || !from.is_final() || known_late, "{from:?} to {to:?}");
                if to == Phase::Cancelled {
                    assert_eq!(may, from.is_before_commit(), "{from:?}");
                }
            }
        }
    }

    #[test]
    fn a_migration_without_status_is_pending() {
        let status: MigrationStatus = serde_json::from_str("{}").unwrap();
        assert_eq!(status.phase, Phase::Pending);
    }

    #[test]
    fn a_deadline_counts_from_the_start() {
        let spec = |text| serde_json::from_str::<MigrationSpec>(text).unwrap();
        let since = Timestamp::UNIX_EPOCH;
        let of = |spec: MigrationSpec| spec.deadline(since).as_second();
        assert_eq!(of(spec(r#"{"podName":"a"}"#)), 600);
        assert_eq!(of(spec(r#"{"podName":"a","deadlineSeconds":5}"#)), 5);
    }
}
