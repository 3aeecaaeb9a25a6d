//! The sending process: tracks and copies the container's memory while it runs,
//! freezes it, lets CRIU dump the rest, commits, and ends it when it runs
//! elsewhere.
//!
//! [`Sender::until_prepared`] holds the order of phases before the commit. Every
//! failure there, and every reason to stop, leaves through one place,
//! [`Sender::unwind`], whose contract is: whatever was done, afterwards the
//! container runs as if nothing had happened. [`Sender::commit`] is the point
//! after which this process never lets it run again by itself.

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use criu::Action;
use migrate::Phase;
use migrate::commit::{CommitRecord, CommitState, Format};
use migrate::converge::{Budget, Convergence, Costs, Decision, LapSample};
use migrate::source::{self, Event, State};
use nodeapi::{FromEngine, Outcome, RunDir, SendJob, ToEngine};
use pages::{Claims, LapReport, Tracker};
use proto::engine::progress::Event as News;
use proto::engine::{Finished, Lap, Summary};
use proto::migration as pb;
use proto::migration::destination_message::Message as FromDestination;
use proto::migration::source_message::Message as ToDestination;
use tokio::sync::{Mutex, mpsc};

use crate::container::{Container, Frozen};
use crate::dump::{Dump, DumpFailure};
use crate::files::TreeSender;
use crate::ipc::ToShim;
use crate::link::Dialer;
use crate::progress::Log;
use crate::send_error::SendError;
use crate::session::Session;
use crate::streams::{PageStreams, SharedStreams};

/// Page streams, each a TCP connection. One HTTP/2 connection carries about
/// 1 GB/s of pages; cloud networks cap a single flow at 5 Gbit/s.
const PAGE_STREAMS: u32 = 2;

/// Sends one container; the process ends with this.
pub(crate) async fn run(
    job: SendJob,
    shim: ToShim,
    messages: mpsc::UnboundedReceiver<ToEngine>,
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

    let work = dir.staging(&job.migration_id);
    let record = dir.commit_record(&job.migration_id);
    let mut sender = Sender::new(job, &dir, shim.clone(), log.clone());
    let outcome = sender.run(messages).await;
    let (finished, last_word) = match &outcome {
        Ok(summary) => (
            Finished {
                outcome: "migrated".into(),
                summary: Some(summary.clone()),
                ..Finished::default()
            },
            Outcome::Migrated,
        ),
        Err(error) => {
            let reason = crate::error_chain(error);
            (
                Finished {
                    outcome: error.outcome().into(),
                    phase: sender.phase.name().into(),
                    side: error.side().into(),
                    reason: reason.clone(),
                    summary: Some(sender.summary()),
                },
                Outcome::Stayed { reason },
            )
        }
    };
    drop(fs::remove_file(&record));
    drop(fs::remove_dir_all(&work));
    // The shim first: whoever hears `finished` may ask it for the container.
    let told = shim.send(&FromEngine::Sent(last_word));
    log.finish(finished);
    log.last_word_heard().await;
    server.abort();
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
    final_lap: Duration,
    dump: Duration,
    prepare_us: u64,
    restore_us: u64,
    frozen_at: Option<Instant>,
    freeze: Duration,
    blackout: Duration,
}

struct Sender {
    job: SendJob,
    work: PathBuf,
    commit_record: PathBuf,
    shim: ToShim,
    log: Log,
    state: State,
    phase: Phase,
    begun: Instant,
    /// Tells a lap to end early.
    stop_lap: Arc<AtomicBool>,
    tracker: Option<Arc<std::sync::Mutex<Tracker>>>,
    streams: Option<SharedStreams>,
    session: Option<Session>,
    dump: Option<Dump>,
    frozen: Option<Frozen>,
    layer: Option<TreeSender>,
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
            commit_record: dir.commit_record(&job.migration_id),
            job,
            shim,
            log,
            state: State::START,
            phase: Phase::Negotiate,
            begun: Instant::now(),
            stop_lap: Arc::default(),
            tracker: None,
            streams: None,
            session: None,
            dump: None,
            frozen: None,
            layer: None,
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

