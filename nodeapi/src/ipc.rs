//! Messages between a shim and the engine process that it started.
//!
//! The engine is the shim's own binary, executed again with the argument
//! `engine` and a SEQPACKET socket as file descriptor 3. Both are always the
//! same build, so there is no version here. One message is one JSON packet; a
//! closed socket means that the other process is gone.
//!
//! ```text
//! sending    shim -> engine  Send, or Recover where the engine before it died
//!            engine -> shim  Listening, then Committed if it comes to that, Undecided while
//!                            the destination does not answer, then Sent
//! receiving  shim -> engine  Receive
//!            engine -> shim  Listening, PrepareRestore, FilesComplete
//!            shim -> engine  RootMounted
//!            (the engine lets CRIU go on once the source has committed)
//!            shim -> engine  Restored, or at any time from PrepareRestore: RestoreFailed
//!            engine -> shim  Guard (with file descriptors)*, AbandonRestore, Running, Settled
//!            or, at any time before Running: Failed
//! ```

use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use crate::incoming::{Incoming, Ticket};

/// What the engine must know about a container; the shim knows it from `Create`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ContainerFacts {
    /// containerd's namespace.
    pub namespace: String,
    /// containerd's container id.
    pub id: String,
    /// The OCI bundle, with `config.json`.
    pub bundle: PathBuf,
    /// The mounted root file system.
    pub rootfs: PathBuf,
    /// runc's `--root`, with the namespace.
    pub runc_root: PathBuf,
    /// The runc program.
    pub runc: PathBuf,
    /// Writable layer (overlay upperdir), if the root file system has one.
    pub upperdir: Option<PathBuf>,
    /// Volumes whose content moves with it, in order of their names.
    pub volumes: Vec<Volume>,
}

/// A volume that ends with its pod, and so has to move with what is in it.
///
/// A container and its replacement have the same ones by name, as their pods are
/// alike; where they lie is each node's own.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Volume {
    /// Its name in the pod.
    pub name: String,
    /// The directory, on this node.
    pub path: PathBuf,
    /// It has its content already: another container of the pod brought it.
    pub brought: bool,
}

impl Volume {
    /// What the hidden directories are called in which content arrives, before the
    /// container's id.
    pub const STAGING_PREFIX: &str = ".sterna-arriving.";

    /// Name of the directory, in the volume, in which content arrives with a
    /// container. It is on the volume's file system, so that it can be renamed.
    pub fn staging_name(container_id: &str) -> String {
        format!("{}{container_id}", Self::STAGING_PREFIX)
    }
}

/// Shim to engine.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub enum ToEngine {
    /// Send this container away.
    Send(Box<SendJob>),
    /// Bring to its end what an engine with this job had begun: it died.
    Recover(Box<SendJob>),
    /// Receive this container.
    Receive(Box<ReceiveJob>),
    /// The root file system is mounted as it is to be restored on.
    RootMounted,
    /// `runc restore` is through: the container runs.
    Restored {
        /// Its first process.
        pid: u32,
    },
    /// `runc restore` failed and left nothing behind.
    RestoreFailed {
        /// The line that says why.
        reason: String,
    },
    /// Give up if that is still possible.
    Cancel {
        /// Shown to whoever waits.
        reason: String,
    },
}

/// Everything an outgoing migration needs.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct SendJob {
    /// The migration.
    pub migration_id: String,
    /// The container.
    pub container: ContainerFacts,
    /// Its first process.
    pub init_pid: u32,
    /// The right to deliver it.
    pub ticket: Ticket,
    /// host:port of the destination's sternad.
    pub peer_address: String,
    /// The name in the destination's certificate.
    pub peer_node: String,
    /// Directory with this node's certificate and key and the CA.
    pub identity_dir: PathBuf,
    /// Switch over only if the blackout is expected to be below this.
    pub max_blackout_ms: u64,
    /// Give up after this long; none: never.
    pub deadline_ms: Option<u64>,
    /// How to take the container's address off this node.
    pub network: Option<network::Attachment>,
}

/// Everything an incoming migration needs.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct ReceiveJob {
    /// The permission.
    pub incoming: Incoming,
    /// The container. Its rootfs is not mounted yet.
    pub container: ContainerFacts,
    /// Name of the UTS namespace that it joins; none where it brings its own.
    pub hostname: Option<String>,
}

/// Options of a restore that must equal those of the dump.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct RestoreFlags {
    /// `--tcp-established`
    pub tcp_established: bool,
    /// CRIU's `tcp-close`: connections come back closed.
    pub tcp_close: bool,
    /// `--file-locks`
    pub file_locks: bool,
    /// `--ext-unix-sk`
    pub ext_unix_sk: bool,
    /// `--shell-job`
    pub shell_job: bool,
}

/// How the shim is to restore the container that arrives.
///
/// The shim runs `runc restore --lazy-pages` with pipes for stdio, and answers
/// `Restored` or `RestoreFailed`. CRIU waits for its first image until the engine
/// gives it, which is after the commit. What runc does before, it does on a root
/// file system that stands in for the one that is still being written.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct RestoreOrder {
    /// `--image-path`, with `descriptors.json`.
    pub images: PathBuf,
    /// `--work-path`, where the engine listens on `lazy-pages.socket`.
    pub work_dir: PathBuf,
    /// To come first in CRIU's `PATH`.
    pub programs: Option<PathBuf>,
    /// Serve memory lazily from the engine.
    pub lazy_pages: bool,
    /// Options that must equal those of the dump.
    pub flags: RestoreFlags,
}

/// How a sending engine ended.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum Outcome {
    /// The container runs on the other node; its processes here are gone.
    Migrated,
    /// It never left and goes on here.
    Stayed {
        /// Why.
        reason: String,
    },
}

/// Engine to shim.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum FromEngine {
    /// The sockets of the run directory are open.
    Listening,
    /// The commit is recorded: from here the container's exit means that it
    /// left, and nothing may thaw or signal it.
    Committed,
    /// After the commit nobody there can be asked what became of the container: it
    /// stands still here until somebody can.
    Undecided,
    /// A sending engine's last word.
    Sent(Outcome),
    /// Start the restore, as far as it goes without images.
    PrepareRestore(RestoreOrder),
    /// All files have arrived: mount the root file system and say so.
    FilesComplete,
    /// The restore takes too long: end it and answer `RestoreFailed` when nothing
    /// of it is left. Only that answer lets the source have the container back.
    AbandonRestore {
        /// Why.
        reason: String,
    },
    /// One file descriptor follows in SCM_RIGHTS: a duplicate of a userfaultfd.
    /// While the shim holds it, no page reads as zero by accident; if the
    /// engine dies before `Settled`, the shim kills the container, then closes.
    Guard,
    /// The container's tasks were let go and its address is attached.
    Running,
    /// All memory is in place; the engine ends, the shim closes its guards.
    Settled,
    /// A receiving engine's last word when the container did not arrive.
    Failed {
        /// Why.
        reason: String,
    },
}
