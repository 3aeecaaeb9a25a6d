//! A container: its state, its processes, and how its end is told.
//!
//! Two locks. `operation` is held while runc works on the container, so that
//! one thing happens at a time; the lock inside [`Container::view`] is held for
//! a few instructions and never across an await, so that State, Pids and the
//! other questions are answered whatever runc is doing.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use containerd_shim_protos::api::Mount;
use containerd_shim_protos::events::task::{TaskExit, TaskOOM};
use nodeapi::{ContainerFacts, ContainerRecord, PodContainer, RunDir, RunState, Volume};
use protobuf::MessageField;
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use crate::cgroup::Cgroup;
use crate::error::{Error, Result};
use crate::events::{Publisher, timestamp};
use crate::exec::Exec;
use crate::io::{Owner, StdioSpec};
use crate::migrate_in::Arrival;
use crate::oom::OomWatch;
use crate::options::Options;
use crate::process::Process;
use crate::reaper::{Exit, ExitReceiver, Reaper};
use crate::runc::Runc;
use crate::state::{Activity, State, Verb};

/// What all containers of a shim share.
#[derive(Debug)]
pub(crate) struct Context {
    /// containerd's namespace.
    pub(crate) namespace: String,
    /// The socket that this shim serves.
    pub(crate) socket: PathBuf,
    /// Where Sterna's processes of this node meet.
    pub(crate) run_dir: RunDir,
    /// The one place where children are reaped.
    pub(crate) reaper: Arc<Reaper>,
    /// Events to containerd.
    pub(crate) publisher: Publisher,
    /// Where engines write what they have to say.
    pub(crate) log: Option<Arc<std::fs::File>>,
    /// Cancelled when the shim is to end.
    pub(crate) shutdown: CancellationToken,
    /// What the end of the shim waits for a little: engines that still have
    /// something to say or to clean up.
    pub(crate) last_work: TaskTracker,
    /// Names of the pod's volumes whose content came with a container.
    pub(crate) brought: Mutex<HashSet<String>>,
}

impl Context {
    fn brought(&self) -> MutexGuard<'_, HashSet<String>> {
        self.brought.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The root file system's mounts and where they go.
#[derive(Debug, Clone)]
pub(crate) struct Rootfs {
    /// The directory, mounted by us or not.
    pub(crate) path: PathBuf,
    /// What we mount there; nothing if it came ready.
    pub(crate) mounts: Vec<Mount>,
}

/// What a container that is not there yet is restored from.
#[derive(Debug, Clone)]
pub(crate) struct CheckpointSource {
    /// CRIU's images.
    pub(crate) images: PathBuf,
    /// Images that these build on, as containerd says it.
    pub(crate) parent: Option<String>,
}

/// The part of a container that changes.
#[derive(Debug)]
pub(crate) struct View {
    pub(crate) state: State,
    /// `runc pause` is working.
    pub(crate) pausing: bool,
    pub(crate) activity: Activity,
    pub(crate) execs: HashMap<String, Arc<Exec>>,
    /// The first process ended; no other may start any more.
    pub(crate) init_ended: bool,
    pub(crate) cgroup: Option<Arc<Cgroup>>,
    pub(crate) oom: Option<OomWatch>,
}

/// See the module's documentation.
#[derive(Debug)]
pub(crate) struct Container {
    pub(crate) context: Arc<Context>,
    pub(crate) id: String,
    pub(crate) bundle: PathBuf,
    pub(crate) options: Options,
    pub(crate) runc: Runc,
    pub(crate) rootfs: Rootfs,
    /// Other processes survive the first one.
    pub(crate) shares_pid_namespace: bool,
    pub(crate) init: Process,
    pub(crate) checkpoint: Option<CheckpointSource>,
    /// Its place in a pod, where its state outlives it; see [`crate::managed`].
    pub(crate) pod: Option<PodContainer>,
    /// Volumes whose content moves with it; see [`crate::volumes`].
    pub(crate) volumes: BTreeMap<String, PathBuf>,
    pub(crate) arrival: Option<Arc<Arrival>>,
    pub(crate) operation: tokio::sync::Mutex<()>,
    /// Processes that were added and run.
    pub(crate) running_execs: watch::Sender<usize>,
    view: Mutex<View>,
}

/// What [`Container::new`] is made of.
#[derive(Debug)]
pub(crate) struct Parts {
    pub(crate) context: Arc<Context>,
    pub(crate) id: String,
    pub(crate) bundle: PathBuf,
    pub(crate) options: Options,
    pub(crate) rootfs: Rootfs,
    pub(crate) shares_pid_namespace: bool,
    pub(crate) stdio: StdioSpec,
    pub(crate) state: State,
    pub(crate) checkpoint: Option<CheckpointSource>,
    pub(crate) pod: Option<PodContainer>,
    pub(crate) volumes: BTreeMap<String, PathBuf>,
    pub(crate) arrival: Option<Arc<Arrival>>,
}

impl Container {
    /// A container of which nothing runs yet.
    pub(crate) fn new(parts: Parts) -> Self {
        Self {
            runc: Runc::new(
                &parts.options,
                &parts.context.namespace,
                &parts.id,
                &parts.bundle,
                Arc::clone(&parts.context.reaper),
            ),
            context: parts.context,
            init: Process::new(parts.id.clone(), parts.stdio),
            id: parts.id,
            bundle: parts.bundle,
            options: parts.options,
            rootfs: parts.rootfs,
            shares_pid_namespace: parts.shares_pid_namespace,
            checkpoint: parts.checkpoint,
            pod: parts.pod,
            volumes: parts.volumes,
            arrival: parts.arrival,
            operation: tokio::sync::Mutex::default(),
            running_execs: watch::Sender::new(0),
            view: Mutex::new(View {
                state: parts.state,
                pausing: false,
                activity: Activity::Idle,
                execs: HashMap::new(),
                init_ended: false,
                cgroup: None,
                oom: None,
            }),
        }
    }

