//! What is to be done in a namespace, from all that is known of it. Pure: no
//! clock, no request; tested without a cluster.
//!
//! What is known may be old. Therefore every action that decides something says
//! which version of its object it was decided on; the API server refuses it if
//! there is a newer one, and the namespace is planned again.

mod migration;
mod outcome;
mod pod;
mod refusal;

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use jiff::{SignedDuration, Timestamp};
use k8s_openapi::api::core::v1::Pod;
use sterna_kube::claim::{Claimant, assign};
use sterna_kube::wanted::{Member, OwnerState, owner_wants, places};
use sterna_kube::{
    Migration, MigrationStatus, Phase, PodRef, PodSettings, Trigger, leaving, owner,
};

pub(crate) use pod::COLD_START;

/// Holds a Migration that is deleted until it is called off.
pub(crate) const FINALIZER: &str = "sterna.dev/migration";

/// All that is known of a namespace.
#[derive(Debug)]
pub(crate) struct View<'a> {
    pub(crate) now: Timestamp,
    /// Its pods that concern us.
    pub(crate) pods: &'a [Arc<Pod>],
    pub(crate) migrations: &'a [Arc<Migration>],
    /// By uid; those of [`owners_to_ask`]. One that is absent could not be asked.
    pub(crate) owners: &'a BTreeMap<String, OwnerState>,
    /// Whether Sterna works there, by name; those of [`nodes_to_ask`].
    pub(crate) nodes: &'a BTreeMap<String, bool>,
    pub(crate) runtime_classes: &'a [String],
    pub(crate) keep_finished: SignedDuration,
}

/// One thing to be done.
#[derive(Debug, Clone, PartialEq)]
pub(crate) enum Action {
    /// Make a Migration.
    Create {
        name: String,
        pod: PodRef,
        trigger: Trigger,
    },
    /// Write the controller's part of a Migration's status.
    Status {
        migration: String,
        version: Option<String>,
        was: Option<Phase>,
        trigger: Trigger,
        status: Box<MigrationStatus>,
    },
    /// Mark the target as this Migration's, and then write the status.
    Claim {
        migration: String,
        version: Option<String>,
        target: PodRef,
        status: Box<MigrationStatus>,
    },
    /// The target seems gone: make sure, and then write the status.
    Release {
        migration: String,
        version: Option<String>,
        target: PodRef,
        status: Box<MigrationStatus>,
    },
    /// Evict a pod that is to be moved.
    Evict { pod: PodRef },
    /// Say on a pod that its Migration was deleted.
    MarkCancelled { pod: PodRef },
    /// Hold a Migration until it is called off.
    Hold { migration: String },
    /// Let a Migration go that is over.
    LetGo { migration: String },
    /// Delete a Migration that is over for long.
    Forget { migration: String },
    /// Set labels on a pod; `None` removes one.
    Label {
        pod: PodRef,
        labels: BTreeMap<String, Option<String>>,
    },
    /// Set a condition of a pod.
    Condition {
        pod: PodRef,
        condition: &'static str,
        holds: bool,
        reason: &'static str,
        message: String,
    },
    /// Tell of something on a pod.
    Event {
        pod: PodRef,
        warning: bool,
        reason: &'static str,
        note: String,
    },
}

/// Owners whose state matters now: kind, name and uid.
pub(crate) fn owners_to_ask(
    pods: &[Arc<Pod>],
    migrations: &[Arc<Migration>],
) -> BTreeSet<(String, String, String)> {
    let undecided = migrations
        .iter()
        .filter_map(|migration| migration.status.as_ref())
        .filter(|status| status.phase.is_before_commit())
        .filter_map(|status| status.owner.clone());
    let leave = pods
        .iter()
        .filter(|pod| leaving::cause(pod).is_some())
        .filter_map(|pod| owner::controller(pod));
    undecided
        .chain(leave)
        .map(|owner| (owner.kind, owner.name, owner.uid))
        .collect()
}

/// Nodes that Migrations ask for and that are not judged yet.
pub(crate) fn nodes_to_ask(migrations: &[Arc<Migration>]) -> BTreeSet<String> {
    migrations
        .iter()
        .filter(|migration| source_of(migration).is_none())
        .filter_map(|migration| migration.spec.target_node.clone())
        .collect()
}

/// Whether time alone may change something.
pub(crate) fn is_busy(migrations: &[Arc<Migration>]) -> bool {
    migrations
        .iter()
        .any(|migration| !phase(migration).is_final())
}

/// Decides.
pub(crate) fn plan(view: &View<'_>) -> Vec<Action> {
    let mut actions = create(view);
    let mut claimants = Vec::new();
    for migration in view.migrations {
        let next = migration::step(view, migration);
        actions.extend(next.actions);
        claimants.extend(next.claimant);
    }
    actions.extend(claim(view, claimants));
    for pod in view.pods {
        actions.extend(pod::tell(view, pod));
    }
    actions
}