    /// Moves the state machine. A transition that does not exist is our bug, and
    /// an error all the same: a panic would leave the container frozen.
    fn advance(&mut self, event: Event) -> Result<(), SendError> {
        let (state, action) = source::step(self.state, event)?;
        tracing::debug!(from = ?self.state, ?event, to = ?state, ?action, "source");
        self.state = state;
        Ok(())
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

    async fn negotiate(&mut self) -> Result<Dialer, SendError> {
        let dialer = Dialer::new(
            self.job.peer_address.clone(),
            &self.job.peer_node,
            &self.job.identity_dir,
            &self.job.ticket,
        )?;
        let mut session = limited(Phase::Negotiate, Session::open(&dialer)).await?;
        session
            .say(ToDestination::Hello(pb::Hello {
                protocol_versions: migrate::offer::PROTOCOL_VERSIONS.to_vec(),
                migration_id: self.job.migration_id.clone(),
                ticket_id: self.job.ticket.id.clone(),
                source_node: String::new(),
                page_streams: PAGE_STREAMS,
                precopy: self.figures.tracked,
            }))
            .await?;
        match limited(Phase::Negotiate, session.hear()).await? {
            FromDestination::Welcome(_) => {}
            _ => return Err(SendError::OutOfTurn("something before welcome")),
        }
        self.session = Some(session);
        self.advance(Event::Welcomed)?;
        Ok(dialer)
    }

    /// Lets the destination get ready, opens what the pre-copy needs, and
    /// starts CRIU as far as it goes without touching a task.
    async fn prepare(&mut self, dialer: &Dialer, container: &Container) -> Result<(), SendError> {
        make_dir(&self.work)?;
        let options = container.checkpoint_options(&self.work, self.job.network.is_some());
        let request = container.dump_request(&options)?;
        let descriptors = self.work.join("descriptors.json");
        let descriptors_json = fs::read(&descriptors).map_err(|source| SendError::File {
            action: "read",
            path: descriptors,
            source,
        })?;
        let session = self.session()?;
        session
            .say(ToDestination::PrepareSwitch(pb::PrepareSwitch {
                descriptors_json: descriptors_json.into(),
                restore: Some(pb::RestoreOptions {
                    tcp_established: options.open_tcp,
                    tcp_close: options.tcp_close,
                    file_locks: options.file_locks,
                    ext_unix_sk: options.external_unix_sockets,
                    shell_job: options.terminal,
                }),
            }))
            .await?;
        match limited(Phase::Prepare, session.hear()).await? {
            FromDestination::SwitchReady(_) => {}
            _ => return Err(SendError::OutOfTurn("something before switch-ready")),
        }
        let streams = limited(Phase::Prepare, async {
            Ok(PageStreams::open(dialer, PAGE_STREAMS).await?)
        })
        .await?;
        self.streams = Some(Arc::new(Mutex::new(streams)));
        if let Some(upperdir) = self.job.container.upperdir.clone() {
            let client = dialer.connect().await?;
            let layer = TreeSender::open(client, pb::FileTree::Layer, &upperdir).await?;
            self.layer = Some(layer);
        }
        let dump = self.dump.insert(Dump::spawn(request)?);
        limited(Phase::Prepare, async {
            Ok(dump.until(Action::PreDump).await?)
        })
        .await?;
        self.advance(Event::DestinationReady)?;
        Ok(())
    }

    /// Copies memory and files while the container runs, until a switch-over
    /// fits the budget.
    async fn pre_copy(&mut self, container: &Container) -> Result<(), SendError> {
        self.layer_pass(container, false).await?;
        if !self.figures.tracked {
            // The kernel cannot track writes: all memory goes in the freeze.
            return Ok(());
        }
        let budget = Budget {
            max_blackout: Duration::from_millis(self.job.max_blackout_ms),
            deadline: self.job.deadline_ms.map(Duration::from_millis),
        };
        let mut convergence = Convergence::new(budget, Costs::default());
        loop {
            let report = self.lap(container).await?;
            convergence.observe(sample(&report));
            self.log.push(News::Lap(Lap {
                number: report.number,
                pages: report.pages,
                zero_pages: report.zero_pages,
                bytes: report.bytes,
                duration_ms: millis(report.duration),
                expected_blackout_ms: millis(convergence.expected_blackout()),
            }));
            self.advance(Event::LapDone)?;
            match convergence.decide(self.log.elapsed()) {
                Decision::Lap => {}
                Decision::Switch => break,
                Decision::GiveUp(reason) => {
                    return Err(SendError::NoConvergence(reason.to_string()));
                }
            }
        }
        Ok(())
    }

    /// One pass over memory, until the destination has acknowledged it.
    async fn lap(&mut self, container: &Container) -> Result<LapReport, SendError> {
        let processes = container.processes()?;
        let stop = Arc::clone(&self.stop_lap);
        let begun = Instant::now();
        let mut report = self
            .with_tracker(move |tracker, streams| {
                tracker
                    .lap(&processes, streams, &stop)
                    .map_err(SendError::Track)
            })
            .await?;
        // Until it has arrived it does not count: this is how fast the link is.
        self.streams()?.lock().await.drain().await?;
        report.duration = begun.elapsed();
        self.figures.laps = report.number;
        if report.number == 1 {
            self.figures.memory_bytes = report.bytes;
        }
        Ok(report)
    }

    /// Runs one blocking operation of the tracker with the page streams.
    async fn with_tracker<T: Send + 'static>(
        &mut self,
        operation: impl FnOnce(&mut Tracker, &mut PageStreams) -> Result<T, SendError> + Send + 'static,
    ) -> Result<T, SendError> {
        let tracker = Arc::clone(self.tracker.get_or_insert_with(|| {
            let tracker = if self.figures.tracked {
                Tracker::new()
            } else {
                Tracker::untracked()
            };
            Arc::new(std::sync::Mutex::new(tracker))
        }));
        let mut streams = self.streams()?.lock_owned().await;
        let (streams, result) = tokio::task::spawn_blocking(move || {
            let mut tracker = tracker.lock().map_err(|_| SendError::Worker)?;
            let result = operation(&mut tracker, &mut streams);
            Ok::<_, SendError>((streams, result))
        })
        .await
        .map_err(|_| SendError::Worker)??;
        // A broken stream explains a sink that closed.
        match streams.failure() {
            Some(failure) => Err(failure.into()),
            None => result,
        }
    }

