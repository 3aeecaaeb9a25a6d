//! Brings a state that waits here to the pod that takes it.
//!
//! ```text
//!  negotiate   Begin on the pod's node
//!  prepare     Prepare there: its shim asks for the state
//!  send        everything, checked there (Prepared)
//!  take        THE COMMIT POINT: the record says whose it is; then Commit
//!  settle      the node's word, asked for until there is one
//! ```
//!
//! Up to the take every failure leaves the state where it is, for another attempt.
//! After it only the word of the node that has it counts, however long that takes.

use std::time::Duration;

use engine::park::{Delivery, Files, Word, ask};
use identity::NodeName;
use migrate::parked::{State, Taker};
use nodeapi::{PodContainer, Ticket};
use proto::agent as pb;
use proto::agent::hold_event::Event as Held;
use tonic::Streaming;

use super::Record;
use crate::node::Node;
use crate::peer::{Peer, resolve, within};
use crate::pods::service::to_wire;

/// As for a container that is sent from where it runs.
const BEGIN_TIMEOUT: Duration = Duration::from_secs(60);
const PREPARE_TIMEOUT: Duration = Duration::from_secs(900);
const ABORT_TIMEOUT: Duration = Duration::from_secs(90);

/// Between two questions to a node that has the state and does not answer.
const ASK_PAUSE: Duration = Duration::from_secs(1);

/// Who is to have a state.
#[derive(Debug, Clone)]
pub(crate) struct Target {
    pub(crate) pod: String,
    pub(crate) uid: String,
    pub(crate) node: NodeName,
}

/// Why a state was not delivered.
#[derive(Debug)]
pub(crate) enum Undelivered {
    /// It waits here as before; another attempt may do better.
    Again(String),
    /// No attempt will.
    Never(String),
}

impl From<anyhow::Error> for Undelivered {
    fn from(error: anyhow::Error) -> Self {
        Self::Again(format!("{error:#}"))
    }
}

fn again(reason: impl ToString) -> Undelivered {
    Undelivered::Again(reason.to_string())
}

/// Brings what has been given away to its end, if anything has; then whether the
/// pod has the state.
pub(crate) async fn settle(
    node: &Node,
    record: &mut Record,
    target: &str,
) -> Result<bool, Undelivered> {
    loop {
        let taker = match record.state.clone() {
            State::Restored { pod } if pod == target => return Ok(true),
            State::Restored { .. } => {
                return Err(Undelivered::Never("another pod has its state".into()));
            }
            State::Taken(taker) => taker,
            State::Parked => return Ok(false),
            State::Coming { .. } => return Err(again("its state is still being written")),
            State::Gone => return Err(Undelivered::Never("its state was removed".into())),
        };
        tracing::info!(node = taker.node, "asks what became of a state");
        let word = until_said(node, &taker).await;
        node.parked.settle(record, &word)?;
    }
}

async fn until_said(node: &Node, taker: &Taker) -> Word {
    let mut warned = false;
    loop {
        let peer = (taker.address.clone(), taker.node.as_str());
        match ask(peer, &node.config.identity_dir, &taker.ticket_id).await {
            Ok(word) => return word,
            Err(error) if std::mem::replace(&mut warned, true) => tracing::debug!("{error}"),
            Err(error) => tracing::warn!("asking until there is an answer: {error}"),
        }
        tokio::time::sleep(ASK_PAUSE).await;
    }
}

/// One attempt, for a state that nobody has. `called_off` ends it up to the take.
/// Returns the bytes that were sent.
pub(crate) async fn deliver(
    node: &Node,
    record: &mut Record,
    target: &Target,
    called_off: impl Future<Output = ()>,
) -> Result<u64, Undelivered> {
    let migration_id = uuid::Uuid::new_v4().to_string();
    let sending = send(node, record, target, &migration_id);
    let (peer, ticket, ready) = tokio::select! {
        sent = sending => sent?,
        () = called_off => return Err(again("it was called off")),
    };
    let taker = Taker {
        pod: target.uid.clone(),
        migration_id: migration_id.clone(),
        ticket_id: ticket.id,
        node: peer.node().to_string(),
        address: peer.address().to_owned(),
    };
    let sent_bytes = ready.sent_bytes;
    node.parked.take(record, taker.clone())?;
    let word = match ready.commit().await {
        Ok(word) => word,
        Err(error) => {
            tracing::warn!("committed, without an answer: {error}");
            until_said(node, &taker).await
        }
    };
    node.parked.settle(record, &word)?;
    match word {
        Word::Running => Ok(sent_bytes),
        Word::HandedBack(reason) => Err(again(format!(
            "it could not be restored on node {}: {reason}",
            target.node
        ))),
    }
}

