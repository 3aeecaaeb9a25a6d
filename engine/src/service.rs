//! The receiver's gRPC service: checks the ticket, puts pages and files where
//! they belong, counts them, and hands each session to the receiver's own loop.

use std::collections::HashMap;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError};

use futures::stream::BoxStream;
use layer::{Limits, Merge, Placer};
use nodeapi::Ticket;
use pages::Staging;
use proto::migration as pb;
use proto::migration::migration_server::Migration;
use tokio::sync::{mpsc, watch};
use tokio_stream::StreamExt;
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Request, Response, Status, Streaming};

use crate::files::{Tree, TreePlacer};
use crate::link::TICKET_KEY;
use crate::wire;

/// Sessions that may wait for the receiver: one, and one that replaces it.
const SESSIONS: usize = 2;
/// Page streams that a source may open.
const MAX_STREAMS: u32 = 64;

/// One session as the receiver's loop sees it.
#[derive(Debug)]
pub(crate) struct Session {
    pub(crate) from_source: Streaming<pb::SourceMessage>,
    pub(crate) to_source: mpsc::Sender<Result<pb::DestinationMessage, Status>>,
}

/// What has arrived so far.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct Arrived {
    pub(crate) batches: HashMap<u32, u64>,
    pub(crate) tree_items: HashMap<Tree, u64>,
    /// The first thing that went wrong with what arrived.
    pub(crate) failure: Option<String>,
}

impl Arrived {
    /// Whether everything in the source's account is here.
    pub(crate) fn covers(&self, account: &pb::Final) -> bool {
        account.streams.iter().all(|total| {
            self.batches.get(&total.stream).copied().unwrap_or_default() == total.batches
        }) && account.trees.iter().all(|total| {
            let items = |tree| self.tree_items.get(&tree).copied().unwrap_or_default();
            Tree::of_total(total).is_ok_and(|tree| items(tree) == total.items)
        })
    }
}

/// Where the trees of an incoming container are built.
#[derive(Debug, Clone)]
pub(crate) struct Trees {
    pub(crate) layer: Option<PathBuf>,
    pub(crate) images: PathBuf,
    /// In the order in which the source numbers them.
    pub(crate) volumes: Vec<Arc<Merge>>,
}

#[derive(Debug, Clone)]
pub(crate) struct Service(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    ticket: Ticket,
    staging: Arc<Staging>,
    trees: Trees,
    arrived: watch::Sender<Arrived>,
    open: Mutex<Open>,
    sessions: mpsc::Sender<Session>,
}

/// Streams that were opened: each may be opened once.
#[derive(Debug, Default)]
struct Open {
    pages: Vec<u32>,
    trees: Vec<Tree>,
    session: bool,
    /// From now on the source may have committed: if it loses its session, it
    /// asks in another.
    undecided: bool,
}

impl Service {
    pub(crate) fn new(
        ticket: Ticket,
        staging: Arc<Staging>,
        trees: Trees,
    ) -> (Self, watch::Receiver<Arrived>, mpsc::Receiver<Session>) {
        let (sessions, opened) = mpsc::channel(SESSIONS);
        let arrived = watch::Sender::new(Arrived::default());
        let account = arrived.subscribe();
        let inner = Inner {
            ticket,
            staging,
            trees,
            arrived,
            open: Mutex::default(),
            sessions,
        };
        (Self(Arc::new(inner)), account, opened)
    }

    /// Lets a source that loses its session open another: before this, a ticket
    /// is good for one.
    pub(crate) fn admit_later_sessions(&self) {
        let mut open = self.0.open.lock().unwrap_or_else(PoisonError::into_inner);
        open.undecided = true;
    }

    fn authorise<T>(&self, request: &Request<T>) -> Result<(), Status> {
        let secret = request
            .metadata()
            .get(TICKET_KEY)
            .map(|value| value.as_bytes());
        match secret {
            Some(secret)
                if migrate::ticket::secrets_equal(secret, self.0.ticket.secret.as_bytes()) =>
            {
                Ok(())
            }
            _ => Err(Status::permission_denied(
                "this call does not carry the ticket",
            )),
        }
    }