    fn streams(&self) -> Result<SharedStreams, SendError> {
        self.streams.clone().ok_or(SendError::Worker)
    }

    /// Copies the writable layer: everything first, then what changed.
    async fn layer_pass(&mut self, container: &Container, strict: bool) -> Result<(), SendError> {
        let Some(mut layer) = self.layer.take() else {
            return Ok(());
        };
        let processes = container.processes()?;
        let (layer, report) = tokio::task::spawn_blocking(move || {
            layer.suspect_mapped_by(&processes);
            let report = layer.pass(strict);
            (layer, report)
        })
        .await
        .map_err(|_| SendError::Worker)?;
        self.figures.layer_bytes = layer.bytes();
        self.layer = Some(layer);
        report?;
        Ok(())
    }

    /// The last steps before the freeze: files, then mappings, then memory, the
    /// fastest-changing last.
    async fn catch_up(&mut self, container: &Container) -> Result<(), SendError> {
        self.layer_pass(container, false).await?;
        if let Some(layer) = &mut self.layer {
            layer.flush().await?;
        }
        if self.figures.tracked {
            self.with_tracker(|tracker, _| {
                tracker.prepare_smaps();
                Ok(())
            })
            .await?;
            self.lap(container).await?;
        }
        Ok(())
    }

    fn session(&mut self) -> Result<&mut Session, SendError> {
        self.session.as_mut().ok_or(SendError::Worker)
    }

