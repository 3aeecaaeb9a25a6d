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

use anyhow::Context as _;
use migrate::Phase;
use nodeapi::Ticket;
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
use super::note::Note;
use super::watch::Watch;
use super::{CancelOrder, Departure, Order};
use crate::arrivals::prepare::new_ticket;
use crate::containerd::content::next_piece;
use crate::doctor::obstacles;
use crate::facts;
use crate::node::Node;
use crate::parked::Expected;
use crate::peer::{Peer, resolve, within};
use crate::side::{Failure, Side};
use crate::startup::is_deserted;

/// The destination gathers its facts and asks its containerd a dozen things.
const BEGIN_TIMEOUT: Duration = Duration::from_secs(60);

/// Unpacking a large image on a slow disk.
const PREPARE_TIMEOUT: Duration = Duration::from_secs(900);

/// Taking back: killing, unmounting, deleting.
const ABORT_TIMEOUT: Duration = Duration::from_secs(90);

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
    note: Note,
    engine: Engine,
    events: Streaming<epb::Progress>,
    /// None where its state is to wait on this node.
    hold: Option<Streaming<pb::HoldEvent>>,
    began_ms: u64,
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
                take_back(self.departure, self.peer.take(), "refused").await;
                return Err(reasons);
            }
            Err(Early::Failed(failure)) => {
                take_back(self.departure, self.peer.take(), &failure.reason).await;
                return Ok(self.finished("failed", &failure));
            }
            Err(Early::Cancelled(reason)) => {
                take_back(self.departure, self.peer.take(), &reason).await;
                return Ok(self.finished("cancelled", &Failure::new(Side::Source, reason)));
            }
        };
        let note = ready.note;
        let mut watch = Watch::new(self.node, self.departure, &mut self.orders);
        watch.peer = self.peer.clone();
        watch.hold = ready.hold;
        watch.began_ms = ready.began_ms;
        let finished = watch.follow(ready.engine, ready.events).await;
        let mut finished =
            conclude(self.node, self.departure, &note, self.peer.take(), finished).await;
        if let Some(summary) = &mut finished.summary {
            // The engine began when this migration was a while old.
            summary.total_ms = millis(self.started.elapsed());
            summary
                .migration_id
                .clone_from(&self.departure.order.migration_id);
        }
        Ok(finished)
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
        if order.parks_on(self.node) {
            return self.prepare_to_park(deadline).await;
        }
        if let Err(text) = resolve(self.node, &order.destination).await {
            return Err(Early::Refused(vec![pb::Reason {
                subject: "node".into(),
                text,
            }]));
        }
        let described = describe(self.node, &order.record, order.into_pod.as_deref()).await?;
        let obstacles = obstacles(&described);
        if !obstacles.is_empty() {
            return Err(Early::Refused(obstacles));
        }
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
        let ticket = Ticket {
            id: ticket.ticket_id,
            secret: ticket.ticket_secret,
        };
        let to = (peer.address().to_owned(), peer.node().to_string());
        self.start_engine(&described, &ticket, to, Some(hold), deadline)
            .await
    }

    /// Negotiate and prepare where the destination is this node's disk.
    async fn prepare_to_park(&mut self, deadline: Option<Instant>) -> Result<Ready, Early> {
        let order = &self.departure.order;
        let described = describe(self.node, &order.record, order.into_pod.as_deref()).await?;
        let obstacles = obstacles(&described);
        if !obstacles.is_empty() {
            return Err(Early::Refused(obstacles));
        }
        let facts = facts::gather(self.node).await?;
        self.enter(Phase::Prepare);
        let (ticket, node) = (new_ticket()?, self.node.name.to_string());
        let pod = described.pod().context("it belongs to no pod")?;
        let expected = Expected {
            pod,
            namespace: &order.record.namespace,
            id: &order.record.id,
            migration_id: &order.migration_id,
            node: &node,
            facts: serde_json::to_value(&facts).map_err(anyhow::Error::from)?,
            needs: serde_json::to_value(&described.needs).map_err(anyhow::Error::from)?,
        };
        self.node.parked.expect(expected, &ticket)?;
        let to = (self.node.own_address(), node);
        self.start_engine(&described, &ticket, to, None, deadline)
            .await
    }

    /// Has the container's shim start to send, to the node of this address and name.
    async fn start_engine(
        &self,
        described: &Described,
        ticket: &Ticket,
        (peer_address, peer_node): (String, String),
        hold: Option<Streaming<pb::HoldEvent>>,
        deadline: Option<Instant>,
    ) -> Result<Ready, Early> {
        let order = &self.departure.order;
        let left = deadline.map(|deadline| deadline.saturating_duration_since(Instant::now()));
        let request = SendRequest {
            container_id: order.record.id.clone(),
            migration_id: order.migration_id.clone(),
            ticket_id: ticket.id.clone(),
            ticket_secret: ticket.secret.clone(),
            peer_address,
            peer_node,
            identity_dir: self.node.config.identity_dir.display().to_string(),
            max_blackout_ms: millis(order.max_blackout),
            // 0 would mean none.
            deadline_ms: left.map_or(0, |left| millis(left).max(1)),
            network_json: described.attachment_json()?,
            ..Default::default()
        };
        let note = described.note(order);
        note.write(self.node)?;
        let began_ms = millis(self.started.elapsed());
        let started = async {
            let engine = Engine::start(&order.record.shim_socket, request).await?;
            let events = engine.watch().await?;
            Ok::<_, Failure>((engine, events))
        };
        match started.await {
            Ok((engine, events)) => Ok(Ready {
                note,
                engine,
                events,
                hold,
                began_ms,
            }),
            Err(failure) => {
                note.remove(self.node);
                Err(failure.into())
            }
        }
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
}

