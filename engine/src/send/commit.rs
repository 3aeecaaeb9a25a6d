//! Commit and Resume: the source gives up its right to the container, and waits
//! for the destination's word.

use criu::Action;
use migrate::Phase;
use migrate::commit::{CommitRecord, CommitState, Format};
use migrate::source::{self, Event, State};
use nodeapi::FromEngine;
use proto::engine::Summary;
use proto::migration as pb;
use proto::migration::destination_message::Message as FromDestination;
use proto::migration::source_message::Message as ToDestination;

use super::{Sender, limited};
use crate::dump::DumpFailure;
use crate::link::Dialer;
use crate::progress::Word;
use crate::send_error::SendError;
use crate::session::Session;

/// A failure before the commit point.
pub(super) struct Uncommitted(pub(super) SendError);

impl Sender {
    /// THE COMMIT POINT. The record is written, then the word is sent. As long
    /// as the record is not written the container may be thawed; once it is,
    /// only the destination's word decides, because it may have heard.
    pub(super) async fn commit(&mut self) -> Result<CommitRecord, Uncommitted> {
        self.enter(Phase::Commit);
        match &self.frozen {
            Some(frozen) => frozen.hold().map_err(|error| Uncommitted(error.into()))?,
            None => return Err(Uncommitted(SendError::Worker)),
        }
        // If CRIU died meanwhile, the kernel has let go of the tasks.
        match &self.dump {
            Some(dump) if dump.still_waits().await => {}
            _ => return Err(Uncommitted(DumpFailure::Ended(Action::PostDump).into())),
        }
        // Looked up first: nothing may fail once the record is written.
        let (committed, _) = source::step(self.state, Event::CommitRecorded)
            .map_err(|error| Uncommitted(error.into()))?;
        let record = CommitRecord {
            format: Format::CURRENT,
            migration_id: self.job.migration_id.clone(),
            namespace: self.job.container.namespace.clone(),
            container_id: self.job.container.id.clone(),
            destination_node: self.job.peer_node.clone(),
            destination_address: self.job.peer_address.clone(),
            ticket_id: self.job.ticket.id.clone(),
            init: crate::container::init_process(self.job.init_pid)
                .map_err(|error| Uncommitted(error.into()))?,
            state: CommitState::Committing,
        };
        self.write_record(&record).map_err(Uncommitted)?;
        // N.B. nothing below may fail: the container is the destination's.
        self.state = committed;
        self.log.commit();
        // The shim learns the rest from how this process ends.
        drop(self.shim.send(&FromEngine::Committed));
        if let Some(session) = &self.session {
            // A session that is gone is opened again in `resume`.
            drop(session.say(ToDestination::Commit(pb::Commit {})).await);
        }
        Ok(record)
    }

    /// Past the commit nothing may end on a transition that does not exist: it
    /// is logged, and the destination's word is followed.
    pub(super) fn advance_committed(&mut self, event: Event) {
        if let Err(error) = self.advance(event) {
            tracing::error!(%error, "went on although the table has no such row");
        }
    }

    /// Notes what the destination said, so that whoever finds the record acts on
    /// it. What is to be done is done even if the note cannot be made.
    pub(super) fn mark_record(&self, record: &mut CommitRecord, state: CommitState) {
        record.state = state;
        if let Err(error) = self.write_record(record) {
            tracing::error!(
                error = crate::error_chain(&error),
                "cannot update the commit record"
            );
        }
    }

    pub(super) fn write_record(&self, record: &CommitRecord) -> Result<(), SendError> {
        // On a tmpfs, by rename: it has to survive this process, not the node,
        // whose end would be the container's end too.
        nodeapi::commit::write(&self.dir, record).map_err(SendError::Record)
    }

