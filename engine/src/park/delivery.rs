//! The source without a container: plays what was recorded.

use std::io;
use std::path::Path;
use std::time::Duration;

use migrate::Phase;
use nodeapi::Ticket;
use proto::migration as pb;
use proto::migration::destination_message::Message as FromDestination;
use proto::migration::source_message::Message as ToDestination;
use tokio::sync::mpsc;
use tokio::task::JoinHandle;
use tokio::time::timeout;
use tokio_stream::wrappers::ReceiverStream;

use super::frames::{Files, FrameReader};
use crate::link::{Client, Dialer, LinkError};
use crate::send_error::SendError;
use crate::session::Session;

/// Messages between the disk and a stream.
const QUEUE: usize = 4;

/// How long the destination may take for its next acknowledgement.
const ACK_TIMEOUT: Duration = Duration::from_secs(30);

/// Why a state does not get there.
#[derive(Debug, thiserror::Error)]
pub enum DeliveryError {
    /// What was recorded cannot be read, or is damaged.
    #[error("cannot read the state that waits here")]
    Read(#[source] io::Error),
    /// The destination, or the way to it.
    #[error("the destination does not take the state: {0}")]
    Destination(String),
}

impl DeliveryError {
    /// Whether another attempt may do better.
    #[must_use]
    pub fn may_pass(&self) -> bool {
        matches!(self, Self::Destination(_))
    }
}

impl From<SendError> for DeliveryError {
    fn from(error: SendError) -> Self {
        Self::Destination(crate::error_chain(&error))
    }
}

impl From<LinkError> for DeliveryError {
    fn from(error: LinkError) -> Self {
        Self::Destination(crate::error_chain(&error))
    }
}

fn lost(status: &tonic::Status) -> DeliveryError {
    DeliveryError::Destination(status.message().to_owned())
}

/// The destination's last word.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Word {
    /// It runs there.
    Running,
    /// It did not run there and will not, for this reason.
    HandedBack(String),
}

/// One attempt to bring a state to a node that waits for it.
#[derive(Debug)]
pub struct Delivery {
    files: Files,
    migration_id: String,
    ticket_id: String,
    dialer: Dialer,
}

/// The destination has everything and waits for the commit.
#[derive(Debug)]
pub struct Ready {
    session: Session,
    /// Bytes of memory and files that were sent.
    pub sent_bytes: u64,
}

impl Delivery {
    /// To the node called `peer_node` at `address`, host:port, with its ticket.
    ///
    /// # Errors
    ///
    /// This node's certificate cannot be used.
    pub fn new(
        files: Files,
        migration_id: String,
        (address, peer_node): (String, &str),
        identity_dir: &Path,
        ticket: &Ticket,
    ) -> Result<Self, DeliveryError> {
        Ok(Self {
            files,
            migration_id,
            ticket_id: ticket.id.clone(),
            dialer: Dialer::new(address, peer_node, identity_dir, ticket)?,
        })
    }

    /// Sends everything, up to the destination's word that it has it all. Dropped,
    /// it is as if nothing had happened.
    ///
    /// # Errors
    ///
    /// The state is here as before.
    pub async fn until_prepared(&self) -> Result<Ready, DeliveryError> {
        let session = within(Phase::Negotiate, Session::open(&self.dialer));
        let mut session = session.await?;
        let sent = self.send(&mut session).await;
        let error = match sent {
            Ok(sent_bytes) => {
                return Ok(Ready {
                    session,
                    sent_bytes,
                });
            }
            Err(error) => error,
        };
        // What the destination says of a failure tells more than how it shows here.
        let said = timeout(Duration::from_millis(200), session.hear()).await;
        let abort = pb::Abort {
            reason: error.to_string(),
        };
        // The destination may be the reason that we are here.
        drop(session.say(ToDestination::Abort(abort)).await);
        match said {
            Ok(Err(said @ SendError::DestinationFailed { .. })) => Err(said.into()),
            _ => Err(error),
        }
    }

    async fn send(&self, session: &mut Session) -> Result<u64, DeliveryError> {
        let files = self.files.clone();
        let read = blocking(move || {
            Ok((
                files.recorded()?,
                files.read_one::<pb::PrepareSwitch>("prepare")?,
                files.read_one::<pb::Final>("final")?,
            ))
        });
        let ((streams, trees), prepare, account) = read.await?;
        session
            .say(ToDestination::Hello(pb::Hello {
                protocol_versions: migrate::offer::PROTOCOL_VERSIONS.to_vec(),
                migration_id: self.migration_id.clone(),
                ticket_id: self.ticket_id.clone(),
                source_node: String::new(),
                page_streams: u32::try_from(streams.len()).unwrap_or(u32::MAX),
                precopy: true,
            }))
            .await?;
        let FromDestination::Welcome(_) = within(Phase::Negotiate, session.hear()).await? else {
            return Err(out_of_turn());
        };
        session.say(ToDestination::PrepareSwitch(prepare)).await?;
        match within(Phase::Prepare, session.hear()).await? {
            FromDestination::SwitchReady(ready) if ready.reads_trees => {}
            FromDestination::SwitchReady(_) => {
                return Err(DeliveryError::Destination(
                    "it does not read trees of files".into(),
                ));
            }
            _ => return Err(out_of_turn()),
        }
        let pages = streams.into_iter().map(|number| self.pages(number));
        let files = trees.into_iter().map(|tree| self.tree(tree));
        let (pages, files) = futures::future::try_join(
            futures::future::try_join_all(pages),
            futures::future::try_join_all(files),
        )
        .await?;
        session
            .say(ToDestination::Freezing(pb::Freezing {}))
            .await?;
        let FromDestination::Holding(_) = within(Phase::Freeze, session.hear()).await? else {
            return Err(out_of_turn());
        };
        session.say(ToDestination::Final(account)).await?;
        let FromDestination::Prepared(_) = within(Phase::Freeze, session.hear()).await? else {
            return Err(out_of_turn());
        };
        Ok(pages.iter().chain(&files).sum())
    }