    /// Takes the right to open a stream that may be opened once.
    fn claim(&self, take: impl FnOnce(&mut Open) -> bool) -> Result<(), Status> {
        let mut open = self.0.open.lock().unwrap_or_else(PoisonError::into_inner);
        if take(&mut open) {
            Ok(())
        } else {
            Err(Status::already_exists(
                "this was opened before with the same ticket, or is one too many",
            ))
        }
    }
}

impl Inner {
    fn fail(&self, reason: &str) {
        self.arrived.send_if_modified(|arrived| {
            let first = arrived.failure.is_none();
            if first {
                arrived.failure = Some(reason.to_owned());
            }
            first
        });
    }

    /// Places one batch and counts it.
    fn stage(&self, batch: pb::PageBatch, stream: u32, expected: u64) -> Result<(), Status> {
        if batch.stream != stream {
            return Err(Status::invalid_argument("a batch of another stream"));
        }
        let batch = wire::batch_from_wire(batch, expected)
            .map_err(|error| Status::invalid_argument(error.to_string()))?;
        self.staging
            .apply(&batch)
            .map_err(|error| Status::failed_precondition(chain(&error)))?;
        self.arrived.send_modify(|arrived| {
            arrived.batches.insert(stream, expected);
        });
        Ok(())
    }
}

fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(error) = source {
        text = format!("{text}: {error}");
        source = error.source();
    }
    text
}

#[tonic::async_trait]
impl Migration for Service {
    type SessionStream = BoxStream<'static, Result<pb::DestinationMessage, Status>>;
    type PagesStream = BoxStream<'static, Result<pb::PageAck, Status>>;
    type FilesStream = BoxStream<'static, Result<pb::FilesAck, Status>>;

    async fn session(
        &self,
        request: Request<Streaming<pb::SourceMessage>>,
    ) -> Result<Response<Self::SessionStream>, Status> {
        self.authorise(&request)?;
        self.claim(|open| !std::mem::replace(&mut open.session, true) || open.undecided)?;
        let (to_source, answers) = mpsc::channel(8);
        self.0
            .sessions
            .try_send(Session {
                from_source: request.into_inner(),
                to_source,
            })
            .map_err(|_| Status::already_exists("another session is open"))?;
        Ok(Response::new(Box::pin(ReceiverStream::new(answers))))
    }

    async fn pages(
        &self,
        request: Request<Streaming<pb::PageBatch>>,
    ) -> Result<Response<Self::PagesStream>, Status> {
        self.authorise(&request)?;
        let mut batches = request.into_inner();
        let (acks, answers) = mpsc::channel(64);
        let inner = Arc::clone(&self.0);
        let service = self.clone();
        tokio::spawn(async move {
            let mut stream = None;
            let mut sequence = 0;
            let failure = loop {
                let batch = match batches.next().await {
                    None => return,
                    Some(Err(status)) => break status,
                    Some(Ok(batch)) => batch,
                };
                // The first batch names the stream.
                let number = match stream {
                    Some(number) => number,
                    None => {
                        let number = batch.stream;
                        let claimed = service.claim(|open| {
                            let fresh = number < MAX_STREAMS && !open.pages.contains(&number);
                            open.pages.push(number);
                            fresh
                        });
                        if let Err(status) = claimed {
                            break status;
                        }
                        *stream.insert(number)
                    }
                };
                sequence += 1;
                // One copy of at most a MiB: shorter than the way to another thread.
                if let Err(status) = inner.stage(batch, number, sequence) {
                    break status;
                }
                if acks.send(Ok(pb::PageAck { sequence })).await.is_err() {
                    break Status::cancelled("the source stopped listening");
                }
            };
            inner.fail(&format!("memory: {}", failure.message()));
            // The source may be gone already.
            drop(acks.send(Err(failure)).await);
        });
        Ok(Response::new(Box::pin(ReceiverStream::new(answers))))
    }

