//! What may be asked of a process in which state, as tables.
//!
//! ```text
//!             +------------------- exit -------------------+
//!             |                                            v
//!  Created ---+--start--> Running --pause--> Paused --exit--> Stopped --delete--> gone
//!     |                      ^  <--resume--    |              ^
//!     |  CreatedCheckpoint --+ start (restore) |              |
//!     |  Receiving ----------+ start (arrives) +--------------+
//!     +--delete--> gone
//! ```
//!
//! A container that is frozen, dumped or on its way to another node because of
//! a policy stays `Running`: only a pause that a client asked for is `Paused`.

use std::fmt;

/// State of a container's first process.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum State {
    /// `runc create` is through.
    Created,
    /// Nothing exists yet; start restores it from a checkpoint.
    CreatedCheckpoint,
    /// Nothing exists yet; start waits for it to arrive from another node.
    Receiving,
    /// It runs.
    Running,
    /// A client paused it.
    Paused,
    /// It ended.
    Stopped,
}

/// What a request wants to do with it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Verb {
    Start,
    Pause,
    Resume,
    Update,
    Checkpoint,
    Exec,
    Delete,
    Send,
}

/// A verb that the state does not allow.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("cannot {verb} {state}")]
pub(crate) struct Refusal {
    verb: Phrase,
    state: Phrase,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Phrase(&'static str);

impl fmt::Display for Phrase {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.0)
    }
}

impl State {
    /// Every state, for tests.
    #[cfg(test)]
    const ALL: [Self; 6] = [
        Self::Created,
        Self::CreatedCheckpoint,
        Self::Receiving,
        Self::Running,
        Self::Paused,
        Self::Stopped,
    ];

    /// Whether `verb` may be tried. The texts are the Go shim's.
    ///
    /// Kill is not here: it is allowed everywhere, and the answer depends on
    /// what runc finds.
    pub(crate) fn check(self, verb: Verb) -> Result<(), Refusal> {
        use State::{Created, CreatedCheckpoint, Paused, Receiving, Running, Stopped};
        use Verb::{Checkpoint, Delete, Exec, Pause, Resume, Send, Start, Update};
        let (action, object) = match (self, verb) {
            (Created | CreatedCheckpoint | Receiving, Start | Delete)
            | (Created, Update | Exec)
            | (CreatedCheckpoint, Update)
            | (Running, Pause | Update | Checkpoint | Exec | Send)
            | (Paused, Resume | Update | Checkpoint)
            | (Stopped, Delete) => return Ok(()),

            (Created | CreatedCheckpoint | Receiving, Pause) => ("pause", "task in created state"),
            (Created | CreatedCheckpoint | Receiving, Resume) => {
                ("resume", "task in created state")
            }
            (Created | CreatedCheckpoint | Receiving, Checkpoint) => {
                ("checkpoint", "a task in created state")
            }
            (Created | CreatedCheckpoint | Receiving, Send) => ("send", "a task in created state"),
            (Receiving, Update) => ("update", "a task that has not arrived"),
            (CreatedCheckpoint | Receiving, Exec) => ("exec", "in a created state"),

            (Running, Start) => ("start", "a running process"),
            (Running, Resume) => ("resume", "a running process"),
            (Running, Delete) => ("delete", "a running process"),

            (Paused, Start) => ("start", "a paused process"),
            (Paused, Pause) => ("pause", "a paused container"),
            (Paused, Exec) => ("exec", "in a paused state"),
            (Paused, Delete) => ("delete", "a paused process"),
            (Paused, Send) => ("send", "a paused container"),

            (Stopped, Start) => ("start", "a stopped process"),
            (Stopped, Pause) => ("pause", "a stopped container"),
            (Stopped, Resume) => ("resume", "a stopped container"),
            (Stopped, Update) => ("update", "a stopped container"),
            (Stopped, Checkpoint) => ("checkpoint", "a stopped container"),
            (Stopped, Exec) => ("exec", "in a stopped state"),
            (Stopped, Send) => ("send", "a stopped container"),
        };
        Err(Refusal {
            verb: Phrase(action),
            state: Phrase(object),
        })
    }
}

/// State of a process that was added to a container.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum ExecState {
    /// Announced, not started.
    Created,
    /// It runs.
    Running,
    /// It ended, or could not be started.
    Stopped,
}

