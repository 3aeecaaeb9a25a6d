//! The destination that keeps what it is sent.

use std::collections::HashMap;
use std::fmt;
use std::io;
use std::sync::atomic::AtomicU64;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use futures::stream::BoxStream;
use migrate::Phase;
use migrate::offer::{PROTOCOL_VERSIONS, common_version};
use nodeapi::Ticket;
use proto::migration as pb;
use proto::migration::destination_message::Message as ToSource;
use proto::migration::migration_server::{Migration, MigrationServer};
use proto::migration::source_message::Message as FromSource;
use tokio::sync::{mpsc, oneshot, watch};
use tokio::time::timeout;
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Request, Response, Status, Streaming};

use super::frames::{Files, FrameWriter};
use crate::files::Tree;
use crate::link::{self, MESSAGE_BYTES, TICKET_KEY};
use crate::service::Arrived;
use crate::wire;

/// Page streams, and trees of files, that a source may open.
const MAX_STREAMS: u32 = 64;

/// Messages between a stream and the disk: enough that neither waits for the other
/// at once.
const QUEUE: usize = 8;

/// Why a state is not recorded.
#[derive(Debug, thiserror::Error)]
pub enum RecorderError {
    /// Its directory cannot be made.
    #[error("cannot make a directory for the state")]
    Directory(#[source] io::Error),
    /// A connection ended other than in order.
    #[error("cannot serve a connection")]
    Serve(#[source] tonic::transport::Error),
}

/// What came of a commit.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Committed {
    /// The state is here, and that is known: its container may end.
    Yes,
    /// It is not and never will be, for this reason: its container goes on.
    No(String),
    /// Nobody knows yet: the source asks again.
    Undecided,
}

type Commit = Box<dyn Fn() -> Committed + Send + Sync>;

/// Records one migration. Clones record the same one.
#[derive(Clone)]
pub struct Recorder(Arc<Inner>);

struct Inner {
    ticket: Ticket,
    migration_id: String,
    files: Files,
    /// Most that may be written, in bytes.
    limit: u64,
    written: Arc<AtomicU64>,
    open: Mutex<Open>,
    arrived: watch::Sender<Arrived>,
    commit: Commit,
}

/// What was opened: each may be opened once.
#[derive(Default)]
struct Open {
    session: bool,
    /// Later sessions may ask.
    prepared: bool,
    streams: HashMap<String, mpsc::Sender<Order>>,
}

/// To the thread that writes one stream.
enum Order {
    Page(pb::PageBatch, oneshot::Sender<io::Result<()>>),
    File(pb::FileItem, oneshot::Sender<io::Result<()>>),
    Sync(oneshot::Sender<io::Result<()>>),
}

impl fmt::Debug for Recorder {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Recorder").field(&self.0.files).finish()
    }
}

impl Recorder {
    /// Makes the directory. At most `limit` bytes are written to it. `commit` is
    /// called when everything is on disk and the source has committed; again if the
    /// source asks again.
    ///
    /// # Errors
    ///
    /// The directory is there, or cannot be made.
    pub fn begin(
        files: Files,
        ticket: Ticket,
        migration_id: String,
        limit: u64,
        commit: impl Fn() -> Committed + Send + Sync + 'static,
    ) -> Result<Self, RecorderError> {
        files.make().map_err(RecorderError::Directory)?;
        Ok(Self(Arc::new(Inner {
            ticket,
            migration_id,
            files,
            limit,
            written: Arc::default(),
            open: Mutex::default(),
            arrived: watch::Sender::new(Arrived::default()),
            commit: Box::new(commit),
        })))
    }

    /// Serves one connection, whose other end has proved which node it is.
    ///
    /// # Errors
    ///
    /// The connection broke.
    pub async fn serve<S>(&self, stream: S) -> Result<(), RecorderError>
    where
        S: tokio::io::AsyncRead
            + tokio::io::AsyncWrite
            + tonic::transport::server::Connected
            + Unpin
            + Send
            + 'static,
    {
        let service = MigrationServer::new(self.clone())
            .max_decoding_message_size(MESSAGE_BYTES)
            .max_encoding_message_size(MESSAGE_BYTES);
        link::server()
            .add_service(service)
            .serve_with_incoming(tokio_stream::once(Ok::<_, io::Error>(stream)))
            .await
            .map_err(RecorderError::Serve)
    }

