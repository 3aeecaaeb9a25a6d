//! The receiving side, as a table.
//!
//! ```text
//!       Hello            PrepareSwitch           Ready               Final
//! Idle -------> Receiving ------------> Preparing ------> SwitchReady ------> Checking
//!  |                |                       |                  |               |    |
//!  v                v                       v                  v               v    |
//! Failed <----- failure, cancel, timeout; Abort, PeerLost in all but Idle -----'    |
//!                                                                                   | Checked
//!                                                                     PeerLost .--. |
//!                                                                              |  v v
//! HandedBack <------------ Abort, failure, cancel, timeout ----------------- Prepared
//!  ^      ^                                                                         |
//!  |      |                                                                         | Commit
//!  |      |                                                                         v
//!  |      '----------------------------- RestoreFailed ------------------------ Restoring
//!  |                                                                             |  |
//!  '-- RestoreFailed -- Undoing <------ failure, timeout ------------------------'  |
//!                                                                                   | LetGo
//! = = = = = = = = = = = = = = = = = = = it has run  = = = = = = = = = = = = = = = = | = =
//!                                                                                   v
//! Settled <-- Filled --- Running <----- Restored, timeout ---------------------- Resuming
//!  ^                        |                                                    |  |
//!  '-- Restored, timeout -- | -- Placed <-------- Filled ------------------------'  |
//!                           |      |                                                |
//! Lost <--------------------'------'----- failure, RestoreFailed -------------------'
//! ```
//!
//! Two arrows matter. Without `Commit` nothing is ever restored here. And before
//! the tasks that are let go can do anything, that they are is written down
//! ([`Action::RecordRan`]): from then on the answer to any question is `Running`,
//! even if the copy dies the moment after, because whoever spoke to it here must
//! not see it fall back in time on the source.
//!
//! [`State::Prepared`] outlives its session: the source may have recorded its
//! commit and be unable to say so. It waits for a later session of the same
//! ticket with `Commit` or `Abort` until the phase's timeout, then writes the
//! fence, discards everything and answers `HandedBack` ever after.

use serde::{Deserialize, Serialize};

use crate::error::IllegalTransition;
use crate::phase::Phase;

/// Where the receiving side is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum State {
    /// The ticket is out; nobody has come with it.
    Idle,
    /// `Welcome` is sent; waits for `PrepareSwitch`. Pages and files are taken
    /// from here on until `Final`.
    Receiving,
    /// What a restore needs is being got ready.
    Preparing,
    /// `SwitchReady` is sent: laps and, at any time, the freeze.
    SwitchReady,
    /// `Final` is here: counts are compared, images made ready.
    Checking,
    /// `Prepared` is sent. Nothing runs and nothing will without `Commit`.
    Prepared,
    /// `Commit` is here; runc restores. No task has run.
    Restoring,
    /// The restore went wrong: what there is of it is being killed.
    Undoing,
    /// The tasks are let go and that is on record; waits for runc to return.
    Resuming,
    /// As `Resuming`, and all memory is in place already.
    Placed,
    /// It runs; memory is still being filled in.
    Running,
    /// Terminal: it runs, and needs nothing of this engine any more.
    Settled,
    /// Terminal: it did not come, and the source knows or will notice.
    Failed,
    /// Terminal: the ticket is fenced, nothing of the container runs here or ever will.
    HandedBack,
    /// Terminal: it ran here and died here.
    Lost,
}

impl State {
    /// Where a migration begins.
    pub const START: Self = Self::Idle;

    /// All of them.
    pub const ALL: [Self; 15] = [
        Self::Idle,
        Self::Receiving,
        Self::Preparing,
        Self::SwitchReady,
        Self::Checking,
        Self::Prepared,
        Self::Restoring,
        Self::Undoing,
        Self::Resuming,
        Self::Placed,
        Self::Running,
        Self::Settled,
        Self::Failed,
        Self::HandedBack,
        Self::Lost,
    ];

