//! The page engine: track, read, encode, stage, serve; no network, no CRIU.
//!
//! The source half finds out which pages of running processes changed, and reads them. The destination
//! half keeps them by address and hands them to restored processes. Between the two there are only [`Batch`]es.

mod batch;
mod bits;
mod claims;
mod lazy;
mod maps;
mod process;
mod ranges;
mod selftest;
mod smaps;
mod staging;
mod sync;
mod track_error;
mod tracker;

pub use batch::{
    BATCH_BYTES, Batch, BatchError, BatchSink, EXTENT_BYTES, MAX_RECORDS, PAGE_BYTES, Record,
    RecordKind, SinkClosed, SpaceId,
};
pub use claims::Claims;
pub use lazy::{
    Canceller, FillOptions, FillReport, LazyError, LazyEvent, LazyServer, Prefill, Starter,
};
pub use maps::MalformedMaps;
pub use process::{Process, processes_of_cgroup};
pub use selftest::{Unsupported, self_test};
pub use staging::{Staging, StagingError, StagingUsage};
pub use track_error::TrackError;
pub use tracker::{LapReport, Tracker};
