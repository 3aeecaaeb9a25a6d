//! A state that waits: what a node has on disk of a container that has ended and
//! whose state nobody has taken yet.
//!
//! ```text
//!           Recorded                 Take                    Ran
//!   Coming ----------> Parked ----------------> Taken ----------------> Restored
//!     |                  | ^                      |                        |
//!     | Abandoned        | '----- HandedBack -----'                        | Forgotten
//!     v                  v Dropped                                         v
//!    Gone <--------------'-------------------------------------------------'
//! ```
//!
//! Rules for whoever keeps it:
//!
//! * `Recorded` is the commit point of the container's end: everything that belongs
//!   to the state is on disk before, and the container is ended only after it. Until
//!   then it goes on as if nothing had happened.
//! * `Taken` is on disk before the word `Commit` is sent to the node of the pod that
//!   takes the state: from then on that node alone says whether it ran. No other pod
//!   can take it, until that node has vouched that it did not run.
//! * `Restored` has no content any more. It stays until nobody can ask again: a pod
//!   whose state is not found would be told that there never was one.

use serde::{Deserialize, Serialize};

/// What has become of the state.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum State {
    /// It is being written; its container runs, or stands still for a moment.
    Coming {
        /// The ticket by which it comes.
        ticket_id: String,
    },
    /// It is here, and nobody has it.
    Parked,
    /// A pod may run with it.
    Taken(Taker),
    /// A pod has run with it.
    Restored {
        /// Uid of the pod.
        pod: String,
    },
    /// There is nothing here.
    Gone,
}

/// Who may have a state.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Taker {
    /// Uid of the pod.
    pub pod: String,
    /// The migration that brings it there.
    pub migration_id: String,
    /// Public name of the ticket for it.
    pub ticket_id: String,
    /// The name in the certificate of the pod's node.
    pub node: String,
    /// host:port of that node's sternad.
    pub address: String,
}

/// What happens to it.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub enum Event {
    /// All of it is on disk.
    Recorded,
    /// Its container goes on: it did not come.
    Abandoned,
    /// A pod's node has everything and waits for the word.
    Take(Taker),
    /// That node says that it runs.
    Ran,
    /// That node vouches that it did not run and will not.
    HandedBack,
    /// Nobody wants it any more, or it has waited too long.
    Dropped,
    /// Nobody can ask for it again.
    Forgotten,
}

/// What must not happen to a state that waits.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("a state that is {state:?} cannot take event {event:?}")]
pub struct IllegalStep {
    /// What it is, and stays.
    pub state: State,
    /// What it was fed.
    pub event: Event,
}

impl State {
    /// The next state.
    ///
    /// # Errors
    ///
    /// What must not happen in this state.
    pub fn step(&self, event: Event) -> Result<Self, Box<IllegalStep>> {
        match (self, event) {
            (Self::Coming { .. }, Event::Recorded) => Ok(Self::Parked),
            (Self::Coming { .. }, Event::Abandoned) => Ok(Self::Gone),
            (Self::Parked, Event::Take(taker)) => Ok(Self::Taken(taker)),
            (Self::Parked, Event::Dropped) => Ok(Self::Gone),
            (Self::Taken(_), Event::HandedBack) => Ok(Self::Parked),
            (Self::Taken(taker), Event::Ran) => Ok(Self::Restored {
                pod: taker.pod.clone(),
            }),
            (Self::Restored { .. }, Event::Forgotten) => Ok(Self::Gone),
            (state, event) => Err(Box::new(IllegalStep {
                state: state.clone(),
                event,
            })),
        }
    }

    /// Whether its content is needed.
    #[must_use]
    pub fn has_content(&self) -> bool {
        matches!(self, Self::Parked | Self::Taken(_))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn taker(pod: &str) -> Taker {
        Taker {
            pod: pod.into(),
            migration_id: "m".into(),
            ticket_id: "t".into(),
            node: "b".into(),
            address: "b:7443".into(),
        }
    }

    fn coming() -> State {
        State::Coming {
            ticket_id: "t".into(),
        }
    }

    #[test]
    fn every_pair_of_state_and_event_is_decided() {
        let restored = State::Restored { pod: "r".into() };
        let states = [
            coming(),
            State::Parked,
            State::Taken(taker("r")),
            restored.clone(),
            State::Gone,
        ];
        let events = [
            Event::Recorded,
            Event::Abandoned,
            Event::Take(taker("r")),
            Event::Ran,
            Event::HandedBack,
            Event::Dropped,
            Event::Forgotten,
        ];
        let legal = [
            (coming(), Event::Recorded, State::Parked),
            (coming(), Event::Abandoned, State::Gone),
            (
                State::Parked,
                Event::Take(taker("r")),
                State::Taken(taker("r")),
            ),
            (State::Parked, Event::Dropped, State::Gone),
            (State::Taken(taker("r")), Event::Ran, restored.clone()),
            (State::Taken(taker("r")), Event::HandedBack, State::Parked),
            (restored, Event::Forgotten, State::Gone),
        ];
        for state in &states {
            for event in &events {
                let expected = legal
                    .iter()
                    .find(|(from, by, _)| from == state && by == event)
                    .map(|(_, _, to)| to);
                let is = state.step(event.clone()).ok();
                assert_eq!(is.as_ref(), expected, "{state:?} {event:?}");
            }
        }
    }

    #[test]
    fn what_one_pod_may_have_no_other_gets() {
        let taken = State::Parked.step(Event::Take(taker("r"))).unwrap();
        assert!(taken.step(Event::Take(taker("other"))).is_err());
        assert!(taken.step(Event::Dropped).is_err());
        let back = taken.step(Event::HandedBack).unwrap();
        let other = back.step(Event::Take(taker("other"))).unwrap();
        assert_eq!(other, State::Taken(taker("other")));
        let ran = other.step(Event::Ran).unwrap();
        assert!(ran.step(Event::Take(taker("third"))).is_err());
        assert!(!ran.has_content());
    }

    #[test]
    fn a_state_survives_the_disk() {
        for state in [coming(), State::Parked, State::Taken(taker("r"))] {
            let text = serde_json::to_string(&state).unwrap();
            assert_eq!(serde_json::from_str::<State>(&text).unwrap(), state);
        }
    }
}
