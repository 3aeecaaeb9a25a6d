//! What the source's node tells of a transfer, in one word.

use sterna_kube::{MigrationStatus, TransferPhase, TransferResult};

#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Outcome {
    /// Nothing, or nothing about this target.
    Nothing,
    /// It has begun.
    Begun,
    /// It has, and its state lies at the source's node until there is a target.
    Parked,
    /// At least one container cannot go back any more.
    Committed,
    /// All containers run in the target.
    Succeeded,
    /// All is over, and at least one container does not.
    Failed(String),
}

/// Reads it.
///
/// A transfer to another target than the present one is of the past; but a state that
/// waits at the source's node does so for whichever pod takes it.
pub(crate) fn read(status: &MigrationStatus) -> Outcome {
    let Some(transfer) = status.transfer.as_ref() else {
        return Outcome::Nothing;
    };
    let target = status.target_pod.as_ref().map(|target| &target.uid);
    if transfer.target_uid.is_some() && transfer.target_uid.as_ref() != target {
        let mut containers = transfer.containers.iter();
        return match containers.any(|one| one.phase == TransferPhase::Parked) {
            true => Outcome::Parked,
            false => Outcome::Nothing,
        };
    }
    let told: Vec<_> = status
        .containers
        .iter()
        .map(|name| {
            transfer
                .containers
                .iter()
                .find(|container| container.name == *name)
        })
        .collect();
    let containers = || told.iter().copied().flatten();
    if !told.is_empty()
        && told
            .iter()
            .all(|told| told.is_some_and(|told| told.result.is_some()))
    {
        let failed: Vec<String> = containers()
            .filter(|container| container.result == Some(TransferResult::Failed))
            .map(|container| {
                let reason = container
                    .reason
                    .as_deref()
                    .unwrap_or("for an unknown reason");
                format!("{}: {reason}", container.name)
            })
            .collect();
        return if failed.is_empty() {
            Outcome::Succeeded
        } else {
            Outcome::Failed(failed.join("; "))
        };
    }
    let committed = |phase| matches!(phase, TransferPhase::Committed | TransferPhase::Finished);
    if containers().any(|container| {
        committed(container.phase) && container.result != Some(TransferResult::Failed)
    }) {
        Outcome::Committed
    } else if containers().any(|container| container.phase == TransferPhase::Parked) {
        Outcome::Parked
    } else if transfer.started_at.is_some() || !transfer.containers.is_empty() {
        Outcome::Begun
    } else {
        Outcome::Nothing
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::{Value, json};

    fn of(transfer: Value) -> Outcome {
        let status = json!({
            "containers": ["a", "b"],
            "targetPod": {"name": "r", "uid": "r"},
            "transfer": transfer,
        });
        read(&serde_json::from_value(status).unwrap())
    }

    #[test]
    fn a_transfer_is_told_in_one_word() {
        let both = |a: Value, b: Value| {
            let (mut a, mut b) = (a, b);
            a["name"] = json!("a");
            b["name"] = json!("b");
            json!({"targetUid": "r", "startedAt": "2026-01-01T00:00:00Z", "containers": [a, b]})
        };
        let done = json!({"phase": "Finished", "result": "Succeeded"});
        let failed = json!({"phase": "Finished", "result": "Failed", "reason": "no memory"});
        let copying = json!({"phase": "Copying"});
        for (transfer, is) in [
            (json!({}), Outcome::Nothing),
            (
                json!({"targetUid": "r", "startedAt": "2026-01-01T00:00:00Z"}),
                Outcome::Begun,
            ),
            (
                json!({"targetUid": "x", "startedAt": "2026-01-01T00:00:00Z"}),
                Outcome::Nothing,
            ),
            (both(copying.clone(), copying.clone()), Outcome::Begun),
            (
                json!({"targetUid": "x", "containers": [{"name": "a", "phase": "Parked"}]}),
                Outcome::Parked,
            ),
            (
                both(json!({"phase": "Parked"}), copying.clone()),
                Outcome::Parked,
            ),
            (
                both(json!({"phase": "Committed"}), copying.clone()),
                Outcome::Committed,
            ),
            (both(done.clone(), copying.clone()), Outcome::Committed),
            (both(failed.clone(), copying), Outcome::Begun),
            (both(done.clone(), done.clone()), Outcome::Succeeded),
            (
                both(done, failed),
                Outcome::Failed("b: no memory".to_owned()),
            ),
        ] {
            assert_eq!(of(transfer.clone()), is, "{transfer}");
        }
    }
}
