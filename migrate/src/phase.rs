//! The phases of a migration, in their order, each with its timeout.
//!
//! Both sides go through the same phases; what they do in them is in
//! [`source`](crate::source) and [`destination`](crate::destination).
//!
//! ```text
//!            Negotiate   Prepare   PreCopy   Freeze  |  Commit   Resume
//! source     runs        runs      runs      frozen  |  frozen   frozen, then gone
//! dest.      -           -         -         -       |  -        runs
//!                                                    |
//!                  any failure: the source goes on   |   the source stays frozen until
//!                  as if nothing had happened        |   it hears Running or HandedBack
//! ```
//!
//! How an engine drives its machine:
//!
//! * One event at a time into `step`; the action that comes back is carried out
//!   before the next event, in the order its documentation gives. Actions whose
//!   documentation says `feed` take long: they are begun, and end with that event.
//!   An action that follows one that is still going on takes its place.
//! * A timer runs with [`Phase::timeout`] from the moment a state with another
//!   [`Phase`] is entered; it is not wound up by events within the phase, except
//!   by `PhaseTimedOut` itself. So a peer cannot stretch a phase by chatting.
//! * A message that does not fit (`IllegalTransition`) ends the session and is
//!   fed as `PeerLost`.

use std::fmt;
use std::time::Duration;

use serde::{Deserialize, Serialize};

/// One step of a migration. The order of the variants is the order of events.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Phase {
    /// Who are you, which versions, may it come: nothing is touched.
    Negotiate,
    /// The destination gets everything ready that can be ready before memory.
    Prepare,
    /// Memory and files are copied while the container runs.
    PreCopy,
    /// The container stands still; what is left of it is sent and checked.
    Freeze,
    /// The source gives up its right to run the container.
    Commit,
    /// The destination runs it; the source ends.
    Resume,
}

/// The slowest link at which a stop-and-copy is allowed to take its time: half
/// of what 1 Gbit/s carries, in bytes per second.
const SLOWEST_LINK: u64 = 60_000_000;

impl Phase {
    /// All, in order.
    pub const ALL: [Self; 6] = [
        Self::Negotiate,
        Self::Prepare,
        Self::PreCopy,
        Self::Freeze,
        Self::Commit,
        Self::Resume,
    ];

    /// The word on the wire and in reports.
    pub fn name(self) -> &'static str {
        match self {
            Self::Negotiate => "negotiate",
            Self::Prepare => "prepare",
            Self::PreCopy => "pre-copy",
            Self::Freeze => "freeze",
            Self::Commit => "commit",
            Self::Resume => "resume",
        }
    }

    /// How long this phase may take. Not one of them is how long it should take.
    pub fn timeout(self) -> Duration {
        Duration::from_secs(match self {
            // The receiver waits here for an engine that is started on the other node.
            Self::Negotiate => 30,
            // The image is there by now; CRIU's first start on a node costs seconds.
            Self::Prepare => 60,
            // The deadline of a migration is the convergence's business; this is the
            // end of patience where none was given. 512 GiB at 10 Gbit/s take 8 minutes.
            Self::PreCopy => 3600,
            // The promise is below one second; a container is stood still no longer
            // than its clients' usual connection timeouts.
            Self::Freeze => 30,
            // The receiver holds staged memory for so long if the source falls silent.
            // Long enough for an engine that died to be replaced and ask.
            Self::Commit => 30,
            // A restore takes 35 to 100 ms and about 1 ms per thread.
            Self::Resume => 60,
        })
    }

    /// [`timeout`](Self::timeout) where `frozen_bytes` have to travel while the
    /// container stands still: all of its memory if the kernel cannot track writes.
    pub fn timeout_with_bytes(self, frozen_bytes: u64) -> Duration {
        match self {
            Self::Freeze => self.timeout() + Duration::from_secs(frozen_bytes / SLOWEST_LINK),
            _ => self.timeout(),
        }
    }
}

impl fmt::Display for Phase {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_phase_has_a_timeout_and_the_name_that_json_shows() {
        for phase in Phase::ALL {
            assert!(phase.timeout() > Duration::ZERO);
            let json = serde_json::to_string(&phase).unwrap();
            assert_eq!(json, format!("\"{phase}\""));
        }
        assert!(Phase::ALL.is_sorted());
    }

    #[test]
    fn only_the_freeze_is_given_time_for_the_bytes_it_moves() {
        let gib = 1 << 30;
        for phase in Phase::ALL {
            let more = phase.timeout_with_bytes(60 * gib) - phase.timeout();
            match phase {
                Phase::Freeze => assert_eq!(more.as_secs(), 60 * gib / SLOWEST_LINK),
                _ => assert_eq!(more, Duration::ZERO),
            }
            assert_eq!(phase.timeout_with_bytes(0), phase.timeout());
        }
    }
}