/// A Migration for each pod that leaves and has none.
///
/// Also for one that cannot be moved, so that this is told, and its replacement does
/// not wait; except where another runtime runs it, which knows nothing of us.
fn create(view: &View<'_>) -> Vec<Action> {
    view.pods
        .iter()
        .filter_map(|pod| {
            let cause = leaving::cause(pod)?;
            let settings = PodSettings::of(pod).ok()??;
            let refusal = refusal::of_pod(view, pod);
            let others = refusal.is_some_and(|refusal| refusal.reason == refusal::OTHER_RUNTIME);
            let of = reference(pod);
            let name = name_for(&of);
            let had_its_chance = view.migrations.iter().any(|one| is_chance(one, &of, &name));
            (settings.manages_any() && !others && !had_its_chance).then_some(Action::Create {
                name,
                pod: of,
                trigger: cause.0,
            })
        })
        .collect()
}

/// Whether a Migration is, or was, this pod's: one that was refused before anything
/// began, such as a request for a node that does not exist, was not.
fn is_chance(migration: &Migration, pod: &PodRef, name: &str) -> bool {
    let of = source_of(migration).map(|source| &source.uid);
    let about_it = match of.or(migration.spec.pod_uid.as_ref()) {
        Some(uid) => *uid == pod.uid,
        None => migration.spec.pod_name == pod.name,
    };
    let matched = || {
        let conditions = migration
            .status
            .iter()
            .flat_map(|status| &status.conditions);
        conditions
            .into_iter()
            .any(|condition| condition.type_ == "Matched")
    };
    let made_by_us = migration.metadata.name.as_deref() == Some(name);
    about_it && (made_by_us || !phase(migration).is_final() || matched())
}

/// The same for the same pod, so that none is made twice.
fn name_for(pod: &PodRef) -> String {
    let uid: String = pod
        .uid
        .chars()
        .filter(char::is_ascii_alphanumeric)
        .take(8)
        .collect();
    // At most 253: a pod's name may have as many.
    let name: String = pod.name.chars().take(240).collect();
    format!("{}-{uid}", name.trim_end_matches(['-', '.']))
}

/// One that waits for a pod to take its state.
#[derive(Debug, Clone)]
pub(crate) struct Waiting {
    pub(crate) claimant: Claimant,
    pub(crate) migration: Arc<Migration>,
    pub(crate) status: Box<MigrationStatus>,
}

/// Gives those that wait a pod, and calls off those for whom none will come.
fn claim(view: &View<'_>, waiting: Vec<Waiting>) -> Vec<Action> {
    let pods: Vec<&Pod> = view.pods.iter().map(AsRef::as_ref).collect();
    let claimants: Vec<Claimant> = waiting.iter().map(|one| one.claimant.clone()).collect();
    let assigned = assign(&claimants, &pods);

    // How many of an owner's may wait beyond those that have got one now.
    let mut left: BTreeMap<&str, usize> = BTreeMap::new();
    for claimant in &claimants {
        let uid = claimant.owner.uid.as_str();
        let active = |pod: &&&Pod| {
            !leaving::is_ending(pod) && owner::controller(pod).is_some_and(|of| of.uid == uid)
        };
        let places = view.owners.get(uid).map_or(usize::MAX, |state| {
            places(state, pods.iter().filter(active).count(), 0)
        });
        left.insert(uid, places);
    }

    let mut order: Vec<&Waiting> = waiting.iter().collect();
    order.sort_by(|a, b| {
        (a.claimant.since, &a.claimant.uid).cmp(&(b.claimant.since, &b.claimant.uid))
    });
    order
        .into_iter()
        .filter_map(|one| {
            let name = one.claimant.migration.clone();
            let version = one.migration.metadata.resource_version.clone();
            let target = assigned
                .iter()
                .find(|(claimant, _)| claimant.migration == name);
            if let Some((_, pod)) = target {
                let target = reference(pod);
                let mut status = one.status.clone();
                status.phase = Phase::Matched;
                status.message = Some(format!("pod {} takes its state", target.name));
                status.target_pod = Some(target.clone());
                migration::condition(&mut status, "Matched", true, "Claimed", view.now);
                return Some(Action::Claim {
                    migration: name,
                    version,
                    target,
                    status,
                });
            }
            let places = left.get_mut(one.claimant.owner.uid.as_str())?;
            let mut status = one.status.clone();
            if *places == 0 {
                let why = "its owner makes no more pods, and none that it has may take its state";
                migration::end(&mut status, Phase::Cancelled, why.to_owned(), view.now);
            }
            *places = places.saturating_sub(1);
            migration::status_action(&one.migration, status)
        })
        .collect()
}

/// Whether its owner still wants what a pod holds, or has left behind; if the owner
/// cannot be asked just now, it does.
fn unwanted(view: &View<'_>, status: &MigrationStatus) -> Option<String> {
    let state = view.owners.get(&status.owner.as_ref()?.uid)?;
    let pod = Member {
        name: &status.source_pod.as_ref()?.name,
        revision: status.revision.as_deref(),
    };
    owner_wants(state, pod).err().map(|why| why.to_string())
}

fn phase(migration: &Migration) -> Phase {
    migration
        .status
        .as_ref()
        .map(|status| status.phase)
        .unwrap_or_default()
}

fn source_of(migration: &Migration) -> Option<&PodRef> {
    migration
        .status
        .as_ref()
        .and_then(|status| status.source_pod.as_ref())
}

fn reference(pod: &Pod) -> PodRef {
    PodRef {
        name: pod.metadata.name.clone().unwrap_or_default(),
        uid: pod.metadata.uid.clone().unwrap_or_default(),
        node: pod.spec.as_ref().and_then(|spec| spec.node_name.clone()),
    }
}

#[cfg(test)]
mod tests;