impl ExecState {
    /// Whether it may be started.
    pub(crate) fn check_start(self) -> Result<(), Refusal> {
        let object = match self {
            Self::Created => return Ok(()),
            Self::Running => "a running process",
            Self::Stopped => "a stopped process",
        };
        Err(Refusal {
            verb: Phrase("start"),
            state: Phrase(object),
        })
    }

    /// Whether it may be deleted.
    pub(crate) fn check_delete(self) -> Result<(), Refusal> {
        match self {
            Self::Created | Self::Stopped => Ok(()),
            Self::Running => Err(Refusal {
                verb: Phrase("delete"),
                state: Phrase("a running process"),
            }),
        }
    }
}

/// What Sterna does with a running container besides; at most one thing.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Activity {
    /// Nothing.
    Idle,
    /// A checkpoint is being written.
    Checkpointing,
    /// It is on its way out and may still stay.
    Sending,
    /// The commit is recorded: its exit means that it left.
    Committed,
    /// As `Committed`, and the other node cannot be asked what became of it.
    Undecided,
    /// It arrived and its memory is being filled in.
    Settling,
}

impl Activity {
    /// Whether `verb` would disturb a migration.
    pub(crate) fn forbids(self, verb: Verb) -> bool {
        match self {
            Self::Idle | Self::Checkpointing => false,
            Self::Sending | Self::Settling => matches!(
                verb,
                Verb::Pause | Verb::Resume | Verb::Update | Verb::Checkpoint | Verb::Send
            ),
            Self::Committed | Self::Undecided => true,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const VERBS: [Verb; 8] = [
        Verb::Start,
        Verb::Pause,
        Verb::Resume,
        Verb::Update,
        Verb::Checkpoint,
        Verb::Exec,
        Verb::Delete,
        Verb::Send,
    ];

    /// `y` where the verb is allowed; columns as in `VERBS`.
    const ALLOWED: [(State, &str); 6] = [
        (State::Created, "y--y-yy-"),
        (State::CreatedCheckpoint, "y--y--y-"),
        (State::Receiving, "y-----y-"),
        (State::Running, "-y-yyy-y"),
        (State::Paused, "--yyy---"),
        (State::Stopped, "------y-"),
    ];

    #[test]
    fn every_verb_in_every_state_is_as_in_the_table() {
        for (state, row) in ALLOWED {
            for (verb, cell) in VERBS.into_iter().zip(row.chars()) {
                assert_eq!(
                    state.check(verb).is_ok(),
                    cell == 'y',
                    "{verb:?} in {state:?}"
                );
            }
        }
        assert_eq!(ALLOWED.map(|(state, _)| state), State::ALL);
    }

    #[test]
    fn refusals_read_as_from_the_go_shim() {
        for (state, verb, text) in [
            (
                State::Created,
                Verb::Pause,
                "cannot pause task in created state",
            ),
            (
                State::Running,
                Verb::Delete,
                "cannot delete a running process",
            ),
            (
                State::Paused,
                Verb::Delete,
                "cannot delete a paused process",
            ),
            (State::Paused, Verb::Exec, "cannot exec in a paused state"),
            (
                State::Stopped,
                Verb::Update,
                "cannot update a stopped container",
            ),
        ] {
            assert_eq!(state.check(verb).unwrap_err().to_string(), text);
        }
    }

    #[test]
    fn an_exec_is_started_once_and_not_deleted_while_it_runs() {
        assert!(ExecState::Created.check_start().is_ok());
        assert!(ExecState::Running.check_start().is_err());
        assert!(ExecState::Stopped.check_start().is_err());
        assert!(ExecState::Created.check_delete().is_ok());
        assert!(ExecState::Running.check_delete().is_err());
        assert!(ExecState::Stopped.check_delete().is_ok());
    }

    #[test]
    fn a_container_on_its_way_can_still_be_looked_into_until_the_commit() {
        for verb in VERBS {
            assert!(!Activity::Idle.forbids(verb));
            assert!(Activity::Committed.forbids(verb));
        }
        assert!(!Activity::Sending.forbids(Verb::Exec));
        assert!(Activity::Sending.forbids(Verb::Pause));
        assert!(Activity::Settling.forbids(Verb::Checkpoint));
    }
}