    /// The changing part; never to be held across an await.
    pub(crate) fn view(&self) -> MutexGuard<'_, View> {
        self.view.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Where runc writes the first process's pid.
    pub(crate) fn pid_file(&self) -> PathBuf {
        self.bundle.join("init.pid")
    }

    /// For the streams of its processes.
    pub(crate) fn io_owner(&self) -> Owner<'_> {
        let (uid, gid) = self.options.io_owner();
        Owner {
            namespace: &self.context.namespace,
            id: &self.id,
            uid,
            gid,
            reaper: &self.context.reaper,
        }
    }

    /// Whether `verb` may be tried now.
    pub(crate) fn check(&self, verb: Verb) -> Result<()> {
        let view = self.view();
        if view.activity.forbids(verb) {
            return Err(Error::Migrating(self.id.clone()));
        }
        Ok(view.state.check(verb)?)
    }

    /// Changes the state, unless the end came in between.
    pub(crate) fn enter(&self, state: State) {
        {
            let mut view = self.view();
            if view.state == State::Stopped {
                return;
            }
            view.state = state;
        }
        self.publish_record();
    }

    /// Changes the activity.
    pub(crate) fn set_activity(&self, activity: Activity) {
        self.view().activity = activity;
        self.publish_record();
    }

    /// Tells the other processes of this node.
    pub(crate) fn publish_record(&self) {
        let record = ContainerRecord {
            namespace: self.context.namespace.clone(),
            id: self.id.clone(),
            bundle: self.bundle.clone(),
            shim_pid: std::process::id(),
            shim_socket: self.context.socket.clone(),
            pid: self.init.pid(),
            state: self.run_state(),
        };
        if let Err(error) = record.write(&self.context.run_dir) {
            tracing::warn!(error = crate::error::chain(&error), "no record");
        }
    }

    /// Takes the record away.
    pub(crate) fn remove_record(&self) {
        let removed =
            ContainerRecord::remove(&self.context.run_dir, &self.context.namespace, &self.id);
        if let Err(error) = removed {
            tracing::warn!(error = crate::error::chain(&error), "a record is left");
        }
    }

    fn run_state(&self) -> RunState {
        let view = self.view();
        match (view.state, view.activity) {
            (State::Stopped, _) => RunState::Stopped,
            (_, Activity::Checkpointing) => RunState::Checkpointing,
            (_, Activity::Sending | Activity::Committed) => RunState::Sending,
            (_, Activity::Undecided) => RunState::Undecided,
            (_, Activity::Settling) => RunState::Settling,
            (State::Created | State::CreatedCheckpoint, Activity::Idle) => RunState::Created,
            (State::Receiving, Activity::Idle) => RunState::Receiving,
            (State::Running, Activity::Idle) => RunState::Running,
            (State::Paused, Activity::Idle) => RunState::Paused,
        }
    }

    /// What an engine must know about it.
    pub(crate) fn facts(&self) -> ContainerFacts {
        ContainerFacts {
            namespace: self.context.namespace.clone(),
            id: self.id.clone(),
            bundle: self.bundle.clone(),
            rootfs: self.rootfs.path.clone(),
            runc_root: self.runc.root().to_owned(),
            runc: self.runc.program().to_owned(),
            upperdir: crate::rootfs::upperdir(&self.rootfs.mounts),
            volumes: self.volumes().collect(),
        }
    }

    fn volumes(&self) -> impl Iterator<Item = Volume> {
        let brought = self.context.brought();
        self.volumes.iter().map(move |(name, path)| Volume {
            name: name.clone(),
            path: path.clone(),
            brought: brought.contains(name),
        })
    }

