//! What pods are told: labels, conditions, Events.

use std::collections::BTreeMap;

use jiff::SignedDuration;
use k8s_openapi::api::core::v1::Pod;
use sterna_kube::annotations::{MIGRATION, STATUS_LABELS, STATUS_RUNNING};
use sterna_kube::claim::has_started;
use sterna_kube::{OnRestoreFailure, Owner, Phase, PodSettings, leaving, owner};

use super::{Action, View, phase, reference, refusal};

/// Condition: whether the pod's state would follow it, and why not.
pub(crate) const MIGRATABLE: &str = "sterna.dev/Migratable";
/// Condition of a pod that replaces another: whether it has its state.
pub(crate) const MIGRATED: &str = "sterna.dev/Migrated";
/// Reason of [`MIGRATED`] where a pod was allowed to start from nothing.
pub(crate) const COLD_START: &str = "ColdStart";

/// A pod that is made later than this is not the one that a lost state was for.
const SOON: SignedDuration = SignedDuration::from_mins(10);

pub(crate) fn tell(view: &View<'_>, pod: &Pod) -> Vec<Action> {
    if leaving::is_ending(pod) {
        return Vec::new();
    }
    let settings = PodSettings::of(pod);
    let mut actions = Vec::new();
    actions.extend(labels(pod, settings.as_ref().ok().and_then(Option::as_ref)));

    let refusal = refusal::of_pod(view, pod);
    let first = condition_of(pod, MIGRATABLE).is_none();
    let (holds, reason, message) = match &refusal {
        None => (true, "Ready", String::new()),
        Some(refusal) => (false, refusal.reason, refusal.message.clone()),
    };
    let told = condition(pod, MIGRATABLE, holds, reason, message.clone());
    if told.is_some() && !holds {
        actions.push(event(pod, true, "NotMigratable", message));
    }
    actions.extend(told);

    let Ok(Some(settings)) = settings else {
        return actions;
    };
    if first && !settings.without_effect.is_empty() {
        let keys = settings.without_effect.join(", ");
        let note = format!("{keys}: recorded, without effect yet");
        actions.push(event(pod, false, "AnnotationWithoutEffect", note));
    }
    actions.extend(migrated(view, pod, &settings));
    actions.extend(came_too_late(view, pod, &settings));
    actions
}

/// Says it of a pod that started from nothing because the state that it could have
/// had was lost before there was any pod to take it: one such pod for each that was
/// lost, of those made soon after.
fn came_too_late(view: &View<'_>, pod: &Pod, settings: &PodSettings) -> Vec<Action> {
    let told = |pod: &Pod| condition_of(pod, MIGRATED).and_then(|told| told.message.clone());
    let created = pod.metadata.creation_timestamp.as_ref().map(|time| time.0);
    let (Some(owner), Some(created)) = (owner::controller(pod), created) else {
        return Vec::new();
    };
    if told(pod).is_some() || !has_started(pod, &settings.managed) {
        return Vec::new();
    }
    let identity = Owner::from_kind(&owner.kind).map(|kind| owner::identity(pod, kind));
    let lost = view.migrations.iter().find_map(|migration| {
        let status = migration.status.as_ref()?;
        let over = status.finished_at.as_ref()?.0;
        let name = migration.metadata.name.as_deref()?;
        let nobody_took_it = status.phase == Phase::Failed
            && status.target_pod.is_none()
            // One that was refused had none to give.
            && status.spec_hash.is_some()
            && status.owner.as_ref() == Some(&owner)
            && status.identity == identity;
        let soon_after = over <= created && created < over + SOON;
        let mut others = view.pods.iter().filter_map(|pod| told(pod));
        let message = status.message.clone().unwrap_or_default();
        let is_new = !others.any(|message| message.contains(name));
        (nobody_took_it && soon_after && is_new).then(|| (name.to_owned(), message))
    });
    let Some((name, message)) = lost else {
        return Vec::new();
    };
    let note = format!("started from nothing, as migration {name} had failed: {message}");
    let told = condition(pod, MIGRATED, false, COLD_START, note.clone());
    let event = event(pod, true, COLD_START, note);
    told.into_iter().chain([event]).collect()
}

