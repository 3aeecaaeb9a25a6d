//! A container that arrives from another node.
//!
//! `Create` starts the engine and returns when that listens. `Start` waits for
//! the arrival. One task, begun in `Create`, follows the engine:
//!
//! ```text
//!   listening --PrepareRestore--> restoring --Restored--> restored --Running--> settling --Settled--> done
//!       |                             |                      |                     |
//!       +------- Failed, engine gone, Kill, Delete ----------+                     +-- engine gone:
//!                undone; Start answers why                                             killed
//! ```
//!
//! runc and CRIU are started long before there is anything to restore, and wait
//! for the engine. The root file system is mounted when its writable layer is
//! complete (`FilesComplete`); what runc prepares before, it prepares on a
//! [stand-in](crate::standin).
//!
//! While memory settles the engine answers page faults. If it dies, the kernel
//! would resolve the rest of them with zeros, unless somebody holds duplicates
//! of the userfaultfds: this task does (the guards), kills every process, and
//! only then lets go. A container that read zeros for its data never runs on.
//!
//! Whatever was called off is fenced when nothing of it is left
//! (`migrate::arrival`), so that the source can have its container back even if
//! the engine is not there to say so.

use std::fs;
use std::os::fd::OwnedFd;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use migrate::arrival::ArrivalState;
use nodeapi::{FromEngine, Incoming, ReceiveJob, RestoreFlags, RestoreOrder, ToEngine, Volume};
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

use crate::bundle::Spec;
use crate::container::Container;
use crate::engine_link::Engine;
use crate::error::{Error, Result};
use crate::hostname;
use crate::reaper::Exit;
use crate::restore::{self, Restore};
use crate::runc::RestoreArgs;
use crate::standin::Standin;
use crate::state::{Activity, State};
use crate::volumes;

/// runc's annotation for a file of CRIU options, in place of /etc/criu/runc.conf.
const CRIU_CONFIG: &str = "org.criu.config";
/// That file, where nothing else is said.
const CRIU_DEFAULT: &str = "/etc/criu/runc.conf";
/// How long an engine may take to say why it gave up, once CRIU has noticed.
const LAST_WORD: Duration = Duration::from_millis(200);

/// How the arrival of a container is waited for and called off.
#[derive(Debug)]
pub(crate) struct Arrival {
    start_wanted: watch::Sender<bool>,
    outcome: watch::Sender<Option<std::result::Result<u32, String>>>,
    cancelled: CancellationToken,
    cancel_reason: watch::Sender<String>,
    ended: CancellationToken,
}

impl Arrival {
    /// Nothing has happened yet.
    pub(crate) fn new() -> Self {
        Self {
            start_wanted: watch::Sender::new(false),
            outcome: watch::Sender::new(None),
            cancelled: CancellationToken::new(),
            cancel_reason: watch::Sender::new(String::new()),
            ended: CancellationToken::new(),
        }
    }

    /// Serves `Start`: answers the pid when the container runs.
    pub(crate) async fn start(&self, id: &str) -> Result<u32> {
        self.start_wanted.send_replace(true);
        let mut outcome = self.outcome.subscribe();
        let outcome = outcome
            .wait_for(Option::is_some)
            .await
            .map(|outcome| outcome.clone());
        match outcome {
            Ok(Some(Ok(pid))) => Ok(pid),
            Ok(Some(Err(reason))) => Err(Error::NotReceived {
                id: id.to_owned(),
                reason,
            }),
            // The sender lives in `self`.
            Ok(None) | Err(_) => Err(Error::NoContainer),
        }
    }

    /// Calls it off, if it has not happened.
    pub(crate) fn cancel(&self, reason: &str) {
        self.cancel_reason.send_if_modified(|known| {
            let first = known.is_empty();
            if first {
                *known = reason.to_owned();
            }
            first
        });
        self.cancelled.cancel();
    }

    /// Waits until what was called off is cleaned up.
    pub(crate) async fn ended(&self) {
        self.ended.cancelled().await;
    }

    fn cancel_reason(&self) -> String {
        self.cancel_reason.borrow().clone()
    }
}

