//! Annotations and labels, and what a pod's annotations ask for.

use std::collections::BTreeMap;

use k8s_openapi::api::core::v1::Pod;
use thiserror::Error;

/// Containers whose memory follows the pod: a JSON list of names.
pub const MANAGED_CONTAINERS: &str = "sterna.dev/managed-containers";
/// What becomes of a container whose state does not arrive: [`OnRestoreFailure`].
pub const ON_RESTORE_FAILURE: &str = "sterna.dev/on-restore-failure";
/// On a pod that replaces another: the name of the Migration that claimed it. Set
/// once, by the controller, against the pod's resource version.
pub const MIGRATION: &str = "sterna.dev/migration";
/// On a pod whose Migration was deleted while it ran: none is made again.
pub const CANCELLED: &str = "sterna.dev/migration-cancelled";

/// Architect's spelling of [`MANAGED_CONTAINERS`].
pub const ARCHITECT_MANAGED_CONTAINERS: &str = "architect.loopholelabs.io/managed-containers";
/// Architect's: after which idle time a container hibernates. No effect yet.
pub const ARCHITECT_SCALEDOWN_DURATIONS: &str = "architect.loopholelabs.io/scaledown-durations";
/// Architect's: what counts as activity. No effect yet.
pub const ARCHITECT_NETWORK_MONITOR: &str = "architect.loopholelabs.io/network-monitor";

/// Prefixes of the labels that tell a container's state: prefix, `/`, its name.
pub const STATUS_LABELS: [&str; 2] = ["status.sterna.dev", "status.architect.loopholelabs.io"];
/// What such a label says of a container that runs.
pub const STATUS_RUNNING: &str = "RUNNING";

/// Label of a node on which Sterna's handler is registered and was seen to work.
pub const NODE_READY: &str = "sterna.dev/ready";

/// What becomes of a container whose state does not arrive.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum OnRestoreFailure {
    /// Its start fails with the reason.
    #[default]
    Retry,
    /// It starts from nothing; an Event, a condition and a metric say so.
    ColdStart,
}

/// What a pod's annotations ask for.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct PodSettings {
    /// Containers whose state is carried over, sorted, each once.
    pub managed: Vec<String>,
    /// What becomes of them if that fails.
    pub on_restore_failure: OnRestoreFailure,
    /// Annotations that are well formed, but have no effect yet.
    pub without_effect: Vec<&'static str>,
}

/// An annotation that cannot be meant as it stands.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
pub enum AnnotationError {
    /// It is no JSON list of container names.
    #[error("annotation {key} is no JSON list of container names, such as [\"cache\"]")]
    NoList {
        /// The annotation.
        key: &'static str,
    },
    /// It is no JSON object from container names to texts.
    #[error("annotation {key} is no JSON object from container names to texts")]
    NoMap {
        /// The annotation.
        key: &'static str,
    },
    /// It names a container that the pod does not have.
    #[error("annotation {key} names container {name:?}, which the pod does not have")]
    UnknownContainer {
        /// The annotation.
        key: &'static str,
        /// The name.
        name: String,
    },
    /// It is none of the words it may be.
    #[error("annotation {key} is {value:?}; it may be {words}")]
    NotOneOf {
        /// The annotation.
        key: &'static str,
        /// What it says.
        value: String,
        /// What it may say.
        words: &'static str,
    },
}

