//! A migration in two halves: what a source sends is recorded on disk, and played to
//! a destination later, which cannot tell the difference.
//!
//! ```text
//!   source ──Migration──> Recorder ──> files        then: the source's container ends
//!                                      files ──> Delivery ──Migration──> destination
//! ```
//!
//! The recorder is a destination that restores nothing: its `Running` says that the
//! state is safe, not that anything runs. A delivery is a source without a container:
//! from its commit until the destination's word the state belongs to nobody else.
//!
//! Both run in sternad. Who may deliver what to whom is decided there; here is only
//! how it is done.

mod delivery;
mod frames;
mod recorder;

pub use delivery::{Delivery, DeliveryError, Ready, Word, ask};
pub use frames::Files;
pub use recorder::{Committed, Recorder, RecorderError};

#[cfg(test)]
mod tests;
