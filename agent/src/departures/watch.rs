//! A running engine and the destination's word, brought together.
//!
//! The engine knows how far the migration is, the destination's sternad why it
//! cannot go on. Whoever is heard first, the result names the one that failed.
//!
//! An engine that dies is followed by another, which its shim starts: that one is
//! listened to next.

use std::time::Duration;

use migrate::Phase;
use nodeapi::{ContainerRecord, RunState};
use proto::agent as pb;
use proto::agent::hold_event::Event as Held;
use proto::agent::migrate_event::Event;
use proto::engine as epb;
use proto::engine::progress;
use tokio::sync::mpsc;
use tonic::Streaming;

use super::engine::Engine;
use super::{CancelOrder, Departure};
use crate::node::Node;
use crate::peer::Peer;
use crate::process;
use crate::side::{Failure, Side};

/// When the engine fails, the destination usually knows why, a moment later.
const VERDICT_TIMEOUT: Duration = Duration::from_secs(3);

/// Between two looks for an engine that follows a dead one. It is there within a few
/// hundredths of a second.
const NEXT_ENGINE_PAUSE: Duration = Duration::from_millis(50);

/// Engines until the last word of one.
pub(super) struct Watch<'a> {
    pub(super) node: &'a Node,
    pub(super) departure: &'a Departure,
    pub(super) orders: &'a mut mpsc::Receiver<CancelOrder>,
    pub(super) peer: Option<Peer>,
    /// None once it has said its last, and where it cannot be reached.
    pub(super) hold: Option<Streaming<pb::HoldEvent>>,
    /// Age of the migration when the engine began, in milliseconds.
    pub(super) began_ms: u64,
    pub(super) phase: Phase,
    known: Known,
}

/// What came to light on the way.
#[derive(Debug, Default)]
struct Known {
    /// Why the destination will not have the container.
    verdict: Option<Failure>,
    /// The container runs there.
    arrived: bool,
    /// A user's order that the engine accepted.
    cancelled: Option<String>,
}

impl<'a> Watch<'a> {
    pub(super) fn new(
        node: &'a Node,
        departure: &'a Departure,
        orders: &'a mut mpsc::Receiver<CancelOrder>,
    ) -> Self {
        Self {
            node,
            departure,
            orders,
            peer: None,
            hold: None,
            began_ms: 0,
            phase: Phase::Prepare,
            known: Known::default(),
        }
    }

    /// Relays what the engine says until it has said its last.
    pub(super) async fn follow(
        mut self,
        mut engine: Engine,
        mut events: Streaming<epb::Progress>,
    ) -> epb::Finished {
        let (found_out, mut findings) = mpsc::channel::<Failure>(1);
        loop {
            let hold = async {
                match &mut self.hold {
                    Some(hold) => hold.message().await,
                    None => std::future::pending().await,
                }
            };
            tokio::select! {
                biased;
                message = events.message() => match message {
                    Ok(Some(epb::Progress { event: Some(progress::Event::Finished(finished)), .. })) => {
                        return self.last_word(finished).await;
                    }
                    Ok(Some(message)) => self.relay(message),
                    broken => match self.next_engine().await {
                        Some(next) => (engine, events) = next,
                        None => {
                            let reason = match &broken {
                                Err(status) => status.message(),
                                Ok(_) => "its connection closed",
                            };
                            return self.without_a_word(reason).await;
                        }
                    },
                },
                held = hold => match held {
                    Ok(Some(pb::HoldEvent { event })) => self.held(&engine, event).await,
                    // It has said its last.
                    Ok(None) if self.known.verdict.is_some() => self.hold = None,
                    broken => {
                        self.hold = None;
                        let reason = match broken {
                            Err(status) => status.message().to_owned(),
                            Ok(_) => "it ended the conversation".into(),
                        };
                        // Finding out takes seconds in which the engine goes on.
                        if let Some(peer) = self.peer.clone() {
                            let found_out = found_out.clone();
                            tokio::spawn(async move {
                                drop(found_out.send(peer.lost(&reason).await).await);
                            });
                        }
                    }
                },
                Some(failure) = findings.recv() => self.destination_lost(&engine, failure).await,
                Some(order) = self.orders.recv() => {
                    let answer = engine.cancel(&order.reason).await;
                    if answer.is_ok() {
                        self.known.cancelled = Some(order.reason);
                    }
                    // Whoever asked may be gone.
                    drop(order.answer.send(answer));
                }
            }
        }
    }