    /// After the commit: asks until the destination says what became of the
    /// container, then ends it here or lets it go on here.
    pub(super) async fn resume(&mut self, record: CommitRecord) -> Result<Summary, SendError> {
        self.enter(Phase::Resume);
        let word = self.destinations_word(&record).await;
        let frozen_at = self.figures.frozen_at.unwrap_or(self.begun);
        self.figures.blackout = frozen_at.elapsed();
        self.figures.freeze = self.figures.blackout;
        match word {
            Some(Word::HandedBack(reason)) => {
                self.advance_committed(Event::HandedBack);
                Err(self.take_back(record, reason).await)
            }
            Some(Word::Gone(_)) => {
                self.advance_committed(Event::Running);
                Ok(self.end_copy(record).await)
            }
            None => Err(SendError::EndedUndecided),
        }
    }

    /// It does not run there: it goes on here.
    pub(super) async fn take_back(
        &mut self,
        mut record: CommitRecord,
        reason: String,
    ) -> SendError {
        let error = SendError::HandedBack(reason);
        self.mark_record(&mut record, CommitState::HandedBack);
        self.unwind(&error).await;
        error
    }

    /// It runs there: the copy here is ended.
    pub(super) async fn end_copy(&mut self, mut record: CommitRecord) -> Summary {
        self.mark_record(&mut record, CommitState::Released);
        // CRIU ends the tasks; on cgroup v1 they can die only when thawed, which
        // the kill does once every one of them has its signal.
        if let Some(dump) = &mut self.dump
            && let Err(error) = dump.answer(true)
        {
            tracing::warn!(%error, "CRIU is gone");
        }
        if let Some(frozen) = self.frozen.take() {
            frozen.kill().await;
        }
        if let Some(dump) = &mut self.dump
            && let Err(error) = dump.finish(true).await
        {
            tracing::debug!(%error, "CRIU did not end the tasks itself");
        }
        self.advance_committed(Event::SourceEnded);
        // Closing the session in order tells the destination that we have heard.
        self.session = None;
        self.summary()
    }

    /// Asks until somebody has said what became of the container. None: nothing is
    /// left of it here, so that it does not matter any more.
    async fn destinations_word(&mut self, record: &CommitRecord) -> Option<Word> {
        let log = self.log.clone();
        loop {
            let answer = tokio::select! {
                biased;
                answer = limited(Phase::Resume, self.hear_or_ask()) => answer,
                // Only where the destination's engine cannot say so itself.
                word = log.word() => return Some(word),
            };
            match answer {
                Ok(FromDestination::Running(running)) => {
                    self.figures.restore_us = running.restore_us;
                    self.figures.prepare_us = running.prepare_us;
                    self.figures.let_go_us = running.let_go_us;
                    return Some(Word::Gone(String::new()));
                }
                Ok(FromDestination::HandedBack(back)) => {
                    return Some(Word::HandedBack(back.reason));
                }
                // Said before it heard of the commit.
                Ok(_) => {}
                Err(error) => {
                    let error = crate::error_chain(&error);
                    if self.state == State::Undecided {
                        tracing::debug!(error, "asking the destination again");
                    } else {
                        tracing::warn!(error, "asking the destination until it answers");
                    }
                    self.advance_committed(Event::PeerLost);
                    self.session = None;
                    tokio::select! {
                        () = tokio::time::sleep(source::ASK_AGAIN_AFTER) => {}
                        word = log.word() => return Some(word),
                    }
                    // Somebody may have killed it.
                    if crate::container::init_process(self.job.init_pid).ok() != Some(record.init) {
                        return None;
                    }
                    self.say_undecided();
                }
            }
        }
    }

    /// Once: a link that is back at once is not worth a word.
    fn say_undecided(&mut self) {
        if !std::mem::replace(&mut self.undecided, true) {
            // It learns the rest from how this process ends.
            drop(self.shim.send(&FromEngine::Undecided));
        }
    }

    async fn hear_or_ask(&mut self) -> Result<FromDestination, SendError> {
        match &mut self.session {
            Some(session) => session.hear().await,
            None => self.ask_again().await,
        }
    }

    async fn ask_again(&mut self) -> Result<FromDestination, SendError> {
        let dialer = Dialer::new(
            self.job.peer_address.clone(),
            &self.job.peer_node,
            &self.job.identity_dir,
            &self.job.ticket,
        )?;
        let session = Session::open(&dialer).await?;
        session.say(ToDestination::Commit(pb::Commit {})).await?;
        self.session.insert(session).hear().await
    }
}
