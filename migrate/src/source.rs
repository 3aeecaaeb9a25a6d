//! The sending side, as a table.
//!
//! ```text
//!              Welcomed              DestinationReady          SwitchDecided
//! Negotiating ----------> Preparing ----------------> PreCopying -----------> Freezing
//!      |                      |                        ^ |    |                  |
//!      |                      |                        '-'    |                  | Frozen
//!      |                      |                      LapDone  |                  v
//!      |                      |                               |               Dumping
//!      |                      |                               |                  |
//!      |                      |                               |                  | FinalSent
//!      |                      |                               |                  v
//!      |                      |                               |          AwaitingPrepared
//!      |                      |                               |                  |
//!      |                      |                               |                  | Prepared
//!      v                      v                               v                  v
//!   Stayed <----- failure, loss, timeout; cancel in all but Committing ----- Committing
//!      ^                                                                         |
//!      |                                                                         | CommitRecorded
//!  = = | = = = = = = = = = = = = = = commit point  = = = = = = = = = = = = = = = | = =
//!      |                                                                         v
//!      |<----------------------------- HandedBack ------------------------- Committed
//!      |                                                                      |     |
//!      |                        PeerLost, PhaseTimedOut                       |     |
//!      |<---- HandedBack ---- Undecided <-------------------------------------'     |
//!                              ^  |   |                                             |
//!              PeerLost,       '--'   | Running                             Running |
//!              PhaseTimedOut          v                                             |
//!                                  Released <---------------------------------------'
//!                                     |
//!                                     | SourceEnded
//!                                     v
//!                                  Migrated
//! ```
//!
//! Above the line every failure leads to [`State::Stayed`]: the container goes
//! on as if nothing had happened. Below it nothing on this node may let the
//! container run: only the destination's word `HandedBack` does, and only the
//! destination's word `Running` kills it. A session that breaks there leaves the
//! machine [`State::Undecided`]: frozen, asking again.
//!
//! N.B. the line lies *before* `Commit` is sent: whoever finds the commit record
//! after a crash must assume that it was.

use serde::{Deserialize, Serialize};

use crate::error::IllegalTransition;
use crate::phase::Phase;

/// Where the sending side is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum State {
    /// `Hello` is sent; waits for `Welcome` or `Refused`.
    Negotiating,
    /// `PrepareSwitch` is sent; waits for `SwitchReady`. The source is never
    /// frozen before the destination has said that it is ready.
    Preparing,
    /// Laps over memory while the container runs.
    PreCopying,
    /// The freezer is asked; waits until all tasks stand still.
    Freezing,
    /// All tasks stand still: final pages, final files, CRIU's images.
    Dumping,
    /// `Final` is sent; waits for `Prepared`.
    AwaitingPrepared,
    /// The commit record is being written. `Commit` is not sent yet.
    Committing,
    /// The record is durable, `Commit` may be on its way; waits for `Running`.
    Committed,
    /// As `Committed`, and nobody to talk to: asks again until there is an answer.
    Undecided,
    /// `Running` was heard: the frozen copy here is being killed.
    Released,
    /// Terminal: it runs on the other node, and nothing of it is left here.
    Migrated,
    /// Terminal: it never left, and runs here.
    Stayed,
}

impl State {
    /// Where a migration begins.
    pub const START: Self = Self::Negotiating;

    /// All of them.
    pub const ALL: [Self; 12] = [
        Self::Negotiating,
        Self::Preparing,
        Self::PreCopying,
        Self::Freezing,
        Self::Dumping,
        Self::AwaitingPrepared,
        Self::Committing,
        Self::Committed,
        Self::Undecided,
        Self::Released,
        Self::Migrated,
        Self::Stayed,
    ];

    /// The phase whose timeout bounds this state; none at the end.
    pub fn phase(self) -> Option<Phase> {
        match self {
            Self::Negotiating => Some(Phase::Negotiate),
            Self::Preparing => Some(Phase::Prepare),
            Self::PreCopying => Some(Phase::PreCopy),
            Self::Freezing | Self::Dumping | Self::AwaitingPrepared => Some(Phase::Freeze),
            Self::Committing => Some(Phase::Commit),
            Self::Committed | Self::Undecided | Self::Released => Some(Phase::Resume),
            Self::Migrated | Self::Stayed => None,
        }
    }

