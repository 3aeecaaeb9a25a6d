//! What other nodes' sternads may ask: service `sterna.agent.v1.Peer`.

use std::pin::Pin;
use std::sync::Arc;
use std::time::Duration;

use futures::Stream;
use proto::agent as pb;
use proto::agent::peer_server::Peer;
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Request, Response, Status, Streaming};

use crate::arrivals::{Arrivals, Outcome, admission, internal, plan};
use crate::facts;
use crate::listener::PeerNode;
use crate::node::Node;

/// A blob that stalls for this long has lost its sender.
const CHUNK_TIMEOUT: Duration = Duration::from_secs(30);

/// Largest piece of a blob: `BlobChunk` in agent.proto.
const CHUNK_LIMIT_BYTES: usize = 1 << 20;

/// Longest text that a peer may leave in our log.
const REASON_LIMIT_BYTES: usize = 1000;

#[derive(Debug)]
pub(crate) struct PeerService {
    node: Arc<Node>,
    arrivals: Arc<Arrivals>,
}

impl PeerService {
    pub(crate) fn new(node: Arc<Node>, arrivals: Arc<Arrivals>) -> Self {
        Self { node, arrivals }
    }
}

/// The node that asks: it has proved its name before its first byte got here.
fn caller<T>(request: &Request<T>) -> Result<Arc<str>, Status> {
    request
        .extensions()
        .get::<PeerNode>()
        .map(|node| Arc::clone(&node.0))
        .ok_or_else(|| Status::unauthenticated("no certificate was shown"))
}

#[tonic::async_trait]
impl Peer for PeerService {
    async fn facts(
        &self,
        request: Request<pb::FactsRequest>,
    ) -> Result<Response<pb::FactsResponse>, Status> {
        caller(&request)?;
        let facts = facts::gather(&self.node).await.map_err(internal)?;
        let facts_json = serde_json::to_vec(&facts).map_err(|error| internal(error.into()))?;
        Ok(Response::new(pb::FactsResponse {
            node: self.node.name.to_string(),
            facts_json: facts_json.into(),
        }))
    }

    async fn check(
        &self,
        request: Request<pb::CheckRequest>,
    ) -> Result<Response<pb::CheckResponse>, Status> {
        caller(&request)?;
        let request = request.into_inner();
        let invalid = |error: anyhow::Error| Status::invalid_argument(format!("{error:#}"));
        let facts = plan::json("facts", &request.facts_json)
            .map_err(invalid)?
            .ok_or_else(|| Status::invalid_argument("no facts were sent"))?;
        let needs = plan::json("needs", &request.needs_json).map_err(invalid)?;
        let refusals = admission::negotiate(&self.node, &facts, needs.as_ref())
            .await
            .map_err(internal)?;
        Ok(Response::new(pb::CheckResponse { refusals }))
    }

    async fn begin(
        &self,
        request: Request<pb::BeginRequest>,
    ) -> Result<Response<pb::BeginResponse>, Status> {
        let source = caller(&request)?;
        self.arrivals
            .begin(&source, request.into_inner())
            .await
            .map(Response::new)
    }

    async fn put_blob(
        &self,
        request: Request<Streaming<pb::BlobChunk>>,
    ) -> Result<Response<pb::PutBlobResponse>, Status> {
        let source = caller(&request)?;
        let mut chunks = request.into_inner();
        let first = next_chunk(&mut chunks)
            .await?
            .ok_or_else(|| Status::invalid_argument("no blob was named"))?;
        let (writer, size) = self
            .arrivals
            .open_blob(&source, &first.migration_id, &first.digest)
            .await?;
        let Some(mut writer) = writer else {
            return Ok(Response::new(pb::PutBlobResponse {}));
        };
        let mut received = 0;
        let mut next = Some(first);
        while let Some(chunk) = next {
            received += chunk.data.len() as u64;
            if received > size || chunk.data.len() > CHUNK_LIMIT_BYTES {
                return Err(Status::invalid_argument(
                    "the blob is longer than announced",
                ));
            }
            if !chunk.data.is_empty() {
                writer
                    .write(chunk.data.to_vec())
                    .await
                    .map_err(|error| internal(error.into()))?;
            }
            next = next_chunk(&mut chunks).await?;
        }
        if received != size {
            return Err(Status::invalid_argument(
                "the blob is shorter than announced",
            ));
        }
        writer
            .commit()
            .await
            .map_err(|error| internal(error.into()))?;
        Ok(Response::new(pb::PutBlobResponse {}))
    }

