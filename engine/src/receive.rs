//! The receiving process: stages what arrives, restores after the commit, fills
//! memory in, and ends.
//!
//! One function, [`Receiver::run`], holds the order of phases; every failure
//! before the commit leaves through its `?` and ends in one place, [`run`],
//! which tells the source, the shim, and removes what was staged.

use std::fs;
use std::future::Future;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use migrate::Phase;
use migrate::destination::{Event, State};
use migrate::offer::{PROTOCOL_VERSIONS, common_version};
use network::Switch;
use nodeapi::{FromEngine, ReceiveJob, RestoreFlags, RestoreOrder, RunDir, ToEngine};
use pages::{SpaceId, Staging};
use proto::migration as pb;
use proto::migration::destination_message::Message as ToSource;
use proto::migration::migration_server::MigrationServer;
use proto::migration::source_message::Message as FromSource;
use tokio::sync::{mpsc, watch};
use tokio_stream::wrappers::ReceiverStream;
use tonic::Status;

use crate::arrival::Arrival;
use crate::gate::{self, Gate};
use crate::ipc::ToShim;
use crate::link::{self, MESSAGE_BYTES, Reception};
use crate::memory::{Memory, MemoryError, MemoryNews};
use crate::service::{Arrived, Service, Session, Trees};
use crate::tmpfs::Programs;

/// How long a receiver waits for its source to come, or to come back.
const SOURCE_TIMEOUT: Duration = Duration::from_secs(60);
/// Most address spaces in one container's account.
const MAX_SPACES: usize = 65_536;
/// Most ranges over all of them.
const MAX_RANGES: usize = 1 << 20;