    /// Stops the container and sends what is left: last pages and files while
    /// CRIU dumps everything else, then CRIU's images, then the account.
    async fn freeze(&mut self, dialer: &Dialer, container: &Container) -> Result<(), SendError> {
        let images_client = dialer.connect().await?;
        self.session()?
            .say(ToDestination::Freezing(pb::Freezing {}))
            .await?;
        self.advance(Event::SwitchDecided)?;
        self.figures.frozen_at = Some(Instant::now());
        self.frozen = Some(container.freeze().await?);
        self.advance(Event::Frozen)?;

        let processes = container.processes()?;
        let claims = self
            .with_tracker(move |tracker, _| {
                tracker
                    .claim(&processes)
                    .map(Arc::new)
                    .map_err(SendError::Track)
            })
            .await?;
        let mut dump = self.dump.take().ok_or(SendError::Worker)?;
        dump.claim(Arc::clone(&claims));
        let frozen_at = Instant::now();
        dump.answer(true)?;
        let dumping = async {
            let dumped = dump.until(Action::PostDump).await;
            (dump, dumped, frozen_at.elapsed())
        };
        let copying = async {
            let report = self.final_lap(Arc::clone(&claims)).await;
            let layer = self.layer_pass(container, true).await;
            report.and_then(|report| layer.map(|()| report))
        };
        let (dumped, copied) = tokio::join!(dumping, copying);
        let (dump, dumped, dump_time) = dumped;
        self.dump = Some(dump);
        self.figures.dump = dump_time;
        let report = copied?;
        dumped?;
        self.figures.final_lap = report.duration;
        self.figures.final_pages = report.pages;

        let mut images = TreeSender::open(images_client, pb::FileTree::Images, &self.work).await?;
        let (images, sent) = tokio::task::spawn_blocking(move || {
            let sent = images.pass(true);
            (images, sent)
        })
        .await
        .map_err(|_| SendError::Worker)?;
        sent?;
        // Links that CRIU made for files that were unlinked but open.
        if self.work.join("remap-fpath.img").exists() {
            self.layer_pass(container, true).await?;
        }
        let mut images = images;
        images.flush_later().await?;
        if let Some(layer) = &mut self.layer {
            layer.flush_later().await?;
        }
        self.figures.image_bytes = images.bytes();
        let streams = self.streams()?;
        let streams = streams.lock().await;
        self.figures.sent_bytes = streams.bytes();
        let account = pb::Final {
            streams: streams.totals(),
            trees: [Some(&images), self.layer.as_ref()]
                .into_iter()
                .flatten()
                .map(TreeSender::total)
                .collect(),
            spaces: spaces(&claims),
        };
        drop(streams);
        let session = self.session.as_mut().ok_or(SendError::Worker)?;
        session.say(ToDestination::Final(account)).await?;
        self.advance(Event::FinalSent)?;
        let session = self.session()?;
        match session.hear().await? {
            FromDestination::Prepared(prepared) => {
                tracing::info!(
                    pages = prepared.staged_pages,
                    "the destination has everything"
                );
            }
            _ => return Err(SendError::OutOfTurn("something before prepared")),
        }
        self.advance(Event::Prepared)?;
        Ok(())
    }

    async fn final_lap(&mut self, claims: Arc<Claims>) -> Result<LapReport, SendError> {
        self.with_tracker(move |tracker, streams| {
            tracker
                .final_lap(&claims, streams)
                .map_err(SendError::Track)
        })
        .await
    }

