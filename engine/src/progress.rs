//! What is told about a running migration, and to whom.

use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use futures::stream::{self, BoxStream, StreamExt};
use proto::engine::engine_server::{Engine, EngineServer};
use proto::engine::progress::Event;
use proto::engine::{
    CancelRequest, CancelResponse, Finished, HandBackRequest, HandBackResponse, LetGoRequest,
    LetGoResponse, PhaseBegun, Progress, WatchRequest,
};
use tokio::net::UnixListener;
use tokio::sync::{Notify, oneshot, watch};
use tokio::task::JoinHandle;
use tokio_stream::wrappers::UnixListenerStream;
use tonic::{Request, Response, Status};

/// How long a finished engine waits for somebody to hear how it ended.
const LAST_WORD: Duration = Duration::from_secs(20);
/// How long the last event may take to a watcher that has asked for it.
const FLUSH: Duration = Duration::from_secs(2);

/// What somebody else vouches for after the commit, in place of the destination's
/// engine.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Word {
    /// The container does not run there and will not.
    HandedBack(String),
    /// It is the other node's, or was.
    Gone(String),
}

/// The history of one migration: written by the engine, read by any number of
/// watchers from its beginning.
#[derive(Debug, Clone)]
pub(crate) struct Log(Arc<Shared>);

#[derive(Debug)]
struct Shared {
    begun: Instant,
    history: Mutex<Vec<Progress>>,
    length: watch::Sender<usize>,
    cancel: watch::Sender<Option<String>>,
    word: watch::Sender<Option<Word>>,
    committed: watch::Sender<bool>,
    heard: Notify,
}

impl Log {
    pub(crate) fn new() -> Self {
        Self(Arc::new(Shared {
            begun: Instant::now(),
            history: Mutex::new(Vec::new()),
            length: watch::Sender::new(0),
            cancel: watch::Sender::new(None),
            word: watch::Sender::new(None),
            committed: watch::Sender::new(false),
            heard: Notify::new(),
        }))
    }

    /// Time since the migration began.
    pub(crate) fn elapsed(&self) -> Duration {
        self.0.begun.elapsed()
    }

    pub(crate) fn phase(&self, phase: migrate::Phase) {
        tracing::info!(phase = phase.name(), "phase begun");
        self.push(Event::Phase(PhaseBegun {
            phase: phase.name().to_owned(),
        }));
    }

    pub(crate) fn push(&self, event: Event) {
        let at_ms = u64::try_from(self.elapsed().as_millis()).unwrap_or(u64::MAX);
        let mut history = self
            .0
            .history
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        history.push(Progress {
            at_ms,
            event: Some(event),
        });
        self.0.length.send_replace(history.len());
    }

    pub(crate) fn finish(&self, finished: Finished) {
        tracing::info!(
            outcome = finished.outcome,
            reason = finished.reason,
            "finished"
        );
        self.push(Event::Finished(finished));
    }

    /// From here `Cancel` is refused.
    pub(crate) fn commit(&self) {
        self.0.committed.send_replace(true);
    }

    /// Asks for an end, as `Cancel` does.
    pub(crate) fn cancel(&self, reason: String) {
        self.0.cancel.send_if_modified(|current| {
            let first = current.is_none();
            if first {
                *current = Some(reason);
            }
            first
        });
    }

    /// Resolves with the reason once somebody cancels.
    pub(crate) async fn cancelled(&self) -> String {
        let mut cancel = self.0.cancel.subscribe();
        match cancel.wait_for(Option::is_some).await {
            Ok(reason) => reason.clone().unwrap_or_default(),
            // The sender lives in `self`.
            Err(_) => std::future::pending().await,
        }
    }

    /// Resolves once somebody vouches for what became of the container.
    pub(crate) async fn word(&self) -> Word {
        let mut word = self.0.word.subscribe();
        match word
            .wait_for(Option::is_some)
            .await
            .map(|word| word.clone())
        {
            Ok(Some(word)) => word,
            // The sender lives in `self`.
            Ok(None) | Err(_) => std::future::pending().await,
        }
    }

    /// Waits until a watcher has read the last event, or nobody came.
    pub(crate) async fn last_word_heard(&self) {
        let heard = tokio::time::timeout(LAST_WORD, self.0.heard.notified()).await;
        if heard.is_err() {
            tracing::warn!("nobody asked how the migration ended");
        }
    }

    fn from(&self, index: usize) -> Vec<Progress> {
        let history = self
            .0
            .history
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        history.get(index..).unwrap_or_default().to_vec()
    }

