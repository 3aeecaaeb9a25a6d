//! Everything that a dump needs to know.

use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

/// The name of the log file of a dump, as runc has it.
pub const DUMP_LOG: &str = "dump.log";

/// The file with options that runc gives CRIU where there is one.
pub(crate) const RUNC_CONFIG_FILE: &str = "/etc/criu/runc.conf";

/// How connections are kept quiet while the tasks are stopped.
///
/// The method is written into the images and used at the restore again, so that
/// the destination has to have it too.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum NetworkLock {
    /// Runs iptables-restore; slow (60 ms) where that is iptables-nft.
    Iptables,
    /// CRIU's own rules by libnftables: 1 ms.
    Nftables,
    /// Not at all: the caller does it.
    Skip,
}

/// What is done with control groups, in runc's words.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum CgroupsMode {
    /// CRIU's default, which is `Soft`.
    Default,
    /// Restore properties of groups that CRIU makes.
    Soft,
    /// Restore groups and properties.
    Full,
    /// Groups must not exist yet.
    Strict,
    /// Leave them to the caller.
    Ignore,
}

/// A mount that is not dumped but provided at the restore.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ExternalMount {
    /// The mount point in the container.
    pub key: PathBuf,
    /// The name under which the restore finds it.
    pub value: PathBuf,
}

/// Everything that a dump needs to know.
///
/// [`DumpRequest::new`] is a dump of a plain process tree that is killed
/// afterwards; [`dump_request_for_runc`](crate::dump_request_for_runc) makes one
/// for a container.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct DumpRequest {
    /// The process to dump, with all descendants.
    pub pid: i32,
    /// Where the images go; must exist.
    pub images: PathBuf,
    /// Where log and statistics go; must exist; else the directory of the images.
    pub work_dir: Option<PathBuf>,
    /// 1 (errors) to 4 (everything, which costs time for every mapping).
    pub log_level: i32,
    /// The container's root directory.
    pub root: Option<PathBuf>,
    /// Let the tasks go on after a dump that succeeded.
    pub leave_running: bool,
    /// Dump TCP connections; the restore has to be told too.
    pub tcp_established: bool,
    /// Restored TCP connections are closed; the restore has to be told too.
    pub tcp_close: bool,
    /// Do not fail on connections that are being made, but forget them.
    pub tcp_skip_in_flight: bool,
    /// Allow unix sockets whose other end is outside; the restore has to be told too.
    pub ext_unix_sk: bool,
    /// Allow a terminal of the caller's session; the restore has to be told too.
    pub shell_job: bool,
    /// Dump file locks; the restore has to be told too.
    pub file_locks: bool,
    /// Unlinked files that are open are linked for the time being.
    pub link_remap: bool,
    /// Largest unlinked file that goes into the images, in bytes; CRIU's default is 1 MiB.
    pub ghost_limit: Option<u32>,
    /// Dump control groups, and how.
    pub cgroups: Option<CgroupsMode>,
    /// Directory of the freezer cgroup with the tasks.
    ///
    /// N.B. needed when the group is frozen already (CRIU hangs without it). CRIU
    /// thaws the group once it has stopped every task itself, and freezes it again
    /// before it lets them go.
    pub freeze_cgroup: Option<PathBuf>,
    /// Expect a terminal whose master is outside.
    pub orphan_pts_master: bool,
    /// `CLONE_NEW*` bits of namespaces whose content is not dumped.
    pub empty_namespaces: i32,
    /// How the network is kept quiet; none: what CRIU was built with.
    pub network_lock: Option<NetworkLock>,
    /// Resources that the restore provides, such as `net[4026532001]:extRootNetNS`.
    pub external: Vec<String>,
    /// Mounts that the restore provides.
    pub external_mounts: Vec<ExternalMount>,
    /// Seconds until freezing is given up; CRIU's default is 10.
    pub timeout_seconds: Option<u32>,
    /// A file with options that win over these.
    pub config_file: Option<PathBuf>,
}

impl DumpRequest {
    /// A dump of the process `pid` and its descendants into `images`.
    pub fn new(pid: i32, images: impl Into<PathBuf>) -> Self {
        Self {
            pid,
            images: images.into(),
            work_dir: None,
            log_level: criu_sys::log_level::WARN,
            root: None,
            leave_running: false,
            tcp_established: false,
            tcp_close: false,
            tcp_skip_in_flight: false,
            ext_unix_sk: false,
            shell_job: false,
            file_locks: false,
            link_remap: false,
            ghost_limit: None,
            cgroups: None,
            freeze_cgroup: None,
            orphan_pts_master: false,
            empty_namespaces: 0,
            network_lock: None,
            external: Vec::new(),
            external_mounts: Vec::new(),
            timeout_seconds: None,
            config_file: None,
        }
    }

    /// Where CRIU writes its log.
    pub fn log(&self) -> PathBuf {
        self.log_directory().join(DUMP_LOG)
    }

    /// Whether the network namespace is provided at the restore.
    pub fn has_external_network(&self) -> bool {
        self.external.iter().any(|name| name.starts_with("net["))
    }

    pub(crate) fn log_directory(&self) -> &Path {
        self.work_dir.as_deref().unwrap_or(&self.images)
    }
}