impl PodSettings {
    /// Reads a pod's annotations; `None` if none of them concerns us.
    ///
    /// # Errors
    ///
    /// The first annotation that cannot be meant as it stands.
    pub fn of(pod: &Pod) -> Result<Option<Self>, AnnotationError> {
        let none = BTreeMap::new();
        let annotations = pod.metadata.annotations.as_ref().unwrap_or(&none);
        let containers: Vec<&str> = pod
            .spec
            .iter()
            .flat_map(|spec| spec.containers.iter().map(|c| c.name.as_str()))
            .collect();
        let known = |key, name: &str| {
            containers.contains(&name).then_some(()).ok_or_else(|| {
                AnnotationError::UnknownContainer {
                    key,
                    name: name.to_owned(),
                }
            })
        };

        let mut managed = Vec::new();
        let mut seen = false;
        for key in [MANAGED_CONTAINERS, ARCHITECT_MANAGED_CONTAINERS] {
            let Some(value) = annotations.get(key) else {
                continue;
            };
            seen = true;
            let names: Vec<String> =
                serde_json::from_str(value).map_err(|_| AnnotationError::NoList { key })?;
            for name in names {
                known(key, &name)?;
                managed.push(name);
            }
        }
        managed.sort();
        managed.dedup();

        let on_restore_failure = match annotations.get(ON_RESTORE_FAILURE).map(String::as_str) {
            None | Some("retry") => OnRestoreFailure::Retry,
            Some("cold-start") => OnRestoreFailure::ColdStart,
            Some(value) => {
                return Err(AnnotationError::NotOneOf {
                    key: ON_RESTORE_FAILURE,
                    value: value.to_owned(),
                    words: "retry or cold-start",
                });
            }
        };

        let mut without_effect = Vec::new();
        for key in [ARCHITECT_SCALEDOWN_DURATIONS, ARCHITECT_NETWORK_MONITOR] {
            let Some(value) = annotations.get(key) else {
                continue;
            };
            let map: BTreeMap<String, String> =
                serde_json::from_str(value).map_err(|_| AnnotationError::NoMap { key })?;
            for name in map.keys() {
                known(key, name)?;
            }
            without_effect.push(key);
        }

        Ok(seen.then_some(Self {
            managed,
            on_restore_failure,
            without_effect,
        }))
    }

    /// Whether the state of any container is carried over.
    #[must_use]
    pub fn manages_any(&self) -> bool {
        !self.managed.is_empty()
    }
}

/// Whether an annotation lists managed containers, well formed or not: a cheap
/// test for which pods to look at.
#[must_use]
pub fn concerns_us(pod: &Pod) -> bool {
    pod.metadata.annotations.as_ref().is_some_and(|all| {
        all.contains_key(MANAGED_CONTAINERS) || all.contains_key(ARCHITECT_MANAGED_CONTAINERS)
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn pod(annotations: serde_json::Value) -> Pod {
        serde_json::from_value(json!({
            "metadata": {"annotations": annotations},
            "spec": {"containers": [{"name": "valkey"}, {"name": "exporter"}]},
        }))
        .unwrap()
    }

    #[test]
    fn architects_manifest_works_word_for_word() {
        let settings = PodSettings::of(&pod(json!({
            ARCHITECT_MANAGED_CONTAINERS: r#"["valkey"]"#,
            ARCHITECT_SCALEDOWN_DURATIONS: r#"{"valkey":"10s"}"#,
            ARCHITECT_NETWORK_MONITOR: r#"{"valkey":"packets"}"#,
        })))
        .unwrap()
        .unwrap();
        assert_eq!(settings.managed, ["valkey"]);
        assert_eq!(settings.on_restore_failure, OnRestoreFailure::Retry);
        assert_eq!(
            settings.without_effect,
            [ARCHITECT_SCALEDOWN_DURATIONS, ARCHITECT_NETWORK_MONITOR]
        );
    }

    #[test]
    fn both_lists_count_and_each_name_once() {
        let settings = PodSettings::of(&pod(json!({
            MANAGED_CONTAINERS: r#"["valkey","exporter"]"#,
            ARCHITECT_MANAGED_CONTAINERS: r#"["valkey"]"#,
        })));
        assert_eq!(settings.unwrap().unwrap().managed, ["exporter", "valkey"]);
    }

    #[test]
    fn a_pod_without_our_annotations_is_none_of_our_business() {
        let other = pod(json!({"example.com/a": "[}"}));
        assert_eq!(PodSettings::of(&other), Ok(None));
        assert!(!concerns_us(&other));
    }

    #[test]
    fn what_cannot_be_meant_is_refused_with_the_annotations_name() {
        for (key, value) in [
            (MANAGED_CONTAINERS, "valkey"),
            (MANAGED_CONTAINERS, r#"{"valkey":true}"#),
            (MANAGED_CONTAINERS, r#"["redis"]"#),
            (ARCHITECT_MANAGED_CONTAINERS, "[1]"),
            (ON_RESTORE_FAILURE, "cold"),
            (ARCHITECT_SCALEDOWN_DURATIONS, "10s"),
            (ARCHITECT_SCALEDOWN_DURATIONS, r#"{"redis":"10s"}"#),
            (ARCHITECT_NETWORK_MONITOR, r#"["valkey"]"#),
        ] {
            let error = PodSettings::of(&pod(json!({ key: value }))).unwrap_err();
            assert!(error.to_string().contains(key), "{key}: {value}: {error}");
        }
    }
}
