//! What runc would tell CRIU about a container.
//!
//! Source: `Checkpoint` in libcontainer/criu_linux.go of runc 1.1.15 to 1.5.1. The
//! images have to restore under `runc restore`, which derives the names of
//! everything that is external from the same configuration.

use std::collections::HashMap;
use std::ffi::OsStr;
use std::fs;
use std::io;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};

use serde::Deserialize;

use crate::freezer::Freezer;
use crate::request::{CgroupsMode, DumpRequest, ExternalMount, NetworkLock, RUNC_CONFIG_FILE};
use crate::securejoin::resolve_in;

/// What `runc restore` reads the names of the stdio pipes from.
const DESCRIPTORS_FILE: &str = "descriptors.json";

/// The annotation that names another file of options for CRIU.
const CONFIG_ANNOTATION: &str = "org.criu.config=";

/// Why a container cannot be described.
#[derive(Debug, thiserror::Error)]
pub enum ContainerError {
    /// A file or directory cannot be used.
    #[error("cannot {operation} {}", path.display())]
    Io {
        /// What was tried.
        operation: &'static str,
        /// The file.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// runc's state is not what we know.
    #[error("cannot understand {}", path.display())]
    State {
        /// The file.
        path: PathBuf,
        /// Why.
        source: serde_json::Error,
    },
    /// Its first process is not there (any more).
    #[error("container {id} does not run")]
    NotRunning {
        /// The container.
        id: String,
    },
    /// It has no control group that can be frozen.
    #[error("container {id} has no freezer cgroup")]
    NoFreezer {
        /// The container.
        id: String,
    },
    /// An option of the checkpoint is unknown, as to runc.
    #[error("unknown {option}: {value:?}")]
    Option {
        /// Which option.
        option: &'static str,
        /// What it says.
        value: String,
    },
}

fn io_error<'a>(
    operation: &'static str,
    path: &'a Path,
) -> impl FnOnce(io::Error) -> ContainerError + 'a {
    move |source| ContainerError::Io {
        operation,
        path: path.to_owned(),
        source,
    }
}

/// How to find a container of runc.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RuncContainer {
    /// runc's `--root`; containerd's have the namespace as last component.
    pub runc_root: PathBuf,
    /// The container's id.
    pub id: String,
}

/// containerd's options of a checkpoint (`containerd.runc.v1.CheckpointOptions`),
/// and ours.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CheckpointOptions {
    /// Kill the container when it is dumped.
    pub exit: bool,
    /// Dump open TCP connections.
    pub open_tcp: bool,
    /// Allow unix sockets whose other end is outside.
    pub external_unix_sockets: bool,
    /// Allow terminals (shell jobs).
    pub terminal: bool,
    /// Dump file locks.
    pub file_locks: bool,
    /// Namespaces that are not dumped; `network` always is one.
    pub empty_namespaces: Vec<String>,
    /// "", "soft", "full", "strict" or "ignore".
    pub cgroups_mode: String,
    /// Where the images go; made if missing.
    pub image_path: PathBuf,
    /// Where log and statistics go; made if missing; none: to the images.
    pub work_path: Option<PathBuf>,
    /// Restored TCP connections are closed.
    pub tcp_close: bool,
    /// How the network is kept quiet; none: what CRIU was built with.
    pub network_lock: Option<NetworkLock>,
    /// Link unlinked files for the time being.
    pub link_remap: bool,
    /// Forget connections that are being made.
    pub tcp_skip_in_flight: bool,
    /// 1 (errors) to 4 (everything, as runc; it costs time).
    pub log_level: i32,
}

impl CheckpointOptions {
    /// Nothing special: the container goes on, connections make the dump fail.
    pub fn new(image_path: impl Into<PathBuf>) -> Self {
        Self {
            exit: false,
            open_tcp: false,
            external_unix_sockets: false,
            terminal: false,
            file_locks: false,
            empty_namespaces: Vec::new(),
            cgroups_mode: String::new(),
            image_path: image_path.into(),
            work_path: None,
            tcp_close: false,
            network_lock: None,
            link_remap: false,
            tcp_skip_in_flight: false,
            log_level: criu_sys::log_level::WARN,
        }
    }
}

/// What runc knows about a running container: its state.json.
#[derive(Debug, Clone, Deserialize)]
pub struct RuncState {
    id: String,
    init_process_pid: i32,
    init_process_start: u64,
    cgroup_paths: HashMap<String, PathBuf>,
    external_descriptors: Option<Vec<String>>,
    config: Config,
}

/// libcontainer's `configs.Config`, as far as it matters. Go writes empty lists
/// as null.
#[derive(Debug, Clone, Deserialize)]
struct Config {
    rootfs: PathBuf,
    mounts: Option<Vec<Mount>>,
    devices: Option<Vec<Device>>,
    namespaces: Option<Vec<Namespace>>,
    mask_paths: Option<Vec<PathBuf>>,
    labels: Option<Vec<String>>,
}

#[derive(Debug, Clone, Deserialize)]
struct Mount {
    destination: PathBuf,
    device: String,
}

