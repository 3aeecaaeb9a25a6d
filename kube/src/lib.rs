//! What Sterna is in Kubernetes: the [`Migration`] object, annotations on pods,
//! and the rules by which a pod that leaves is matched with the one that replaces
//! it.
//!
//! Nothing here does I/O. Who is restored from whom is decided once, by the
//! controller, and stands in a Migration; the nodes' agents act on it. Both use
//! the rules of this crate, so that they cannot disagree:
//!
//! ```text
//!  pod S leaves (cause) ──> Migration ──> claim: pod R replaces S ──> transfer ──> result
//!     leaving.rs           migration.rs      claim.rs, wanted.rs      written by S's agent
//!                                            verdict.rs: what R's agent may conclude
//! ```

pub mod annotations;
pub mod claim;
pub mod leaving;
pub mod migration;
pub mod owner;
pub mod spec_hash;
pub mod verdict;
pub mod wanted;

pub use annotations::{OnRestoreFailure, PodSettings};
pub use leaving::Cause;
pub use migration::{
    ContainerTransfer, Migration, MigrationSpec, MigrationStatus, OwnerRef, Phase, PodRef,
    Transfer, TransferPhase, TransferResult, Trigger,
};
pub use owner::Owner;
pub use verdict::Verdict;

/// Field manager of what the controller writes.
pub const CONTROLLER: &str = "sterna-controller";
/// Field manager of what a node's agent writes.
pub const AGENT: &str = "sternad";
/// API group of our objects, and prefix of labels, annotations and conditions.
pub const GROUP: &str = "sterna.dev";
