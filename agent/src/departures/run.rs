//! A migration as its source's sternad sees it, from the order to the last word.
//!
//! ```text
//! negotiate   describe the container, Begin on the destination
//! prepare     send missing blobs, Prepare on the destination, start the engine
//! ...         the engines' phases, relayed; cancelled if the destination is lost
//! leave       the container runs there: remove it here
//! ```
//!
//! Until the engine says that it migrated, the container is this node's, and the
//! destination is told to take back what it prepared. That word is only sent when
//! the source is known to run or to have never been touched.

use std::time::Duration;

use migrate::Phase;
use nodeapi::{ContainerRecord, RunState};
use proto::agent as pb;
use proto::agent::migrate_event::Event;
use proto::engine as epb;
use proto::engine::progress;
use proto::shim::control::SendRequest;
use tokio::sync::mpsc;
use tokio::time::Instant;
use tonic::Streaming;

use super::describe::{Described, Stop, describe};
use super::engine::Engine;
use super::leave::leave;
use super::{CancelOrder, Departure};
use crate::containerd::content::next_piece;
use crate::facts;
use crate::node::Node;
use crate::peer::{Peer, within};
use crate::process;
use crate::side::{Failure, Side};
use crate::startup::is_deserted;

/// The destination gathers its facts and asks its containerd a dozen things.
const BEGIN_TIMEOUT: Duration = Duration::from_secs(60);

/// Unpacking a large image on a slow disk.
const PREPARE_TIMEOUT: Duration = Duration::from_secs(900);

/// Taking back: killing, unmounting, deleting.
const ABORT_TIMEOUT: Duration = Duration::from_secs(90);

/// When the engine fails, the destination usually knows why, a moment later.
const VERDICT_TIMEOUT: Duration = Duration::from_secs(3);

/// Pieces of blobs between the nodes.
const CHUNK_BYTES: usize = 1 << 20;

/// Ends: exactly one event that says so.
pub(crate) async fn run(node: &Node, departure: &Departure, orders: mpsc::Receiver<CancelOrder>) {
    let mut run = Run {
        node,
        departure,
        orders,
        started: Instant::now(),
        phase: Phase::Negotiate,
        peer: None,
    };
    let order = &departure.order;
    departure.events.push(Event::Accepted(pb::Accepted {
        migration_id: order.migration_id.clone(),
        source: node.name.to_string(),
        destination: order.destination.to_string(),
        container: Some(pb::ContainerName {
            namespace: order.record.namespace.clone(),
            id: order.record.id.clone(),
        }),
    }));
    tracing::info!("begins");
    match run.migrate().await {
        Ok(finished) => {
            tracing::info!(
                outcome = finished.outcome,
                phase = finished.phase,
                side = finished.side,
                reason = finished.reason,
                "ends"
            );
            run.progress(progress::Event::Finished(finished));
        }
        Err(reasons) => {
            for reason in &reasons {
                tracing::info!(subject = reason.subject, reason = reason.text, "refused");
            }
            departure
                .events
                .push(Event::Refused(pb::Refused { reasons }));
        }
    }
}

struct Run<'a> {
    node: &'a Node,
    departure: &'a Departure,
    orders: mpsc::Receiver<CancelOrder>,
    started: Instant,
    phase: Phase,
    /// Once the destination has something to take back.
    peer: Option<Peer>,
}

/// Everything that the engine needs is there.
struct Ready {
    described: Described,
    engine: Engine,
    watch: Streaming<epb::Progress>,
    hold: Streaming<pb::HoldEvent>,
    peer: Peer,
    engine_began: Instant,
}

/// How the part before the engine ended.
enum Early {
    Refused(Vec<pb::Reason>),
    Failed(Failure),
    Cancelled(String),
}

impl From<Failure> for Early {
    fn from(failure: Failure) -> Self {
        Self::Failed(failure)
    }
}

impl From<anyhow::Error> for Early {
    fn from(error: anyhow::Error) -> Self {
        Self::Failed(Failure::local(&error, Side::Source, Side::SourceContainerd))
    }
}

impl From<Stop> for Early {
    fn from(stop: Stop) -> Self {
        match stop {
            Stop::Refused(reasons) => Self::Refused(reasons),
            Stop::Failed(failure) => Self::Failed(failure),
        }
    }
}