#[derive(Debug, Clone, Deserialize)]
struct Device {
    path: PathBuf,
}

#[derive(Debug, Clone, Deserialize)]
struct Namespace {
    #[serde(rename = "type")]
    kind: String,
    path: PathBuf,
}

impl RuncContainer {
    /// Reads runc's state of the container and makes sure that it runs.
    ///
    /// # Errors
    ///
    /// When there is no such container, its first process is gone, or the state
    /// is not what runc 1.1 to 1.5 write.
    pub fn state(&self) -> Result<RuncState, ContainerError> {
        let path = self.runc_root.join(&self.id).join("state.json");
        let text = fs::read(&path).map_err(io_error("read", &path))?;
        let state: RuncState = serde_json::from_slice(&text)
            .map_err(|source| ContainerError::State { path, source })?;
        if start_time(state.init_process_pid) != Some(state.init_process_start) {
            return Err(ContainerError::NotRunning { id: state.id });
        }
        Ok(state)
    }
}

/// When a process started, in ticks since boot: with the pid it names a process
/// for good. `None` for one that is gone.
fn start_time(pid: i32) -> Option<u64> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    // The second field, the name, may hold anything.
    let (_, fields) = stat.rsplit_once(')')?;
    fields.split_whitespace().nth(19)?.parse().ok()
}

impl RuncState {
    /// The container's first process.
    pub fn init_pid(&self) -> i32 {
        self.init_process_pid
    }

    /// The container's root directory, as the host sees it.
    pub fn rootfs(&self) -> &Path {
        &self.config.rootfs
    }

    /// The control group that freezes it.
    ///
    /// # Errors
    ///
    /// When it has none (a container without control groups).
    pub fn freezer(&self) -> Result<Freezer, ContainerError> {
        let path = |controller: &str| self.cgroup_paths.get(controller).cloned();
        let v1 = path("freezer").map(Freezer::V1);
        let v2 = || {
            self.is_unified()
                .then(|| path("").map(Freezer::V2))
                .flatten()
        };
        v1.or_else(v2).ok_or_else(|| ContainerError::NoFreezer {
            id: self.id.clone(),
        })
    }

    /// Only the unified hierarchy. On a hybrid node runc lists it beside the
    /// controllers of v1, under the name "".
    fn is_unified(&self) -> bool {
        self.cgroup_paths.keys().all(String::is_empty)
    }

    fn namespace(&self, kind: &str) -> Option<&Namespace> {
        self.config
            .namespaces
            .iter()
            .flatten()
            .find(|namespace| namespace.kind == kind)
    }

    /// `net[4026532001]:extRootNetNS` for namespaces that the container joined.
    fn external_namespaces(&self) -> Result<Vec<String>, ContainerError> {
        let mut external = Vec::new();
        for (kind, name, key) in [
            ("NEWNET", "net", "extRootNetNS"),
            ("NEWPID", "pid", "extRootPidNS"),
        ] {
            let joined = self.namespace(kind).map(|namespace| &namespace.path);
            if let Some(path) = joined.filter(|path| !path.as_os_str().is_empty()) {
                let inode = sys::netns::inode(path).map_err(io_error("look at", path))?;
                external.push(format!("{name}[{inode}]:{key}"));
            }
        }
        Ok(external)
    }

    /// Mounts of which only the place is dumped.
    fn external_mounts(&self) -> Result<Vec<ExternalMount>, ContainerError> {
        let mut mounts = Vec::new();
        for mount in self.config.mounts.iter().flatten() {
            match mount.device.as_str() {
                "bind" => mounts.push(self.external_mount(&mount.destination)?),
                "cgroup" if !self.is_unified() && self.namespace("NEWCGROUP").is_none() => {
                    for name in v1_hierarchies()? {
                        mounts.push(self.external_mount(&mount.destination.join(name))?);
                    }
                }
                _ => {}
            }
        }
        for path in self.config.mask_paths.iter().flatten() {
            if self.is_masked_file(path)? {
                mounts.push(ExternalMount {
                    key: path.clone(),
                    value: "/dev/null".into(),
                });
            }
        }
        for device in self.config.devices.iter().flatten() {
            mounts.push(self.external_mount(&device.path)?);
        }
        Ok(mounts)
    }

    fn external_mount(&self, destination: &Path) -> Result<ExternalMount, ContainerError> {
        let rootfs = &self.config.rootfs;
        let inside = destination.strip_prefix(rootfs).unwrap_or(destination);
        let key = resolve_in(rootfs, inside).map_err(io_error("resolve", destination))?;
        Ok(ExternalMount {
            value: key.clone(),
            key,
        })
    }

    /// A masked directory is a tmpfs, which CRIU dumps.
    fn is_masked_file(&self, path: &Path) -> Result<bool, ContainerError> {
        let root = PathBuf::from(format!("/proc/{}/root", self.init_process_pid));
        let inside = root.join(path.strip_prefix("/").unwrap_or(path));
        match fs::metadata(&inside) {
            Ok(found) => Ok(!found.is_dir()),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(false),
            Err(error) => Err(io_error("look at", &inside)(error)),
        }
    }

