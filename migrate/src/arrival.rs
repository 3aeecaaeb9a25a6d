//! The arrival record: what the destination has on disk about a ticket, so that a
//! source that asks is answered even where the engine that took part is gone.
//!
//! Rules for whoever keeps it:
//!
//! * The receiving engine writes it `Open` before it listens, and it is never
//!   removed while the node is up: a source may ask very late.
//! * `Ran` is written before a task of the copy can do anything, `Fenced` before
//!   anybody is told that the container was handed back. Neither changes again.
//! * When the engine dies before it has settled, the shim acts by
//!   [`after_engine_death`]: first no process of the copy is left, then the fence.

use serde::{Deserialize, Serialize};

use crate::commit::{Answer, Format};

/// What has become of the ticket.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum ArrivalState {
    /// An engine receives, waits for the commit or restores.
    Open,
    /// The tasks were let go: the container ran here, whatever happened since.
    Ran,
    /// It did not run here, and with this ticket nothing ever will.
    Fenced,
}

/// One ticket on the destination.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ArrivalRecord {
    /// Always [`Format::CURRENT`].
    pub format: Format,
    /// The migration.
    pub migration_id: String,
    /// The public name of the ticket.
    pub ticket_id: String,
    /// The name in the certificate of the node that may ask.
    pub source_node: String,
    /// containerd's namespace.
    pub namespace: String,
    /// containerd's container id.
    pub container_id: String,
    /// What has become of it.
    pub state: ArrivalState,
}

/// What a source is told by whoever is left to speak; no record: this node knows
/// nothing of the ticket. Where an engine still listens, it answers itself.
pub fn answer(record: Option<&ArrivalRecord>) -> Answer {
    match record.map(|record| record.state) {
        None => Answer::Unknown,
        Some(ArrivalState::Open) => Answer::NotYet,
        Some(ArrivalState::Ran) => Answer::Running,
        Some(ArrivalState::Fenced) => Answer::HandedBack,
    }
}

/// What the shim does when the receiving engine died before it had settled.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Aftermath {
    /// Kill the copy, wait until no process of it is left, then write `Fenced`.
    KillThenFence,
    /// Kill the copy: its memory is not all there, and what is missing would read
    /// as zeros. The record stays: it ran.
    Kill,
}

/// See [`Aftermath`].
pub fn after_engine_death(state: ArrivalState) -> Aftermath {
    match state {
        ArrivalState::Open | ArrivalState::Fenced => Aftermath::KillThenFence,
        ArrivalState::Ran => Aftermath::Kill,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn record(state: ArrivalState) -> ArrivalRecord {
        ArrivalRecord {
            format: Format::CURRENT,
            migration_id: "m-1".into(),
            ticket_id: "t-1".into(),
            source_node: "a".into(),
            namespace: "default".into(),
            container_id: "web".into(),
            state,
        }
    }

    #[test]
    fn only_a_fenced_ticket_is_answered_with_handed_back() {
        assert_eq!(answer(None), Answer::Unknown);
        for (state, wanted) in [
            (ArrivalState::Open, Answer::NotYet),
            (ArrivalState::Ran, Answer::Running),
            (ArrivalState::Fenced, Answer::HandedBack),
        ] {
            assert_eq!(answer(Some(&record(state))), wanted);
        }
    }

    #[test]
    fn what_ran_is_not_fenced_when_its_engine_dies() {
        assert_eq!(after_engine_death(ArrivalState::Ran), Aftermath::Kill);
        assert_eq!(
            after_engine_death(ArrivalState::Open),
            Aftermath::KillThenFence
        );
    }

    #[test]
    fn a_record_is_read_as_it_was_written() {
        let record = record(ArrivalState::Fenced);
        let text = serde_json::to_string(&record).unwrap();
        assert_eq!(
            serde_json::from_str::<ArrivalRecord>(&text).unwrap(),
            record
        );
    }
}