    /// The engine that has the migration now; none where its shim has none any more.
    pub(super) async fn next_engine(&self) -> Option<(Engine, Streaming<epb::Progress>)> {
        let record = &self.departure.order.record;
        let socket = self
            .node
            .run_dir
            .engine_socket(&self.departure.order.migration_id);
        loop {
            // Looked at before: an engine that is not met until its shim has let the
            // container go is not met any more.
            let wanted = ContainerRecord::read(&self.node.run_dir, &record.namespace, &record.id)
                .ok()
                .flatten()
                .filter(|record| process::is_alive(record.shim_pid))
                .is_some_and(|record| {
                    matches!(record.state, RunState::Sending | RunState::Undecided)
                });
            match Engine::attach(&socket).await {
                Ok(next) => return Some(next),
                Err(_) if wanted => tokio::time::sleep(NEXT_ENGINE_PAUSE).await,
                Err(_) => return None,
            }
        }
    }

    fn relay(&mut self, message: epb::Progress) {
        let Some(event) = message.event else { return };
        if let progress::Event::Phase(begun) = &event {
            let phase = Phase::ALL
                .into_iter()
                .find(|phase| phase.name() == begun.phase);
            match phase {
                // Both are over by the time there is an engine.
                Some(Phase::Negotiate | Phase::Prepare) => return,
                Some(phase) => self.phase = phase,
                None => {}
            }
        }
        let at_ms = self.began_ms.saturating_add(message.at_ms);
        let progress = epb::Progress {
            at_ms,
            event: Some(event),
        };
        self.departure.events.push(Event::Progress(progress));
    }

    async fn held(&mut self, engine: &Engine, event: Option<Held>) {
        match event {
            Some(Held::Holding(_)) | None => {}
            Some(Held::Arrived(_)) => {
                self.known.arrived = true;
                self.hold = None;
            }
            Some(Held::Failed(failed)) => {
                let failure = Failure::new(Side::from_name(&failed.side), failed.reason);
                self.destination_lost(engine, failure).await;
            }
            Some(Held::TakenBack(_)) => self.given_back(engine).await,
        }
    }

    /// The destination will not have the container: stop, if it is not too late.
    async fn destination_lost(&mut self, engine: &Engine, failure: Failure) {
        tracing::warn!(
            side = failure.side.name(),
            reason = failure.reason,
            phase = self.phase.name(),
            "the destination is lost"
        );
        let cancelled = engine.cancel(&failure.to_string()).await;
        self.known.verdict = Some(failure);
        if let Err(status) = cancelled {
            // After the commit the engines settle it between themselves.
            tracing::warn!(reason = status.message(), "the engine is not cancelled");
        }
    }

    /// Nothing of the container is left on the destination: an engine that has
    /// committed and got no answer since may take it back.
    async fn given_back(&self, engine: &Engine) {
        let reason = self
            .known
            .verdict
            .as_ref()
            .map_or("", |verdict| &verdict.reason);
        if let Err(status) = engine.hand_back(reason).await {
            // It has ended, or is about to.
            tracing::debug!(
                reason = status.message(),
                "the engine does not take the container back"
            );
        }
    }

    /// The engine's last word, with the better reason of two.
    async fn last_word(mut self, mut finished: epb::Finished) -> epb::Finished {
        if finished.outcome == "migrated" {
            // Others than its shim do not take a container along when they go.
            let lost = |verdict: &&Failure| verdict.side == Side::DestinationShim;
            if let Some(verdict) = self.known.verdict.as_ref().filter(lost) {
                let text = format!(
                    "the container was let go on {} and then lost there: {}",
                    self.departure.order.destination, verdict.reason
                );
                self.departure.events.push(Event::Notice(text));
            }
            return finished;
        }
        if finished.phase.is_empty() {
            finished.phase = self.phase.name().into();
        }
        if finished.outcome == "failed" {
            // Also where the engine blames its own side: a stream that breaks
            // looks like a fault of whoever writes to it.
            self.hear_destination().await;
        }
        self.known.correct(&mut finished);
        finished
    }

    /// What the destination has to say, if it does so soon; if it is silent,
    /// whether it can be reached at all.
    async fn hear_destination(&mut self) {
        if self.known.verdict.is_some() || self.known.arrived {
            return;
        }
        let Some(hold) = self.hold.as_mut() else {
            // It broke a moment ago, or there never was one.
            if let Some(peer) = &self.peer {
                self.known.verdict = peer.probe().await.err();
            }
            return;
        };
        let word = async {
            loop {
                match hold.message().await {
                    Ok(Some(pb::HoldEvent {
                        event: Some(Held::Holding(_)) | None,
                    })) => {}
                    other => return other.map(|event| event.and_then(|event| event.event)),
                }
            }
        };
        let word = tokio::time::timeout(VERDICT_TIMEOUT, word).await;
        match (word, &self.peer) {
            (Ok(Ok(Some(Held::Failed(failed)))), _) => {
                let side = Side::from_name(&failed.side);
                self.known.verdict = Some(Failure::new(side, failed.reason));
            }
            (Ok(Ok(Some(Held::Arrived(_)))), _) => self.known.arrived = true,
            (Ok(Err(status)), Some(peer)) => {
                self.known.verdict = Some(peer.lost(status.message()).await);
            }
            (Err(_), Some(peer)) => self.known.verdict = peer.probe().await.err(),
            _ => {}
        }
    }

