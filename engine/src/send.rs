//! The sending process: tracks and copies the container's memory while it runs,
//! freezes it, lets CRIU dump the rest, commits, and ends it when it runs
//! elsewhere.
//!
//! [`Sender::until_prepared`] holds the order of phases before the commit. Every
//! failure there, and every reason to stop, leaves through one place,
//! [`Sender::unwind`], whose contract is: whatever was done, afterwards the
//! container runs as if nothing had happened. [`Sender::commit`] is the point
//! after which this process never lets it run again by itself. Where an engine
//! died, the next one begins in [`Sender::recover`].

mod commit;
mod copier;
mod freeze;
mod precopy;
mod recover;

use std::fs;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use criu::SeccompFilters;
use migrate::Phase;
use migrate::source::{self, Event, State};
use nodeapi::{FromEngine, Outcome, RunDir, SendJob, ToEngine};
use proto::engine::{Finished, Summary};
use proto::migration as pb;
use proto::migration::source_message::Message as ToDestination;
use tokio::sync::mpsc;

use self::commit::Uncommitted;
use self::copier::Copier;
use crate::container::{Container, Frozen};
use crate::dump::Dump;
use crate::ipc::ToShim;
use crate::progress::Log;
use crate::send_error::SendError;
use crate::session::Session;
use crate::tmpfs::Programs;

/// Page streams, each a TCP connection. One HTTP/2 connection carries about
/// 1 GB/s of pages; cloud networks cap a single flow at 5 Gbit/s.
const PAGE_STREAMS: u32 = 2;
/// How long a destination may take to say why its streams broke.
const LAST_WORD: Duration = Duration::from_millis(200);

/// Sends one container; the process ends with this.
pub(crate) async fn run(
    job: SendJob,
    shim: ToShim,
    messages: mpsc::UnboundedReceiver<ToEngine>,
) -> Result<(), SendError> {
    serve(job, shim, async |sender| sender.run(messages).await).await
}

/// Brings to its end what an engine with this job had begun; the process ends with
/// this. An error without a last word to the shim means that nothing was decided:
/// another engine has to try.
pub(crate) async fn recover(job: SendJob, shim: ToShim) -> Result<(), SendError> {
    let dir = RunDir::default();
    let record = nodeapi::commit::read(&dir, &job.migration_id).map_err(SendError::Record)?;
    // Of the engine that died.
    drop(fs::remove_file(dir.engine_socket(&job.migration_id)));
    serve(job, shim, async |sender| sender.recover(record).await).await
}

/// Has a sender work, and tells everybody how that ended.
async fn serve(
    job: SendJob,
    shim: ToShim,
    work: impl AsyncFnOnce(&mut Sender) -> Result<Summary, SendError>,
) -> Result<(), SendError> {
    let dir = RunDir::default();
    let log = Log::new();
    let socket = dir.engine_socket(&job.migration_id);
    if let Some(parent) = socket.parent() {
        make_dir(parent)?;
    }
    let server = log.serve(&socket).map_err(|source| SendError::File {
        action: "listen on",
        path: socket.clone(),
        source,
    })?;
    shim.send(&FromEngine::Listening)
        .map_err(|_| SendError::ShimGone)?;

    let mut sender = Sender::new(job, &dir, shim.clone(), log.clone());
    let outcome = work(&mut sender).await;
    let (finished, last_word) = match &outcome {
        Ok(summary) => (
            Finished {
                outcome: "migrated".into(),
                summary: sender.knows_figures.then(|| summary.clone()),
                ..Finished::default()
            },
            Outcome::Migrated,
        ),
        Err(error) => {
            let reason = crate::error_chain(error);
            (
                Finished {
                    outcome: error.outcome().into(),
                    phase: match error {
                        // The one who knew is dead; sternad may know.
                        SendError::EngineDied => String::new(),
                        _ => sender.phase.name().into(),
                    },
                    side: error.side().into(),
                    reason: reason.clone(),
                    summary: sender.knows_figures.then(|| sender.summary()),
                },
                Outcome::Stayed { reason },
            )
        }
    };
    if let Err(error) = nodeapi::commit::remove(&dir, &sender.job.migration_id) {
        tracing::error!(
            error = crate::error_chain(&error),
            "the commit record is left"
        );
    }
    drop(fs::remove_dir_all(&sender.work));
    // Of an engine that died: it could not remove its own.
    drop(fs::remove_dir_all(sender.programs_directory()));
    // The shim first: whoever hears `finished` may ask it for the container.
    let told = shim.send(&FromEngine::Sent(last_word));
    log.finish(finished);
    log.last_word_heard().await;
    server.end().await;
    drop(fs::remove_file(&socket));
    told.map_err(|_| SendError::ShimGone)?;
    outcome.map(drop)
}