    fn open(&self) -> MutexGuard<'_, Open> {
        // Every change under the lock is a few assignments.
        self.0.open.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn authorise<T>(&self, request: &Request<T>) -> Result<(), Status> {
        let secret = request.metadata().get(TICKET_KEY);
        let known = self.0.ticket.secret.as_bytes();
        match secret {
            Some(secret) if migrate::ticket::secrets_equal(secret.as_bytes(), known) => Ok(()),
            _ => Err(Status::permission_denied(
                "this call does not carry the ticket",
            )),
        }
    }

    /// Starts the thread that writes a stream, which must be a new one.
    fn writer(&self, name: String, path: &std::path::Path) -> Result<mpsc::Sender<Order>, Status> {
        let mut open = self.open();
        if open.streams.contains_key(&name) {
            return Err(Status::already_exists("this stream was opened before"));
        }
        let frames = FrameWriter::create(path, Arc::clone(&self.0.written), self.0.limit)
            .map_err(|error| not_written(&error))?;
        let (orders, queue) = mpsc::channel(QUEUE);
        tokio::task::spawn_blocking(move || write(frames, queue));
        open.streams.insert(name, orders.clone());
        Ok(orders)
    }

    fn fail(&self, status: &Status) {
        self.0.arrived.send_if_modified(|arrived| {
            let first = arrived.failure.is_none();
            if first {
                arrived.failure = Some(status.message().to_owned());
            }
            first
        });
    }

    async fn record_pages(
        &self,
        batches: &mut Streaming<pb::PageBatch>,
        acks: &mpsc::Sender<Result<pb::PageAck, Status>>,
    ) -> Result<(), Status> {
        let mut writer = None;
        let mut number = 0;
        let mut sequence = 0;
        while let Some(batch) = batches.message().await? {
            let writer = match &writer {
                Some(writer) => writer,
                None => {
                    number = batch.stream;
                    if number >= MAX_STREAMS {
                        return Err(Status::invalid_argument("one stream too many"));
                    }
                    let path = self.0.files.pages(number);
                    writer.insert(self.writer(format!("pages-{number}"), &path)?)
                }
            };
            sequence += 1;
            if batch.stream != number {
                return Err(Status::invalid_argument("a batch of another stream"));
            }
            // The container ends when this is committed: it must not turn out
            // afterwards that nobody can read it.
            wire::batch_from_wire(batch.clone(), sequence)
                .map_err(|error| Status::invalid_argument(error.to_string()))?;
            order(writer, |done| Order::Page(batch, done)).await?;
            self.0.arrived.send_modify(|arrived| {
                arrived.batches.insert(number, sequence);
            });
            if acks.send(Ok(pb::PageAck { sequence })).await.is_err() {
                return Err(Status::cancelled("the source stopped listening"));
            }
        }
        Ok(())
    }

    async fn record_files(
        &self,
        items: &mut Streaming<pb::FileItem>,
        acks: &mpsc::Sender<Result<pb::FilesAck, Status>>,
    ) -> Result<(), Status> {
        let mut writer = None;
        let mut tree = Tree::Layer;
        let mut sequence = 0;
        while let Some(item) = items.message().await? {
            let of = Tree::of_item(&item)
                .map_err(|error| Status::invalid_argument(error.to_string()))?;
            let writer = match &writer {
                Some(writer) => writer,
                None => {
                    tree = of;
                    let number = tree.number();
                    if number >= MAX_STREAMS {
                        return Err(Status::invalid_argument("one tree of files too many"));
                    }
                    let path = self.0.files.tree(number);
                    writer.insert(self.writer(format!("tree-{number}"), &path)?)
                }
            };
            sequence += 1;
            if of != tree || item.sequence != sequence {
                return Err(Status::invalid_argument("a file out of order"));
            }
            let flush = match &item.item {
                Some(pb::file_item::Item::Flush(flush)) => Some(*flush),
                _ => None,
            };
            order(writer, |done| Order::File(item, done)).await?;
            self.0.arrived.send_modify(|arrived| {
                arrived.tree_items.insert(tree, sequence);
            });
            if let Some(flush) = flush
                && acks.send(Ok(pb::FilesAck { flush })).await.is_err()
            {
                return Err(Status::cancelled("the source stopped listening"));
            }
        }
        Ok(())
    }

