//! What a source hears that asks for a ticket whose engine is gone: the arrival
//! record's word, in the engine's place.
//!
//! The ticket's secret is gone with the engine. It is not needed: who asks has shown
//! the certificate of the node that the ticket was made for, and is told one thing.

use std::io;
use std::sync::Arc;
use std::time::Duration;

use futures::stream::BoxStream;
use migrate::commit::Answer;
use nodeapi::{FileError, RunDir};
use proto::migration as pb;
use proto::migration::destination_message::Message as ToSource;
use proto::migration::migration_server::{Migration, MigrationServer};
use proto::migration::source_message::Message as FromSource;
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Request, Response, Status, Streaming};

use crate::listener::PeerStream;
use crate::node::Node;

/// From the session to the question.
const QUESTION_TIMEOUT: Duration = Duration::from_secs(10);

/// A source closes its connection as soon as it has been told.
const CONNECTION_LIMIT: Duration = Duration::from_secs(60);

/// The record of one ticket as it stands whenever somebody asks.
#[derive(Debug, Clone)]
struct Answers {
    node: Arc<Node>,
    ticket_id: Arc<str>,
}

/// Whose connections are answered for this ticket; none: it is not known here.
pub(crate) fn source_node(dir: &RunDir, ticket_id: &str) -> Result<Option<String>, FileError> {
    Ok(nodeapi::arrival::read(dir, ticket_id)?.map(|record| record.source_node))
}

/// Answers on one connection, whose other end has proved to be the ticket's source.
pub(crate) async fn serve(
    node: Arc<Node>,
    ticket_id: &str,
    stream: PeerStream,
) -> anyhow::Result<()> {
    let answers = Answers {
        node,
        ticket_id: ticket_id.into(),
    };
    tonic::transport::Server::builder()
        .timeout(QUESTION_TIMEOUT)
        .max_connection_age(CONNECTION_LIMIT)
        .add_service(MigrationServer::new(answers))
        .serve_with_incoming(tokio_stream::once(Ok::<_, io::Error>(stream)))
        .await?;
    Ok(())
}

impl Answers {
    fn answer(&self) -> Result<ToSource, Status> {
        let record = nodeapi::arrival::read(&self.node.run_dir, &self.ticket_id)
            .map_err(|error| Status::internal(format!("{:#}", anyhow::Error::from(error))))?;
        let answer = migrate::arrival::answer(record.as_ref());
        tracing::info!(ticket_id = &*self.ticket_id, ?answer, "a source asked");
        match answer {
            Answer::Running => Ok(ToSource::Running(pb::Running::default())),
            Answer::HandedBack => Ok(ToSource::HandedBack(pb::HandedBack {
                reason: format!("node {} vouches that it does not run there", self.node.name),
            })),
            Answer::NotYet | Answer::Unknown => {
                Err(Status::unavailable("not decided yet: ask again"))
            }
        }
    }

    async fn hear(&self, mut messages: Streaming<pb::SourceMessage>) -> Result<ToSource, Status> {
        let first = tokio::time::timeout(QUESTION_TIMEOUT, messages.message())
            .await
            .map_err(|_| Status::deadline_exceeded("nothing was asked"))??;
        match first.and_then(|first| first.message) {
            Some(FromSource::Commit(_)) => self.answer(),
            _ => Err(Status::failed_precondition(
                "the engine of this migration is gone",
            )),
        }
    }
}

#[tonic::async_trait]
impl Migration for Answers {
    type SessionStream = BoxStream<'static, Result<pb::DestinationMessage, Status>>;
    type PagesStream = BoxStream<'static, Result<pb::PageAck, Status>>;
    type FilesStream = BoxStream<'static, Result<pb::FilesAck, Status>>;

    async fn session(
        &self,
        request: Request<Streaming<pb::SourceMessage>>,
    ) -> Result<Response<Self::SessionStream>, Status> {
        // The question comes when the session is open.
        let (to_source, answer) = mpsc::channel(1);
        let this = self.clone();
        tokio::spawn(async move {
            let heard = this.hear(request.into_inner()).await;
            let message = heard.map(|message| pb::DestinationMessage {
                message: Some(message),
            });
            // Who is gone asks again.
            drop(to_source.send(message).await);
        });
        Ok(Response::new(Box::pin(ReceiverStream::new(answer))))
    }

    async fn pages(
        &self,
        _request: Request<Streaming<pb::PageBatch>>,
    ) -> Result<Response<Self::PagesStream>, Status> {
        Err(Status::failed_precondition(
            "the engine of this migration is gone",
        ))
    }

    async fn files(
        &self,
        _request: Request<Streaming<pb::FileItem>>,
    ) -> Result<Response<Self::FilesStream>, Status> {
        Err(Status::failed_precondition(
            "the engine of this migration is gone",
        ))
    }
}