/// Nothing that did not come to wait here is left of it; also where nobody knows how
/// it ended: a source that asks is told then that its container goes on.
pub(super) fn give_up_parking(node: &Node, order: &Order) {
    if let Err(error) = node.parked.end(&order.migration_id) {
        tracing::error!("cannot give up a state that was coming: {error:#}");
    }
}

/// Does what the last word asks for: removes the container here, or has the
/// destination remove what it prepared for it.
pub(super) async fn conclude(
    node: &Node,
    departure: &Departure,
    note: &Note,
    peer: Option<Peer>,
    finished: epb::Finished,
) -> epb::Finished {
    remove_deserted_socket(node, &note.migration_id);
    match finished.outcome.as_str() {
        // Its kubelet sees that it ended, and removes it.
        "migrated" if note.into_pod.is_some() => {}
        "migrated" => {
            for problem in leave(node, note).await {
                tracing::warn!(problem, "something is left of a container that went away");
                let text = format!(
                    "the container runs on {}, but here: {problem}",
                    note.destination
                );
                departure.events.push(Event::Notice(text));
            }
        }
        // N.B. only the engine's own word, or its shim's, that the container is
        // this node's: what the destination removes may be the only copy else.
        "failed" | "cancelled" | "handed-back" => {
            take_back(departure, peer, &finished.reason).await
        }
        // People look, and the next sternad does.
        _ => return finished,
    }
    note.remove(node);
    finished
}

/// Has the destination remove what it prepared. It finds out by itself if it
/// cannot be told: its engine has lost its source.
async fn take_back(departure: &Departure, peer: Option<Peer>, reason: &str) {
    let Some(peer) = peer else { return };
    let request = pb::AbortRequest {
        migration_id: departure.order.migration_id.clone(),
        reason: reason.to_owned(),
    };
    // A destination that is away must not hold up the result.
    if peer.probe().await.is_err() {
        return;
    }
    if let Err(status) = peer.client().abort(within(ABORT_TIMEOUT, request)).await {
        let reason = status.message();
        tracing::warn!(peer = %peer.node(), reason, "cannot have the destination take back");
    }
}

/// An engine that was killed could not remove its own.
fn remove_deserted_socket(node: &Node, migration_id: &str) {
    let socket = node.run_dir.engine_socket(migration_id);
    if is_deserted(&socket)
        && let Err(error) = std::fs::remove_file(&socket)
    {
        tracing::warn!(%error, "cannot remove {}", socket.display());
    }
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