/// Serves `Create` for a container that is expected.
pub(crate) async fn prepare(
    container: &Arc<Container>,
    incoming: Incoming,
    spec: &Spec,
) -> Result<()> {
    // Others share it: it keeps its name.
    let hostname = spec.joined_uts().map(hostname::of_namespace).transpose()?;
    let traces = Traces {
        staging: container.context.run_dir.staging(&incoming.migration_id),
        ticket_socket: container.context.run_dir.ticket_socket(&incoming.ticket.id),
        volumes: container
            .volumes
            .values()
            .map(|volume| volume.join(Volume::staging_name(&container.id)))
            .collect(),
    };
    let ticket_id = incoming.ticket.id.clone();
    let job = ToEngine::Receive(Box::new(ReceiveJob {
        incoming,
        container: container.facts(),
        hostname,
    }));
    let Some(arrival) = container.arrival.clone() else {
        return Err(Error::Engine {
            what: "is wanted for a container that is not expected".to_owned(),
        });
    };
    let engine = match Engine::start(&container.context, &job).await {
        Ok(engine) => engine,
        Err(error) => {
            // Nothing was restored, and nothing will be.
            fence(container, &ticket_id);
            traces.remove();
            return Err(error);
        }
    };
    let receiver = Receiver {
        container: Arc::clone(container),
        arrival,
        ticket_id,
        engine,
        guards: Vec::new(),
    };
    container.context.last_work.spawn(async move {
        receiver.run().await;
        traces.remove();
    });
    Ok(())
}

/// What an engine leaves that could not clean up.
struct Traces {
    staging: PathBuf,
    ticket_socket: PathBuf,
    volumes: Vec<PathBuf>,
}

impl Traces {
    fn remove(&self) {
        for removed in [
            fs::remove_dir_all(&self.staging),
            fs::remove_file(&self.ticket_socket),
        ] {
            if let Err(error) = removed
                && error.kind() != std::io::ErrorKind::NotFound
            {
                tracing::warn!(%error, "files of a migration are left");
            }
        }
        for staging in &self.volumes {
            volumes::remove(staging);
        }
    }
}

struct Receiver {
    container: Arc<Container>,
    arrival: Arc<Arrival>,
    ticket_id: String,
    engine: Engine,
    /// See the module's documentation.
    guards: Vec<OwnedFd>,
}

/// Why the container does not arrive.
#[derive(Debug)]
struct GivenUp {
    reason: String,
    /// The engine knows it, or is gone.
    engine_knows: bool,
}

type Step<T> = std::result::Result<T, GivenUp>;

/// What went wrong in this process.
fn own(error: Error) -> GivenUp {
    GivenUp {
        reason: error.chain(),
        engine_knows: false,
    }
}

impl Receiver {
    async fn run(mut self) {
        // Create holds the gate until it has announced the container; then it
        // is ours until its start is announced.
        let gate = Arc::clone(&self.container.init.gate).lock_owned().await;
        match self.arrive().await {
            Ok(pid) => {
                let container = Arc::clone(&self.container);
                container.enter(State::Running);
                container.brought_volumes();
                container.set_activity(Activity::Settling);
                container.publish_start();
                drop(gate);
                self.arrival.outcome.send_replace(Some(Ok(pid)));
                let arrival = Arc::clone(&self.arrival);
                self.settle().await;
                arrival.ended.cancel();
            }
            Err(given_up) => {
                tracing::warn!(
                    id = self.container.id,
                    reason = given_up.reason,
                    "did not arrive"
                );
                let reason = given_up.reason.clone();
                let (arrival, container) = (Arc::clone(&self.arrival), Arc::clone(&self.container));
                self.undo(given_up).await;
                drop(gate);
                if container.init.pid() == 0 {
                    // Nobody else will say that it is over.
                    container.enter(State::Stopped);
                    container.init.set_exit(Exit::assumed(255));
                }
                arrival.outcome.send_replace(Some(Err(reason)));
                arrival.ended.cancel();
            }
        }
    }

