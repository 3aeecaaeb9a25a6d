//! Containers of Kubernetes pods, as their annotations tell of them.

use std::fmt;

use serde::{Deserialize, Serialize};

/// Containers of a pod that Sterna manages: a JSON list of their names. The
/// second is Architect's, whose manifests work unchanged.
const MANAGED: [&str; 2] = [
    "sterna.dev/managed-containers",
    "architect.loopholelabs.io/managed-containers",
];

/// What becomes of a container whose state does not arrive.
const ON_RESTORE_FAILURE: &str = "sterna.dev/on-restore-failure";

/// One container of one pod: what a migration between pods is about.
///
/// The uid names the pod for good; namespace and name are for people and may be
/// empty.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct PodContainer {
    /// The pod's namespace.
    pub namespace: String,
    /// The pod's name.
    pub pod: String,
    /// The pod's uid.
    pub uid: String,
    /// The container's name in the pod.
    pub container: String,
}

impl fmt::Display for PodContainer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self {
            namespace,
            pod,
            container,
            ..
        } = self;
        write!(f, "{container} of pod {namespace}/{pod}")
    }
}

/// What a container's annotations say, where the CRI put it into a pod.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PodAnnotations {
    /// Which container it is.
    pub name: PodContainer,
    /// Sterna is to carry its state to its replacement.
    pub managed: bool,
    /// Without its state it may start from nothing.
    pub cold_start: bool,
}

impl PodAnnotations {
    /// Reads them; `None` for what is no pod's container, sandboxes among them.
    ///
    /// Those of containerd's CRI: pkg/cri/annotations. A list of managed
    /// containers that is no list of names manages nothing here: whoever admits
    /// pods says so to their owner.
    pub fn read<'a>(annotation: impl Fn(&str) -> Option<&'a str>) -> Option<Self> {
        let cri = |key: &str| annotation(&format!("io.kubernetes.cri.{key}"));
        if cri("container-type") != Some("container") {
            return None;
        }
        let name = PodContainer {
            namespace: cri("sandbox-namespace")?.to_owned(),
            pod: cri("sandbox-name")?.to_owned(),
            uid: cri("sandbox-uid")?.to_owned(),
            container: cri("container-name")?.to_owned(),
        };
        let managed = MANAGED
            .iter()
            .filter_map(|key| serde_json::from_str::<Vec<String>>(annotation(key)?).ok())
            .flatten()
            .any(|managed| managed == name.container);
        Some(Self {
            name,
            managed,
            cold_start: annotation(ON_RESTORE_FAILURE) == Some("cold-start"),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(kind: &str, more: &[(&str, &str)]) -> Option<PodAnnotations> {
        let cri = [
            ("io.kubernetes.cri.container-type", kind),
            ("io.kubernetes.cri.sandbox-namespace", "shop"),
            ("io.kubernetes.cri.sandbox-name", "cart-0"),
            ("io.kubernetes.cri.sandbox-uid", "u-1"),
            ("io.kubernetes.cri.container-name", "cache"),
        ];
        PodAnnotations::read(|key| {
            let mut all = cri.iter().chain(more);
            all.find(|(name, _)| *name == key).map(|(_, value)| *value)
        })
    }

    #[test]
    fn a_container_is_managed_where_either_list_names_it() {
        for (key, list, managed) in [
            ("sterna.dev/managed-containers", r#"["cache"]"#, true),
            (
                "architect.loopholelabs.io/managed-containers",
                r#"["a", "cache"]"#,
                true,
            ),
            ("sterna.dev/managed-containers", r#"["web"]"#, false),
            ("sterna.dev/managed-containers", "cache", false),
        ] {
            let read = read("container", &[(key, list)]).unwrap();
            assert_eq!(read.managed, managed, "{key}: {list}");
            assert_eq!(read.name.to_string(), "cache of pod shop/cart-0");
        }
    }

    #[test]
    fn a_sandbox_is_no_container_of_a_pod() {
        assert_eq!(read("sandbox", &[]), None);
    }

    #[test]
    fn only_the_word_itself_allows_a_cold_start() {
        let key = "sterna.dev/on-restore-failure";
        assert!(!read("container", &[]).unwrap().cold_start);
        assert!(!read("container", &[(key, "retry")]).unwrap().cold_start);
        assert!(
            read("container", &[(key, "cold-start")])
                .unwrap()
                .cold_start
        );
    }
}
