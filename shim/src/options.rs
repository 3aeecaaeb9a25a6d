//! The runtime options of a container, as containerd sends and the bundle keeps them.

use std::path::{Path, PathBuf};
use std::{fs, io};

use containerd_shim_protos::shim::oci;
use protobuf::well_known_types::any::Any;
use protobuf::{CodedInputStream, Message};
use serde::{Deserialize, Serialize};

use crate::error::{Error, Result};

/// Type of the options that the Go shim takes.
const RUNC_OPTIONS: &str = "containerd.runc.v1.Options";
/// Type that the CRI sends to a runtime whose name it does not know: the table
/// of the configuration file as TOML.
const GENERIC_OPTIONS: &str = "runtimeoptions.v1.Options";
/// What containerd 1.7 sends for the same.
const CRI_OPTIONS: &str = "cri.runtimeoptions.v1.Options";

const OPTIONS_FILE: &str = "options.json";
const RUNTIME_FILE: &str = "runtime";
const DEFAULT_ROOT: &str = "/run/containerd/runc";

/// Field names of `options.json` are the Go shim's, and it omits what is empty:
/// either shim must be able to clean up after the other.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub(crate) struct Options {
    #[serde(skip_serializing_if = "is_default")]
    pub(crate) no_pivot_root: bool,
    #[serde(skip_serializing_if = "is_default")]
    pub(crate) no_new_keyring: bool,
    #[serde(skip_serializing_if = "is_default")]
    pub(crate) shim_cgroup: String,
    #[serde(skip_serializing_if = "is_default")]
    pub(crate) io_uid: u32,
    #[serde(skip_serializing_if = "is_default")]
    pub(crate) io_gid: u32,
    #[serde(skip_serializing_if = "is_default")]
    pub(crate) binary_name: String,
    #[serde(skip_serializing_if = "is_default")]
    pub(crate) root: String,
    #[serde(skip_serializing_if = "is_default")]
    pub(crate) systemd_cgroup: bool,
    #[serde(skip_serializing_if = "is_default")]
    pub(crate) criu_image_path: String,
    #[serde(skip_serializing_if = "is_default")]
    pub(crate) criu_work_path: String,
}

fn is_default<T: Default + PartialEq>(value: &T) -> bool {
    *value == T::default()
}

/// The same table as people write it in containerd's configuration.
#[derive(Debug, Default, Deserialize)]
#[serde(default, rename_all = "PascalCase")]
struct TomlOptions {
    no_pivot_root: bool,
    no_new_keyring: bool,
    shim_cgroup: String,
    io_uid: u32,
    io_gid: u32,
    binary_name: String,
    root: String,
    systemd_cgroup: bool,
    criu_image_path: String,
    criu_work_path: String,
}

impl Options {
    /// Reads what came with a request; nothing means the defaults.
    pub(crate) fn from_any(any: Option<&Any>) -> Result<Self> {
        let Some(any) = any.filter(|any| !any.type_url.is_empty()) else {
            return Ok(Self::default());
        };
        let name = any.type_url.rsplit('/').next().unwrap_or_default();
        let invalid = |why: String| Error::InvalidArgument {
            what: format!("runtime options {name}: {why}"),
        };
        match name {
            RUNC_OPTIONS => oci::Options::parse_from_bytes(&any.value)
                .map(Self::from)
                .map_err(|error| invalid(error.to_string())),
            GENERIC_OPTIONS | CRI_OPTIONS => {
                let body = config_body(&any.value).map_err(|error| invalid(error.to_string()))?;
                let text =
                    std::str::from_utf8(&body).map_err(|error| invalid(error.to_string()))?;
                toml::from_str::<TomlOptions>(text)
                    .map(Self::from)
                    .map_err(|error| invalid(error.message().to_owned()))
            }
            _ => Err(invalid("type is not known".to_owned())),
        }
    }

    /// Leaves them in the bundle, for `delete`.
    pub(crate) fn write(&self, bundle: &Path) -> Result<()> {
        use std::os::unix::fs::OpenOptionsExt;
        let path = bundle.join(OPTIONS_FILE);
        let text = serde_json::to_vec(self).map_err(|source| Error::Json {
            action: "write",
            path: path.clone(),
            source,
        })?;
        fs::OpenOptions::new()
            .write(true)
            .create(true)
            .truncate(true)
            .mode(0o600)
            .open(&path)
            .and_then(|mut file| io::Write::write_all(&mut file, &text))
            .map_err(Error::io("write", &path))?;
        let path = bundle.join(RUNTIME_FILE);
        fs::write(&path, &self.binary_name).map_err(Error::io("write", &path))
    }

    /// Reads them from a bundle. A bundle whose `Create` never came has none.
    pub(crate) fn read(bundle: &Path) -> Result<Self> {
        let path = bundle.join(OPTIONS_FILE);
        let mut options = match fs::read(&path) {
            Ok(text) => serde_json::from_slice::<Self>(&text).map_err(|source| Error::Json {
                action: "understand",
                path,
                source,
            })?,
            Err(error) if error.kind() == io::ErrorKind::NotFound => Self::default(),
            Err(error) => return Err(Error::io("read", &path)(error)),
        };
        // The Go shim's `runtime` file wins over its options.
        if let Ok(name) = fs::read_to_string(bundle.join(RUNTIME_FILE))
            && !name.is_empty()
        {
            options.binary_name = name;
        }
        Ok(options)
    }