    async fn files(
        &self,
        request: Request<Streaming<pb::FileItem>>,
    ) -> Result<Response<Self::FilesStream>, Status> {
        self.authorise(&request)?;
        let mut items = request.into_inner();
        let (acks, answers) = mpsc::channel(4);
        let inner = Arc::clone(&self.0);
        let service = self.clone();
        let (queue, mut queued) = mpsc::channel::<pb::FileItem>(16);
        let placing = tokio::task::spawn_blocking({
            let (inner, acks) = (Arc::clone(&inner), acks.clone());
            move || -> Result<(), Status> {
                let mut placer: Option<TreePlacer> = None;
                while let Some(item) = queued.blocking_recv() {
                    let tree = Tree::of_item(&item)
                        .map_err(|error| Status::invalid_argument(error.to_string()))?;
                    let placer = match &mut placer {
                        Some(placer) => placer,
                        None => placer.insert(service.placer(tree)?),
                    };
                    let flush = placer
                        .apply(item)
                        .map_err(|error| Status::failed_precondition(chain(&error)))?;
                    let items = placer.items();
                    inner.arrived.send_modify(|arrived| {
                        arrived.tree_items.insert(tree, items);
                    });
                    if let Some(flush) = flush
                        && acks.blocking_send(Ok(pb::FilesAck { flush })).is_err()
                    {
                        return Err(Status::cancelled("the source stopped listening"));
                    }
                }
                Ok(())
            }
        });
        tokio::spawn(async move {
            let mut lost = None;
            while let Some(item) = items.next().await {
                match item {
                    Ok(item) => {
                        if queue.send(item).await.is_err() {
                            break; // the placer says why
                        }
                    }
                    Err(status) => {
                        lost = Some(status);
                        break;
                    }
                }
            }
            drop(queue);
            let placed = placing
                .await
                .unwrap_or_else(|_| Err(Status::internal("placing failed")));
            if let Some(failure) = placed.err().or(lost) {
                inner.fail(&format!("files: {}", failure.message()));
                drop(acks.send(Err(failure)).await);
            }
        });
        Ok(Response::new(Box::pin(ReceiverStream::new(answers))))
    }
}

impl Service {
    fn placer(&self, tree: Tree) -> Result<TreePlacer, Status> {
        self.claim(|open| {
            let fresh = !open.trees.contains(&tree);
            if fresh {
                open.trees.push(tree);
            }
            fresh
        })?;
        let trees = &self.0.trees;
        let volume = |number: u32| trees.volumes.get(usize::try_from(number).ok()?);
        let placer = match tree {
            Tree::Layer => trees
                .layer
                .as_ref()
                .map(|root| Placer::new(root, Limits::default())),
            Tree::Images => Some(Placer::new(&trees.images, Limits::images())),
            Tree::Volume(number) => volume(number).map(|merge| merge.placer(Limits::default())),
        };
        let placer = placer
            .ok_or_else(|| Status::invalid_argument("no such tree here"))?
            .map_err(|error| Status::failed_precondition(chain(&error)))?;
        Ok(TreePlacer::new(tree, placer))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_account_is_covered_when_every_stream_and_tree_is() {
        let account = pb::Final {
            streams: vec![pb::StreamTotal {
                stream: 0,
                batches: 2,
            }],
            trees: vec![pb::TreeTotal {
                tree: pb::FileTree::Images.into(),
                items: 3,
                volume: 0,
            }],
            spaces: vec![],
        };
        let mut arrived = Arrived::default();
        assert!(!arrived.covers(&account));
        arrived.batches.insert(0, 2);
        assert!(!arrived.covers(&account));
        arrived.tree_items.insert(Tree::Images, 3);
        assert!(arrived.covers(&account));
    }
}