    async fn hold(&self, mut from: Streaming<pb::SourceMessage>, to: Answers) {
        let again = self.open().prepared;
        if !again && let Err(status) = self.until_prepared(&mut from, &to).await {
            tracing::warn!(reason = status.message(), "a state is not recorded");
            let failed = pb::Failed {
                phase: String::new(),
                reason: status.message().to_owned(),
            };
            say(&to, ToSource::Failed(failed)).await;
            return;
        }
        match hear(&mut from, Phase::Commit).await {
            Ok(FromSource::Commit(_)) => {}
            Ok(_) => return,
            Err(status) => {
                // It may have committed: then it asks again.
                return tracing::warn!(reason = status.message(), "no commit was heard");
            }
        }
        let this = self.clone();
        let committed = tokio::task::spawn_blocking(move || (this.0.commit)()).await;
        let word = match committed {
            Ok(Committed::Yes) => ToSource::Running(pb::Running::default()),
            Ok(Committed::No(reason)) => ToSource::HandedBack(pb::HandedBack { reason }),
            Ok(Committed::Undecided) | Err(_) => return,
        };
        say(&to, word).await;
        // The end of the session is the end of the connection: the word must go first.
        drop(timeout(Phase::Commit.timeout(), from.message()).await);
    }

    async fn until_prepared(
        &self,
        from: &mut Streaming<pb::SourceMessage>,
        to: &Answers,
    ) -> Result<(), Status> {
        let out_of_turn = || Status::failed_precondition("a message out of turn");
        let FromSource::Hello(hello) = hear(from, Phase::Negotiate).await? else {
            return Err(out_of_turn());
        };
        if hello.migration_id != self.0.migration_id {
            return Err(Status::invalid_argument("it is about another migration"));
        }
        let version = common_version(&hello.protocol_versions, PROTOCOL_VERSIONS)
            .ok_or_else(|| Status::failed_precondition("no common version"))?;
        let welcome = pb::Welcome {
            protocol_version: version,
            staging_limit_bytes: self.0.limit,
        };
        say(to, ToSource::Welcome(welcome)).await;
        let FromSource::PrepareSwitch(prepare) = hear(from, Phase::Prepare).await? else {
            return Err(out_of_turn());
        };
        self.keep("prepare", prepare).await?;
        // What this build of Sterna restores, others do.
        say(
            to,
            ToSource::SwitchReady(pb::SwitchReady { reads_trees: true }),
        )
        .await;
        let account = loop {
            match hear(from, Phase::PreCopy).await? {
                FromSource::Freezing(_) => say(to, ToSource::Holding(pb::Holding {})).await,
                FromSource::Detached(_) => {}
                FromSource::Final(account) => break account,
                _ => return Err(out_of_turn()),
            }
        };
        self.complete(&account).await?;
        self.keep("final", account).await?;
        self.on_disk().await?;
        self.open().prepared = true;
        say(to, ToSource::Prepared(pb::Prepared::default())).await;
        Ok(())
    }

    /// Waits for everything in the account.
    async fn complete(&self, account: &pb::Final) -> Result<(), Status> {
        let mut arrived = self.0.arrived.subscribe();
        let complete =
            arrived.wait_for(|arrived| arrived.failure.is_some() || arrived.covers(account));
        let complete = timeout(Phase::Freeze.timeout(), complete).await;
        let arrived = complete
            .map_err(|_| Status::deadline_exceeded("not all that was counted has come"))?
            .map_err(|_| Status::internal("nobody counts"))?;
        match &arrived.failure {
            Some(reason) => Err(Status::data_loss(reason.clone())),
            None => Ok(()),
        }
    }

