//! The receiving process: stages what arrives, restores after the commit, fills
//! memory in, and ends.
//!
//! One function, [`Receiver::run`], holds the order of phases; every failure
//! before the commit leaves through its `?` and ends in one place, [`run`],
//! which tells the source, the shim, and removes what was staged.

mod restore;
mod stage;
mod volumes;

use std::fs;
use std::future::Future;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use migrate::Phase;
use migrate::destination::{Event, State};
use migrate::offer::{PROTOCOL_VERSIONS, common_version};
use network::Switch;
use nodeapi::{FromEngine, ReceiveJob, RunDir, ToEngine};
use pages::Staging;
use proto::migration as pb;
use proto::migration::destination_message::Message as ToSource;
use proto::migration::migration_server::MigrationServer;
use proto::migration::source_message::Message as FromSource;
use tokio::sync::{mpsc, watch};
use tokio_stream::wrappers::ReceiverStream;
use tonic::Status;

use self::stage::flags_from_wire;
use self::volumes::Volumes;
use crate::arrival::Arrival;
use crate::gate::Gate;
use crate::ipc::ToShim;
use crate::link::{self, MESSAGE_BYTES, Reception};
use crate::receive_error::ReceiveError;
use crate::service::{Arrived, Service, Session, Trees};
use crate::tmpfs::Programs;

/// How long a receiver waits for its source to come, or to come back.
const SOURCE_TIMEOUT: Duration = Duration::from_secs(60);

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
    let volumes = Volumes::prepare(&job.container.volumes, &job.container.id)?;
    let trees = Trees {
        layer: incoming.upperdir.clone(),
        images: arriving.clone(),
        volumes: volumes.trees(),
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
        volumes,
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
    receiver.volumes.remove().await;
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
    volumes: Volumes,
    staging: Arc<Staging>,
    arrival: Arrival,
    service: Service,
    arrived: watch::Receiver<Arrived>,
    sessions: mpsc::Receiver<Session>,
    messages: mpsc::UnboundedReceiver<ToEngine>,
    shim: ToShim,
    state: State,
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
                self.volumes.take_back().await;
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
            other => return Err(ReceiveError::unexpected(other)),
        };
        self.volumes.check(&prepare.volumes)?;
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
                other => return Err(ReceiveError::unexpected(other)),
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

    /// Waits for the commit, across a lost session: the source may have
    /// recorded it although we never heard.
    async fn until_commit(&mut self, mut session: Session) -> Result<Session, ReceiveError> {
        loop {
            match self
                .hear(&mut session, Phase::Commit.timeout(), "commit")
                .await
            {
                Ok(FromSource::Commit(_)) => return Ok(session),
                Ok(other) => return Err(ReceiveError::unexpected(other)),
                Err(ReceiveError::SourceLost(reason)) => {
                    tracing::warn!(reason, "lost the source before its commit; waiting for it");
                    self.advance(Event::PeerLost);
                    session = self.next_session(Phase::Commit).await?;
                }
                Err(error) => return Err(error),
            }
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
        message = messages.recv() => Err(ReceiveError::spoken(message)),
        () = tokio::time::sleep(limit) => Err(ReceiveError::Timeout { what, limit }),
    }
}

fn status_text(status: &Status) -> String {
    format!("{:?}: {}", status.code(), status.message())
}