fn make_dir(path: &Path) -> Result<(), SendError> {
    use std::os::unix::fs::DirBuilderExt;
    fs::DirBuilder::new()
        .recursive(true)
        .mode(0o700)
        .create(path)
        .map_err(|source| SendError::File {
            action: "create",
            path: path.to_owned(),
            source,
        })
}

/// What a migration is judged by.
#[derive(Debug, Default)]
struct Figures {
    tracked: bool,
    laps: u32,
    memory_bytes: u64,
    sent_bytes: u64,
    layer_bytes: u64,
    image_bytes: u64,
    final_pages: u64,
    claim: Duration,
    final_lap: Duration,
    dump: Duration,
    images: Duration,
    prepare_us: u64,
    let_go_us: u64,
    restore_us: u64,
    frozen_at: Option<Instant>,
    freeze: Duration,
    blackout: Duration,
}

struct Sender {
    job: SendJob,
    dir: RunDir,
    work: PathBuf,
    shim: ToShim,
    log: Log,
    state: State,
    phase: Phase,
    begun: Instant,
    copier: Option<Copier>,
    session: Option<Session>,
    dump: Option<Dump>,
    programs: Option<Programs>,
    seccomp: SeccompFilters,
    frozen: Option<Frozen>,
    /// The shim was told that the destination does not answer.
    undecided: bool,
    /// False in an engine that follows a dead one, which took them along.
    knows_figures: bool,
    figures: Figures,
}

impl Sender {
    fn new(job: SendJob, dir: &RunDir, shim: ToShim, log: Log) -> Self {
        let tracked = match pages::self_test() {
            Ok(()) => true,
            Err(unsupported) => {
                tracing::warn!(reason = crate::error_chain(&unsupported), "stop and copy");
                false
            }
        };
        Self {
            work: dir.staging(&job.migration_id),
            dir: dir.clone(),
            job,
            shim,
            log,
            state: State::START,
            phase: Phase::Negotiate,
            begun: Instant::now(),
            copier: None,
            session: None,
            dump: None,
            programs: None,
            seccomp: SeccompFilters::default(),
            frozen: None,
            undecided: false,
            knows_figures: true,
            figures: Figures {
                tracked,
                ..Figures::default()
            },
        }
    }

    async fn run(
        &mut self,
        mut messages: mpsc::UnboundedReceiver<ToEngine>,
    ) -> Result<Summary, SendError> {
        let stop = Stop {
            log: self.log.clone(),
            deadline: self.job.deadline_ms.map(Duration::from_millis),
        };
        let prepared = tokio::select! {
            prepared = self.until_prepared() => prepared,
            error = stop.asked(&mut messages) => Err(error),
        };
        if let Err(error) = prepared {
            let error = self.explain(error).await;
            self.unwind(&error).await;
            return Err(error);
        }
        match self.commit().await {
            Ok(record) => self.resume(record).await,
            Err(Uncommitted(error)) => {
                self.unwind(&error).await;
                Err(error)
            }
        }
    }

    /// What the destination says of a failure tells more than how it shows here.
    async fn explain(&mut self, error: SendError) -> SendError {
        if error.event() != Event::PeerLost {
            return error;
        }
        let Some(session) = &mut self.session else {
            return error;
        };
        match tokio::time::timeout(LAST_WORD, session.hear()).await {
            Ok(Err(said @ SendError::DestinationFailed { .. })) => said,
            _ => error,
        }
    }

    /// Moves the state machine. A transition that does not exist is our bug, and
    /// an error all the same: a panic would leave the container frozen.
    fn advance(&mut self, event: Event) -> Result<(), SendError> {
        let (state, action) = source::step(self.state, event)?;
        tracing::debug!(from = ?self.state, ?event, to = ?state, ?action, "source");
        self.state = state;
        Ok(())
    }

    /// Where CRIU finds our programs: beside the images, all of which travel.
    fn programs_directory(&self) -> PathBuf {
        self.work.with_extension("programs")
    }

    fn copier(&self) -> Result<&Copier, SendError> {
        self.copier.as_ref().ok_or(SendError::Worker)
    }

    fn session(&mut self) -> Result<&mut Session, SendError> {
        self.session.as_mut().ok_or(SendError::Worker)
    }

    fn enter(&mut self, phase: Phase) {
        self.phase = phase;
        self.log.phase(phase);
    }