type Sent = (Peer, Ticket, engine::park::Ready);

async fn send(
    node: &Node,
    record: &Record,
    target: &Target,
    migration_id: &str,
) -> Result<Sent, Undelivered> {
    resolve(node, &target.node).await.map_err(again)?;
    let peer = Peer::connect(node, &target.node).await.map_err(again)?;
    let pod = PodContainer {
        namespace: record.pod.namespace.clone(),
        pod: target.pod.clone(),
        uid: target.uid.clone(),
        container: record.pod.container.clone(),
    };
    let json = |value| serde_json::to_vec(value).map_err(again);
    let offer = pb::BeginRequest {
        migration_id: migration_id.to_owned(),
        namespace: record.namespace.clone(),
        facts_json: json(&record.facts)?.into(),
        needs_json: json(&record.needs)?.into(),
        pod: Some(to_wire(&pod)),
        ..Default::default()
    };
    let begun = peer.client().begin(within(BEGIN_TIMEOUT, offer)).await;
    let begun = match begun {
        Ok(begun) => begun.into_inner(),
        Err(status) => return Err(again(peer.explain("decide on the state", &status).await)),
    };
    if !begun.refusals.is_empty() {
        let texts = begun.refusals.iter().map(|reason| reason.text.as_str());
        return Err(again(texts.collect::<Vec<_>>().join("; ")));
    }
    let abort = Abort {
        peer: Some(peer.clone()),
        migration_id: migration_id.to_owned(),
    };
    let sent = prepared(node, &peer, record, migration_id).await;
    if sent.is_ok() {
        abort.not_needed();
    }
    let (ticket, ready) = sent?;
    Ok((peer, ticket, ready))
}

async fn prepared(
    node: &Node,
    peer: &Peer,
    record: &Record,
    migration_id: &str,
) -> Result<(Ticket, engine::park::Ready), Undelivered> {
    let request = pb::HoldRequest {
        migration_id: migration_id.to_owned(),
    };
    let mut hold = match peer.client().hold(request).await {
        Ok(hold) => hold.into_inner(),
        Err(status) => return Err(again(peer.explain("hold the migration", &status).await)),
    };
    let sending = async {
        let request = pb::PrepareRequest {
            migration_id: migration_id.to_owned(),
        };
        let mut client = peer.client();
        let prepared = client.prepare(within(PREPARE_TIMEOUT, request)).await;
        let ticket = match prepared {
            Ok(ticket) => ticket.into_inner(),
            Err(status) => return Err(again(peer.explain("prepare for the state", &status).await)),
        };
        let ticket = Ticket {
            id: ticket.ticket_id,
            secret: ticket.ticket_secret,
        };
        let delivery = Delivery::new(
            Files::at(node.parked.directory(&record.pod)?),
            migration_id.to_owned(),
            (peer.address().to_owned(), peer.node().as_str()),
            &node.config.identity_dir,
            &ticket,
        );
        let ready = async { delivery?.until_prepared().await };
        match ready.await {
            Ok(ready) => Ok((ticket, ready)),
            Err(error) => {
                let may_pass = error.may_pass();
                let text = format!("{:#}", anyhow::Error::from(error));
                Err(match may_pass {
                    true => Undelivered::Again(text),
                    false => Undelivered::Never(text),
                })
            }
        }
    };
    tokio::select! {
        sent = sending => sent,
        reason = failure(&mut hold) => Err(again(reason)),
    }
}

/// Resolves once the other node says that nothing comes of it.
async fn failure(hold: &mut Streaming<pb::HoldEvent>) -> String {
    loop {
        match hold.message().await {
            Ok(Some(pb::HoldEvent {
                event: Some(Held::Failed(failed)),
            })) => return failed.reason,
            Ok(Some(_)) => {}
            Ok(None) => return "the other node ended the conversation".into(),
            Err(status) => return status.message().to_owned(),
        }
    }
}

/// Has the other node take back what it prepared, also where an attempt is dropped.
struct Abort {
    peer: Option<Peer>,
    migration_id: String,
}

impl Abort {
    fn not_needed(mut self) {
        self.peer = None;
    }
}

impl Drop for Abort {
    fn drop(&mut self) {
        let Some(peer) = self.peer.take() else { return };
        let request = pb::AbortRequest {
            migration_id: std::mem::take(&mut self.migration_id),
            reason: "the state did not get there".into(),
        };
        tokio::spawn(async move {
            // A node that is away finds out by itself.
            drop(peer.client().abort(within(ABORT_TIMEOUT, request)).await);
        });
    }
}
