//! After the commit: the restore, the pages that come behind it, and the word to
//! the source, which is `Running` or `HandedBack` and nothing else.

use std::time::{Duration, Instant};

use migrate::Phase;
use migrate::destination::{Event, State};
use nodeapi::{FromEngine, ToEngine};
use proto::migration as pb;
use proto::migration::destination_message::Message as ToSource;

use super::{Receiver, SOURCE_TIMEOUT};
use crate::memory::{Memory, MemoryNews};
use crate::receive_error::ReceiveError;
use crate::service::Session;

/// A restored container whose memory is still being filled in.
pub(super) struct Filling {
    memory: Memory,
    running: pb::Running,
}

impl Receiver {
    /// Restores the container and attaches its address. On error nothing of the
    /// container runs here if the state is still `Restoring`.
    pub(super) async fn restore(
        &mut self,
        checked_in: Duration,
        session: &mut Session,
    ) -> Result<Filling, ReceiveError> {
        let begun = Instant::now();
        // CRIU opens the files in them.
        self.volumes.put_in_place().await?;
        let mut memory = Memory::serve(&self.work_dir, &self.staging, &self.shim, &self.arrival)?;
        if let Some(gate) = self.gate.take() {
            gate.open().map_err(self.at_gate("open"))?;
        }
        let limit = tokio::time::sleep(Phase::Resume.timeout());
        tokio::pin!(limit);
        let mut late = false;
        let mut give_up = None;
        let mut restored = None;
        let mut let_go = Duration::ZERO;
        loop {
            tokio::select! {
                news = memory.next() => match news {
                    MemoryNews::LetGo => {
                        let_go = begun.elapsed();
                        self.advance(Event::LetGo);
                        // Tasks are about to resume: their sockets exist, so
                        // that a packet that arrives now finds them.
                        if let Some(switch) = &mut self.switch {
                            switch.attach().await.map_err(ReceiveError::Network)?;
                            switch.announce().await.map_err(ReceiveError::Network)?;
                        }
                    }
                    MemoryNews::Filled if self.state == State::Resuming => {
                        self.advance(Event::Filled);
                    }
                    MemoryNews::Filled => {}
                    // Whatever is restored would wait for its memory for ever.
                    MemoryNews::Failed if self.state == State::Restoring => {
                        give_up = Some("the page server failed".to_owned());
                    }
                    MemoryNews::Failed if self.state == State::Undoing => {}
                    MemoryNews::Failed => drop(memory.filled().await?),
                },
                message = self.messages.recv() => match message {
                    Some(ToEngine::Restored { pid }) => {
                        memory.tasks_run();
                        restored = Some(pb::Running {
                            pid,
                            restore_us: micros(begun.elapsed()),
                            prepare_us: micros(checked_in),
                            let_go_us: 0,
                        });
                    }
                    Some(ToEngine::RestoreFailed { reason }) => {
                        // The page server may have heard more than this loop.
                        if !self.arrival.give_up() && self.state == State::Restoring {
                            self.advance(Event::LetGo);
                        }
                        return Err(ReceiveError::Restore(reason));
                    }
                    // Too late to give up: the source has committed.
                    Some(_) => {}
                    // This process goes with its shim; the source asks on.
                    None => return Err(ReceiveError::ShimGone),
                },
                // A source that lost its session asks again; the answer is due
                // when it is known.
                Some(reopened) = self.sessions.recv() => *session = reopened,
                () = &mut limit, if !late => {
                    late = true;
                    give_up = Some(format!("it took longer than {:?}", Phase::Resume.timeout()));
                }
            }
            if let Some(reason) = give_up.take() {
                tracing::error!(reason, "the restore is given up, if it is not too late");
                if self.state == State::Restoring && self.arrival.give_up() {
                    self.advance(Event::LocalFailure);
                    self.shim.send(&FromEngine::AbandonRestore { reason })?;
                } else if self.state != State::Undoing {
                    // It has run, whether runc returns or not.
                    session.say(ToSource::Running(pb::Running::default())).await;
                }
            }
            // runc may be heard before the page server.
            let runs = matches!(self.state, State::Resuming | State::Placed);
            if let Some(mut running) = restored.take_if(|_| runs) {
                running.let_go_us = micros(let_go);
                return Ok(Filling { memory, running });
            }
        }
    }

    /// The container runs: says so, and fills its memory in.
    pub(super) async fn settle(
        &mut self,
        mut session: Session,
        filling: Filling,
    ) -> Result<(), ReceiveError> {
        self.advance(Event::Restored);
        self.shim.send(&FromEngine::Running)?;
        session.say(ToSource::Running(filling.running)).await;
        self.volumes.remove().await;
        let mut memory = filling.memory;
        let report = loop {
            tokio::select! {
                report = memory.filled() => break report?,
                // A source that did not hear the answer asks again.
                Some(reopened) = self.sessions.recv() => {
                    session = reopened;
                    session.say(ToSource::Running(filling.running)).await;
                }
            }
        };
        tracing::info!(?report, "memory is in place");
        if self.state == State::Running {
            self.advance(Event::Filled);
        }
        self.shim.send(&FromEngine::Settled)?;
        // The source closes its session once it has heard; one that lost it
        // has as long as we would have waited for it.
        loop {
            if matches!(
                tokio::time::timeout(SOURCE_TIMEOUT, session.closed()).await,
                Ok(true) | Err(_)
            ) {
                return Ok(());
            }
            match tokio::time::timeout(SOURCE_TIMEOUT, self.sessions.recv()).await {
                Ok(Some(reopened)) => {
                    session = reopened;
                    session.say(ToSource::Running(filling.running)).await;
                }
                _ => return Ok(()),
            }
        }
    }

    /// Nothing runs here and nothing will: the source may have it back. That is
    /// written down, then it is told, and again whenever it asks.
    pub(super) async fn hand_back(&mut self, session: Option<Session>, error: &ReceiveError) {
        self.arrival.fence().await;
        let answer = pb::HandedBack {
            reason: crate::error_chain(error),
        };
        let mut open = session;
        loop {
            if let Some(session) = &mut open {
                session.say(ToSource::HandedBack(answer.clone())).await;
                if session.closed().await {
                    return;
                }
            }
            open = match tokio::time::timeout(SOURCE_TIMEOUT, self.sessions.recv()).await {
                Ok(Some(reopened)) => Some(reopened),
                _ => return,
            };
        }
    }
}

fn micros(duration: Duration) -> u64 {
    u64::try_from(duration.as_micros()).unwrap_or(u64::MAX)
}