    /// It has arrived, and with it what is in its volumes.
    pub(crate) fn brought_volumes(&self) {
        self.context.brought().extend(self.volumes.keys().cloned());
    }

    /// Its first process is there: remembers it and sees to its end.
    pub(crate) fn init_appeared(self: &Arc<Self>, pid: u32, exit: ExitReceiver) {
        self.init.set_pid(pid);
        match Cgroup::of(pid) {
            Ok(cgroup) => {
                let cgroup = Arc::new(cgroup);
                let oom = OomWatch::start(self, &cgroup);
                let mut view = self.view();
                view.cgroup = Some(cgroup);
                view.oom = oom;
            }
            // It may be gone already.
            Err(error) => tracing::warn!(%error, pid, "no control group"),
        }
        let container = Arc::clone(self);
        tokio::spawn(async move {
            if let Ok(exit) = exit.await {
                container.init_ended(exit).await;
            }
        });
    }

    /// The first process was reaped. Its exit is the container's last event:
    /// clients stop listening after it.
    async fn init_ended(self: Arc<Self>, exit: Exit) {
        let was_paused = {
            let mut view = self.view();
            view.init_ended = true;
            view.state == State::Paused
        };
        if self.shares_pid_namespace
            && let Err(error) = self.runc.kill(libc::SIGKILL.unsigned_abs(), true).await
        {
            tracing::debug!(error = crate::error::chain(&error), "nothing left to kill");
        }
        if was_paused && let Err(error) = self.runc.resume().await {
            // Its other processes could otherwise never end.
            tracing::debug!(error = crate::error::chain(&error), "not resumed");
        }
        let mut execs = self.running_execs.subscribe();
        // An error would mean that the sender is gone, which `self` holds.
        drop(execs.wait_for(|running| *running == 0).await);
        // Whoever brings it into being publishes that first.
        let _gate = self.init.gate.lock().await;
        let oom = self.view().oom.take();
        if let Some(oom) = oom
            && oom.stop().await
        {
            self.publish_oom();
        }
        {
            let mut view = self.view();
            view.state = State::Stopped;
            view.activity = Activity::Idle;
        }
        self.publish_record();
        self.publish_exit(&self.init, exit);
    }

    /// Announces the end of one of its processes and wakes who waits for it.
    pub(crate) fn publish_exit(&self, process: &Process, exit: Exit) {
        process.set_exit(exit);
        self.context.publisher.publish(&TaskExit {
            container_id: self.id.clone(),
            id: process.id.clone(),
            pid: process.pid(),
            exit_status: exit.status,
            exited_at: MessageField::some(timestamp(exit.at)),
            ..Default::default()
        });
    }

    /// Announces that the kernel killed one of its processes for memory.
    pub(crate) fn publish_oom(&self) {
        self.context.publisher.publish(&TaskOOM {
            container_id: self.id.clone(),
            ..Default::default()
        });
    }

    /// An added process.
    pub(crate) fn exec(&self, exec_id: &str) -> Result<Arc<Exec>> {
        self.view()
            .execs
            .get(exec_id)
            .cloned()
            .ok_or_else(|| Error::NoProcess(exec_id.to_owned()))
    }

    /// Mounts the root file system; undone if it fails half-way.
    pub(crate) async fn mount_rootfs(&self) -> Result<()> {
        if self.rootfs.mounts.is_empty() {
            return Ok(());
        }
        let rootfs = self.rootfs.clone();
        let mounted = tokio::task::spawn_blocking(move || {
            crate::rootfs::mount_all(&rootfs.mounts, &rootfs.path)
        })
        .await
        .map_err(Error::Interrupted)?;
        if mounted.is_err()
            && let Err(error) = self.unmount_rootfs().await
        {
            tracing::warn!(error = error.chain(), "mounts are left");
        }
        mounted
    }

    /// Unmounts what [`mount_rootfs`](Self::mount_rootfs) mounted.
    pub(crate) async fn unmount_rootfs(&self) -> Result<()> {
        if self.rootfs.mounts.is_empty() {
            return Ok(());
        }
        let path = self.rootfs.path.clone();
        tokio::task::spawn_blocking(move || {
            crate::rootfs::unmount(&path).map_err(Error::io("unmount", &path))
        })
        .await
        .map_err(Error::Interrupted)?
    }

    /// Lets go what was made for a container that did not come into being; runc
    /// cleans up after itself.
    pub(crate) async fn discard(&self) {
        self.init.abort_io().await;
        if let Err(error) = self.unmount_rootfs().await {
            tracing::warn!(error = error.chain(), "mounts are left");
        }
    }

    /// Has runc end and forget the container.
    pub(crate) async fn discard_in_runc(&self) {
        if let Err(error) = self.runc.delete(true).await
            && !error.is_missing()
        {
            tracing::warn!(error = crate::error::chain(&error), "runc keeps something");
        }
    }
}
