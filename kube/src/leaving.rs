//! Whether a pod leaves its node so that another takes its place, and why.

use k8s_openapi::api::core::v1::Pod;

use crate::Trigger;
use crate::annotations::CANCELLED;

/// The condition that tells an interrupted pod from one that is not wanted any
/// more: a plain delete, a scale-down and a rollout do not set it (KEP-3329).
const DISRUPTION_TARGET: &str = "DisruptionTarget";

/// Why a pod leaves.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Cause(pub Trigger);

/// Why it leaves; `None` if it stays, or ends for a reason that carries no state
/// over.
///
/// A pod on a node that shuts down gets no deletion timestamp: its kubelet ends
/// it. Elsewhere the condition comes a few milliseconds before the timestamp, and
/// may stay without one, where an eviction is refused after all.
#[must_use]
pub fn cause(pod: &Pod) -> Option<Cause> {
    let cancelled = pod
        .metadata
        .annotations
        .as_ref()
        .is_some_and(|all| all.contains_key(CANCELLED));
    if cancelled {
        return None;
    }
    let conditions = pod.status.as_ref()?.conditions.as_ref()?;
    let condition = conditions
        .iter()
        .find(|condition| condition.type_ == DISRUPTION_TARGET && condition.status == "True")?;
    let trigger = match condition.reason.as_deref()? {
        "EvictionByEvictionAPI" => Trigger::Eviction,
        "PreemptionByScheduler" => Trigger::Preemption,
        "DeletionByTaintManager" => Trigger::Taint,
        "TerminationByKubelet" => return Some(Cause(Trigger::Kubelet)),
        _ => return None,
    };
    pod.metadata.deletion_timestamp.as_ref()?;
    Some(Cause(trigger))
}

/// Its deletion has begun, or it has ended.
#[must_use]
pub fn is_ending(pod: &Pod) -> bool {
    let phase = pod
        .status
        .as_ref()
        .and_then(|status| status.phase.as_deref());
    pod.metadata.deletion_timestamp.is_some() || matches!(phase, Some("Succeeded" | "Failed"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn pod(reason: Option<&str>, deleted: bool, cancelled: bool) -> Pod {
        serde_json::from_value(json!({
            "metadata": {
                "deletionTimestamp": deleted.then_some("2026-01-01T00:00:00Z"),
                "annotations": cancelled.then_some(json!({CANCELLED: "true"})),
            },
            "status": {"conditions": reason.map(|reason| json!([
                {"type": "Ready", "status": "True"},
                {"type": "DisruptionTarget", "status": "True", "reason": reason},
            ]))},
        }))
        .unwrap()
    }

    #[test]
    fn only_an_interrupted_pod_leaves() {
        for (reason, deleted, cancelled, trigger) in [
            (
                Some("EvictionByEvictionAPI"),
                true,
                false,
                Some(Trigger::Eviction),
            ),
            (
                Some("PreemptionByScheduler"),
                true,
                false,
                Some(Trigger::Preemption),
            ),
            (
                Some("DeletionByTaintManager"),
                true,
                false,
                Some(Trigger::Taint),
            ),
            (
                Some("TerminationByKubelet"),
                true,
                false,
                Some(Trigger::Kubelet),
            ),
            (
                Some("TerminationByKubelet"),
                false,
                false,
                Some(Trigger::Kubelet),
            ),
            // Its node is gone, and its state with it.
            (Some("DeletionByPodGC"), true, false, None),
            // The eviction was refused after all.
            (Some("EvictionByEvictionAPI"), false, false, None),
            // kubectl delete, a scale-down, a rollout.
            (None, true, false, None),
            (None, false, false, None),
            (Some("EvictionByEvictionAPI"), true, true, None),
        ] {
            let is = cause(&pod(reason, deleted, cancelled)).map(|cause| cause.0);
            assert_eq!(is, trigger, "{reason:?} {deleted} {cancelled}");
        }
    }

    #[test]
    fn a_pod_that_has_ended_is_ending() {
        assert!(is_ending(&pod(None, true, false)));
        assert!(!is_ending(&pod(None, false, false)));
        let failed = json!({"status": {"phase": "Failed"}});
        assert!(is_ending(&serde_json::from_value(failed).unwrap()));
    }
}