    async fn prepare(
        &self,
        request: Request<pb::PrepareRequest>,
    ) -> Result<Response<pb::PrepareResponse>, Status> {
        let source = caller(&request)?;
        let ticket = self
            .arrivals
            .prepare(&source, &request.into_inner().migration_id)
            .await?;
        Ok(Response::new(pb::PrepareResponse {
            ticket_id: ticket.id,
            ticket_secret: ticket.secret,
        }))
    }

    type HoldStream = Pin<Box<dyn Stream<Item = Result<pb::HoldEvent, Status>> + Send>>;

    async fn hold(
        &self,
        request: Request<pb::HoldRequest>,
    ) -> Result<Response<Self::HoldStream>, Status> {
        let source = caller(&request)?;
        let holder = self
            .arrivals
            .hold(&source, &request.into_inner().migration_id)
            .await?;
        let (events, queue) = mpsc::channel(2);
        tokio::spawn(async move {
            let holding = pb::hold_event::Event::Holding(pb::Holding {});
            if events
                .send(Ok(pb::HoldEvent {
                    event: Some(holding),
                }))
                .await
                .is_err()
            {
                return;
            }
            let outcome = tokio::select! {
                outcome = holder.outcome() => outcome,
                () = events.closed() => return,
            };
            let failed = matches!(outcome, Outcome::Failed(_));
            let outcome = pb::HoldEvent {
                event: Some(event(outcome)),
            };
            if events.send(Ok(outcome)).await.is_err() || !failed {
                return;
            }
            let taken_back = tokio::select! {
                taken_back = holder.taken_back() => taken_back,
                () = events.closed() => return,
            };
            if taken_back {
                let event = pb::hold_event::Event::TakenBack(pb::TakenBack {});
                // A caller that is gone asks again or not at all.
                drop(events.send(Ok(pb::HoldEvent { event: Some(event) })).await);
            }
        });
        Ok(Response::new(Box::pin(ReceiverStream::new(queue))))
    }

    async fn abort(
        &self,
        request: Request<pb::AbortRequest>,
    ) -> Result<Response<pb::AbortResponse>, Status> {
        let source = caller(&request)?;
        let request = request.into_inner();
        let reason = clipped(&request.reason);
        self.arrivals
            .abort(&source, &request.migration_id, reason)
            .await?;
        Ok(Response::new(pb::AbortResponse {}))
    }
}

fn event(outcome: Outcome) -> pb::hold_event::Event {
    match outcome {
        Outcome::Arrived { pid } => pb::hold_event::Event::Arrived(pb::Arrived { pid }),
        Outcome::Failed(failure) => pb::hold_event::Event::Failed(pb::ArrivalFailed {
            side: failure.side.name().into(),
            reason: failure.reason,
        }),
    }
}

async fn next_chunk(
    chunks: &mut Streaming<pb::BlobChunk>,
) -> Result<Option<pb::BlobChunk>, Status> {
    tokio::time::timeout(CHUNK_TIMEOUT, chunks.message())
        .await
        .map_err(|_| Status::deadline_exceeded("the blob stalled"))?
}

fn clipped(text: &str) -> &str {
    let mut end = text.len().min(REASON_LIMIT_BYTES);
    while !text.is_char_boundary(end) {
        end -= 1;
    }
    &text[..end]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_long_reason_is_cut_between_characters() {
        let text = "ü".repeat(REASON_LIMIT_BYTES);
        assert_eq!(clipped(&text).len(), REASON_LIMIT_BYTES);
        assert_eq!(clipped(&format!("x{text}")).len(), REASON_LIMIT_BYTES - 1);
        assert_eq!(clipped("short"), "short");
    }
}