    async fn arrive(&mut self) -> Step<u32> {
        let order = loop {
            if let FromEngine::PrepareRestore(order) = self.next().await? {
                break order;
            }
        };
        self.start_wanted().await?;
        let pid = match self.restore(&order).await {
            Ok(pid) => pid,
            Err(given_up) => return Err(self.restore_failed(given_up).await),
        };
        self.engine
            .send(&ToEngine::Restored { pid })
            .await
            .map_err(|error| GivenUp {
                reason: error.chain(),
                engine_knows: true,
            })?;
        let given_up = loop {
            match self.next().await {
                Ok(FromEngine::Running) => return Ok(pid),
                Ok(FromEngine::AbandonRestore { reason }) => {
                    break GivenUp {
                        reason,
                        engine_knows: false,
                    };
                }
                Ok(_) => {}
                Err(given_up) => break given_up,
            }
        };
        kill_all(&self.container).await;
        Err(self.restore_failed(given_up).await)
    }

    /// Nothing of a restore is left: the engine is told, if it waits for that.
    async fn restore_failed(&self, given_up: GivenUp) -> GivenUp {
        if !given_up.engine_knows {
            let told = ToEngine::RestoreFailed {
                reason: given_up.reason.clone(),
            };
            // One that is gone needs not be told.
            drop(self.engine.send(&told).await);
        }
        given_up
    }

    /// The next message; guards are put away. Fails when the engine failed, is
    /// gone, or the arrival was called off.
    async fn next(&mut self) -> Step<FromEngine> {
        let message = tokio::select! {
            () = self.arrival.cancelled.cancelled() => {
                return Err(GivenUp {
                    reason: self.arrival.cancel_reason(),
                    engine_knows: false,
                });
            }
            () = self.container.context.shutdown.cancelled() => {
                return Err(GivenUp {
                    reason: "the shim ends".to_owned(),
                    engine_knows: false,
                });
            }
            message = self.engine.next() => message,
        };
        match message {
            Some((FromEngine::Failed { reason }, _)) => Err(GivenUp {
                reason,
                engine_knows: true,
            }),
            Some((message, fds)) => {
                self.guards.extend(fds);
                Ok(message)
            }
            None => Err(GivenUp {
                reason: format!(
                    "the migration engine is gone, {}",
                    self.engine.how_it_ended().await
                ),
                engine_knows: true,
            }),
        }
    }

    /// Without a client that wants it to run, it does not.
    async fn start_wanted(&mut self) -> Step<()> {
        let mut wanted = self.arrival.start_wanted.subscribe();
        loop {
            tokio::select! {
                _ = wanted.wait_for(|wanted| *wanted) => return Ok(()),
                message = self.next() => { message?; }
            }
        }
    }

    /// Has runc restore the container, and gives up with the engine.
    async fn restore(&mut self, order: &RestoreOrder) -> Step<u32> {
        let container = Arc::clone(&self.container);
        let standin = Standin::mount(&container, &order.work_dir)
            .await
            .map_err(own)?;
        write_criu_config(&container, order.flags).map_err(own)?;
        let mut restore = Restore::begin(&container, &restore_args(order), &order.images)
            .await
            .map_err(own)?;
        let finished = loop {
            tokio::select! {
                finished = restore.finish() => break finished,
                message = self.next() => {
                    let given_up = match message {
                        Ok(FromEngine::FilesComplete) => {
                            restore.note_cgroup();
                            match self.mount_root(&standin).await {
                                Ok(()) => continue,
                                Err(given_up) => given_up,
                            }
                        }
                        // The engine waits for the word that nothing is left.
                        Ok(FromEngine::AbandonRestore { reason }) => GivenUp {
                            reason,
                            engine_knows: false,
                        },
                        Ok(_) => {
                            restore.note_cgroup();
                            continue;
                        }
                        Err(given_up) => given_up,
                    };
                    restore.abandon().await;
                    return Err(given_up);
                }
            }
        };
        match finished {
            Ok(pid) => {
                standin.remove().await;
                Ok(pid)
            }
            Err(error) => {
                let reason = restore::explain(&error, &order.work_dir);
                restore.abandon().await;
                // CRIU ends when the engine gives up, which then says why.
                if let Ok(Err(given_up)) = tokio::time::timeout(LAST_WORD, self.next()).await {
                    return Err(given_up);
                }
                Err(GivenUp {
                    reason,
                    engine_knows: false,
                })
            }
        }
    }

    /// Mounts the files that have arrived, and says so.
    async fn mount_root(&self, standin: &Standin) -> Step<()> {
        standin.replace().await.map_err(own)?;
        let mounted = self.engine.send(&ToEngine::RootMounted).await;
        mounted.map_err(|error| GivenUp {
            reason: error.chain(),
            engine_knows: true,
        })
    }