    /// Nothing more will happen.
    pub fn is_terminal(self) -> bool {
        self.phase().is_none()
    }

    /// A cancellation is still obeyed.
    pub fn may_cancel(self) -> bool {
        self < Self::Committing
    }

    /// The container must stay frozen whatever happens on this node.
    pub fn is_past_commit(self) -> bool {
        matches!(self, Self::Committed | Self::Undecided | Self::Released)
    }
}

/// What happens to the sending side.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Event {
    /// Peer: `Welcome`.
    Welcomed,
    /// Peer: `Refused`.
    Refused,
    /// Peer: `SwitchReady`.
    DestinationReady,
    /// A lap is over and everything it sent is acknowledged.
    LapDone,
    /// The convergence says switch; also at once where nothing can be tracked.
    SwitchDecided,
    /// The convergence gives up.
    GaveUp,
    /// All tasks of the container stand still.
    Frozen,
    /// Final pages, files and images are sent, `Final` behind them; CRIU waits in
    /// `post-dump`. Fed before the session is listened to again: `Prepared` follows.
    FinalSent,
    /// Peer: `Prepared`.
    Prepared,
    /// The commit record is durable.
    CommitRecorded,
    /// Peer: `Running`, on the first session or on a later one.
    Running,
    /// Peer: `HandedBack`; or an operator who made sure that the destination's
    /// copy can never run says so.
    HandedBack,
    /// The frozen copy here is dead, all of it.
    SourceEnded,
    /// The session ended or broke, a page or file stream with it, or a peer broke
    /// the protocol; when asking again: nobody answered.
    PeerLost,
    /// The phase took longer than its timeout.
    PhaseTimedOut,
    /// Somebody wants it to stay.
    CancelRequested,
    /// Something on this node failed.
    LocalFailure,
    /// Peer: `Failed`.
    DestinationFailed,
}

impl Event {
    /// All of them.
    pub const ALL: [Self; 18] = [
        Self::Welcomed,
        Self::Refused,
        Self::DestinationReady,
        Self::LapDone,
        Self::SwitchDecided,
        Self::GaveUp,
        Self::Frozen,
        Self::FinalSent,
        Self::Prepared,
        Self::CommitRecorded,
        Self::Running,
        Self::HandedBack,
        Self::SourceEnded,
        Self::PeerLost,
        Self::PhaseTimedOut,
        Self::CancelRequested,
        Self::LocalFailure,
        Self::DestinationFailed,
    ];
}

/// What the engine must do now.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Action {
    /// Go on waiting.
    Nothing,
    /// Send `PrepareSwitch`.
    SendPrepareSwitch,
    /// Arm the tracking and make the first lap; feed `LapDone`. Where nothing can
    /// be tracked: feed `SwitchDecided`.
    StartLaps,
    /// Observe the lap, ask [`Convergence::decide`](crate::converge::Convergence::decide),
    /// then make another lap or feed `SwitchDecided` or `GaveUp`.
    Decide,
    /// Lock the network, freeze the cgroup; feed `Frozen`.
    Freeze,
    /// Final pages beside CRIU's dump, final files, images, then `Final`; hold CRIU
    /// in `post-dump`; feed `FinalSent`.
    SendFinal,
    /// Write the commit record durably, state `Committing`; feed `CommitRecorded`,
    /// or `LocalFailure` if it cannot be written.
    RecordCommit,
    /// Send `Commit`. Failing to is `PeerLost`.
    SendCommit,
    /// Wait a little ([`ASK_AGAIN_AFTER`]), drop the old session, open a new one
    /// with the same ticket and send `Commit` as its first message. Failing to is
    /// `PeerLost`.
    AskAgain,
    /// Mark the commit record `Released`, then let CRIU kill the container (or kill
    /// it where CRIU is gone); feed `SourceEnded` when nothing of it is left.
    KillSource,
    /// Remove the commit record: the migration is complete.
    Finish,
    /// Send `Abort` if the session is alive, and end it. Nothing else was begun.
    Leave,
    /// As `Leave`, and stop laps and tracking.
    Disarm,
    /// As `Disarm`; CRIU is refused at `post-dump`, network and cgroup are let go.
    ThawAndDisarm,
    /// As `ThawAndDisarm`, but first wait until the writing of the commit record has
    /// ended in whatever way and remove the record durably. N.B. in this order: a
    /// record that outlives the thaw would let a restart send `Commit` for a
    /// container that runs.
    RevokeAndThaw,
    /// Mark the commit record `HandedBack`, then thaw and disarm as in
    /// `ThawAndDisarm`, then remove the record.
    ThawAfterHandBack,
    /// Tell whoever cancels that it is too late.
    RefuseCancel,
}