    /// THE COMMIT POINT. The record is written, then the word is sent. As long
    /// as the record is not written the container may be thawed; once it is,
    /// only the destination's word decides, because it may have heard.
    async fn commit(&mut self) -> Result<CommitRecord, Uncommitted> {
        self.enter(Phase::Commit);
        // If CRIU died meanwhile, the kernel has let go of the tasks.
        match &self.dump {
            Some(dump) if dump.still_waits().await => {}
            _ => return Err(Uncommitted(DumpFailure::Ended(Action::PostDump).into())),
        }
        // Looked up first: nothing may fail once the record is written.
        let (committed, _) = source::step(self.state, Event::CommitRecorded)
            .map_err(|error| Uncommitted(error.into()))?;
        let record = CommitRecord {
            format: Format::CURRENT,
            migration_id: self.job.migration_id.clone(),
            namespace: self.job.container.namespace.clone(),
            container_id: self.job.container.id.clone(),
            destination_node: self.job.peer_node.clone(),
            destination_address: self.job.peer_address.clone(),
            ticket_id: self.job.ticket.id.clone(),
            init: crate::container::init_process(self.job.init_pid)
                .map_err(|error| Uncommitted(error.into()))?,
            state: CommitState::Committing,
        };
        if let Some(network) = &self.job.network {
            network::detach(network)
                .await
                .map_err(|error| Uncommitted(SendError::Network(error)))?;
        }
        self.write_record(&record).map_err(Uncommitted)?;
        // N.B. nothing below may fail: the container is the destination's.
        self.state = committed;
        self.log.commit();
        // The shim learns the rest from how this process ends.
        drop(self.shim.send(&FromEngine::Committed));
        if let Some(session) = &self.session {
            // A session that is gone is opened again in `resume`.
            drop(session.say(ToDestination::Commit(pb::Commit {})).await);
        }
        Ok(record)
    }

    /// Past the commit nothing may end on a transition that does not exist: it
    /// is logged, and the destination's word is followed.
    fn advance_committed(&mut self, event: Event) {
        if let Err(error) = self.advance(event) {
            tracing::error!(%error, "went on although the table has no such row");
        }
    }

    /// Notes what the destination said, so that whoever finds the record acts on
    /// it. What is to be done is done even if the note cannot be made.
    fn mark_record(&self, record: &mut CommitRecord, state: CommitState) {
        record.state = state;
        if let Err(error) = self.write_record(record) {
            tracing::error!(
                error = crate::error_chain(&error),
                "cannot update the commit record"
            );
        }
    }

    fn write_record(&self, record: &CommitRecord) -> Result<(), SendError> {
        let error = |source| SendError::File {
            action: "write",
            path: self.commit_record.clone(),
            source,
        };
        if let Some(parent) = self.commit_record.parent() {
            make_dir(parent)?;
        }
        let text = serde_json::to_vec(record).map_err(|source| error(source.into()))?;
        // On a tmpfs, by rename: it has to survive this process, not the node,
        // whose end would be the container's end too.
        let partial = self.commit_record.with_extension("partial");
        fs::write(&partial, text).map_err(error)?;
        fs::rename(&partial, &self.commit_record).map_err(error)
    }

    /// After the commit: asks until the destination says what became of the
    /// container, then ends it here or lets it go on here.
    async fn resume(&mut self, mut record: CommitRecord) -> Result<Summary, SendError> {
        self.enter(Phase::Resume);
        let handed_back = self.destinations_word().await;
        let frozen_at = self.figures.frozen_at.unwrap_or(self.begun);
        self.figures.blackout = frozen_at.elapsed();
        self.figures.freeze = self.figures.blackout;
        if let Some(reason) = handed_back {
            let error = SendError::HandedBack(reason);
            self.advance_committed(Event::HandedBack);
            self.mark_record(&mut record, CommitState::HandedBack);
            self.unwind(&error).await;
            return Err(error);
        }
        self.advance_committed(Event::Running);
        self.mark_record(&mut record, CommitState::Released);
        if let Some(dump) = &mut self.dump {
            // CRIU ends the tasks. If it cannot, the freezer's kill below does.
            if let Err(error) = dump.finish(true).await {
                tracing::warn!(%error, "CRIU did not end the tasks");
            }
        }
        if let Some(frozen) = self.frozen.take() {
            frozen.kill().await;
        }
        self.advance_committed(Event::SourceEnded);
        // Closing the session in order tells the destination that we have heard.
        self.session = None;
        Ok(self.summary())
    }