    /// The engine is gone without a last word, or was when we came. Its shim knows
    /// whether the container is still ours, the destination whether it has it.
    pub(super) async fn without_a_word(mut self, reason: &str) -> epb::Finished {
        self.hear_destination().await;
        let record = &self.departure.order.record;
        let record = ContainerRecord::read(&self.node.run_dir, &record.namespace, &record.id);
        let state = record
            .ok()
            .flatten()
            .filter(|record| process::is_alive(record.shim_pid))
            .map(|record| record.state);
        let finished = |outcome: &str, reason: String| epb::Finished {
            outcome: outcome.into(),
            phase: self.phase.name().into(),
            side: Side::SourceShim.name().into(),
            reason,
            summary: None,
        };
        let mut text = format!("the sending engine ended without a word ({reason})");
        if let Some(verdict) = &self.known.verdict {
            text.push_str(&format!(
                ", and node {} says: {}",
                self.departure.order.destination, verdict.reason
            ));
        }
        match (state, self.known.arrived) {
            (Some(RunState::Stopped), true) => {
                tracing::warn!(reason = text, "the container has moved all the same");
                finished("migrated", String::new())
            }
            (Some(RunState::Running), false) => {
                let mut finished = finished("failed", text);
                self.known.correct(&mut finished);
                finished
            }
            (state, arrived) => {
                text.push_str(&format!(
                    "; the container is {} here and {} on {}: look at both (sterna ps) before doing anything",
                    state.map_or("unknown", RunState::name),
                    if arrived { "runs" } else { "may have arrived" },
                    self.departure.order.destination,
                ));
                finished("unknown", text)
            }
        }
    }
}

impl Known {
    /// Names the one that failed first: an engine sees the consequences.
    fn correct(&self, finished: &mut epb::Finished) {
        if let Some(reason) = &self.cancelled {
            finished.outcome = "cancelled".into();
            finished.side = "operator".into();
            finished.reason.clone_from(reason);
            return;
        }
        let Some(verdict) = &self.verdict else { return };
        // A receiving engine ends when its source does: what its shim then says is
        // the consequence. Of the others' ends the source is never the cause.
        let may_be_consequence = matches!(verdict.side, Side::DestinationShim | Side::Source);
        if may_be_consequence && finished.outcome == "failed" && finished.side.starts_with("source")
        {
            return;
        }
        // Cancelled on our own order: to the user it failed.
        if finished.outcome == "cancelled" {
            finished.outcome = "failed".into();
        }
        finished.side = verdict.side.name().into();
        finished.reason.clone_from(&verdict.reason);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn finished(outcome: &str, side: &str) -> epb::Finished {
        epb::Finished {
            outcome: outcome.into(),
            side: side.into(),
            reason: "engine".into(),
            ..Default::default()
        }
    }

    fn corrected(known: &Known, outcome: &str, side: &str) -> (String, String, String) {
        let mut finished = finished(outcome, side);
        known.correct(&mut finished);
        (finished.outcome, finished.side, finished.reason)
    }

    fn lost(side: Side) -> Known {
        Known {
            verdict: Some(Failure::new(side, "there")),
            ..Known::default()
        }
    }

    fn words(outcome: &str, side: &str, reason: &str) -> (String, String, String) {
        (outcome.into(), side.into(), reason.into())
    }

    #[test]
    fn a_lost_destination_is_named_though_the_engine_was_only_told_to_stop() {
        for side in [
            Side::DestinationAgent,
            Side::DestinationContainerd,
            Side::DestinationShim,
            Side::Link,
        ] {
            let expected = words("failed", side.name(), "there");
            assert_eq!(corrected(&lost(side), "cancelled", "operator"), expected);
            assert_eq!(corrected(&lost(side), "failed", "destination"), expected);
        }
    }

    #[test]
    fn a_source_that_failed_is_not_excused_by_the_receiver_that_ended_with_it() {
        let known = lost(Side::DestinationShim);
        assert_eq!(
            corrected(&known, "failed", "source"),
            words("failed", "source", "engine")
        );
        let back = words("handed-back", "destination shim", "there");
        assert_eq!(corrected(&known, "handed-back", "destination"), back);
        // A phase that timed out because the link is down.
        assert_eq!(
            corrected(&lost(Side::Link), "failed", "source"),
            words("failed", "link", "there")
        );
    }

    #[test]
    fn what_a_user_cancelled_is_cancelled_whatever_broke_because_of_it() {
        let known = Known {
            cancelled: Some("by a user".into()),
            ..lost(Side::DestinationShim)
        };
        let expected = words("cancelled", "operator", "by a user");
        assert_eq!(corrected(&known, "failed", "destination"), expected);
        assert_eq!(corrected(&known, "cancelled", "operator"), expected);
    }
}