    /// The runc program: a name to look up in PATH, or a path.
    pub(crate) fn program(&self) -> PathBuf {
        match self.binary_name.as_str() {
            "" => PathBuf::from("runc"),
            name => PathBuf::from(name),
        }
    }

    /// runc's `--root` for a namespace.
    pub(crate) fn runc_root(&self, namespace: &str) -> PathBuf {
        let root = match self.root.as_str() {
            "" => DEFAULT_ROOT,
            root => root,
        };
        Path::new(root).join(namespace)
    }

    /// Who owns the pipes of the container's processes.
    pub(crate) fn io_owner(&self) -> (u32, u32) {
        (self.io_uid, self.io_gid)
    }
}

impl From<oci::Options> for Options {
    fn from(options: oci::Options) -> Self {
        Self {
            no_pivot_root: options.no_pivot_root,
            no_new_keyring: options.no_new_keyring,
            shim_cgroup: options.shim_cgroup,
            io_uid: options.io_uid,
            io_gid: options.io_gid,
            binary_name: options.binary_name,
            root: options.root,
            systemd_cgroup: options.systemd_cgroup,
            criu_image_path: options.criu_image_path,
            criu_work_path: options.criu_work_path,
        }
    }
}

impl From<TomlOptions> for Options {
    fn from(options: TomlOptions) -> Self {
        Self {
            no_pivot_root: options.no_pivot_root,
            no_new_keyring: options.no_new_keyring,
            shim_cgroup: options.shim_cgroup,
            io_uid: options.io_uid,
            io_gid: options.io_gid,
            binary_name: options.binary_name,
            root: options.root,
            systemd_cgroup: options.systemd_cgroup,
            criu_image_path: options.criu_image_path,
            criu_work_path: options.criu_work_path,
        }
    }
}

/// Field 3 of `runtimeoptions.v1.Options` {type_url, config_path, config_body};
/// the message has no other use here that would deserve generated code.
fn config_body(message: &[u8]) -> protobuf::Result<Vec<u8>> {
    const CONFIG_BODY: u32 = (3 << 3) | 2;
    let mut input = CodedInputStream::from_bytes(message);
    let mut body = Vec::new();
    while let Some(tag) = input.read_raw_tag_or_eof()? {
        if tag == CONFIG_BODY {
            body = input.read_bytes()?;
        } else {
            protobuf::rt::skip_field_for_tag(tag, &mut input)?;
        }
    }
    Ok(body)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::any::to_any;

    #[test]
    fn no_options_are_the_defaults() {
        assert_eq!(Options::from_any(None).unwrap(), Options::default());
        let empty = Any::default();
        assert_eq!(Options::from_any(Some(&empty)).unwrap(), Options::default());
        let options = Options::default();
        assert_eq!(options.program(), PathBuf::from("runc"));
        assert_eq!(
            options.runc_root("k8s.io"),
            PathBuf::from("/run/containerd/runc/k8s.io")
        );
    }

    #[test]
    fn runc_options_are_taken_with_and_without_a_host_in_the_type() {
        let message = oci::Options {
            binary_name: "/usr/bin/crun".into(),
            systemd_cgroup: true,
            ..Default::default()
        };
        let mut any = to_any(&message).unwrap();
        assert_eq!(any.type_url, RUNC_OPTIONS);
        for _ in 0..2 {
            let options = Options::from_any(Some(&any)).unwrap();
            assert_eq!(options.program(), PathBuf::from("/usr/bin/crun"));
            assert!(options.systemd_cgroup);
            any.type_url = format!("types.containerd.io/{RUNC_OPTIONS}");
        }
    }

    #[test]
    fn generic_options_carry_toml() {
        let body = b"BinaryName = \"/opt/runc\"\nSystemdCgroup = true\nIoUid = 7\n";
        let mut value = vec![0x0a, 1, b't', 0x12, 0, 0x1a];
        value.push(u8::try_from(body.len()).unwrap());
        value.extend_from_slice(body);
        let any = Any {
            type_url: GENERIC_OPTIONS.into(),
            value,
            ..Default::default()
        };
        let options = Options::from_any(Some(&any)).unwrap();
        assert_eq!(options.binary_name, "/opt/runc");
        assert!(options.systemd_cgroup);
        assert_eq!(options.io_owner(), (7, 0));
    }

    #[test]
    fn options_of_another_runtime_are_an_invalid_argument() {
        let any = Any {
            type_url: "containerd.runhcs.v1.Options".into(),
            ..Default::default()
        };
        assert!(matches!(
            Options::from_any(Some(&any)),
            Err(Error::InvalidArgument { .. })
        ));
    }

    #[test]
    fn a_bundle_keeps_them_as_the_go_shim_would() {
        let bundle = tempfile::tempdir().unwrap();
        assert_eq!(Options::read(bundle.path()).unwrap(), Options::default());
        let options = Options {
            binary_name: "crun".into(),
            systemd_cgroup: true,
            ..Default::default()
        };
        options.write(bundle.path()).unwrap();
        let text = fs::read_to_string(bundle.path().join(OPTIONS_FILE)).unwrap();
        assert_eq!(text, r#"{"binary_name":"crun","systemd_cgroup":true}"#);
        assert_eq!(Options::read(bundle.path()).unwrap(), options);

        // What a newer Go shim adds does not disturb us.
        fs::write(
            bundle.path().join(OPTIONS_FILE),
            r#"{"root":"/r","task_api_version":3}"#,
        )
        .unwrap();
        assert_eq!(
            Options::read(bundle.path()).unwrap().runc_root("n"),
            PathBuf::from("/r/n")
        );
    }
}