    /// runc takes the file from the annotation; an empty one means none.
    fn config_file(&self) -> Option<PathBuf> {
        let mut labels = self.config.labels.iter().flatten();
        match labels.find_map(|label| label.strip_prefix(CONFIG_ANNOTATION)) {
            Some("") => None,
            Some(file) => Some(file.into()),
            None => Some(RUNC_CONFIG_FILE.into()),
        }
    }
}

/// Names under which runc mounts the hierarchies of cgroup v1 in a container.
fn v1_hierarchies() -> Result<Vec<PathBuf>, ContainerError> {
    let path = Path::new("/proc/self/mountinfo");
    let text = fs::read(path).map_err(io_error("read", path))?;
    Ok(hierarchies_of(&text))
}

fn hierarchies_of(mountinfo: &[u8]) -> Vec<PathBuf> {
    let mut seen: Vec<&[u8]> = Vec::new();
    let mut names = Vec::new();
    for line in mountinfo.split(|&byte| byte == b'\n') {
        let fields: Vec<&[u8]> = line.split(|&byte| byte == b' ').collect();
        let Some(dash) = fields.iter().position(|field| *field == b"-") else {
            continue;
        };
        let (Some(mount_point), Some(&b"cgroup"), Some(&options)) =
            (fields.get(4), fields.get(dash + 1), fields.get(dash + 3))
        else {
            continue;
        };
        // The first mount of a hierarchy counts.
        if seen.contains(&options) {
            continue;
        }
        seen.push(options);
        let mount_point = Path::new(OsStr::from_bytes(mount_point));
        names.extend(mount_point.file_name().map(PathBuf::from));
    }
    names
}

/// Everything that runc would set for `runc checkpoint`, and the file that
/// `runc restore` reads, `descriptors.json`, written to the images' directory.
///
/// To be called while the container runs: it reads files, some of them of the
/// container, and that should not be part of a freeze.
///
/// # Errors
///
/// When the container does not run, or something about it cannot be read.
pub fn dump_request_for_runc(
    container: &RuncContainer,
    options: &CheckpointOptions,
) -> Result<DumpRequest, ContainerError> {
    let state = container.state()?;
    make_directory(&options.image_path)?;
    if let Some(path) = &options.work_path {
        make_directory(path)?;
    }
    let request = describe(&state, options)?;
    let path = options.image_path.join(DESCRIPTORS_FILE);
    // What stdin, stdout and stderr were when the first process started; after a
    // restore runc keeps the new ones.
    let names = state.external_descriptors.as_deref().unwrap_or_default();
    let text = serde_json::to_vec(names).map_err(|source| ContainerError::State {
        path: path.clone(),
        source,
    })?;
    fs::write(&path, text).map_err(io_error("write", &path))?;
    Ok(request)
}

fn describe(state: &RuncState, options: &CheckpointOptions) -> Result<DumpRequest, ContainerError> {
    if let Some(unknown) = options
        .empty_namespaces
        .iter()
        .find(|name| *name != "network")
    {
        return Err(ContainerError::Option {
            option: "empty namespace",
            value: unknown.clone(),
        });
    }
    Ok(DumpRequest {
        work_dir: options.work_path.clone(),
        log_level: options.log_level,
        root: Some(state.config.rootfs.clone()),
        leave_running: !options.exit,
        tcp_established: options.open_tcp,
        tcp_close: options.tcp_close,
        tcp_skip_in_flight: options.tcp_skip_in_flight,
        ext_unix_sk: options.external_unix_sockets,
        shell_job: options.terminal,
        file_locks: options.file_locks,
        link_remap: options.link_remap,
        cgroups: Some(cgroups_mode(&options.cgroups_mode)?),
        freeze_cgroup: state
            .freezer()
            .ok()
            .map(|freezer| freezer.directory().to_owned()),
        orphan_pts_master: true,
        // runc does not manage network devices: never dumped.
        empty_namespaces: libc::CLONE_NEWNET,
        network_lock: options.network_lock,
        external: state.external_namespaces()?,
        external_mounts: state.external_mounts()?,
        config_file: state.config_file(),
        ..DumpRequest::new(state.init_process_pid, &options.image_path)
    })
}

fn cgroups_mode(name: &str) -> Result<CgroupsMode, ContainerError> {
    match name {
        "" => Ok(CgroupsMode::Default),
        "soft" => Ok(CgroupsMode::Soft),
        "full" => Ok(CgroupsMode::Full),
        "strict" => Ok(CgroupsMode::Strict),
        "ignore" => Ok(CgroupsMode::Ignore),
        _ => Err(ContainerError::Option {
            option: "cgroups mode",
            value: name.to_owned(),
        }),
    }
}

fn make_directory(path: &Path) -> Result<(), ContainerError> {
    let mut builder = fs::DirBuilder::new();
    builder.recursive(true).mode(0o700);
    builder
        .create(path)
        .map_err(io_error("make directory", path))
}

#[cfg(test)]
mod tests;