    /// Asks until the destination has said what became of the container: none if
    /// it runs, a reason if it was handed back.
    async fn destinations_word(&mut self) -> Option<String> {
        let log = self.log.clone();
        loop {
            let answer = tokio::select! {
                biased;
                answer = limited(Phase::Resume, self.hear_or_ask()) => answer,
                // Only where the destination's engine cannot say so itself.
                reason = log.handed_back() => return Some(reason),
            };
            match answer {
                Ok(FromDestination::Running(running)) => {
                    self.figures.restore_us = running.restore_us;
                    self.figures.prepare_us = running.prepare_us;
                    return None;
                }
                Ok(FromDestination::HandedBack(back)) => return Some(back.reason),
                // Said before it heard of the commit.
                Ok(_) => {}
                Err(error) => {
                    let error = crate::error_chain(&error);
                    tracing::warn!(error, "asking the destination again");
                    self.advance_committed(Event::PeerLost);
                    self.session = None;
                    tokio::select! {
                        () = tokio::time::sleep(source::ASK_AGAIN_AFTER) => {}
                        reason = log.handed_back() => return Some(reason),
                    }
                }
            }
        }
    }

    async fn hear_or_ask(&mut self) -> Result<FromDestination, SendError> {
        match &mut self.session {
            Some(session) => session.hear().await,
            None => self.ask_again().await,
        }
    }

    async fn ask_again(&mut self) -> Result<FromDestination, SendError> {
        let dialer = Dialer::new(
            self.job.peer_address.clone(),
            &self.job.peer_node,
            &self.job.identity_dir,
            &self.job.ticket,
        )?;
        let session = Session::open(&dialer).await?;
        session.say(ToDestination::Commit(pb::Commit {})).await?;
        self.session.insert(session).hear().await
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
        self.stop_lap.store(true, Ordering::Relaxed);
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
        self.streams = None;
        if let Some(tracker) = self.tracker.take() {
            // Waits for a lap that is ending, then closes the userfaultfds.
            let disarmed = tokio::task::spawn_blocking(move || {
                let tracker =
                    Arc::into_inner(tracker).and_then(|tracker| tracker.into_inner().ok());
                tracker.map(Tracker::disarm)
            });
            drop(disarmed.await);
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
        }
    }
}

/// A failure before the commit point.
struct Uncommitted(SendError);

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

async fn limited<T>(
    phase: Phase,
    work: impl Future<Output = Result<T, SendError>>,
) -> Result<T, SendError> {
    let limit = phase.timeout();
    tokio::time::timeout(limit, work)
        .await
        .unwrap_or(Err(SendError::Timeout { phase, limit }))
}

fn spaces(claims: &Claims) -> Vec<pb::Space> {
    claims
        .spaces()
        .map(|(space, ranges)| pb::Space {
            space: space.0,
            ranges: ranges
                .iter()
                .map(|range| pb::Range {
                    start: range.start,
                    end: range.end,
                })
                .collect(),
        })
        .collect()
}

fn sample(report: &LapReport) -> LapSample {
    LapSample {
        written_bytes: report.bytes,
        sent_bytes: report.bytes,
        scanned_bytes: report.scanned_bytes,
        duration: report.duration,
        link_bytes_per_second: None,
    }
}

fn millis(duration: Duration) -> u64 {
    u64::try_from(duration.as_millis()).unwrap_or(u64::MAX)
}

fn micros(duration: Duration) -> u64 {
    u64::try_from(duration.as_micros()).unwrap_or(u64::MAX)
}