    /// Sends a page stream, until it was acknowledged; returns its bytes.
    async fn pages(&self, number: u32) -> Result<u64, DeliveryError> {
        let mut client: Client = self.dialer.connect().await?;
        let (batches, reading) = play::<pb::PageBatch>(self.files.pages(number));
        let mut acks = client
            .pages(batches)
            .await
            .map_err(|status| lost(&status))?
            .into_inner();
        let mut acked = 0;
        loop {
            match timeout(ACK_TIMEOUT, acks.message()).await {
                Ok(Ok(Some(ack))) => acked = ack.sequence,
                Ok(Ok(None)) => break,
                Ok(Err(status)) => return Err(lost(&status)),
                Err(_) => {
                    let text = "it acknowledges no memory any more".to_owned();
                    return Err(DeliveryError::Destination(text));
                }
            }
        }
        let (messages, bytes) = read(reading).await?;
        if acked != messages {
            let text = format!("it acknowledged {acked} of {messages} batches of memory");
            return Err(DeliveryError::Destination(text));
        }
        Ok(bytes)
    }

    /// Sends a tree of files; its last message asks for an answer.
    async fn tree(&self, tree: u32) -> Result<u64, DeliveryError> {
        let mut client: Client = self.dialer.connect().await?;
        let (items, reading) = play::<pb::FileItem>(self.files.tree(tree));
        let mut acks = client
            .files(items)
            .await
            .map_err(|status| lost(&status))?
            .into_inner();
        // `Prepared` tells what counts: here only that it does not stall.
        while timeout(Phase::PreCopy.timeout(), acks.message())
            .await
            .map_err(|_| DeliveryError::Destination("its files stall".into()))?
            .map_err(|status| lost(&status))?
            .is_some()
        {}
        Ok(read(reading).await?.1)
    }
}

impl Ready {
    /// Gives the state away, which must be on disk before, and waits for the word.
    ///
    /// # Errors
    ///
    /// Nothing was heard: [`ask`] until there is an answer.
    pub async fn commit(mut self) -> Result<Word, DeliveryError> {
        self.session
            .say(ToDestination::Commit(pb::Commit {}))
            .await?;
        word(&mut self.session).await
    }
}

/// Asks what became of a state that was given away with a ticket, whose secret went
/// with the process that gave it.
///
/// # Errors
///
/// There is no answer yet: ask again.
pub async fn ask(
    (address, peer_node): (String, &str),
    identity_dir: &Path,
    ticket_id: &str,
) -> Result<Word, DeliveryError> {
    let ticket = Ticket {
        id: ticket_id.to_owned(),
        secret: "asks".to_owned(),
    };
    let dialer = Dialer::new(address, peer_node, identity_dir, &ticket)?;
    let session = within(Phase::Negotiate, Session::open(&dialer));
    let mut session = session.await?;
    session.say(ToDestination::Commit(pb::Commit {})).await?;
    word(&mut session).await
}

async fn word(session: &mut Session) -> Result<Word, DeliveryError> {
    match within(Phase::Resume, session.hear()).await? {
        FromDestination::Running(_) => Ok(Word::Running),
        FromDestination::HandedBack(back) => Ok(Word::HandedBack(back.reason)),
        _ => Err(out_of_turn()),
    }
}

fn out_of_turn() -> DeliveryError {
    DeliveryError::Destination("it said something out of turn".into())
}

async fn within<T>(
    phase: Phase,
    work: impl Future<Output = Result<T, SendError>>,
) -> Result<T, DeliveryError> {
    match timeout(phase.timeout(), work).await {
        Ok(result) => Ok(result?),
        Err(_) => Err(DeliveryError::Destination(format!(
            "it is silent in {}",
            phase.name()
        ))),
    }
}

/// A thread that reads a stream's messages, and what comes of it: how many there
/// were, and their bytes.
type Reading = JoinHandle<io::Result<(u64, u64)>>;

fn play<M>(path: std::path::PathBuf) -> (ReceiverStream<M>, Reading)
where
    M: prost::Message + Default + 'static,
{
    let (queue, messages) = mpsc::channel(QUEUE);
    let reading = tokio::task::spawn_blocking(move || {
        let mut frames = FrameReader::open(&path)?;
        let (mut count, mut bytes) = (0, 0);
        while let Some(message) = frames.next::<M>()? {
            count += 1;
            bytes += message.encoded_len() as u64;
            // The other end says why it does not want more.
            if queue.blocking_send(message).is_err() {
                break;
            }
        }
        Ok((count, bytes))
    });
    (ReceiverStream::new(messages), reading)
}

async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> io::Result<T> + Send + 'static,
) -> Result<T, DeliveryError> {
    read(tokio::task::spawn_blocking(work)).await
}

async fn read<T>(reading: JoinHandle<io::Result<T>>) -> Result<T, DeliveryError> {
    match reading.await {
        Ok(result) => result.map_err(DeliveryError::Read),
        Err(_) => Err(DeliveryError::Read(io::Error::other("a reader panicked"))),
    }
}