/// What came of the Migration that claimed a pod.
fn migrated(view: &View<'_>, pod: &Pod, settings: &PodSettings) -> Vec<Action> {
    let name = pod
        .metadata
        .annotations
        .as_ref()
        .and_then(|all| all.get(MIGRATION));
    let Some(name) = name else {
        return Vec::new();
    };
    let mut migrations = view.migrations.iter();
    let Some(migration) = migrations.find(|one| one.metadata.name.as_ref() == Some(name)) else {
        return Vec::new();
    };
    let status = migration.status.as_ref();
    let target = status.and_then(|status| status.target_pod.as_ref());
    if target.map(|target| &target.uid) != pod.metadata.uid.as_ref() {
        return Vec::new();
    }
    let message = status
        .and_then(|status| status.message.clone())
        .unwrap_or_default();
    let (holds, reason, note) = match phase(migration) {
        Phase::Succeeded => (true, "Restored", format!("migration {name}: {message}")),
        Phase::Cancelled => (false, "Cancelled", format!("migration {name}: {message}")),
        Phase::Failed
            if settings.on_restore_failure == OnRestoreFailure::ColdStart
                && has_started(pod, &settings.managed) =>
        {
            (
                false,
                COLD_START,
                format!("started from nothing, as migration {name} failed: {message}"),
            )
        }
        Phase::Failed => (
            false,
            "Failed",
            format!("migration {name} failed: {message}"),
        ),
        Phase::Pending | Phase::Matched | Phase::Transferring | Phase::Committed => {
            return Vec::new();
        }
    };
    let Some(told) = condition(pod, MIGRATED, holds, reason, note.clone()) else {
        return Vec::new();
    };
    vec![told, event(pod, !holds, reason, note)]
}

/// One label for each managed container that runs, under each prefix.
fn labels(pod: &Pod, settings: Option<&PodSettings>) -> Option<Action> {
    let managed = settings
        .map(|settings| settings.managed.as_slice())
        .unwrap_or_default();
    let statuses = pod
        .status
        .as_ref()
        .and_then(|status| status.container_statuses.as_ref());
    let runs = |name: &String| {
        statuses.into_iter().flatten().any(|status| {
            status.name == *name
                && status
                    .state
                    .as_ref()
                    .is_some_and(|state| state.running.is_some())
        })
    };
    let mut changes = BTreeMap::new();
    for name in managed {
        for prefix in STATUS_LABELS {
            let key = format!("{prefix}/{name}");
            let is = pod.metadata.labels.as_ref().and_then(|all| all.get(&key));
            let should = runs(name).then_some(STATUS_RUNNING);
            if is.map(String::as_str) != should {
                changes.insert(key, should.map(str::to_owned));
            }
        }
    }
    (!changes.is_empty()).then(|| Action::Label {
        pod: reference(pod),
        labels: changes,
    })
}

fn condition_of<'a>(
    pod: &'a Pod,
    kind: &str,
) -> Option<&'a k8s_openapi::api::core::v1::PodCondition> {
    let conditions = pod
        .status
        .as_ref()
        .and_then(|status| status.conditions.as_ref());
    conditions
        .into_iter()
        .flatten()
        .find(|condition| condition.type_ == kind)
}

/// Sets a condition, if it says anything new.
fn condition(
    pod: &Pod,
    kind: &'static str,
    holds: bool,
    reason: &'static str,
    message: String,
) -> Option<Action> {
    let value = if holds { "True" } else { "False" };
    let same = condition_of(pod, kind).is_some_and(|is| {
        is.status == value
            && is.reason.as_deref() == Some(reason)
            && is.message.clone().unwrap_or_default() == message
    });
    (!same).then(|| Action::Condition {
        pod: reference(pod),
        condition: kind,
        holds,
        reason,
        message,
    })
}

fn event(pod: &Pod, warning: bool, reason: &'static str, note: String) -> Action {
    Action::Event {
        pod: reference(pod),
        warning,
        reason,
        note,
    }
}