/// The pause before the source asks again, short because the container stands
/// still meanwhile: a lost link is usually back at once or not for long.
pub const ASK_AGAIN_AFTER: std::time::Duration = std::time::Duration::from_millis(500);

/// One transition.
///
/// # Errors
///
/// [`IllegalTransition`] where `event` has no place in `state`; the state is
/// then unchanged.
pub fn step(state: State, event: Event) -> Result<(State, Action), IllegalTransition> {
    use Action as A;
    use Event as E;
    use State as S;

    Ok(match (state, event) {
        // The way it should go.
        (S::Negotiating, E::Welcomed) => (S::Preparing, A::SendPrepareSwitch),
        (S::Preparing, E::DestinationReady) => (S::PreCopying, A::StartLaps),
        (S::PreCopying, E::LapDone) => (S::PreCopying, A::Decide),
        (S::PreCopying, E::SwitchDecided) => (S::Freezing, A::Freeze),
        (S::Freezing, E::Frozen) => (S::Dumping, A::SendFinal),
        (S::Dumping, E::FinalSent) => (S::AwaitingPrepared, A::Nothing),
        (S::AwaitingPrepared, E::Prepared) => (S::Committing, A::RecordCommit),
        (S::Committing, E::CommitRecorded) => (S::Committed, A::SendCommit),
        (S::Committed | S::Undecided, E::Running) => (S::Released, A::KillSource),
        (S::Released, E::SourceEnded) => (S::Migrated, A::Finish),

        // Before the commit: whatever goes wrong, it stays and runs.
        (S::Negotiating, E::Refused) => (S::Stayed, A::Leave),
        (S::PreCopying, E::GaveUp) => (S::Stayed, A::Disarm),
        (
            S::Negotiating | S::Preparing,
            E::PeerLost
            | E::PhaseTimedOut
            | E::CancelRequested
            | E::LocalFailure
            | E::DestinationFailed,
        ) => (S::Stayed, A::Leave),
        (
            S::PreCopying,
            E::PeerLost
            | E::PhaseTimedOut
            | E::CancelRequested
            | E::LocalFailure
            | E::DestinationFailed,
        ) => (S::Stayed, A::Disarm),
        (
            S::Freezing | S::Dumping | S::AwaitingPrepared,
            E::PeerLost
            | E::PhaseTimedOut
            | E::CancelRequested
            | E::LocalFailure
            | E::DestinationFailed,
        ) => (S::Stayed, A::ThawAndDisarm),
        // `Commit` was not sent: the destination cannot run it, so this node may.
        (S::Committing, E::PeerLost | E::PhaseTimedOut | E::LocalFailure | E::HandedBack) => {
            (S::Stayed, A::RevokeAndThaw)
        }

        // After the commit: only the destination's word moves it.
        (S::Committed | S::Undecided, E::HandedBack) => (S::Stayed, A::ThawAfterHandBack),
        (S::Committed | S::Undecided, E::PeerLost | E::PhaseTimedOut) => {
            (S::Undecided, A::AskAgain)
        }
        // Whatever broke here, the container is frozen and the record is written.
        (S::Committed | S::Undecided, E::LocalFailure) => (state, A::Nothing),
        // The destination was asked more than once and answers each time.
        (S::Released, E::Running | E::PeerLost) => (S::Released, A::Nothing),
        (S::Released, E::PhaseTimedOut | E::LocalFailure) => (S::Released, A::KillSource),
        (S::Committing | S::Committed | S::Undecided | S::Released, E::CancelRequested) => {
            (state, A::RefuseCancel)
        }

        (state, event) => return Err(IllegalTransition::Source { state, event }),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    use Action as A;
    use Event as E;
    use State as S;

    /// Every legal pair; whatever is not here must be refused.
    #[rustfmt::skip] // one row, one line
    const LEGAL: &[(State, Event, State, Action)] = &[
        (S::Negotiating, E::Welcomed, S::Preparing, A::SendPrepareSwitch),
        (S::Negotiating, E::Refused, S::Stayed, A::Leave),
        (S::Negotiating, E::PeerLost, S::Stayed, A::Leave),
        (S::Negotiating, E::PhaseTimedOut, S::Stayed, A::Leave),
        (S::Negotiating, E::CancelRequested, S::Stayed, A::Leave),
        (S::Negotiating, E::LocalFailure, S::Stayed, A::Leave),
        (S::Negotiating, E::DestinationFailed, S::Stayed, A::Leave),
        (S::Preparing, E::DestinationReady, S::PreCopying, A::StartLaps),
        (S::Preparing, E::PeerLost, S::Stayed, A::Leave),
        (S::Preparing, E::PhaseTimedOut, S::Stayed, A::Leave),
        (S::Preparing, E::CancelRequested, S::Stayed, A::Leave),
        (S::Preparing, E::LocalFailure, S::Stayed, A::Leave),
        (S::Preparing, E::DestinationFailed, S::Stayed, A::Leave),
        (S::PreCopying, E::LapDone, S::PreCopying, A::Decide),
        (S::PreCopying, E::SwitchDecided, S::Freezing, A::Freeze),
        (S::PreCopying, E::GaveUp, S::Stayed, A::Disarm),
        (S::PreCopying, E::PeerLost, S::Stayed, A::Disarm),
        (S::PreCopying, E::PhaseTimedOut, S::Stayed, A::Disarm),
        (S::PreCopying, E::CancelRequested, S::Stayed, A::Disarm),
        (S::PreCopying, E::LocalFailure, S::Stayed, A::Disarm),
        (S::PreCopying, E::DestinationFailed, S::Stayed, A::Disarm),
        (S::Freezing, E::Frozen, S::Dumping, A::SendFinal),
        (S::Freezing, E::PeerLost, S::Stayed, A::ThawAndDisarm),
        (S::Freezing, E::PhaseTimedOut, S::Stayed, A::ThawAndDisarm),
        (S::Freezing, E::CancelRequested, S::Stayed, A::ThawAndDisarm),
        (S::Freezing, E::LocalFailure, S::Stayed, A::ThawAndDisarm),
        (S::Freezing, E::DestinationFailed, S::Stayed, A::ThawAndDisarm),
        (S::Dumping, E::FinalSent, S::AwaitingPrepared, A::Nothing),
        (S::Dumping, E::PeerLost, S::Stayed, A::ThawAndDisarm),
        (S::Dumping, E::PhaseTimedOut, S::Stayed, A::ThawAndDisarm),
        (S::Dumping, E::CancelRequested, S::Stayed, A::ThawAndDisarm),
        (S::Dumping, E::LocalFailure, S::Stayed, A::ThawAndDisarm),
        (S::Dumping, E::DestinationFailed, S::Stayed, A::ThawAndDisarm),
        (S::AwaitingPrepared, E::Prepared, S::Committing, A::RecordCommit),
        (S::AwaitingPrepared, E::PeerLost, S::Stayed, A::ThawAndDisarm),
        (S::AwaitingPrepared, E::PhaseTimedOut, S::Stayed, A::ThawAndDisarm),
        (S::AwaitingPrepared, E::CancelRequested, S::Stayed, A::ThawAndDisarm),
        (S::AwaitingPrepared, E::LocalFailure, S::Stayed, A::ThawAndDisarm),
        (S::AwaitingPrepared, E::DestinationFailed, S::Stayed, A::ThawAndDisarm),
        (S::Committing, E::CommitRecorded, S::Committed, A::SendCommit),
        (S::Committing, E::PeerLost, S::Stayed, A::RevokeAndThaw),
        (S::Committing, E::PhaseTimedOut, S::Stayed, A::RevokeAndThaw),
        (S::Committing, E::LocalFailure, S::Stayed, A::RevokeAndThaw),
        (S::Committing, E::HandedBack, S::Stayed, A::RevokeAndThaw),
        (S::Committing, E::CancelRequested, S::Committing, A::RefuseCancel),
        (S::Committed, E::Running, S::Released, A::KillSource),
        (S::Committed, E::HandedBack, S::Stayed, A::ThawAfterHandBack),
        (S::Committed, E::PeerLost, S::Undecided, A::AskAgain),
        (S::Committed, E::PhaseTimedOut, S::Undecided, A::AskAgain),
        (S::Committed, E::LocalFailure, S::Committed, A::Nothing),
        (S::Committed, E::CancelRequested, S::Committed, A::RefuseCancel),
        (S::Undecided, E::Running, S::Released, A::KillSource),
        (S::Undecided, E::HandedBack, S::Stayed, A::ThawAfterHandBack),
        (S::Undecided, E::PeerLost, S::Undecided, A::AskAgain),
        (S::Undecided, E::PhaseTimedOut, S::Undecided, A::AskAgain),
        (S::Undecided, E::LocalFailure, S::Undecided, A::Nothing),
        (S::Undecided, E::CancelRequested, S::Undecided, A::RefuseCancel),
        (S::Released, E::SourceEnded, S::Migrated, A::Finish),
        (S::Released, E::Running, S::Released, A::Nothing),
        (S::Released, E::PeerLost, S::Released, A::Nothing),
        (S::Released, E::PhaseTimedOut, S::Released, A::KillSource),
        (S::Released, E::LocalFailure, S::Released, A::KillSource),
        (S::Released, E::CancelRequested, S::Released, A::RefuseCancel),
    ];

    #[test]
    fn every_pair_of_state_and_event_does_what_the_table_says() {
        let mut met = 0;
        for state in State::ALL {
            for event in Event::ALL {
                let wanted = LEGAL
                    .iter()
                    .find(|(from, on, ..)| (*from, *on) == (state, event))
                    .map(|&(_, _, to, action)| (to, action))
                    .ok_or(IllegalTransition::Source { state, event });
                met += usize::from(wanted.is_ok());
                assert_eq!(step(state, event), wanted, "{state:?} on {event:?}");
            }
        }
        assert_eq!(met, LEGAL.len(), "a row of the table is there twice");
    }

    #[test]
    fn the_lists_of_states_and_events_are_complete() {
        // The variants count up from zero, so that the last one counts them.
        assert!(State::ALL.iter().enumerate().all(|(i, s)| *s as usize == i));
        assert!(Event::ALL.iter().enumerate().all(|(i, e)| *e as usize == i));
        assert_eq!(State::ALL.len(), State::Stayed as usize + 1);
        assert_eq!(Event::ALL.len(), Event::DestinationFailed as usize + 1);
    }

    #[test]
    fn every_state_but_the_last_has_a_timeout_and_survives_the_loss_of_its_peer() {
        for state in State::ALL {
            let timed = step(state, E::PhaseTimedOut).is_ok();
            let lost = step(state, E::PeerLost).is_ok();
            assert_eq!(timed, !state.is_terminal(), "{state:?}");
            assert_eq!(lost, !state.is_terminal(), "{state:?}");
        }
    }

    #[test]
    fn after_the_commit_only_the_destinations_word_thaws_or_kills() {
        for state in State::ALL.into_iter().filter(|s| s.is_past_commit()) {
            for event in Event::ALL {
                let Ok((next, action)) = step(state, event) else {
                    continue;
                };
                match action {
                    A::ThawAfterHandBack => assert_eq!(event, E::HandedBack),
                    A::KillSource => assert!(event == E::Running || state == S::Released),
                    A::ThawAndDisarm | A::RevokeAndThaw | A::Disarm | A::Leave => {
                        panic!("{state:?} lets the container run on {event:?}")
                    }
                    _ => assert!(next.is_past_commit() || next == S::Migrated),
                }
            }
        }
    }

    #[test]
    fn a_cancellation_is_obeyed_before_the_commit_and_refused_from_it_on() {
        for state in State::ALL.into_iter().filter(|s| !s.is_terminal()) {
            let (next, action) = step(state, E::CancelRequested).unwrap();
            if state.may_cancel() {
                assert_eq!(next, S::Stayed);
            } else {
                assert_eq!((next, action), (state, A::RefuseCancel));
            }
        }
    }

    #[test]
    fn an_illegal_transition_names_side_state_and_event() {
        let error = step(S::Migrated, E::Running).unwrap_err();
        assert_eq!(
            error.to_string(),
            "the source cannot take event Running in state Migrated"
        );
    }
}