    /// Serves `sterna.engine.v1` on a unix socket.
    pub(crate) fn serve(&self, socket: &Path) -> std::io::Result<Serving> {
        let listener = UnixListener::bind(socket)?;
        let (stop, stopped) = oneshot::channel::<()>();
        let server = tonic::transport::Server::builder()
            .add_service(EngineServer::new(self.clone()))
            .serve_with_incoming_shutdown(UnixListenerStream::new(listener), async {
                // Dropped or sent: both mean stop.
                drop(stopped.await);
            });
        let task = tokio::spawn(async move {
            if let Err(error) = server.await {
                tracing::warn!(%error, "the engine's socket ended");
            }
        });
        Ok(Serving { stop, task })
    }
}

/// The socket at work.
#[derive(Debug)]
pub(crate) struct Serving {
    stop: oneshot::Sender<()>,
    task: JoinHandle<()>,
}

impl Serving {
    /// Ends it once every watcher has received what was sent to it.
    pub(crate) async fn end(self) {
        drop(self.stop);
        if tokio::time::timeout(FLUSH, self.task).await.is_err() {
            tracing::debug!("a watcher did not take the last event");
        }
    }
}

#[tonic::async_trait]
impl Engine for Log {
    type WatchStream = BoxStream<'static, Result<Progress, Status>>;

    async fn watch(
        &self,
        _request: Request<WatchRequest>,
    ) -> Result<Response<Self::WatchStream>, Status> {
        struct Cursor {
            log: Log,
            next: usize,
            length: watch::Receiver<usize>,
            done: bool,
        }
        let cursor = Cursor {
            log: self.clone(),
            next: 0,
            length: self.0.length.subscribe(),
            done: false,
        };
        let batches = stream::unfold(cursor, |mut cursor| async move {
            if cursor.done {
                // Reached only once the watcher has taken the last event.
                cursor.log.0.heard.notify_one();
                return None;
            }
            let next = cursor.next;
            cursor.length.wait_for(|length| *length > next).await.ok()?;
            let events = cursor.log.from(next);
            cursor.next += events.len();
            cursor.done = matches!(
                events.last(),
                Some(Progress {
                    event: Some(Event::Finished(_)),
                    ..
                })
            );
            Some((stream::iter(events.into_iter().map(Ok)), cursor))
        });
        Ok(Response::new(batches.flatten().boxed()))
    }

    async fn cancel(
        &self,
        request: Request<CancelRequest>,
    ) -> Result<Response<CancelResponse>, Status> {
        if *self.0.committed.borrow() {
            return Err(Status::failed_precondition(
                "the container is committed to the destination: too late to cancel",
            ));
        }
        Log::cancel(self, request.into_inner().reason);
        Ok(Response::new(CancelResponse {}))
    }

    async fn hand_back(
        &self,
        request: Request<HandBackRequest>,
    ) -> Result<Response<HandBackResponse>, Status> {
        let reason = request.into_inner().reason;
        if *self.0.committed.borrow() {
            self.0.word.send_replace(Some(Word::HandedBack(reason)));
        } else {
            Log::cancel(self, reason);
        }
        Ok(Response::new(HandBackResponse {}))
    }

    async fn let_go(
        &self,
        request: Request<LetGoRequest>,
    ) -> Result<Response<LetGoResponse>, Status> {
        if !*self.0.committed.borrow() {
            return Err(Status::failed_precondition(
                "the container is not committed to the destination: it runs here",
            ));
        }
        let reason = request.into_inner().reason;
        self.0.word.send_replace(Some(Word::Gone(reason)));
        Ok(Response::new(LetGoResponse {}))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn finished() -> Finished {
        Finished {
            outcome: "migrated".into(),
            ..Default::default()
        }
    }

    #[tokio::test]
    async fn a_late_watcher_hears_everything_and_then_the_end() {
        let log = Log::new();
        log.phase(migrate::Phase::Negotiate);
        let mut early = Engine::watch(&log, Request::new(WatchRequest {}))
            .await
            .unwrap()
            .into_inner();
        assert!(matches!(
            early.next().await.unwrap().unwrap().event,
            Some(Event::Phase(_))
        ));
        log.finish(finished());
        let late = Engine::watch(&log, Request::new(WatchRequest {}))
            .await
            .unwrap()
            .into_inner();
        let events: Vec<_> = late
            .map(|event| event.unwrap().event.unwrap())
            .collect()
            .await;
        assert_eq!(events.len(), 2);
        assert_eq!(events[1], Event::Finished(finished()));
        log.last_word_heard().await;
        assert_eq!(early.collect::<Vec<_>>().await.len(), 1);
    }

    #[tokio::test]
    async fn cancel_is_heard_before_the_commit_and_refused_after_it() {
        let log = Log::new();
        let request = || {
            Request::new(CancelRequest {
                reason: "operator".into(),
            })
        };
        Engine::cancel(&log, request()).await.unwrap();
        assert_eq!(log.cancelled().await, "operator");
        log.commit();
        let status = Engine::cancel(&log, request()).await.unwrap_err();
        assert_eq!(status.code(), tonic::Code::FailedPrecondition);
    }
}
