//! What Sterna's processes on one node tell each other.
//!
//! shim, engine and sternad never link each other; they meet in the files and
//! messages defined here. All of it lives under [`RunDir`], on a tmpfs, mode
//! 0700: it must survive a process, never a reboot.

pub mod arrival;
pub mod commit;
mod incoming;
mod ipc;
mod pod;
mod record;
mod rundir;

pub use incoming::{Incoming, Ticket};
pub use ipc::{
    ContainerFacts, FromEngine, Outcome, ReceiveJob, RestoreFlags, RestoreOrder, SendJob, ToEngine,
    Volume,
};
pub use pod::{PodAnnotations, PodContainer};
pub use record::{ContainerRecord, RunState};
pub use rundir::{FileError, RunDir};
