//! What a pod must be like to take another's state.

use k8s_openapi::api::core::v1::{Container, Pod, PodSpec};
use serde_json::{Value, json};
use sha2::{Digest, Sha256};

/// Volumes that the API server adds to a pod have a random part in their name;
/// each pod has its own token.
const TOKEN_VOLUME: &str = "kube-api-access-";

/// A hash of everything in a pod's spec that the state of `managed` containers
/// depends on: two pods with the same one can take each other's.
///
/// Not in it: what differs between replicas of one template (node, host name,
/// token volume), what the kubelet alone cares for (probes, hooks, requests,
/// ports), and other containers, which start fresh. Limits are in it: memory that
/// was resized in place may not fit where the template's limit applies.
#[must_use]
pub fn spec_hash(pod: &Pod, managed: &[String]) -> String {
    let default = PodSpec::default();
    let spec = pod.spec.as_ref().unwrap_or(&default);
    let mut containers: Vec<&Container> = spec
        .containers
        .iter()
        .filter(|container| managed.contains(&container.name))
        .collect();
    containers.sort_by(|a, b| a.name.cmp(&b.name));
    let all = json!({
        "containers": containers.into_iter().map(container).collect::<Vec<_>>(),
        "hostIPC": spec.host_ipc,
        "hostNetwork": spec.host_network,
        "hostPID": spec.host_pid,
        "hostUsers": spec.host_users,
        "os": spec.os,
        "runtimeClassName": spec.runtime_class_name,
        "securityContext": spec.security_context,
        "shareProcessNamespace": spec.share_process_namespace,
    });
    // Objects of serde_json are sorted by key, so that equal specs give equal bytes.
    let digest = Sha256::digest(all.to_string());
    digest
        .iter()
        .take(16)
        .map(|byte| format!("{byte:02x}"))
        .collect()
}

fn container(container: &Container) -> Value {
    let mut mounts = container.volume_mounts.clone().unwrap_or_default();
    for mount in &mut mounts {
        if mount.name.starts_with(TOKEN_VOLUME) {
            TOKEN_VOLUME.clone_into(&mut mount.name);
        }
    }
    json!({
        "args": container.args,
        "command": container.command,
        "env": container.env,
        "envFrom": container.env_from,
        "image": container.image,
        "limits": container.resources.as_ref().and_then(|all| all.limits.as_ref()),
        "name": container.name,
        "securityContext": container.security_context,
        "volumeDevices": container.volume_devices,
        "volumeMounts": mounts,
        "workingDir": container.working_dir,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn hash(change: impl FnOnce(&mut Value)) -> String {
        let mut pod = json!({
            "metadata": {"name": "cart-5d4f-x"},
            "spec": {
                "nodeName": "a",
                "containers": [
                    {"name": "cache", "image": "valkey:9",
                     "resources": {"limits": {"memory": "256Mi"}, "requests": {"cpu": "1"}},
                     "volumeMounts": [{"name": "kube-api-access-x7x7x", "mountPath": "/var/run/secrets"}]},
                    {"name": "exporter", "image": "exporter:1"},
                ],
            },
        });
        change(&mut pod);
        spec_hash(&serde_json::from_value(pod).unwrap(), &["cache".to_owned()])
    }

    #[test]
    fn replicas_of_one_template_have_the_same() {
        let one = hash(|_| ());
        assert_eq!(one.len(), 32);
        for (what, change) in [
            ("metadata/name", json!("cart-5d4f-y")),
            ("spec/nodeName", json!("b")),
            ("spec/hostname", json!("b")),
            (
                "spec/containers/0/volumeMounts/0/name",
                json!("kube-api-access-y"),
            ),
            ("spec/containers/0/resources/requests/cpu", json!("2")),
            (
                "spec/containers/0/readinessProbe",
                json!({"periodSeconds": 1}),
            ),
            ("spec/containers/1/image", json!("exporter:2")),
        ] {
            assert_eq!(hash(|pod| set(pod, what, change)), one, "{what}");
        }
    }

    #[test]
    fn what_the_state_depends_on_changes_it() {
        let one = hash(|_| ());
        for (what, change) in [
            ("spec/containers/0/image", json!("valkey:8")),
            ("spec/containers/0/args", json!(["--save", ""])),
            (
                "spec/containers/0/env",
                json!([{"name": "A", "value": "1"}]),
            ),
            ("spec/containers/0/resources/limits/memory", json!("128Mi")),
            ("spec/containers/0/volumeMounts/0/mountPath", json!("/data")),
            ("spec/containers/0/securityContext", json!({"runAsUser": 1})),
            ("spec/runtimeClassName", json!("sterna")),
            ("spec/shareProcessNamespace", json!(true)),
        ] {
            assert_ne!(hash(|pod| set(pod, what, change)), one, "{what}");
        }
    }

    fn set(pod: &mut Value, path: &str, value: Value) {
        let (parent, key) = path.rsplit_once('/').unwrap();
        pod.pointer_mut(&format!("/{parent}")).unwrap()[key] = value;
    }
}
