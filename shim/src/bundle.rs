//! What the shim reads from and writes to a container's bundle.

use std::collections::HashMap;
use std::fs;
use std::path::{Path, PathBuf};

use serde_json::Value;

use crate::error::{Error, Result};
use crate::movable;

/// A container's OCI specification; edited as JSON, so that what we do not
/// know about stays in it.
#[derive(Debug, Clone)]
pub(crate) struct Spec {
    path: PathBuf,
    json: Value,
}

impl Spec {
    /// Reads `config.json` of a bundle.
    pub(crate) fn read(bundle: &Path) -> Result<Self> {
        let path = bundle.join("config.json");
        let text = fs::read(&path).map_err(Error::io("read", &path))?;
        let json = serde_json::from_slice(&text).map_err(|source| Error::Json {
            action: "understand",
            path: path.clone(),
            source,
        })?;
        Ok(Self { path, json })
    }

    fn write(&self) -> Result<()> {
        let text = serde_json::to_vec(&self.json).map_err(|source| Error::Json {
            action: "write",
            path: self.path.clone(),
            source,
        })?;
        let partial = self.path.with_extension("json.partial");
        fs::write(&partial, text)
            .and_then(|()| fs::rename(&partial, &self.path))
            .map_err(Error::io("write", &self.path))
    }

    /// Adds the rules that keep the container movable.
    pub(crate) fn keep_movable(&mut self) -> Result<()> {
        if movable::keep_movable(&mut self.json) {
            self.write()?;
        }
        Ok(())
    }

    /// Whether the CRI made it: a pod's sandbox, or a container in one.
    pub(crate) fn is_of_a_pod(&self) -> bool {
        self.annotation("io.kubernetes.cri.container-type")
            .is_some()
    }

    /// One annotation.
    pub(crate) fn annotation(&self, name: &str) -> Option<&str> {
        self.json.get("annotations")?.get(name)?.as_str()
    }

    /// Sets an annotation in the file.
    pub(crate) fn set_annotation(&mut self, name: &str, value: &str) -> Result<()> {
        let annotations = &mut self.json["annotations"];
        if annotations.is_null() {
            *annotations = Value::Object(serde_json::Map::new());
        }
        annotations[name] = Value::from(value);
        self.write()
    }

    /// Whether other processes survive the first one: it is not the init of a
    /// pid namespace of its own, so that the kernel does not end them.
    pub(crate) fn shares_pid_namespace(&self) -> bool {
        let Some(namespaces) = self.json["linux"]["namespaces"].as_array() else {
            return true;
        };
        !namespaces.iter().any(|namespace| {
            namespace["type"] == "pid" && namespace["path"].as_str().unwrap_or("").is_empty()
        })
    }

    /// Its control group, where that is named by a path: systemd's are not.
    pub(crate) fn cgroup(&self) -> Option<&Path> {
        let path = Path::new(self.json["linux"]["cgroupsPath"].as_str()?);
        path.is_absolute().then_some(path)
    }

    /// The UTS namespace that it joins instead of getting one of its own.
    pub(crate) fn joined_uts(&self) -> Option<&Path> {
        let namespaces = self.json["linux"]["namespaces"].as_array()?;
        let uts = namespaces
            .iter()
            .find(|namespace| namespace["type"] == "uts")?;
        let path = uts["path"].as_str().filter(|path| !path.is_empty())?;
        Some(Path::new(path))
    }

    /// Directories and files of the node that the container sees.
    pub(crate) fn bind_sources(&self) -> impl Iterator<Item = &Path> {
        let mounts = self.json["mounts"].as_array().into_iter().flatten();
        mounts.filter_map(|mount| {
            let mut options = mount["options"].as_array().into_iter().flatten();
            let bind = mount["type"] == "bind"
                || options.any(|option| option == "bind" || option == "rbind");
            Some(Path::new(mount["source"].as_str()?)).filter(|_| bind)
        })
    }

    /// The root file system, where no mounts for it came with the request.
    pub(crate) fn root(&self, bundle: &Path) -> PathBuf {
        bundle.join(self.json["root"]["path"].as_str().unwrap_or("rootfs"))
    }
}

