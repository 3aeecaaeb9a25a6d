//! Page streams of a sender: batches go out in order per extent, and are
//! counted when the destination has them.

use std::time::{Duration, Instant};

use pages::{Batch, BatchSink, SinkClosed};
use proto::migration as pb;
use tokio::sync::{mpsc, watch};
use tokio::time::timeout;
use tokio_stream::wrappers::ReceiverStream;

use crate::link::{Dialer, LinkError};
use crate::wire;

/// Batches in flight per stream between the reader of memory and the socket:
/// enough to keep the socket busy, few enough to measure the link by.
const QUEUE: usize = 4;
/// How long the destination may take for its next acknowledgement.
const ACK_TIMEOUT: Duration = Duration::from_secs(10);

/// How long the reason for a closed stream may take to come.
const REASON_TIMEOUT: Duration = Duration::from_millis(200);

/// Why pages do not get through.
#[derive(Debug, thiserror::Error)]
pub(crate) enum StreamError {
    #[error("cannot open a page stream")]
    Open(#[source] LinkError),
    #[error("cannot open a page stream: {0}")]
    Refused(String),
    #[error("a page stream broke: {0}")]
    Broken(String),
    #[error("the destination acknowledged nothing for {} s", ACK_TIMEOUT.as_secs())]
    Silent,
}

#[derive(Debug)]
struct Stream {
    number: u32,
    queue: mpsc::Sender<pb::PageBatch>,
    sent: u64,
    acked: watch::Receiver<Result<u64, String>>,
}

/// A mark in all streams.
#[derive(Debug)]
pub(crate) struct Sent(Vec<(u64, watch::Receiver<Result<u64, String>>)>);

impl Sent {
    /// Waits until the destination has everything up to the mark.
    pub(crate) async fn arrived(self) -> Result<(), StreamError> {
        for (sent, mut acked) in self.0 {
            loop {
                match &*acked.borrow_and_update() {
                    Ok(sequence) if *sequence >= sent => break,
                    Ok(_) => {}
                    Err(reason) => return Err(StreamError::Broken(reason.clone())),
                }
                match timeout(ACK_TIMEOUT, acked.changed()).await {
                    Ok(Ok(())) => {}
                    Ok(Err(_)) => return Err(StreamError::Broken("its reader ended".into())),
                    Err(_) => return Err(StreamError::Silent),
                }
            }
        }
        Ok(())
    }
}

/// All page streams of one migration.
#[derive(Debug)]
pub(crate) struct PageStreams {
    streams: Vec<Stream>,
    bytes: u64,
}

impl PageStreams {
    /// Opens `count` streams, each on a connection of its own.
    pub(crate) async fn open(dialer: &Dialer, count: u32) -> Result<Self, StreamError> {
        let mut streams = Vec::new();
        for number in 0..count {
            let mut client = dialer.connect().await.map_err(StreamError::Open)?;
            let (queue, batches) = mpsc::channel(QUEUE);
            let mut acks = client
                .pages(ReceiverStream::new(batches))
                .await
                .map_err(|status| StreamError::Refused(status.message().to_owned()))?
                .into_inner();
            let (report, acked) = watch::channel(Ok(0));
            tokio::spawn(async move {
                loop {
                    let news = match acks.message().await {
                        Ok(Some(ack)) => Ok(ack.sequence),
                        Ok(None) => Err("the destination closed it".to_owned()),
                        Err(status) => Err(status.message().to_owned()),
                    };
                    let over = news.is_err();
                    if report.send(news).is_err() || over {
                        return;
                    }
                }
            });
            streams.push(Stream {
                number,
                queue,
                sent: 0,
                acked,
            });
        }
        Ok(Self { streams, bytes: 0 })
    }

    /// What has been sent so far, to wait for.
    pub(crate) fn sent(&self) -> Sent {
        Sent(
            self.streams
                .iter()
                .map(|stream| (stream.sent, stream.acked.clone()))
                .collect(),
        )
    }

    /// Why a stream is broken, if one is.
    pub(crate) fn failure(&self) -> Option<StreamError> {
        self.streams
            .iter()
            .find_map(|stream| match &*stream.acked.borrow() {
                Err(reason) => Some(StreamError::Broken(reason.clone())),
                Ok(_) => None,
            })
    }

    /// Why a stream does not take pages any more. Its queue is closed a moment before
    /// its reader has heard why. Blocks.
    pub(crate) fn why_closed(&self) -> Option<StreamError> {
        let begun = Instant::now();
        loop {
            let failure = self.failure();
            if failure.is_some() || begun.elapsed() > REASON_TIMEOUT {
                return failure;
            }
            std::thread::sleep(Duration::from_millis(1));
        }
    }

    /// The account for `Final`.
    pub(crate) fn totals(&self) -> Vec<pb::StreamTotal> {
        self.streams
            .iter()
            .map(|stream| pb::StreamTotal {
                stream: stream.number,
                batches: stream.sent,
            })
            .collect()
    }

    /// Page content sent so far.
    pub(crate) fn bytes(&self) -> u64 {
        self.bytes
    }
}

impl BatchSink for PageStreams {
    fn send(&mut self, batch: Batch) -> Result<(), SinkClosed> {
        // All versions of a page take the same stream, so that the newest one
        // arrives last.
        let lane = (batch.extent() ^ u64::from(batch.space.0)) % self.streams.len() as u64;
        let stream = &mut self.streams[lane as usize];
        self.bytes += batch.payload.len() as u64;
        stream.sent += 1;
        let wire = wire::batch_to_wire(batch, stream.number, stream.sent);
        stream.queue.blocking_send(wire).map_err(|_| SinkClosed)
    }
}