    /// The phase whose timeout bounds this state; none at the end.
    pub fn phase(self) -> Option<Phase> {
        match self {
            Self::Idle => Some(Phase::Negotiate),
            Self::Receiving | Self::Preparing => Some(Phase::Prepare),
            Self::SwitchReady => Some(Phase::PreCopy),
            Self::Checking => Some(Phase::Freeze),
            Self::Prepared => Some(Phase::Commit),
            Self::Restoring | Self::Undoing | Self::Resuming | Self::Placed | Self::Running => {
                Some(Phase::Resume)
            }
            Self::Settled | Self::Failed | Self::HandedBack | Self::Lost => None,
        }
    }

    /// The migration is over on this side; only questions are still answered.
    pub fn is_terminal(self) -> bool {
        self.phase().is_none()
    }

    /// Pages and files are welcome.
    pub fn takes_content(self) -> bool {
        matches!(self, Self::Receiving | Self::Preparing | Self::SwitchReady)
    }
}

/// What happens to the receiving side.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Event {
    /// Peer: a `Hello` that can be accepted, with a ticket that is good.
    Hello,
    /// Peer: a `Hello` with a good ticket that cannot be accepted.
    Unacceptable,
    /// Peer: `PrepareSwitch`.
    PrepareSwitch,
    /// Everything that can be started before the freeze is started.
    Ready,
    /// Peer: `Final`.
    Final,
    /// Everything that `Final` lists has arrived and is right.
    Checked,
    /// Peer: `Commit`, on the first session or as the first message of a later one.
    Commit,
    /// Peer: `Abort`, likewise.
    Abort,
    /// CRIU has rebuilt everything and lets the tasks go (the `RSTF` word on the
    /// lazy-pages socket). Until [`Action::RecordRan`] is carried out the engine
    /// serves no page fault after this one and the network is not attached, so
    /// that no task can have done anything.
    LetGo,
    /// runc has returned with success. `LetGo` comes before it, always: an engine
    /// that hears of this first feeds `LetGo` itself.
    Restored,
    /// The restore failed or was undone, and no process of it is left.
    RestoreFailed,
    /// All memory is in place.
    Filled,
    /// The session, a page or a file stream ended or broke, or the peer broke the
    /// protocol.
    PeerLost,
    /// The phase took longer than its timeout.
    PhaseTimedOut,
    /// This node's agent or shim does not want the container any more.
    CancelRequested,
    /// Something on this node failed, or what arrived is wrong.
    LocalFailure,
}

impl Event {
    /// All of them.
    pub const ALL: [Self; 16] = [
        Self::Hello,
        Self::Unacceptable,
        Self::PrepareSwitch,
        Self::Ready,
        Self::Final,
        Self::Checked,
        Self::Commit,
        Self::Abort,
        Self::LetGo,
        Self::Restored,
        Self::RestoreFailed,
        Self::Filled,
        Self::PeerLost,
        Self::PhaseTimedOut,
        Self::CancelRequested,
        Self::LocalFailure,
    ];
}