/// Annotations that put several containers under one shim, in order.
const GROUP_ANNOTATIONS: [&str; 2] = [
    "io.containerd.runc.v2.group",
    "io.kubernetes.cri.sandbox-id",
];

/// The group that a container belongs to: its pod, or itself.
pub(crate) fn group(bundle: &Path, id: &str) -> Result<String> {
    #[derive(serde::Deserialize)]
    struct Annotations {
        #[serde(default)]
        annotations: Option<HashMap<String, String>>,
    }
    let path = bundle.join("config.json");
    let text = fs::read(&path).map_err(Error::io("read", &path))?;
    let spec: Annotations = serde_json::from_slice(&text).map_err(|source| Error::Json {
        action: "understand",
        path,
        source,
    })?;
    let annotations = spec.annotations.unwrap_or_default();
    Ok(GROUP_ANNOTATIONS
        .iter()
        .find_map(|name| annotations.get(*name))
        .cloned()
        .unwrap_or_else(|| id.to_owned()))
}

/// Reads a pid that runc left.
pub(crate) fn read_pid(path: &Path) -> Result<u32> {
    let text = fs::read_to_string(path).map_err(Error::io("read", path))?;
    text.trim().parse().map_err(|_| Error::Io {
        action: "understand",
        path: path.to_owned(),
        source: std::io::ErrorKind::InvalidData.into(),
    })
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn bundle(config: &Value) -> tempfile::TempDir {
        let bundle = tempfile::tempdir().unwrap();
        fs::write(bundle.path().join("config.json"), config.to_string()).unwrap();
        bundle
    }

    #[test]
    fn a_container_is_grouped_by_label_then_by_pod_then_alone() {
        for (annotations, group_name) in [
            (json!({}), "web"),
            (Value::Null, "web"),
            (json!({"io.kubernetes.cri.sandbox-id": "pod"}), "pod"),
            (
                json!({"io.kubernetes.cri.sandbox-id": "pod", "io.containerd.runc.v2.group": "g"}),
                "g",
            ),
        ] {
            let bundle = bundle(&json!({"annotations": annotations}));
            assert_eq!(group(bundle.path(), "web").unwrap(), group_name);
        }
    }

    #[test]
    fn only_a_pid_namespace_of_its_own_ends_with_the_first_process() {
        for (namespaces, shares) in [
            (json!([{"type": "pid"}]), false),
            (json!([{"type": "pid", "path": "/proc/1/ns/pid"}]), true),
            (json!([{"type": "mount"}]), true),
            (Value::Null, true),
        ] {
            let bundle = bundle(&json!({"linux": {"namespaces": namespaces}}));
            let spec = Spec::read(bundle.path()).unwrap();
            assert_eq!(spec.shares_pid_namespace(), shares);
        }
    }

    #[test]
    fn an_annotation_is_added_and_what_is_not_understood_stays() {
        let bundle = bundle(&json!({"future": {"x": [1, 2]}}));
        let mut spec = Spec::read(bundle.path()).unwrap();
        spec.set_annotation("a", "b").unwrap();
        let again = Spec::read(bundle.path()).unwrap();
        assert_eq!(again.annotation("a"), Some("b"));
        assert_eq!(again.json["future"]["x"], json!([1, 2]));
    }

    #[test]
    fn sandboxes_and_containers_of_the_cri_are_told_from_those_of_others() {
        for (annotations, of_a_pod) in [
            (json!({"io.kubernetes.cri.container-type": "sandbox"}), true),
            (
                json!({"io.kubernetes.cri.container-type": "container"}),
                true,
            ),
            (json!({"io.containerd.runc.v2.group": "g"}), false),
            (Value::Null, false),
        ] {
            let bundle = bundle(&json!({"annotations": annotations}));
            assert_eq!(Spec::read(bundle.path()).unwrap().is_of_a_pod(), of_a_pod);
        }
    }

    #[test]
    fn a_pid_file_that_is_not_a_number_is_an_error_that_names_it() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("init.pid");
        fs::write(&path, "12\n").unwrap();
        assert_eq!(read_pid(&path).unwrap(), 12);
        fs::write(&path, "x").unwrap();
        assert!(read_pid(&path).unwrap_err().chain().contains("init.pid"));
    }
}