    async fn keep<M>(&self, name: &'static str, message: M) -> Result<(), Status>
    where
        M: prost::Message + 'static,
    {
        let files = self.0.files.clone();
        tokio::task::spawn_blocking(move || files.write_one(name, &message))
            .await
            .map_err(|_| Status::internal("a writer panicked"))?
            .map_err(|error| not_written(&error))
    }

    /// Makes the disk have all of it.
    async fn on_disk(&self) -> Result<(), Status> {
        let streams: Vec<_> = self.open().streams.values().cloned().collect();
        for stream in streams {
            order(&stream, Order::Sync).await?;
        }
        let files = self.0.files.clone();
        tokio::task::spawn_blocking(move || files.sync())
            .await
            .map_err(|_| Status::internal("a writer panicked"))?
            .map_err(|error| not_written(&error))
    }
}

/// Answers to one session.
type Answers = mpsc::Sender<Result<pb::DestinationMessage, Status>>;

async fn say(to: &Answers, message: ToSource) {
    let message = pb::DestinationMessage {
        message: Some(message),
    };
    // A source that is gone shows when it is next listened to.
    drop(to.send(Ok(message)).await);
}

async fn hear(from: &mut Streaming<pb::SourceMessage>, phase: Phase) -> Result<FromSource, Status> {
    timeout(phase.timeout(), from.message())
        .await
        .map_err(|_| Status::deadline_exceeded(format!("silent in {}", phase.name())))??
        .and_then(|message| message.message)
        .ok_or_else(|| Status::cancelled("the source closed the session"))
}

async fn order(
    writer: &mpsc::Sender<Order>,
    order: impl FnOnce(oneshot::Sender<io::Result<()>>) -> Order,
) -> Result<(), Status> {
    let gone = || Status::internal("a writer is gone");
    let (done, written) = oneshot::channel();
    writer.send(order(done)).await.map_err(|_| gone())?;
    written
        .await
        .map_err(|_| gone())?
        .map_err(|error| not_written(&error))
}

/// Writes one stream until nobody gives orders any more.
fn write(mut frames: FrameWriter, mut orders: mpsc::Receiver<Order>) {
    while let Some(order) = orders.blocking_recv() {
        let (result, done) = match order {
            Order::Page(batch, done) => (frames.put(&batch), done),
            Order::File(item, done) => (frames.put(&item), done),
            Order::Sync(done) => (frames.sync(), done),
        };
        // Who gave the order may be gone.
        drop(done.send(result));
    }
}

fn not_written(error: &io::Error) -> Status {
    Status::resource_exhausted(format!("cannot write the state: {error}"))
}

#[tonic::async_trait]
impl Migration for Recorder {
    type SessionStream = BoxStream<'static, Result<pb::DestinationMessage, Status>>;
    type PagesStream = BoxStream<'static, Result<pb::PageAck, Status>>;
    type FilesStream = BoxStream<'static, Result<pb::FilesAck, Status>>;

    async fn session(
        &self,
        request: Request<Streaming<pb::SourceMessage>>,
    ) -> Result<Response<Self::SessionStream>, Status> {
        self.authorise(&request)?;
        {
            let mut open = self.open();
            if std::mem::replace(&mut open.session, true) && !open.prepared {
                return Err(Status::already_exists("a session was opened before"));
            }
        }
        let (to_source, answers) = mpsc::channel(8);
        let this = self.clone();
        tokio::spawn(async move { this.hold(request.into_inner(), to_source).await });
        Ok(Response::new(Box::pin(ReceiverStream::new(answers))))
    }

    async fn pages(
        &self,
        request: Request<Streaming<pb::PageBatch>>,
    ) -> Result<Response<Self::PagesStream>, Status> {
        self.authorise(&request)?;
        let (acks, answers) = mpsc::channel(64);
        let this = self.clone();
        tokio::spawn(async move {
            let mut batches = request.into_inner();
            if let Err(status) = this.record_pages(&mut batches, &acks).await {
                this.fail(&status);
                // The source may be gone already.
                drop(acks.send(Err(status)).await);
            }
        });
        Ok(Response::new(Box::pin(ReceiverStream::new(answers))))
    }

    async fn files(
        &self,
        request: Request<Streaming<pb::FileItem>>,
    ) -> Result<Response<Self::FilesStream>, Status> {
        self.authorise(&request)?;
        let (acks, answers) = mpsc::channel(4);
        let this = self.clone();
        tokio::spawn(async move {
            let mut items = request.into_inner();
            if let Err(status) = this.record_files(&mut items, &acks).await {
                this.fail(&status);
                drop(acks.send(Err(status)).await);
            }
        });
        Ok(Response::new(Box::pin(ReceiverStream::new(answers))))
    }
}
