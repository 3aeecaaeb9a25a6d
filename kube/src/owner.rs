//! What makes a pod's replacement, and which of its pods one is.

use k8s_openapi::api::core::v1::Pod;

use crate::OwnerRef;

/// Label of a ReplicaSet's pods that a Deployment made.
const POD_TEMPLATE_HASH: &str = "pod-template-hash";
/// Annotation and label of an Indexed Job's pods.
const COMPLETION_INDEX: &str = "batch.kubernetes.io/job-completion-index";

/// The kind of a pod's controller, where it makes replacements that can take a
/// state.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Owner {
    /// It makes a replacement as soon as the pod's deletion has begun.
    ReplicaSet,
    /// It makes a replacement of the same name once the pod is gone.
    StatefulSet,
    /// It makes a replacement when its `podReplacementPolicy` says.
    Job,
}

impl Owner {
    /// From an owner reference's kind; `None` for one that makes none elsewhere,
    /// such as a DaemonSet.
    #[must_use]
    pub fn from_kind(kind: &str) -> Option<Self> {
        match kind {
            "ReplicaSet" => Some(Self::ReplicaSet),
            "StatefulSet" => Some(Self::StatefulSet),
            "Job" => Some(Self::Job),
            _ => None,
        }
    }
}

/// A pod's controller.
#[must_use]
pub fn controller(pod: &Pod) -> Option<OwnerRef> {
    let owners = pod.metadata.owner_references.as_ref()?;
    let owner = owners.iter().find(|owner| owner.controller == Some(true))?;
    Some(OwnerRef {
        kind: owner.kind.clone(),
        name: owner.name.clone(),
        uid: owner.uid.clone(),
    })
}

/// Which of its owner's pods it is: pods with the same one are interchangeable.
///
/// A StatefulSet's has its name, an Indexed Job's its index; a ReplicaSet's are
/// all alike, as are those of a Job without indexes.
#[must_use]
pub fn identity(pod: &Pod, owner: Owner) -> String {
    let metadata = &pod.metadata;
    let label = |key| metadata.labels.as_ref().and_then(|all| all.get(key));
    let annotation = |key| metadata.annotations.as_ref().and_then(|all| all.get(key));
    match owner {
        Owner::ReplicaSet => label(POD_TEMPLATE_HASH).cloned().unwrap_or_default(),
        Owner::StatefulSet => metadata.name.clone().unwrap_or_default(),
        Owner::Job => annotation(COMPLETION_INDEX)
            .or_else(|| label(COMPLETION_INDEX))
            .cloned()
            .unwrap_or_default(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn pod(owners: serde_json::Value) -> Pod {
        serde_json::from_value(json!({"metadata": {
            "name": "web-1",
            "labels": {"pod-template-hash": "5d4f"},
            "annotations": {"batch.kubernetes.io/job-completion-index": "3"},
            "ownerReferences": owners,
        }}))
        .unwrap()
    }

    #[test]
    fn only_the_controller_among_owners_counts() {
        let owner = |kind, controller| json!({"apiVersion": "apps/v1", "kind": kind, "name": "web", "uid": "u", "controller": controller});
        let both = json!([owner("Foo", false), owner("ReplicaSet", true)]);
        assert_eq!(controller(&pod(both)).unwrap().kind, "ReplicaSet");
        assert_eq!(controller(&pod(json!([owner("Foo", false)]))), None);
        assert_eq!(controller(&pod(json!([]))), None);
    }

    #[test]
    fn each_kind_of_owner_tells_its_pods_apart_in_its_own_way() {
        let pod = pod(json!([]));
        for (kind, is) in [
            ("ReplicaSet", Some("5d4f")),
            ("StatefulSet", Some("web-1")),
            ("Job", Some("3")),
            ("DaemonSet", None),
        ] {
            let identity = Owner::from_kind(kind).map(|owner| identity(&pod, owner));
            assert_eq!(identity.as_deref(), is, "{kind}");
        }
    }
}