    /// Everything up to the destination's word that it has it all.
    async fn until_prepared(&mut self) -> Result<(), SendError> {
        self.enter(Phase::Negotiate);
        let dialer = self.negotiate().await?;

        self.enter(Phase::Prepare);
        let container = Container::open(&self.job.container, self.job.init_pid)?;
        self.prepare(&dialer, &container).await?;

        self.enter(Phase::PreCopy);
        self.pre_copy(&container).await?;
        self.catch_up(&container).await?;

        self.enter(Phase::Freeze);
        // Without tracking all of its memory travels while it stands still.
        let frozen_bytes = match self.figures.tracked {
            true => 0,
            false => container.resident_bytes()?,
        };
        let limit = Phase::Freeze.timeout_with_bytes(frozen_bytes);
        tokio::time::timeout(limit, self.freeze(&dialer, &container))
            .await
            .unwrap_or(Err(SendError::Timeout {
                phase: Phase::Freeze,
                limit,
            }))
    }

    /// The one place where a migration is undone. Afterwards the container runs
    /// here as if nothing had happened. Steps never mask the first error.
    async fn unwind(&mut self, error: &SendError) {
        tracing::info!(error = crate::error_chain(error), state = ?self.state, "undoing");
        if !self.state.is_terminal() {
            // What a peer did out of turn has no row of its own.
            let stayed = self
                .advance(error.event())
                .or_else(|_| self.advance(Event::PeerLost));
            debug_assert!(
                stayed.is_ok(),
                "every state but the last survives the loss of its peer"
            );
        }
        if let Some(session) = self.session.take() {
            let abort = pb::Abort {
                reason: crate::error_chain(error),
            };
            // The destination may be the reason that we are here.
            drop(session.say(ToDestination::Abort(abort)).await);
        }
        // CRIU first: it cures the tasks while they are still frozen.
        if let Some(mut dump) = self.dump.take()
            && let Err(error) = dump.finish(false).await
        {
            tracing::debug!(%error, "the dump ended");
        }
        if let Some(frozen) = self.frozen.take() {
            frozen.thaw().await;
        }
        if let Some(network) = &self.job.network
            && let Err(error) = network::reattach(network).await
        {
            tracing::error!(%error, "cannot attach the container's address again");
        }
        if let Some(copier) = self.copier.take() {
            copier.disarm().await;
        }
    }

    fn summary(&self) -> Summary {
        let figures = &self.figures;
        Summary {
            migration_id: self.job.migration_id.clone(),
            tracking: if figures.tracked {
                "userfaultfd"
            } else {
                "none"
            }
            .into(),
            laps: figures.laps,
            memory_bytes: figures.memory_bytes,
            sent_bytes: figures.sent_bytes,
            layer_bytes: figures.layer_bytes,
            image_bytes: figures.image_bytes,
            final_pages: figures.final_pages,
            freeze_us: micros(figures.freeze),
            final_lap_us: micros(figures.final_lap),
            dump_us: micros(figures.dump),
            prepare_us: figures.prepare_us,
            restore_us: figures.restore_us,
            blackout_us: micros(figures.blackout),
            total_ms: millis(self.begun.elapsed()),
            claim_us: micros(figures.claim),
            images_us: micros(figures.images),
            let_go_us: figures.let_go_us,
        }
    }
}

/// What ends a migration before the commit although nothing failed.
struct Stop {
    log: Log,
    deadline: Option<Duration>,
}

impl Stop {
    async fn asked(self, messages: &mut mpsc::UnboundedReceiver<ToEngine>) -> SendError {
        let deadline = async {
            match self.deadline {
                Some(deadline) => {
                    tokio::time::sleep(deadline.saturating_sub(self.log.elapsed())).await;
                    SendError::Deadline(deadline)
                }
                None => std::future::pending().await,
            }
        };
        tokio::select! {
            reason = self.log.cancelled() => SendError::Cancelled(reason),
            message = messages.recv() => match message {
                Some(ToEngine::Cancel { reason }) => SendError::Cancelled(reason),
                Some(_) => SendError::OutOfTurn("the shim"),
                None => SendError::ShimGone,
            },
            error = deadline => error,
        }
    }
}

fn millis(duration: Duration) -> u64 {
    u64::try_from(duration.as_millis()).unwrap_or(u64::MAX)
}

fn micros(duration: Duration) -> u64 {
    u64::try_from(duration.as_micros()).unwrap_or(u64::MAX)
}

async fn limited<T>(
    phase: Phase,
    work: impl Future<Output = Result<T, SendError>>,
) -> Result<T, SendError> {
    let limit = phase.timeout();
    tokio::time::timeout(limit, work)
        .await
        .unwrap_or(Err(SendError::Timeout { phase, limit }))
}
