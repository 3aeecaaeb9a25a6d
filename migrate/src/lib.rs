//! The migration protocol core: phases, negotiation, convergence, commit.
//!
//! Everything here is pure: no socket, no clock, no file system, no CRIU. The
//! engine processes at both ends feed events in and carry out the actions that
//! come back; times are passed in as [`Duration`](std::time::Duration)s.
//!
//! ```
//! use migrate::source::{self, Action, Event, State};
//! # use sterna_migrate as migrate;
//! let (state, action) = source::step(State::START, Event::Welcomed)?;
//! assert_eq!((state, action), (State::Preparing, Action::SendPrepareSwitch));
//! # Ok::<(), migrate::IllegalTransition>(())
//! ```
//!
//! | module | noun |
//! |---|---|
//! | [`phase`] | the phases, their names, order and timeouts |
//! | [`source`], [`destination`] | the two state machines, drawn and tabled |
//! | [`commit`], [`arrival`] | what each side has on disk, and what a restart makes of it |
//! | [`parked`] | a state that waits on disk for a container to take it |
//! | [`offer`], [`cpu`] | may this container go from that node to this one, and if not, why |
//! | [`converge`] | another lap, switch over, or give up |
//! | [`ticket`] | the right to deliver one container once |
//! | [`timing`] | phase durations, freeze and blackout out of time stamps |
//!
//! `docs/protocol.md` tells the same for readers who do not program.

pub mod arrival;
pub mod commit;
pub mod converge;
pub mod cpu;
pub mod destination;
mod error;
pub mod offer;
pub mod parked;
pub mod phase;
pub mod source;
pub mod ticket;
pub mod timing;
mod version;

pub use error::{IllegalTransition, RecordVersionError, TicketError, VersionError};
pub use phase::Phase;
pub use version::Version;
