//! The next status of one Migration.

use std::sync::Arc;

use jiff::{SignedDuration, Timestamp};
use k8s_openapi::api::core::v1::Pod;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::{Condition, Time};
use sterna_kube::claim::Claimant;
use sterna_kube::claim::has_started;
use sterna_kube::spec_hash::spec_hash;
use sterna_kube::{
    Migration, MigrationStatus, Owner, Phase, PodSettings, Trigger, leaving, owner, wanted,
};

use super::outcome::{self, Outcome};
use super::{Action, FINALIZER, View, Waiting, phase, reference, refusal, unwanted};

/// How long a source's node may take to tell the result after the source's pod is
/// gone: its last message and the pod's end are on their way at the same time.
const LAST_WORD: SignedDuration = SignedDuration::from_secs(30);

/// How long the node where a state waits may take to tell that it was restored.
const RESTORED_WORD: SignedDuration = SignedDuration::from_mins(2);

/// What comes of one Migration.
#[derive(Debug, Default)]
pub(crate) struct Next {
    pub(crate) actions: Vec<Action>,
    pub(crate) claimant: Option<Waiting>,
}

pub(crate) fn step(view: &View<'_>, migration: &Arc<Migration>) -> Next {
    let name = migration.metadata.name.clone().unwrap_or_default();
    let deleted = migration.metadata.deletion_timestamp.is_some();
    let held = migration
        .metadata
        .finalizers
        .as_ref()
        .is_some_and(|all| all.iter().any(|one| one == FINALIZER));
    let mut status = Box::new(migration.status.clone().unwrap_or_default());

    if status.phase.is_final() {
        return over(view, migration, &name, held, deleted, status);
    }
    if !held && !deleted {
        return Next::one(Action::Hold { migration: name });
    }
    if status.source_pod.is_none() {
        begin(view, migration, &mut status);
        if status.phase.is_final() {
            return Next::status(migration, status);
        }
    }

    if status.replaced_late.is_none() {
        let owner = status.owner.as_ref();
        let state = owner.and_then(|owner| view.owners.get(&owner.uid));
        status.replaced_late = state.and_then(wanted::replaces_late);
    }

    let find = |uid: Option<&String>| {
        let mut pods = view.pods.iter();
        pods.find(|pod| pod.metadata.uid.as_ref() == uid && uid.is_some())
    };
    let source = find(status.source_pod.as_ref().map(|pod| &pod.uid));
    let target = find(status.target_pod.as_ref().map(|pod| &pod.uid));

    match outcome::read(&status) {
        Outcome::Succeeded => {
            end(
                &mut status,
                Phase::Succeeded,
                "every container runs there".into(),
                view.now,
            );
            return Next::status(migration, status);
        }
        Outcome::Failed(why) => {
            end(&mut status, Phase::Failed, why, view.now);
            return Next::status(migration, status);
        }
        Outcome::Committed => {
            status.phase = Phase::Committed;
            return Next::status(migration, status);
        }
        Outcome::Begun | Outcome::Parked if status.target_pod.is_some() => {
            status.phase = Phase::Transferring;
        }
        Outcome::Begun | Outcome::Parked | Outcome::Nothing => (),
    }
    // Committed, but no longer told so: nothing is undone.
    if !status.phase.is_before_commit() {
        return Next::status(migration, status);
    }

    if let Some((phase, why)) = give_up(view, migration, &mut status, source.map(AsRef::as_ref)) {
        end(&mut status, phase, why, view.now);
        return Next::status(migration, status);
    }
    if let Some(claimed) = status.target_pod.clone() {
        let Some(target) = target.filter(|pod| !leaving::is_ending(pod)) else {
            status.phase = Phase::Pending;
            status.target_pod = None;
            status.message = Some(format!("pod {} is gone, waits for another", claimed.name));
            condition(&mut status, "Matched", false, "TargetGone", view.now);
            return Next::one(Action::Release {
                migration: name,
                version: migration.metadata.resource_version.clone(),
                target: claimed,
                status,
            });
        };
        // Bound meanwhile.
        status.target_pod = Some(reference(target));
        if outcome::read(&status) == Outcome::Parked {
            started_without(view, target, &mut status);
        }
        return Next::status(migration, status);
    }

    if outcome::read(&status) == Outcome::Parked {
        let node = status.source_pod.as_ref().and_then(|pod| pod.node.clone());
        let node = node.unwrap_or_default();
        status.message = Some(format!(
            "its state waits on node {node} for the pod that replaces it"
        ));
        condition(&mut status, "StateWaits", true, "Parked", view.now);
    }
    let mut actions = Vec::new();
    if let Some(source) = source {
        let asked = migration.spec.trigger == Trigger::Request;
        if asked && source.metadata.deletion_timestamp.is_none() {
            status.message = Some("its pod is being evicted".to_owned());
            actions.push(Action::Evict {
                pod: reference(source),
            });
        }
    }
    let since = source.and_then(|pod| leaving_since(pod));
    let claimant = claimant(migration, &status, since);
    if claimant.is_none() {
        actions.extend(status_action(migration, status.clone()));
    }
    Next {
        actions,
        claimant: claimant.map(|claimant| Waiting {
            claimant,
            migration: Arc::clone(migration),
            status,
        }),
    }
}

