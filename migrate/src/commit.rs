//! The commit record: what the source has on disk about a migration that may be
//! past its commit point, and what a restart makes of it.
//!
//! The record lies on a file system that survives processes and not the node
//! (`/run`): when the node restarts, the frozen container is gone as well.
//!
//! Rules for whoever keeps it:
//!
//! * It is written before `Commit` is sent, replaced as a whole, and removed only
//!   by the actions `Finish`, `RevokeAndThaw` and `ThawAfterHandBack`.
//! * A container has at most one record. A migration does not begin while there is
//!   one of its container: it is first brought to its end by [`after_restart`].
//! * Before anything is done to processes, [`InitProcess`] is compared with what
//!   runs: pids are used again.

use serde::{Deserialize, Serialize};

use crate::error::RecordVersionError;

/// The format of [`CommitRecord`]. 1: the first.
const FORMAT: u32 = 1;

/// The version of a record's format. Reading another one is an error, because a
/// guess could let two copies of a container run.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "u32", into = "u32")]
pub struct Format(());

impl Format {
    /// The one this version of Sterna writes.
    pub const CURRENT: Self = Self(());
}

impl TryFrom<u32> for Format {
    type Error = RecordVersionError;

    fn try_from(found: u32) -> Result<Self, RecordVersionError> {
        match found {
            FORMAT => Ok(Self::CURRENT),
            _ => Err(RecordVersionError {
                found,
                known: FORMAT,
            }),
        }
    }
}

impl From<Format> for u32 {
    fn from(_: Format) -> Self {
        FORMAT
    }
}

/// How far the commit has come.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum CommitState {
    /// `Commit` may have been sent; nothing was heard.
    Committing,
    /// `Running` was heard: the copy here is to be killed.
    Released,
    /// `HandedBack` was heard: the copy here is to go on.
    HandedBack,
}

/// The first process of the container, so that no other is taken for it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct InitProcess {
    /// Its pid on the node.
    pub pid: i32,
    /// Its start in clock ticks after the node's boot: field 22 of `/proc/PID/stat`.
    pub start_ticks: u64,
}

/// Everything needed to bring a commit to its end, except the ticket's secret:
/// that stays in memory, and the node's certificate says who asks.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct CommitRecord {
    /// Always [`Format::CURRENT`].
    pub format: Format,
    /// The migration.
    pub migration_id: String,
    /// containerd's namespace.
    pub namespace: String,
    /// containerd's container id.
    pub container_id: String,
    /// The name in the destination's certificate.
    pub destination_node: String,
    /// host:port of the destination's sternad.
    pub destination_address: String,
    /// The public name of the ticket.
    pub ticket_id: String,
    /// The container's first process.
    pub init: InitProcess,
    /// How far it has come.
    pub state: CommitState,
}

/// What the destination says when it is asked about a ticket.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Answer {
    /// It runs there, or has run there and died since.
    Running,
    /// It does not run there, has not, and never will.
    HandedBack,
    /// Still being decided: ask again.
    NotYet,
    /// No such ticket is known there. It may have been, before that node restarted.
    Unknown,
}

/// What to do with the container here.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Recovery {
    /// Mark the record `HandedBack` if there is one, thaw, then remove the record.
    Thaw,
    /// Mark the record `Released`, kill what is left, then remove the record.
    Kill,
    /// Leave it frozen, drive the machine on from
    /// [`State::Undecided`](crate::source::State::Undecided): ask until there is an
    /// answer, or until an operator decides.
    KeepFrozenAndAsk,
}

/// What becomes of a frozen container whose engine died: `record` is what lies on
/// disk, `answer` what the destination said, if it was reached.
///
/// Without a record `Commit` was never sent, so this node still has the right to
/// run the container, whatever a destination would say.
pub fn after_restart(record: Option<&CommitRecord>, answer: Option<Answer>) -> Recovery {
    let Some(record) = record else {
        return Recovery::Thaw;
    };
    match (record.state, answer) {
        (CommitState::Released, _) => Recovery::Kill,
        (CommitState::HandedBack, _) => Recovery::Thaw,
        (CommitState::Committing, Some(Answer::Running)) => Recovery::Kill,
        (CommitState::Committing, Some(Answer::HandedBack)) => Recovery::Thaw,
        (CommitState::Committing, Some(Answer::NotYet | Answer::Unknown) | None) => {
            Recovery::KeepFrozenAndAsk
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn record(state: CommitState) -> CommitRecord {
        CommitRecord {
            format: Format::CURRENT,
            migration_id: "m-1".into(),
            namespace: "default".into(),
            container_id: "web".into(),
            destination_node: "b".into(),
            destination_address: "10.0.0.2:7443".into(),
            ticket_id: "t-1".into(),
            init: InitProcess {
                pid: 4711,
                start_ticks: 123_456,
            },
            state,
        }
    }

    #[test]
    fn every_record_and_every_answer_lead_to_the_one_safe_recovery() {
        use Answer::*;
        let answers = [
            None,
            Some(Running),
            Some(HandedBack),
            Some(NotYet),
            Some(Unknown),
        ];
        for answer in answers {
            assert_eq!(after_restart(None, answer), Recovery::Thaw);
            let after = |state| after_restart(Some(&record(state)), answer);
            assert_eq!(after(CommitState::Released), Recovery::Kill);
            assert_eq!(after(CommitState::HandedBack), Recovery::Thaw);
            assert_eq!(
                after(CommitState::Committing),
                match answer {
                    Some(Running) => Recovery::Kill,
                    Some(HandedBack) => Recovery::Thaw,
                    _ => Recovery::KeepFrozenAndAsk,
                }
            );
        }
    }

    #[test]
    fn a_record_is_read_as_it_was_written() {
        let record = record(CommitState::Committing);
        let text = serde_json::to_string(&record).unwrap();
        assert!(text.contains(r#""format":1"#), "{text}");
        assert_eq!(serde_json::from_str::<CommitRecord>(&text).unwrap(), record);
    }

    #[test]
    fn a_record_of_another_format_is_refused_rather_than_guessed_at() {
        let text = serde_json::to_string(&record(CommitState::Released)).unwrap();
        for other in ["0", "2"] {
            let text = text.replace(r#""format":1"#, &format!(r#""format":{other}"#));
            let error = serde_json::from_str::<CommitRecord>(&text).unwrap_err();
            assert!(error.to_string().contains("format"), "{error}");
        }
    }
}
