//! Why a pod cannot be moved, in words for whoever asked.

use k8s_openapi::api::core::v1::Pod;
use sterna_kube::{Migration, Owner, PodSettings, leaving, owner};

use super::{View, phase, source_of};

/// Reason: another runtime runs the pod.
pub(crate) const OTHER_RUNTIME: &str = "OtherRuntimeClass";

/// Why a pod cannot be moved.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Refusal {
    /// For programs.
    pub(crate) reason: &'static str,
    /// For people.
    pub(crate) message: String,
}

fn refuse(reason: &'static str, message: impl Into<String>) -> Option<Refusal> {
    Some(Refusal {
        reason,
        message: message.into(),
    })
}

/// Why this pod can never be moved, if it cannot.
pub(crate) fn of_pod(view: &View<'_>, pod: &Pod) -> Option<Refusal> {
    let settings = match PodSettings::of(pod) {
        Err(error) => return refuse("InvalidAnnotation", error.to_string()),
        Ok(settings) => settings.unwrap_or_default(),
    };
    if !settings.manages_any() {
        return refuse("NotManaged", "no container is listed as managed");
    }
    let spec = pod.spec.as_ref();
    let class = spec
        .and_then(|spec| spec.runtime_class_name.as_deref())
        .unwrap_or_default();
    if !view.runtime_classes.iter().any(|ours| ours == class) {
        let ours = view.runtime_classes.join(", ");
        return refuse(
            OTHER_RUNTIME,
            format!("its runtimeClassName is {class:?}; ours are {ours}"),
        );
    }
    let shares = |field: fn(&k8s_openapi::api::core::v1::PodSpec) -> Option<bool>| {
        spec.and_then(field).unwrap_or(false)
    };
    if shares(|spec| spec.host_network) {
        return refuse("HostNetwork", "it has its node's network");
    }
    if shares(|spec| spec.host_pid) || shares(|spec| spec.host_ipc) {
        return refuse("HostNamespace", "it has its node's processes or IPC");
    }
    match owner::controller(pod) {
        None => refuse(
            "NoReplacement",
            "it has no controller that would replace it",
        ),
        Some(owner) if Owner::from_kind(&owner.kind).is_none() => refuse(
            "NoReplacement",
            format!(
                "its controller is a {}, which makes no replacement elsewhere",
                owner.kind
            ),
        ),
        Some(_) => None,
    }
}

/// Why this Migration cannot be, for the pod that it names.
pub(crate) fn of_migration(view: &View<'_>, migration: &Migration, pod: &Pod) -> Option<Refusal> {
    if let Some(refusal) = of_pod(view, pod) {
        return Some(refusal);
    }
    let node = pod.spec.as_ref().and_then(|spec| spec.node_name.as_deref());
    let Some(node) = node else {
        return refuse("NotRunning", "it runs on no node yet");
    };
    if let Some(target) = migration.spec.target_node.as_deref() {
        if target == node {
            return refuse("SameNode", format!("it is on node {node} already"));
        }
        if view.nodes.get(target) == Some(&false) {
            return refuse(
                "NoSuchNode",
                format!("Sterna does not work on node {target}, or there is no such node"),
            );
        }
    }
    let uid = pod.metadata.uid.as_deref();
    let twin = view.migrations.iter().find(|other| {
        other.metadata.uid != migration.metadata.uid
            && !phase(other).is_final()
            && source_of(other).is_some_and(|source| Some(source.uid.as_str()) == uid)
    });
    if let Some(twin) = twin {
        let name = twin.metadata.name.as_deref().unwrap_or_default();
        return refuse("MovesAlready", format!("migration {name} moves it already"));
    }
    if leaving::is_ending(pod) && leaving::cause(pod).is_none() {
        return refuse("Ending", "it is being deleted, or has ended");
    }
    None
}