impl Run<'_> {
    fn progress(&self, event: progress::Event) {
        let at_ms = u64::try_from(self.started.elapsed().as_millis()).unwrap_or(u64::MAX);
        self.departure.events.push(Event::Progress(epb::Progress {
            at_ms,
            event: Some(event),
        }));
    }

    fn enter(&mut self, phase: Phase) {
        self.phase = phase;
        self.progress(progress::Event::Phase(epb::PhaseBegun {
            phase: phase.name().into(),
        }));
    }

    /// The last word, or the reasons why nothing was begun.
    async fn migrate(&mut self) -> Result<epb::Finished, Vec<pb::Reason>> {
        let ready = match self.until_ready().await {
            Ok(ready) => ready,
            Err(Early::Refused(reasons)) => {
                self.take_back("refused").await;
                return Err(reasons);
            }
            Err(Early::Failed(failure)) => {
                self.take_back(&failure.reason).await;
                return Ok(self.finished("failed", &failure));
            }
            Err(Early::Cancelled(reason)) => {
                self.take_back(&reason).await;
                return Ok(self.finished("cancelled", &Failure::new(Side::Source, reason)));
            }
        };
        let described = ready.described;
        let watched = Watched {
            engine: ready.engine,
            watch: ready.watch,
            hold: Some(ready.hold),
            peer: ready.peer,
            began: ready.engine_began,
            verdict: None,
            arrived: false,
        };
        let mut finished = self.watch(watched).await;
        self.remove_deserted_socket();
        if finished.outcome == "migrated" {
            for problem in leave(self.node, &described).await {
                tracing::warn!(problem, "something is left of a container that went away");
                let notice = format!(
                    "the container runs on {}, but here: {problem}",
                    self.departure.order.destination
                );
                self.departure.events.push(Event::Notice(notice));
            }
        } else if self.source_is_ours(&finished) {
            self.take_back(&finished.reason).await;
        }
        if let Some(summary) = &mut finished.summary {
            // The engine began when this migration was a while old.
            summary.total_ms =
                u64::try_from(self.started.elapsed().as_millis()).unwrap_or(u64::MAX);
            summary
                .migration_id
                .clone_from(&self.departure.order.migration_id);
        }
        Ok(finished)
    }

    /// An engine that was killed could not remove its own.
    fn remove_deserted_socket(&self) {
        let socket = self
            .node
            .run_dir
            .engine_socket(&self.departure.order.migration_id);
        if is_deserted(&socket)
            && let Err(error) = std::fs::remove_file(&socket)
        {
            tracing::warn!(%error, "cannot remove {}", socket.display());
        }
    }

    /// Whether nobody but this node can have the container running: only then may
    /// the destination be told to remove its own.
    fn source_is_ours(&self, finished: &epb::Finished) -> bool {
        match finished.outcome.as_str() {
            // The engine's own word, or its shim's.
            "failed" | "cancelled" | "handed-back" => true,
            _ => false,
        }
    }

    fn finished(&self, outcome: &str, failure: &Failure) -> epb::Finished {
        epb::Finished {
            outcome: outcome.into(),
            phase: self.phase.name().into(),
            side: failure.side.name().into(),
            reason: failure.reason.clone(),
            summary: None,
        }
    }

    /// Has the destination remove what it prepared.
    async fn take_back(&mut self, reason: &str) {
        let Some(peer) = self.peer.take() else { return };
        let request = pb::AbortRequest {
            migration_id: self.departure.order.migration_id.clone(),
            reason: reason.to_owned(),
        };
        if let Err(status) = peer.client().abort(within(ABORT_TIMEOUT, request)).await {
            // It finds out by itself: its engine has lost its source.
            tracing::warn!(peer = %peer.node(), reason = status.message(), "cannot ask the destination to take back");
        }
    }

    /// Negotiate and prepare, unless a user or the deadline says stop.
    async fn until_ready(&mut self) -> Result<Ready, Early> {
        let deadline = self
            .departure
            .order
            .deadline
            .map(|limit| self.started + limit);
        // The orders are taken out, so that `self` can work meanwhile.
        let (_, nobody) = mpsc::channel(1);
        let mut orders = std::mem::replace(&mut self.orders, nobody);
        let result = tokio::select! {
            result = self.negotiate_and_prepare(deadline) => result,
            order = stopped(&mut orders) => Err(Early::Cancelled(order)),
            () = passed(deadline) => {
                Err(Early::Failed(Failure::new(Side::Source, "the deadline passed before the copy could begin")))
            }
        };
        self.orders = orders;
        result
    }

    async fn negotiate_and_prepare(&mut self, deadline: Option<Instant>) -> Result<Ready, Early> {
        let order = &self.departure.order;
        self.enter(Phase::Negotiate);
        let described = describe(self.node, &order.record).await?;
        let facts = facts::gather(self.node).await?;
        let peer = Peer::connect(self.node, &order.destination).await?;

        let offer = described.offer(&order.migration_id, &facts)?;
        let response = match peer.client().begin(within(BEGIN_TIMEOUT, offer)).await {
            Ok(response) => response.into_inner(),
            Err(status) => {
                return Err(peer
                    .explain("decide on the container", &status)
                    .await
                    .into());
            }
        };
        if !response.refusals.is_empty() {
            return Err(Early::Refused(response.refusals));
        }
        self.peer = Some(peer.clone());

        self.enter(Phase::Prepare);
        let hold = self.hold(&peer).await?;
        self.send_blobs(&described, &peer, &response.missing_blobs)
            .await?;
        let request = pb::PrepareRequest {
            migration_id: order.migration_id.clone(),
        };
        let ticket = match peer
            .client()
            .prepare(within(PREPARE_TIMEOUT, request))
            .await
        {
            Ok(response) => response.into_inner(),
            Err(status) => {
                return Err(peer
                    .explain("prepare for the container", &status)
                    .await
                    .into());
            }
        };
        let left = deadline.map(|deadline| deadline.saturating_duration_since(Instant::now()));
        let request = SendRequest {
            container_id: order.record.id.clone(),
            migration_id: order.migration_id.clone(),
            ticket_id: ticket.ticket_id,
            ticket_secret: ticket.ticket_secret,
            peer_address: peer.address().to_owned(),
            peer_node: peer.node().to_string(),
            identity_dir: self.node.config.identity_dir.display().to_string(),
            max_blackout_ms: millis(order.max_blackout),
            // 0 would mean none.
            deadline_ms: left.map_or(0, |left| millis(left).max(1)),
            network_json: described.attachment_json()?,
            ..Default::default()
        };
        let engine_began = Instant::now();
        let engine = Engine::start(&order.record.shim_socket, request).await?;
        let watch = engine.watch().await?;
        Ok(Ready {
            described,
            engine,
            watch,
            hold,
            peer,
            engine_began,
        })
    }

    async fn hold(&self, peer: &Peer) -> Result<Streaming<pb::HoldEvent>, Failure> {
        let request = pb::HoldRequest {
            migration_id: self.departure.order.migration_id.clone(),
        };
        match peer.client().hold(request).await {
            Ok(response) => Ok(response.into_inner()),
            Err(status) => Err(peer.explain("hold the migration", &status).await),
        }
    }

    /// The image's blobs that the destination asked for.
    async fn send_blobs(
        &self,
        described: &Described,
        peer: &Peer,
        missing: &[String],
    ) -> Result<(), Early> {
        let mut blobs = Vec::new();
        for digest in missing {
            // Anything else in the content store is none of its business.
            let size = described.blob_size(digest).ok_or_else(|| {
                let text = format!(
                    "node {} asks for {digest:?}, which is not of the image",
                    peer.node()
                );
                Failure::new(Side::DestinationAgent, text)
            })?;
            blobs.push((digest, size));
        }
        let bytes_total = blobs.iter().map(|(_, size)| size).sum();
        let mut bytes_done = 0;
        for (digest, size) in blobs {
            self.departure.events.push(Event::ImageCopy(pb::ImageCopy {
                bytes_done,
                bytes_total,
            }));
            self.send_blob(described, peer, digest).await?;
            bytes_done += size;
        }
        if bytes_total > 0 {
            self.departure.events.push(Event::ImageCopy(pb::ImageCopy {
                bytes_done,
                bytes_total,
            }));
        }
        Ok(())
    }

    async fn send_blob(
        &self,
        described: &Described,
        peer: &Peer,
        digest: &str,
    ) -> Result<(), Early> {
        let containerd = self.node.containerd.namespace(&described.namespace)?;
        let mut pieces = containerd
            .read_blob(digest)
            .await
            .map_err(anyhow::Error::from)?;
        let (queue, chunks) = mpsc::channel(4);
        let first = pb::BlobChunk {
            migration_id: self.departure.order.migration_id.clone(),
            digest: digest.to_owned(),
            data: Default::default(),
        };
        // Owns the queue: its end is the blob's end.
        let read = async move {
            let mut next = first;
            loop {
                // A closed queue: the destination has it, or says why it does not
                // want it.
                if queue.send(next).await.is_err() {
                    return Ok(());
                }
                let Some(piece) = next_piece(&mut pieces, digest).await? else {
                    return Ok(());
                };
                let piece = bytes::Bytes::from(piece);
                let (mut at, length) = (0, piece.len());
                while length - at > CHUNK_BYTES {
                    let data = piece.slice(at..at + CHUNK_BYTES);
                    at += CHUNK_BYTES;
                    if queue
                        .send(pb::BlobChunk {
                            data,
                            ..Default::default()
                        })
                        .await
                        .is_err()
                    {
                        return Ok(());
                    }
                }
                next = pb::BlobChunk {
                    data: piece.slice(at..),
                    ..Default::default()
                };
            }
        };
        let chunks = tokio_stream::wrappers::ReceiverStream::new(chunks);
        let mut client = peer.client();
        let send = client.put_blob(chunks);
        let (read, sent) = tokio::join!(read, send);
        let read: Result<(), crate::containerd::CallError> = read;
        if let Err(status) = sent {
            // A reading error made the stream short: it comes first.
            read.map_err(anyhow::Error::from)?;
            return Err(peer.explain("take the image", &status).await.into());
        }
        Ok(read.map_err(anyhow::Error::from)?)
    }

    /// Relays the engine until its last word.
    async fn watch(&mut self, mut watched: Watched) -> epb::Finished {
        let (found_out, mut findings) = mpsc::channel::<Failure>(1);
        loop {
            let hold = async {
                match &mut watched.hold {
                    Some(hold) => hold.message().await,
                    None => std::future::pending().await,
                }
            };
            tokio::select! {
                biased;
                message = watched.watch.message() => match message {
                    Ok(Some(epb::Progress { event: Some(progress::Event::Finished(finished)), .. })) => {
                        return self.last_word(finished, watched).await;
                    }
                    Ok(Some(message)) => self.relay(message, watched.began),
                    Ok(None) => return self.engine_lost("its connection closed", watched).await,
                    Err(status) => return self.engine_lost(status.message(), watched).await,
                },
                event = hold => match event {
                    Ok(Some(pb::HoldEvent { event: Some(event) })) => match event {
                        pb::hold_event::Event::Holding(_) => {}
                        pb::hold_event::Event::Arrived(_) => {
                            watched.arrived = true;
                            watched.hold = None;
                        }
                        pb::hold_event::Event::TakenBack(_) => self.given_back(&watched).await,
                        pb::hold_event::Event::Failed(failed) => {
                            let failure = Failure::new(Side::from_name(&failed.side), failed.reason);
                            self.destination_lost(&mut watched, failure).await;
                        }
                    },
                    Ok(Some(_)) => {}
                    // It has said its last.
                    Ok(None) if watched.verdict.is_some() => watched.hold = None,
                    other => {
                        watched.hold = None;
                        let reason = match other {
                            Err(status) => status.message().to_owned(),
                            Ok(_) => "it ended the conversation".into(),
                        };
                        // Finding out takes seconds in which the engine goes on.
                        let (peer, found_out) = (watched.peer.clone(), found_out.clone());
                        tokio::spawn(async move {
                            drop(found_out.send(peer.lost(&reason).await).await);
                        });
                    }
                },
                Some(failure) = findings.recv() => self.destination_lost(&mut watched, failure).await,
                Some(order) = self.orders.recv() => {
                    let answer = watched.engine.cancel(&order.reason).await;
                    // Whoever asked may be gone.
                    drop(order.answer.send(answer));
                }
            }
        }
    }

    fn relay(&mut self, message: epb::Progress, began: Instant) {
        let Some(event) = message.event else { return };
        if let progress::Event::Phase(begun) = &event {
            let phase = Phase::ALL
                .into_iter()
                .find(|phase| phase.name() == begun.phase);
            match phase {
                // Both are over by the time there is an engine.
                Some(Phase::Negotiate | Phase::Prepare) => return,
                Some(phase) => self.phase = phase,
                None => {}
            }
        }
        let before = millis(began.duration_since(self.started));
        let at_ms = before.saturating_add(message.at_ms);
        self.departure.events.push(Event::Progress(epb::Progress {
            at_ms,
            event: Some(event),
        }));
    }

    /// The destination will not have the container: stop, if it is not too late.
    async fn destination_lost(&mut self, watched: &mut Watched, failure: Failure) {
        tracing::warn!(
            side = failure.side.name(),
            reason = failure.reason,
            phase = self.phase.name(),
            "the destination is lost"
        );
        let cancelled = watched.engine.cancel(&format!("{failure}")).await;
        watched.verdict = Some(failure);
        if let Err(status) = cancelled {
            // After the commit the engines settle it between themselves.
            tracing::warn!(reason = status.message(), "the engine goes on");
        }
    }

    /// Nothing of the container is left on the destination. An engine that has
    /// committed and got no answer since may take it back.
    async fn given_back(&self, watched: &Watched) {
        let reason = watched
            .verdict
            .as_ref()
            .map_or("", |verdict| &verdict.reason);
        if let Err(status) = watched.engine.hand_back(reason).await {
            // It has ended, or is about to.
            tracing::debug!(
                reason = status.message(),
                "the engine does not take the container back"
            );
        }
    }

    /// The engine's last word, with the better reason of two.
    async fn last_word(
        &mut self,
        mut finished: epb::Finished,
        mut watched: Watched,
    ) -> epb::Finished {
        if finished.outcome == "migrated" {
            return finished;
        }
        let engine_blames_source = finished.side.starts_with("source");
        if watched.verdict.is_none() && !engine_blames_source && finished.outcome == "failed" {
            self.hear_destination(&mut watched).await;
        }
        if finished.phase.is_empty() {
            finished.phase = self.phase.name().into();
        }
        if let Some(verdict) = watched.verdict {
            // Cancelled on our own order: to the user it failed.
            finished.outcome = "failed".into();
            finished.side = verdict.side.name().into();
            finished.reason = verdict.reason;
        }
        finished
    }

    /// What the destination has to say, if it does so soon.
    async fn hear_destination(&self, watched: &mut Watched) {
        let Some(hold) = watched.hold.as_mut() else {
            return;
        };
        let Ok(event) = tokio::time::timeout(VERDICT_TIMEOUT, hold.message()).await else {
            return;
        };
        use pb::hold_event::Event;
        match event {
            Ok(Some(pb::HoldEvent {
                event: Some(Event::Failed(failed)),
            })) => {
                let side = Side::from_name(&failed.side);
                watched.verdict = Some(Failure::new(side, failed.reason));
            }
            Ok(Some(pb::HoldEvent {
                event: Some(Event::Arrived(_)),
            })) => watched.arrived = true,
            Err(status) => watched.verdict = Some(watched.peer.lost(status.message()).await),
            Ok(_) => {}
        }
    }

    /// The engine is gone without a last word. Its shim knows whether the
    /// container is still ours, and the destination why it has not come.
    async fn engine_lost(&mut self, reason: &str, mut watched: Watched) -> epb::Finished {
        if watched.verdict.is_none() && !watched.arrived {
            self.hear_destination(&mut watched).await;
        }
        let record = &self.departure.order.record;
        let current = ContainerRecord::read(&self.node.run_dir, &record.namespace, &record.id);
        let runs = matches!(
            &current,
            Ok(Some(current)) if current.state == RunState::Running && process::is_alive(current.shim_pid)
        );
        let mut text = format!("the sending engine ended without a word ({reason})");
        if let Some(verdict) = &watched.verdict {
            text.push_str(&format!(
                ", and node {} says: {}",
                watched.peer.node(),
                verdict.reason
            ));
        }
        let ended = matches!(&current, Ok(Some(current)) if current.state == RunState::Stopped);
        if watched.arrived && ended {
            tracing::warn!(reason = text, "the container has moved all the same");
            return epb::Finished {
                outcome: "migrated".into(),
                ..Default::default()
            };
        }
        if runs && !watched.arrived {
            return self.finished("failed", &Failure::new(Side::SourceShim, text));
        }
        let state = match current {
            Ok(Some(current)) => current.state.name(),
            _ => "unknown",
        };
        text.push_str(&format!(
            "; the container is {state} here and {} on {}: look at both (sterna ps) before doing anything",
            if watched.arrived { "runs" } else { "may have arrived" },
            self.departure.order.destination,
        ));
        self.finished("unknown", &Failure::new(Side::SourceShim, text))
    }
}

/// The engine and the destination, while they work.
struct Watched {
    engine: Engine,
    watch: Streaming<epb::Progress>,
    /// None once it has said its last.
    hold: Option<Streaming<pb::HoldEvent>>,
    peer: Peer,
    began: Instant,
    /// Why the destination failed, where that is known.
    verdict: Option<Failure>,
    arrived: bool,
}

/// The reason of the first order to stop. Before there is an engine nothing
/// speaks against it.
async fn stopped(orders: &mut mpsc::Receiver<CancelOrder>) -> String {
    match orders.recv().await {
        Some(order) => {
            // Whoever asked may be gone.
            drop(order.answer.send(Ok(())));
            order.reason
        }
        None => std::future::pending().await,
    }
}

async fn passed(deadline: Option<Instant>) {
    match deadline {
        Some(deadline) => tokio::time::sleep_until(deadline).await,
        None => std::future::pending().await,
    }
}

fn millis(duration: Duration) -> u64 {
    u64::try_from(duration.as_millis()).unwrap_or(u64::MAX)
}