/// Resolves what a new Migration names, or refuses it.
fn begin(view: &View<'_>, migration: &Migration, status: &mut MigrationStatus) {
    let spec = &migration.spec;
    status.started_at = Some(Time(view.now));
    let pod = view.pods.iter().find(|pod| {
        let uid = pod.metadata.uid.as_ref();
        pod.metadata.name.as_ref() == Some(&spec.pod_name)
            && spec
                .pod_uid
                .as_ref()
                .is_none_or(|wanted| uid == Some(wanted))
    });
    let Some(pod) = pod else {
        let why = format!(
            "there is no pod {} whose annotations list managed containers",
            spec.pod_name
        );
        end(status, Phase::Failed, why, view.now);
        return;
    };
    status.source_pod = Some(reference(pod));
    if let Some(refusal) = refusal::of_migration(view, migration, pod) {
        end(status, Phase::Failed, refusal.message, view.now);
        return;
    }
    let settings = PodSettings::of(pod).ok().flatten().unwrap_or_default();
    let of = owner::controller(pod);
    let kind = of.as_ref().and_then(|owner| Owner::from_kind(&owner.kind));
    status.identity = kind.map(|kind| owner::identity(pod, kind));
    status.owner = of;
    status.revision = wanted::revision(pod).map(str::to_owned);
    status.spec_hash = Some(spec_hash(pod, &settings.managed));
    status.containers = settings.managed;
    status.message = Some("waits for the pod that replaces it".to_owned());
}

/// Ends a Migration whose target runs although the state still waits: it was allowed
/// to start from nothing, and must not get the older state when it restarts.
fn started_without(view: &View<'_>, target: &Pod, status: &mut MigrationStatus) {
    if !has_started(target, &status.containers) {
        return;
    }
    // That the state was restored is told a moment later than that the pod runs.
    condition(status, "TargetStarted", true, "PodState", view.now);
    let mut conditions = status.conditions.iter();
    let since = conditions
        .find(|condition| condition.type_ == "TargetStarted")
        .map_or(view.now, |condition| condition.last_transition_time.0);
    if view.now >= since + RESTORED_WORD {
        let why = "the pod that was to take its state has started without it".to_owned();
        end(status, Phase::Failed, why, view.now);
    }
}

/// Whether, and why, it is over before the commit.
fn give_up(
    view: &View<'_>,
    migration: &Migration,
    status: &mut MigrationStatus,
    source: Option<&Pod>,
) -> Option<(Phase, String)> {
    if migration.metadata.deletion_timestamp.is_some() {
        return Some((Phase::Cancelled, "it was deleted".to_owned()));
    }
    if let Some(why) = unwanted(view, status) {
        return Some((Phase::Cancelled, why));
    }
    // For as long as its node keeps it, which says so when it does not any more.
    let waits = outcome::read(status) == Outcome::Parked;
    let started = status.started_at.as_ref().map_or(view.now, |time| time.0);
    if !waits && view.now >= migration.spec.deadline(started) {
        let why = match status.target_pod {
            Some(_) => "its state did not arrive in time",
            None => "no pod came in time to take its state",
        };
        return Some((Phase::Failed, why.to_owned()));
    }
    let ended = |pod: &Pod| {
        let phase = pod
            .status
            .as_ref()
            .and_then(|status| status.phase.as_deref());
        matches!(phase, Some("Succeeded" | "Failed"))
    };
    let gone = source.is_none_or(ended);
    condition(status, "SourceGone", gone, "PodState", view.now);
    if gone && !waits {
        let since = status
            .conditions
            .iter()
            .find(|condition| condition.type_ == "SourceGone")
            .map_or(view.now, |condition| condition.last_transition_time.0);
        if view.now >= since + LAST_WORD {
            return Some((
                Phase::Failed,
                "its pod ended before its state was sent".to_owned(),
            ));
        }
    }
    None
}