    /// Takes everything back that was done for a container that did not arrive.
    async fn undo(self, given_up: GivenUp) {
        let Self {
            container,
            ticket_id,
            engine,
            guards,
            ..
        } = self;
        if container.init.pid() != 0 {
            kill_all(&container).await;
            container.discard_in_runc().await;
        }
        // Not before the processes are gone.
        drop(guards);
        fence(&container, &ticket_id);
        if given_up.engine_knows {
            let context = Arc::clone(&container.context);
            container
                .context
                .last_work
                .spawn(async move { engine.see_off(&context).await });
        } else {
            engine.stop(&given_up.reason).await;
        }
        container.discard().await;
    }

    /// Holds the guards until all memory is in place.
    async fn settle(mut self) {
        let id = self.container.id.clone();
        loop {
            let message = tokio::select! {
                message = self.engine.next() => message,
                // With this process go engine and guards.
                () = self.container.context.shutdown.cancelled() => None,
            };
            match message {
                Some((FromEngine::Settled, _)) => {
                    drop(std::mem::take(&mut self.guards));
                    let settled = {
                        let mut view = self.container.view();
                        let settled = view.activity == Activity::Settling;
                        if settled {
                            view.activity = Activity::Idle;
                        }
                        settled
                    };
                    if settled {
                        self.container.publish_record();
                    }
                    tracing::info!(id, "settled");
                    self.engine.see_off(&self.container.context).await;
                    return;
                }
                Some((_, fds)) => self.guards.extend(fds),
                None => break,
            }
        }
        tracing::error!(
            id,
            "nobody is left to serve its memory: the container is killed"
        );
        kill_all(&self.container).await;
        drop(self.guards);
    }
}

/// Kills every process of a container; returns when they are gone.
async fn kill_all(container: &Container) {
    let cgroup = container.view().cgroup.clone();
    if let Some(cgroup) = cgroup {
        return cgroup.kill_for_good().await;
    }
    // It had ended, or almost, before its control group was looked at.
    let pid = container.init.pid();
    while pid != 0 && !container.view().init_ended {
        if let Err(error) = sys::signal::send(pid.cast_signed(), libc::SIGKILL) {
            tracing::debug!(%error, pid, "not killed");
        }
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}

/// No process of the container is left here, and none can come into being any
/// more: whoever asks is told so, unless one has run.
fn fence(container: &Container, ticket_id: &str) {
    let dir = &container.context.run_dir;
    match nodeapi::arrival::decide(dir, ticket_id, ArrivalState::Fenced) {
        Ok(Some(state)) => tracing::info!(id = container.id, ?state, "arrival decided"),
        // Its engine had not begun.
        Ok(None) => {}
        // sternad tries again when it removes what was prepared.
        Err(error) => tracing::error!(error = crate::error::chain(&error), "no fence"),
    }
}

fn restore_args(order: &RestoreOrder) -> RestoreArgs {
    let mut flags = restore::flags(order.flags);
    if order.lazy_pages {
        flags.push("--lazy-pages");
    }
    RestoreArgs {
        images: order.images.clone(),
        work_dir: order.work_dir.clone(),
        parent: None,
        programs: order.programs.clone(),
        flags,
    }
}

/// Writes CRIU's options for which runc has no flag. What the operator wrote
/// for this container or this node stays in force.
fn write_criu_config(container: &Container, flags: RestoreFlags) -> Result<()> {
    let mut spec = Spec::read(&container.bundle)?;
    let path = container.bundle.join("sterna-criu.conf");
    let own = path.display().to_string();
    let before = match spec.annotation(CRIU_CONFIG) {
        Some(named) if named != own => PathBuf::from(named),
        _ => PathBuf::from(CRIU_DEFAULT),
    };
    let mut text = fs::read_to_string(&before).unwrap_or_default();
    if !text.is_empty() && !text.ends_with('\n') {
        text.push('\n');
    }
    // CRIU's more talkative levels cost as much time as the restore itself.
    text.push_str("verbosity 1\n");
    if flags.tcp_close {
        text.push_str("tcp-close\n");
    }
    fs::write(&path, text).map_err(Error::io("write", &path))?;
    spec.set_annotation(CRIU_CONFIG, &own)
}