/// Why a container did not arrive.
#[derive(Debug, thiserror::Error)]
pub(crate) enum ReceiveError {
    #[error("cannot {action} {path}")]
    File {
        action: &'static str,
        path: PathBuf,
        #[source]
        source: io::Error,
    },
    #[error("cannot talk to the shim")]
    Shim(#[from] crate::ipc::IpcError),
    #[error("the shim is gone")]
    ShimGone,
    #[error("cannot begin the arrival record")]
    Record(#[from] nodeapi::FileError),
    #[error("cannot take connections")]
    Link(#[from] link::LinkError),
    #[error("the source did not {what} within {} s", limit.as_secs())]
    Timeout { what: &'static str, limit: Duration },
    #[error("the source is gone: {0}")]
    SourceLost(String),
    #[error("the source gave up: {0}")]
    Aborted(String),
    #[error("given up here: {0}")]
    Cancelled(String),
    #[error("{0}")]
    Damaged(String),
    #[error("the source said {0} out of turn")]
    OutOfTurn(&'static str),
    #[error("the source speaks only versions {0:?} of the migration protocol")]
    Version(Vec<u32>),
    #[error("cannot read CRIU's images")]
    Images(#[source] criu::images::ImageError),
    #[error("the restore failed: {0}")]
    Restore(String),
    #[error("cannot fill memory in")]
    Fill(#[from] MemoryError),
    #[error("cannot attach the container's address")]
    Network(#[source] network::NetworkError),
}

impl ReceiveError {
    /// What this failure is to the state machine.
    fn event(&self) -> Event {
        match self {
            Self::Aborted(_) => Event::Abort,
            Self::SourceLost(_) | Self::OutOfTurn(_) => Event::PeerLost,
            Self::Timeout { .. } => Event::PhaseTimedOut,
            Self::Cancelled(_) => Event::CancelRequested,
            Self::File { .. }
            | Self::Shim(_)
            | Self::ShimGone
            | Self::Record(_)
            | Self::Link(_)
            | Self::Damaged(_)
            | Self::Version(_)
            | Self::Images(_)
            | Self::Restore(_)
            | Self::Fill(_)
            | Self::Network(_) => Event::LocalFailure,
        }
    }
}

/// Receives one container; the process ends with this.
pub(crate) async fn run(
    job: ReceiveJob,
    shim: ToShim,
    messages: mpsc::UnboundedReceiver<ToEngine>,
) -> Result<(), ReceiveError> {
    let dir = RunDir::default();
    let staged = dir.staging(&job.incoming.migration_id);
    let ticket_socket = dir.ticket_socket(&job.incoming.ticket.id);
    let outcome = receive(&dir, job, &shim, messages).await;
    // Nothing of it is needed any more, whatever happened.
    drop(fs::remove_file(&ticket_socket));
    drop(fs::remove_dir_all(&staged));
    if let Err(error) = &outcome {
        shim.send(&FromEngine::Failed {
            reason: crate::error_chain(error),
        })?;
    }
    outcome
}

async fn receive(
    dir: &RunDir,
    job: ReceiveJob,
    shim: &ToShim,
    messages: mpsc::UnboundedReceiver<ToEngine>,
) -> Result<(), ReceiveError> {
    let incoming = &job.incoming;
    let root = dir.staging(&incoming.migration_id);
    let (arriving, images, work_dir) = (
        root.join("arriving"),
        root.join("images"),
        root.join("work"),
    );
    for path in [&arriving, &images, &work_dir] {
        make_dir(path)?;
    }
    let ticket_socket = dir.ticket_socket(&incoming.ticket.id);
    if let Some(parent) = ticket_socket.parent() {
        make_dir(parent)?;
    }
    let switch = match &incoming.network {
        Some(prepared) => Some(prepared.open().await.map_err(ReceiveError::Network)?),
        None => None,
    };
    let staging = Arc::new(Staging::new(incoming.memory_limit_bytes));
    let trees = Trees {
        layer: incoming.upperdir.clone(),
        images: arriving.clone(),
    };
    let arrival = Arrival::open(dir, &job)?;
    let (service, arrived, sessions) =
        Service::new(incoming.ticket.clone(), Arc::clone(&staging), trees);
    let reception = Reception::open(
        &ticket_socket,
        &incoming.identity_dir,
        incoming.source_node.clone(),
    )?;
    let server = tokio::spawn(
        link::server()
            .add_service(
                MigrationServer::new(service.clone())
                    .max_decoding_message_size(MESSAGE_BYTES)
                    .max_encoding_message_size(MESSAGE_BYTES),
            )
            .serve_with_incoming(ReceiverStream::new(reception.accept())),
    );
    shim.send(&FromEngine::Listening)?;
    let mut receiver = Receiver {
        migration_id: incoming.migration_id.clone(),
        memory_limit: incoming.memory_limit_bytes,
        arriving,
        images,
        work_dir,
        hostname: job.hostname,
        gate: None,
        programs: None,
        switch,
        staging,
        arrival,
        service,
        arrived,
        sessions,
        messages,
        shim: shim.clone(),
        state: State::START,
    };
    let outcome = receiver.run().await;
    server.abort();
    outcome
}

fn make_dir(path: &Path) -> Result<(), ReceiveError> {
    use std::os::unix::fs::DirBuilderExt;
    fs::DirBuilder::new()
        .recursive(true)
        .mode(0o700)
        .create(path)
        .map_err(|source| ReceiveError::File {
            action: "create",
            path: path.to_owned(),
            source,
        })
}

#[derive(Debug)]
struct Receiver {
    migration_id: String,
    memory_limit: u64,
    /// Where CRIU's images are put.
    arriving: PathBuf,
    /// Where CRIU finds them.
    images: PathBuf,
    work_dir: PathBuf,
    hostname: Option<String>,
    /// Given up together with this receiver.
    gate: Option<Gate>,
    programs: Option<Programs>,
    switch: Option<Switch>,
    staging: Arc<Staging>,
    arrival: Arrival,
    service: Service,
    arrived: watch::Receiver<Arrived>,
    sessions: mpsc::Receiver<Session>,
    messages: mpsc::UnboundedReceiver<ToEngine>,
    shim: ToShim,
    state: State,
}

/// A restored container whose memory is still being filled in.
struct Filling {
    memory: Memory,
    running: pb::Running,
}

impl Receiver {
    async fn run(&mut self) -> Result<(), ReceiveError> {
        let mut session = self.next_session(Phase::Negotiate).await?;
        let checked_in = match self.until_prepared(&mut session).await {
            Ok(checked_in) => checked_in,
            Err(error) => {
                let phase = self.state.phase().map_or("", Phase::name);
                self.advance(error.event());
                self.arrival.fence().await;
                let reason = crate::error_chain(&error);
                session
                    .say(ToSource::Failed(pb::Failed {
                        phase: phase.into(),
                        reason,
                    }))
                    .await;
                return Err(error);
            }
        };
        let mut session = match self.until_commit(session).await {
            Ok(session) => session,
            Err(error) => {
                self.fail(&error);
                self.hand_back(None, &error).await;
                return Err(error);
            }
        };
        // From here the source never runs the container by itself: whatever
        // happens below ends in `Running` or in `HandedBack`.
        self.advance(Event::Commit);
        match self.restore(checked_in, &mut session).await {
            Ok(filling) => self.settle(session, filling).await,
            // Whoever cleans up after the shim makes sure that nothing is left, and
            // then fences.
            Err(error @ (ReceiveError::ShimGone | ReceiveError::Shim(_))) => Err(error),
            Err(error) if matches!(self.state, State::Restoring | State::Undoing) => {
                // The shim answers only when nothing of the restore is left.
                self.advance(Event::RestoreFailed);
                self.hand_back(Some(session), &error).await;
                Err(error)
            }
            // It has run: the source must not let it run again.
            Err(error) => {
                self.advance(Event::LocalFailure);
                session.say(ToSource::Running(pb::Running::default())).await;
                Err(error)
            }
        }
    }

    /// Moves the state machine; a transition that does not exist is our bug.
    fn advance(&mut self, event: Event) {
        match migrate::destination::step(self.state, event) {
            Ok((state, _action)) => {
                tracing::debug!(from = ?self.state, ?event, to = ?state, "destination");
                self.state = state;
            }
            Err(illegal) => panic!("{illegal}"),
        }
    }

    /// As [`advance`](Self::advance), for what went wrong: what a peer did out of
    /// turn has no row of its own.
    fn fail(&mut self, error: &ReceiveError) {
        match migrate::destination::step(self.state, error.event()) {
            Ok(_) => self.advance(error.event()),
            Err(_) => self.advance(Event::LocalFailure),
        }
    }

    async fn next_session(&mut self, phase: Phase) -> Result<Session, ReceiveError> {
        let sessions = &mut self.sessions;
        let opened = async { Ok(sessions.recv().await) };
        let (messages, arrived) = (&mut self.messages, &mut self.arrived);
        let opened = guarded(messages, arrived, phase.timeout(), "open a session", opened).await?;
        opened.ok_or_else(|| ReceiveError::SourceLost("the server ended".into()))
    }

    /// The next message of the source, while nothing else goes wrong.
    async fn hear(
        &mut self,
        session: &mut Session,
        limit: Duration,
        what: &'static str,
    ) -> Result<FromSource, ReceiveError> {
        let message = session.hear();
        guarded(&mut self.messages, &mut self.arrived, limit, what, message).await
    }

    /// Negotiate, Prepare, PreCopy, Freeze: everything up to the word Prepared.
    async fn until_prepared(&mut self, session: &mut Session) -> Result<Duration, ReceiveError> {
        let limit = Phase::Negotiate.timeout();
        let hello = match self.hear(session, limit, "say hello").await? {
            FromSource::Hello(hello) => hello,
            _ => return Err(ReceiveError::OutOfTurn("something before hello")),
        };
        if hello.migration_id != self.migration_id {
            return Err(ReceiveError::Damaged(
                "the session is about another migration".into(),
            ));
        }
        let version = common_version(&hello.protocol_versions, PROTOCOL_VERSIONS)
            .ok_or(ReceiveError::Version(hello.protocol_versions))?;
        self.advance(Event::Hello);
        session
            .say(ToSource::Welcome(pb::Welcome {
                protocol_version: version,
                staging_limit_bytes: self.memory_limit,
            }))
            .await;

        let limit = Phase::Prepare.timeout();
        let prepare = match self.hear(session, limit, "prepare the switch-over").await? {
            FromSource::PrepareSwitch(prepare) => prepare,
            other => return Err(unexpected(other)),
        };
        self.advance(Event::PrepareSwitch);
        let path = self.images.join("descriptors.json");
        fs::write(&path, &prepare.descriptors_json).map_err(|source| ReceiveError::File {
            action: "write",
            path,
            source,
        })?;
        self.start_restore(flags_from_wire(prepare.restore.unwrap_or_default()))
            .await?;
        self.advance(Event::Ready);
        session
            .say(ToSource::SwitchReady(pb::SwitchReady {
                reads_trees: self.programs.is_some(),
            }))
            .await;

        // Pre-copy takes as long as it takes; a dead source shows as a broken
        // session.
        let limit = Phase::PreCopy.timeout();
        let account = loop {
            match self.hear(session, limit, "finish the pre-copy").await? {
                FromSource::Freezing(_) => {
                    self.staging.mark_hot_from_now();
                    if let Some(switch) = &mut self.switch {
                        switch.hold().await.map_err(ReceiveError::Network)?;
                    }
                    session.say(ToSource::Holding(pb::Holding {})).await;
                }
                FromSource::Detached(_) => {
                    if let Some(switch) = &mut self.switch {
                        switch.hold_again().await.map_err(ReceiveError::Network)?;
                    }
                }
                FromSource::Final(account) => break account,
                other => return Err(unexpected(other)),
            }
        };
        let begun = Instant::now();
        self.advance(Event::Final);
        let prepared = self.check(&account).await?;
        self.mount_root().await?;
        self.advance(Event::Checked);
        self.service.admit_later_sessions();
        session.say(ToSource::Prepared(prepared)).await;
        Ok(begun.elapsed())
    }

    /// Has the shim start runc and CRIU; they stand still at the gate when this
    /// returns. What cannot be restored for their sake shows here, while the
    /// container still runs on the source.
    async fn start_restore(&mut self, flags: RestoreFlags) -> Result<(), ReceiveError> {
        let directory = self.images.with_file_name("programs");
        self.programs = Programs::make(directory.clone()).map_err(|source| ReceiveError::File {
            action: "make",
            path: directory,
            source,
        })?;
        let gate = Gate::make(&self.images).map_err(self.at_gate("make"))?;
        let failed = self.at_gate("watch");
        let gate = self.gate.insert(gate);
        self.shim.send(&FromEngine::PrepareRestore(RestoreOrder {
            images: self.images.clone(),
            work_dir: self.work_dir.clone(),
            programs: self
                .programs
                .as_ref()
                .map(|programs| programs.directory().to_owned()),
            lazy_pages: true,
            flags,
        }))?;
        let reached = async { gate.reached().await.map_err(failed) };
        let (messages, arrived) = (&mut self.messages, &mut self.arrived);
        let limit = Phase::Prepare.timeout();
        guarded(messages, arrived, limit, "get CRIU ready", reached).await
    }

    /// Has the shim mount the files that have arrived.
    async fn mount_root(&mut self) -> Result<(), ReceiveError> {
        self.shim.send(&FromEngine::FilesComplete)?;
        let limit = Phase::Freeze.timeout();
        match tokio::time::timeout(limit, self.messages.recv()).await {
            Ok(Some(ToEngine::RootMounted)) => Ok(()),
            Ok(message) => Err(spoken(message)),
            Err(_) => Err(ReceiveError::Timeout {
                what: "mount its root file system",
                limit,
            }),
        }
    }

    fn at_gate(&self, action: &'static str) -> impl FnOnce(io::Error) -> ReceiveError + use<> {
        let path = self.images.join(gate::INVENTORY);
        move |source| ReceiveError::File {
            action,
            path,
            source,
        }
    }

    /// Waits for everything in the account and compares it with what is here.
    async fn check(&mut self, account: &pb::Final) -> Result<pb::Prepared, ReceiveError> {
        let mut arrived = self.arrived.clone();
        let complete = async {
            arrived
                .wait_for(|arrived| arrived.covers(account))
                .await
                .map(|_| ())
                .map_err(|_| ReceiveError::SourceLost("the server ended".into()))
        };
        let limit = Phase::Freeze.timeout();
        guarded(
            &mut self.messages,
            &mut self.arrived,
            limit,
            "send all it counted",
            complete,
        )
        .await?;
        if account.spaces.len() > MAX_SPACES
            || account
                .spaces
                .iter()
                .map(|space| space.ranges.len())
                .sum::<usize>()
                > MAX_RANGES
        {
            return Err(ReceiveError::Damaged(
                "the account names too many ranges".into(),
            ));
        }
        // Of processes that ended before the freeze.
        let listed: Vec<_> = account
            .spaces
            .iter()
            .map(|space| SpaceId(space.space))
            .collect();
        self.staging.retain_spaces(&listed);
        for space in &account.spaces {
            let ranges: Vec<_> = space
                .ranges
                .iter()
                .map(|range| range.start..range.end)
                .collect();
            self.staging
                .retain(SpaceId(space.space), &ranges)
                .map_err(|error| ReceiveError::Damaged(error.to_string()))?;
        }
        let images = self.arriving.clone();
        let hostname = self.hostname.clone();
        let dumped = tokio::task::spawn_blocking(move || {
            criu::images::clear_lazy(&images)?;
            if let Some(name) = hostname {
                criu::images::set_hostname(&images, &name)?;
            }
            criu::images::dumped_pages(&images)
        })
        .await
        .map_err(|error| ReceiveError::Damaged(error.to_string()))?
        .map_err(ReceiveError::Images)?;
        // CRIU restores these itself; a page that is there already would look like
        // one that came into being by mistake.
        for pages in &dumped {
            self.staging
                .remove(SpaceId(pages.pid), &pages.ranges)
                .map_err(|error| ReceiveError::Damaged(error.to_string()))?;
        }
        let inventory = take_images(&self.arriving, &self.images)?;
        let failed = self.at_gate("close");
        if let Some(gate) = &mut self.gate {
            gate.hold(inventory).map_err(failed)?;
        }
        let usage = self.staging.usage();
        Ok(pb::Prepared {
            staged_pages: usage.pages,
            staged_bytes: usage.bytes,
        })
    }

    /// Waits for the commit, across a lost session: the source may have
    /// recorded it although we never heard.
    async fn until_commit(&mut self, mut session: Session) -> Result<Session, ReceiveError> {
        loop {
            match self
                .hear(&mut session, Phase::Commit.timeout(), "commit")
                .await
            {
                Ok(FromSource::Commit(_)) => return Ok(session),
                Ok(other) => return Err(unexpected(other)),
                Err(ReceiveError::SourceLost(reason)) => {
                    tracing::warn!(reason, "lost the source before its commit; waiting for it");
                    self.advance(Event::PeerLost);
                    session = self.next_session(Phase::Commit).await?;
                }
                Err(error) => return Err(error),
            }
        }
    }

    /// Restores the container and attaches its address. On error nothing of the
    /// container runs here if the state is still `Restoring`.
    async fn restore(
        &mut self,
        checked_in: Duration,
        session: &mut Session,
    ) -> Result<Filling, ReceiveError> {
        let begun = Instant::now();
        let mut memory = Memory::serve(&self.work_dir, &self.staging, &self.shim, &self.arrival)?;
        if let Some(gate) = self.gate.take() {
            gate.open().map_err(self.at_gate("open"))?;
        }
        let limit = tokio::time::sleep(Phase::Resume.timeout());
        tokio::pin!(limit);
        let mut late = false;
        let mut give_up = None;
        let mut restored = None;
        let mut let_go = Duration::ZERO;
        loop {
            tokio::select! {
                news = memory.next() => match news {
                    MemoryNews::LetGo => {
                        let_go = begun.elapsed();
                        self.advance(Event::LetGo);
                        // Tasks are about to resume: their sockets exist, so
                        // that a packet that arrives now finds them.
                        if let Some(switch) = &mut self.switch {
                            switch.attach().await.map_err(ReceiveError::Network)?;
                            switch.announce().await.map_err(ReceiveError::Network)?;
                        }
                    }
                    MemoryNews::Filled if self.state == State::Resuming => {
                        self.advance(Event::Filled);
                    }
                    MemoryNews::Filled => {}
                    // Whatever is restored would wait for its memory for ever.
                    MemoryNews::Failed if self.state == State::Restoring => {
                        give_up = Some("the page server failed".to_owned());
                    }
                    MemoryNews::Failed if self.state == State::Undoing => {}
                    MemoryNews::Failed => drop(memory.filled().await?),
                },
                message = self.messages.recv() => match message {
                    Some(ToEngine::Restored { pid }) => {
                        memory.tasks_run();
                        restored = Some(pb::Running {
                            pid,
                            restore_us: micros(begun.elapsed()),
                            prepare_us: micros(checked_in),
                            let_go_us: 0,
                        });
                    }
                    Some(ToEngine::RestoreFailed { reason }) => {
                        // The page server may have heard more than this loop.
                        if !self.arrival.give_up() && self.state == State::Restoring {
                            self.advance(Event::LetGo);
                        }
                        return Err(ReceiveError::Restore(reason));
                    }
                    // Too late to give up: the source has committed.
                    Some(_) => {}
                    // This process goes with its shim; the source asks on.
                    None => return Err(ReceiveError::ShimGone),
                },
                // A source that lost its session asks again; the answer is due
                // when it is known.
                Some(reopened) = self.sessions.recv() => *session = reopened,
                () = &mut limit, if !late => {
                    late = true;
                    give_up = Some(format!("it took longer than {:?}", Phase::Resume.timeout()));
                }
            }
            if let Some(reason) = give_up.take() {
                tracing::error!(reason, "the restore is given up, if it is not too late");
                if self.state == State::Restoring && self.arrival.give_up() {
                    self.advance(Event::LocalFailure);
                    self.shim.send(&FromEngine::AbandonRestore { reason })?;
                } else if self.state != State::Undoing {
                    // It has run, whether runc returns or not.
                    session.say(ToSource::Running(pb::Running::default())).await;
                }
            }
            // runc may be heard before the page server.
            let runs = matches!(self.state, State::Resuming | State::Placed);
            if let Some(mut running) = restored.take_if(|_| runs) {
                running.let_go_us = micros(let_go);
                return Ok(Filling { memory, running });
            }
        }
    }

    /// The container runs: says so, and fills its memory in.
    async fn settle(&mut self, mut session: Session, filling: Filling) -> Result<(), ReceiveError> {
        self.advance(Event::Restored);
        self.shim.send(&FromEngine::Running)?;
        session.say(ToSource::Running(filling.running)).await;
        let mut memory = filling.memory;
        let report = loop {
            tokio::select! {
                report = memory.filled() => break report?,
                // A source that did not hear the answer asks again.
                Some(reopened) = self.sessions.recv() => {
                    session = reopened;
                    session.say(ToSource::Running(filling.running)).await;
                }
            }
        };
        tracing::info!(?report, "memory is in place");
        if self.state == State::Running {
            self.advance(Event::Filled);
        }
        self.shim.send(&FromEngine::Settled)?;
        // The source closes its session once it has heard; one that lost it
        // has as long as we would have waited for it.
        loop {
            if matches!(
                tokio::time::timeout(SOURCE_TIMEOUT, session.closed()).await,
                Ok(true) | Err(_)
            ) {
                return Ok(());
            }
            match tokio::time::timeout(SOURCE_TIMEOUT, self.sessions.recv()).await {
                Ok(Some(reopened)) => {
                    session = reopened;
                    session.say(ToSource::Running(filling.running)).await;
                }
                _ => return Ok(()),
            }
        }
    }

    /// Nothing runs here and nothing will: the source may have it back. That is
    /// written down, then it is told, and again whenever it asks.
    async fn hand_back(&mut self, session: Option<Session>, error: &ReceiveError) {
        self.arrival.fence().await;
        let answer = pb::HandedBack {
            reason: crate::error_chain(error),
        };
        let mut open = session;
        loop {
            if let Some(session) = &mut open {
                session.say(ToSource::HandedBack(answer.clone())).await;
                if session.closed().await {
                    return;
                }
            }
            open = match tokio::time::timeout(SOURCE_TIMEOUT, self.sessions.recv()).await {
                Ok(Some(reopened)) => Some(reopened),
                _ => return,
            };
        }
    }
}

impl Session {
    async fn say(&mut self, message: ToSource) {
        // A source that is gone shows when it is next listened to.
        drop(
            self.to_source
                .send(Ok(pb::DestinationMessage {
                    message: Some(message),
                }))
                .await,
        );
    }

    async fn hear(&mut self) -> Result<FromSource, ReceiveError> {
        match self.from_source.message().await {
            Ok(Some(pb::SourceMessage {
                message: Some(message),
            })) => Ok(message),
            Ok(Some(_)) => Err(ReceiveError::Damaged("an empty message".into())),
            Ok(None) => Err(ReceiveError::SourceLost("it closed the session".into())),
            Err(status) => Err(ReceiveError::SourceLost(status_text(&status))),
        }
    }

    /// Waits for the end of the session; true if the source closed it in order.
    async fn closed(&mut self) -> bool {
        loop {
            match self.from_source.message().await {
                Ok(Some(_)) => {}
                Ok(None) => return true,
                Err(_) => return false,
            }
        }
    }
}

/// Waits for one thing while nothing else ends the reception: the shim's word,
/// damage on a stream, or time.
async fn guarded<T>(
    messages: &mut mpsc::UnboundedReceiver<ToEngine>,
    arrived: &mut watch::Receiver<Arrived>,
    limit: Duration,
    what: &'static str,
    wanted: impl Future<Output = Result<T, ReceiveError>>,
) -> Result<T, ReceiveError> {
    tokio::select! {
        wanted = wanted => wanted,
        failed = arrived.wait_for(|arrived| arrived.failure.is_some()) => {
            let reason = failed.ok().and_then(|arrived| arrived.failure.clone());
            Err(ReceiveError::Damaged(reason.unwrap_or_default()))
        }
        message = messages.recv() => Err(spoken(message)),
        () = tokio::time::sleep(limit) => Err(ReceiveError::Timeout { what, limit }),
    }
}

/// Why a word of the shim ends the reception.
fn spoken(message: Option<ToEngine>) -> ReceiveError {
    match message {
        Some(ToEngine::RestoreFailed { reason }) => ReceiveError::Restore(reason),
        Some(ToEngine::Cancel { reason }) => ReceiveError::Cancelled(reason),
        Some(_) => ReceiveError::Cancelled("the shim spoke out of turn".into()),
        None => ReceiveError::Cancelled("the shim is gone".into()),
    }
}

/// Puts CRIU's images where it looks for them, all but the one that it waits for,
/// whose content is returned.
fn take_images(arriving: &Path, images: &Path) -> Result<Vec<u8>, ReceiveError> {
    let failed = |action, path: &Path| {
        let path = path.to_owned();
        move |source| ReceiveError::File {
            action,
            path,
            source,
        }
    };
    let inventory = arriving.join(gate::INVENTORY);
    let content = fs::read(&inventory).map_err(failed("read", &inventory))?;
    let names = fs::read_dir(arriving).map_err(failed("list", arriving))?;
    for name in names {
        let name = name.map_err(failed("list", arriving))?.file_name();
        if name != gate::INVENTORY {
            let path = arriving.join(&name);
            fs::rename(&path, images.join(&name)).map_err(failed("move", &path))?;
        }
    }
    Ok(content)
}

fn flags_from_wire(options: pb::RestoreOptions) -> RestoreFlags {
    RestoreFlags {
        tcp_established: options.tcp_established,
        tcp_close: options.tcp_close,
        file_locks: options.file_locks,
        ext_unix_sk: options.ext_unix_sk,
        shell_job: options.shell_job,
    }
}

fn unexpected(message: FromSource) -> ReceiveError {
    match message {
        FromSource::Abort(abort) => ReceiveError::Aborted(abort.reason),
        FromSource::Hello(_) => ReceiveError::OutOfTurn("hello"),
        FromSource::PrepareSwitch(_) => ReceiveError::OutOfTurn("prepare-switch"),
        FromSource::Freezing(_) => ReceiveError::OutOfTurn("freezing"),
        FromSource::Detached(_) => ReceiveError::OutOfTurn("detached"),
        FromSource::Final(_) => ReceiveError::OutOfTurn("final"),
        FromSource::Commit(_) => ReceiveError::OutOfTurn("commit"),
    }
}

fn status_text(status: &Status) -> String {
    format!("{:?}: {}", status.code(), status.message())
}

fn micros(duration: Duration) -> u64 {
    u64::try_from(duration.as_micros()).unwrap_or(u64::MAX)
}