/// What there is to do about one that is over.
fn over(
    view: &View<'_>,
    migration: &Arc<Migration>,
    name: &str,
    held: bool,
    deleted: bool,
    mut status: Box<MigrationStatus>,
) -> Next {
    // The source's node had committed when it heard that it was called off.
    if outcome::read(&status) == Outcome::Succeeded && status.phase != Phase::Succeeded {
        end(
            &mut status,
            Phase::Succeeded,
            "every container runs there".into(),
            view.now,
        );
        return Next::status(migration, status);
    }
    let mut actions = Vec::new();
    if deleted && status.phase == Phase::Cancelled {
        let of = status.source_pod.as_ref().map(|source| &source.uid);
        let source = view
            .pods
            .iter()
            .find(|pod| pod.metadata.uid.as_ref() == of && leaving::cause(pod).is_some());
        actions.extend(source.map(|pod| Action::MarkCancelled {
            pod: reference(pod),
        }));
    }
    if held {
        actions.push(Action::LetGo {
            migration: name.to_owned(),
        });
    }
    let finished = status.finished_at.as_ref().map_or(view.now, |time| time.0);
    if !deleted && view.now >= finished + view.keep_finished {
        actions.push(Action::Forget {
            migration: name.to_owned(),
        });
    }
    Next {
        actions,
        claimant: None,
    }
}

/// Since when it leaves: an interrupted pod's condition says so, another's
/// deletion was asked for its grace period before the time that it bears.
fn leaving_since(pod: &Pod) -> Option<Timestamp> {
    let conditions = pod
        .status
        .as_ref()
        .and_then(|status| status.conditions.as_ref());
    let interrupted = conditions
        .into_iter()
        .flatten()
        .find(|condition| condition.type_ == "DisruptionTarget" && condition.status == "True")
        .and_then(|condition| condition.last_transition_time.as_ref());
    if let Some(time) = interrupted {
        return Some(time.0);
    }
    let end = pod.metadata.deletion_timestamp.as_ref()?;
    let grace = pod.metadata.deletion_grace_period_seconds.unwrap_or(0);
    end.0.checked_sub(SignedDuration::from_secs(grace)).ok()
}

fn claimant(
    migration: &Migration,
    status: &MigrationStatus,
    since: Option<Timestamp>,
) -> Option<Claimant> {
    // A pod that was asked to move and stays is not replaced by anybody; one that
    // is gone left when the Migration began, at the latest.
    let gone = status
        .conditions
        .iter()
        .any(|condition| condition.type_ == "SourceGone" && condition.status == "True");
    let started = status.started_at.as_ref().map(|time| time.0);
    let since = since.or(if gone { started } else { None })?;
    Some(Claimant {
        migration: migration.metadata.name.clone()?,
        uid: status.source_pod.as_ref()?.uid.clone(),
        owner: status.owner.clone()?,
        identity: status.identity.clone()?,
        spec_hash: status.spec_hash.clone()?,
        containers: status.containers.clone(),
        since,
        target_node: migration.spec.target_node.clone(),
    })
}

/// Ends it.
pub(crate) fn end(status: &mut MigrationStatus, phase: Phase, why: String, now: Timestamp) {
    debug_assert!(
        status.phase.may_become(phase),
        "{:?} to {phase:?}",
        status.phase
    );
    status.phase = phase;
    status.message = Some(why);
    status.finished_at = Some(Time(now));
    let reason = match phase {
        Phase::Succeeded => "Restored",
        Phase::Cancelled => "Cancelled",
        _ => "Failed",
    };
    condition(status, "Succeeded", phase == Phase::Succeeded, reason, now);
}

/// Sets a condition; the time is that of its last change.
pub(crate) fn condition(
    status: &mut MigrationStatus,
    kind: &str,
    holds: bool,
    reason: &str,
    now: Timestamp,
) {
    let value = if holds { "True" } else { "False" };
    let old = status
        .conditions
        .iter()
        .position(|condition| condition.type_ == kind);
    let since = old
        .map(|index| status.conditions.remove(index))
        .filter(|old| old.status == value)
        .map_or(Time(now), |old| old.last_transition_time);
    let condition = Condition {
        type_: kind.to_owned(),
        status: value.to_owned(),
        reason: reason.to_owned(),
        message: String::new(),
        last_transition_time: since,
        observed_generation: None,
    };
    let at = old.unwrap_or(status.conditions.len());
    status.conditions.insert(at, condition);
}

/// Writes a status, if it says anything new.
pub(crate) fn status_action(migration: &Migration, status: Box<MigrationStatus>) -> Option<Action> {
    (migration.status.as_ref() != Some(&*status)).then(|| Action::Status {
        migration: migration.metadata.name.clone().unwrap_or_default(),
        version: migration.metadata.resource_version.clone(),
        was: migration.status.as_ref().map(|_| phase(migration)),
        trigger: migration.spec.trigger,
        status,
    })
}

impl Next {
    fn one(action: Action) -> Self {
        Self {
            actions: vec![action],
            claimant: None,
        }
    }

    fn status(migration: &Migration, status: Box<MigrationStatus>) -> Self {
        Self {
            actions: status_action(migration, status).into_iter().collect(),
            claimant: None,
        }
    }
}