/// What the engine must do now.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Action {
    /// Go on.
    Nothing,
    /// Send `Welcome`; take pages and files from now on.
    SendWelcome,
    /// Send `Refused` with all reasons, end the session, fence as in `Discard`.
    SendRefused,
    /// Do what can be done before the freeze; feed `Ready`.
    GetReady,
    /// Send `SwitchReady`.
    SendSwitchReady,
    /// Wait for the batches and files that `Final` counts, compare, drop what is
    /// staged outside of the listed ranges; feed `Checked` or `LocalFailure`.
    Check,
    /// Send `Prepared`. Failing to is `PeerLost`.
    SendPrepared,
    /// Keep everything, let a later session of the same ticket in.
    AwaitSource,
    /// Restore; feed `LetGo` and `Restored`, or `RestoreFailed`.
    Restore,
    /// Mark the arrival record `Ran` durably, then attach and announce the
    /// network, then serve page faults.
    RecordRan,
    /// Send `Running`, if there is a session.
    SendRunning,
    /// Everything is done: close.
    Finish,
    /// The container runs although something takes long: go on serving its memory,
    /// and say so in the log.
    KeepServing,
    /// Kill whatever the restore has made, wait until nothing is left; feed
    /// `RestoreFailed` if the state is still `Undoing`.
    KillCopy,
    /// Mark the arrival record `Fenced`, send `Failed` if there is a session, drop
    /// what was received.
    Discard,
    /// Mark the arrival record `Fenced` durably, then drop what was received, then
    /// send `HandedBack` if there is a session.
    FenceAndHandBack,
    /// Send `HandedBack`.
    SendHandedBack,
    /// Tell whoever cancels that it is too late.
    RefuseCancel,
}

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
        (S::Idle, E::Hello) => (S::Receiving, A::SendWelcome),
        (S::Receiving, E::PrepareSwitch) => (S::Preparing, A::GetReady),
        (S::Preparing, E::Ready) => (S::SwitchReady, A::SendSwitchReady),
        (S::SwitchReady, E::Final) => (S::Checking, A::Check),
        (S::Checking, E::Checked) => (S::Prepared, A::SendPrepared),
        (S::Prepared, E::Commit) => (S::Restoring, A::Restore),
        (S::Restoring, E::LetGo) => (S::Resuming, A::RecordRan),
        (S::Resuming, E::Restored) => (S::Running, A::SendRunning),
        (S::Running, E::Filled) => (S::Settled, A::Finish),

        // Before `Prepared`: the source cannot have committed, it goes on.
        (S::Idle, E::Unacceptable) => (S::Failed, A::SendRefused),
        // Somebody who never said hello went away.
        (S::Idle, E::PeerLost) => (S::Idle, A::Nothing),
        (
            S::Idle | S::Receiving | S::Preparing | S::SwitchReady | S::Checking,
            E::PhaseTimedOut | E::CancelRequested | E::LocalFailure,
        ) => (S::Failed, A::Discard),
        (S::Receiving | S::Preparing | S::SwitchReady | S::Checking, E::Abort | E::PeerLost) => {
            (S::Failed, A::Discard)
        }

        // `Prepared`: the source may have committed.
        (S::Prepared, E::PeerLost) => (S::Prepared, A::AwaitSource),
        (S::Prepared, E::Abort | E::PhaseTimedOut | E::CancelRequested | E::LocalFailure) => {
            (S::HandedBack, A::FenceAndHandBack)
        }

        // Committed, nothing has run.
        (S::Restoring | S::Undoing, E::RestoreFailed) => (S::HandedBack, A::FenceAndHandBack),
        (S::Restoring, E::PhaseTimedOut | E::LocalFailure) => (S::Undoing, A::KillCopy),
        (S::Undoing, E::PhaseTimedOut | E::LocalFailure) => (S::Undoing, A::KillCopy),
        // It came too late: the tasks are being killed, and were never served a page.
        (S::Undoing, E::LetGo | E::Restored) => (S::Undoing, A::Nothing),

        // It has run.
        (S::Resuming, E::Filled) => (S::Placed, A::Nothing),
        (S::Placed, E::Restored) => (S::Settled, A::SendRunning),
        // It runs whether runc returns or not: the source need not wait for that.
        (S::Resuming, E::PhaseTimedOut) => (S::Running, A::SendRunning),
        (S::Placed, E::PhaseTimedOut) => (S::Settled, A::SendRunning),
        (S::Running, E::Restored) => (S::Running, A::Nothing),
        (S::Running, E::PhaseTimedOut) => (S::Running, A::KeepServing),
        (S::Resuming | S::Placed | S::Running, E::RestoreFailed | E::LocalFailure) => {
            (S::Lost, A::KillCopy)
        }

        // The session is not needed any more, and a question is answered when the
        // answer is there.
        (S::Restoring | S::Undoing | S::Resuming | S::Placed | S::Running, E::PeerLost) => {
            (state, A::Nothing)
        }
        (S::Restoring | S::Undoing | S::Resuming | S::Placed, E::Commit) => (state, A::Nothing),
        (S::Running, E::Commit) => (S::Running, A::SendRunning),
        (S::Restoring | S::Undoing | S::Resuming | S::Placed | S::Running, E::CancelRequested) => {
            (state, A::RefuseCancel)
        }

        // Over, but a source that lost its session still wants to know.
        (S::Settled | S::Lost, E::Commit) => (state, A::SendRunning),
        (S::HandedBack, E::Commit | E::Abort) => (S::HandedBack, A::SendHandedBack),
        (S::Settled | S::HandedBack | S::Lost, E::PeerLost) => (state, A::Nothing),

        (state, event) => return Err(IllegalTransition::Destination { state, event }),
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
        (S::Idle, E::Hello, S::Receiving, A::SendWelcome),
        (S::Idle, E::Unacceptable, S::Failed, A::SendRefused),
        (S::Idle, E::PeerLost, S::Idle, A::Nothing),
        (S::Idle, E::PhaseTimedOut, S::Failed, A::Discard),
        (S::Idle, E::CancelRequested, S::Failed, A::Discard),
        (S::Idle, E::LocalFailure, S::Failed, A::Discard),
        (S::Receiving, E::PrepareSwitch, S::Preparing, A::GetReady),
        (S::Receiving, E::Abort, S::Failed, A::Discard),
        (S::Receiving, E::PeerLost, S::Failed, A::Discard),
        (S::Receiving, E::PhaseTimedOut, S::Failed, A::Discard),
        (S::Receiving, E::CancelRequested, S::Failed, A::Discard),
        (S::Receiving, E::LocalFailure, S::Failed, A::Discard),
        (S::Preparing, E::Ready, S::SwitchReady, A::SendSwitchReady),
        (S::Preparing, E::Abort, S::Failed, A::Discard),
        (S::Preparing, E::PeerLost, S::Failed, A::Discard),
        (S::Preparing, E::PhaseTimedOut, S::Failed, A::Discard),
        (S::Preparing, E::CancelRequested, S::Failed, A::Discard),
        (S::Preparing, E::LocalFailure, S::Failed, A::Discard),
        (S::SwitchReady, E::Final, S::Checking, A::Check),
        (S::SwitchReady, E::Abort, S::Failed, A::Discard),
        (S::SwitchReady, E::PeerLost, S::Failed, A::Discard),
        (S::SwitchReady, E::PhaseTimedOut, S::Failed, A::Discard),
        (S::SwitchReady, E::CancelRequested, S::Failed, A::Discard),
        (S::SwitchReady, E::LocalFailure, S::Failed, A::Discard),
        (S::Checking, E::Checked, S::Prepared, A::SendPrepared),
        (S::Checking, E::Abort, S::Failed, A::Discard),
        (S::Checking, E::PeerLost, S::Failed, A::Discard),
        (S::Checking, E::PhaseTimedOut, S::Failed, A::Discard),
        (S::Checking, E::CancelRequested, S::Failed, A::Discard),
        (S::Checking, E::LocalFailure, S::Failed, A::Discard),
        (S::Prepared, E::Commit, S::Restoring, A::Restore),
        (S::Prepared, E::PeerLost, S::Prepared, A::AwaitSource),
        (S::Prepared, E::Abort, S::HandedBack, A::FenceAndHandBack),
        (S::Prepared, E::PhaseTimedOut, S::HandedBack, A::FenceAndHandBack),
        (S::Prepared, E::CancelRequested, S::HandedBack, A::FenceAndHandBack),
        (S::Prepared, E::LocalFailure, S::HandedBack, A::FenceAndHandBack),
        (S::Restoring, E::LetGo, S::Resuming, A::RecordRan),
        (S::Restoring, E::RestoreFailed, S::HandedBack, A::FenceAndHandBack),
        (S::Restoring, E::PhaseTimedOut, S::Undoing, A::KillCopy),
        (S::Restoring, E::LocalFailure, S::Undoing, A::KillCopy),
        (S::Restoring, E::Commit, S::Restoring, A::Nothing),
        (S::Restoring, E::PeerLost, S::Restoring, A::Nothing),
        (S::Restoring, E::CancelRequested, S::Restoring, A::RefuseCancel),
        (S::Undoing, E::RestoreFailed, S::HandedBack, A::FenceAndHandBack),
        (S::Undoing, E::PhaseTimedOut, S::Undoing, A::KillCopy),
        (S::Undoing, E::LocalFailure, S::Undoing, A::KillCopy),
        (S::Undoing, E::LetGo, S::Undoing, A::Nothing),
        (S::Undoing, E::Restored, S::Undoing, A::Nothing),
        (S::Undoing, E::Commit, S::Undoing, A::Nothing),
        (S::Undoing, E::PeerLost, S::Undoing, A::Nothing),
        (S::Undoing, E::CancelRequested, S::Undoing, A::RefuseCancel),
        (S::Resuming, E::Restored, S::Running, A::SendRunning),
        (S::Resuming, E::Filled, S::Placed, A::Nothing),
        (S::Resuming, E::PhaseTimedOut, S::Running, A::SendRunning),
        (S::Resuming, E::RestoreFailed, S::Lost, A::KillCopy),
        (S::Resuming, E::LocalFailure, S::Lost, A::KillCopy),
        (S::Resuming, E::Commit, S::Resuming, A::Nothing),
        (S::Resuming, E::PeerLost, S::Resuming, A::Nothing),
        (S::Resuming, E::CancelRequested, S::Resuming, A::RefuseCancel),
        (S::Placed, E::Restored, S::Settled, A::SendRunning),
        (S::Placed, E::PhaseTimedOut, S::Settled, A::SendRunning),
        (S::Placed, E::RestoreFailed, S::Lost, A::KillCopy),
        (S::Placed, E::LocalFailure, S::Lost, A::KillCopy),
        (S::Placed, E::Commit, S::Placed, A::Nothing),
        (S::Placed, E::PeerLost, S::Placed, A::Nothing),
        (S::Placed, E::CancelRequested, S::Placed, A::RefuseCancel),
        (S::Running, E::Filled, S::Settled, A::Finish),
        (S::Running, E::Restored, S::Running, A::Nothing),
        (S::Running, E::PhaseTimedOut, S::Running, A::KeepServing),
        (S::Running, E::RestoreFailed, S::Lost, A::KillCopy),
        (S::Running, E::LocalFailure, S::Lost, A::KillCopy),
        (S::Running, E::Commit, S::Running, A::SendRunning),
        (S::Running, E::PeerLost, S::Running, A::Nothing),
        (S::Running, E::CancelRequested, S::Running, A::RefuseCancel),
        (S::Settled, E::Commit, S::Settled, A::SendRunning),
        (S::Settled, E::PeerLost, S::Settled, A::Nothing),
        (S::Lost, E::Commit, S::Lost, A::SendRunning),
        (S::Lost, E::PeerLost, S::Lost, A::Nothing),
        (S::HandedBack, E::Commit, S::HandedBack, A::SendHandedBack),
        (S::HandedBack, E::Abort, S::HandedBack, A::SendHandedBack),
        (S::HandedBack, E::PeerLost, S::HandedBack, A::Nothing),
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
                    .ok_or(IllegalTransition::Destination { state, event });
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
        assert_eq!(State::ALL.len(), State::Lost as usize + 1);
        assert_eq!(Event::ALL.len(), Event::LocalFailure as usize + 1);
    }

    #[test]
    fn every_state_but_the_last_has_a_timeout_and_survives_the_loss_of_its_peer() {
        for state in State::ALL {
            let timed = step(state, E::PhaseTimedOut).is_ok();
            assert_eq!(timed, !state.is_terminal(), "{state:?}");
            if !state.is_terminal() {
                assert!(step(state, E::PeerLost).is_ok(), "{state:?}");
            }
        }
    }

    #[test]
    fn nothing_is_restored_without_a_commit() {
        for state in State::ALL {
            for event in Event::ALL {
                if let Ok((next, action)) = step(state, event)
                    && action == A::Restore
                {
                    assert_eq!((state, event), (S::Prepared, E::Commit));
                    assert_eq!(next, S::Restoring);
                }
            }
        }
    }

    #[test]
    fn what_has_run_is_never_handed_back_and_what_is_fenced_never_runs() {
        let has_run = [S::Resuming, S::Placed, S::Running, S::Settled, S::Lost];
        for state in State::ALL {
            for event in Event::ALL {
                let Ok((next, action)) = step(state, event) else {
                    continue;
                };
                if has_run.contains(&state) {
                    assert!(has_run.contains(&next), "{state:?} on {event:?}");
                    assert!(!matches!(action, A::FenceAndHandBack | A::SendHandedBack));
                } else if has_run.contains(&next) {
                    assert_eq!((state, action), (S::Restoring, A::RecordRan));
                }
                if matches!(state, S::HandedBack | S::Failed) {
                    assert_eq!(next, state);
                }
            }
        }
    }

    #[test]
    fn an_illegal_transition_names_side_state_and_event() {
        let error = step(S::Receiving, E::Commit).unwrap_err();
        assert_eq!(
            error.to_string(),
            "the destination cannot take event Commit in state Receiving"
        );
    }
}
