//! Why pages could not be followed or read.

use std::io;

use crate::{MalformedMaps, SinkClosed, SpaceId};

/// A failure of a lap, of claiming, or of the final lap. The processes run on, or stay frozen, untouched.
///
/// A process that ends during a lap is not a failure; one that ends while it should be frozen is.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum TrackError {
    /// The caller said so.
    #[error("the lap was cancelled")]
    Cancelled,
    /// Nobody takes pages any more.
    #[error("cannot hand over pages")]
    Sink(#[from] SinkClosed),
    /// Two processes have the same pid in their innermost pid namespaces: the container holds nested namespaces.
    #[error("two processes are called {space} in their pid namespaces")]
    DuplicateSpace {
        /// The pid they have in common.
        space: SpaceId,
    },
    /// A file of `/proc/PID` could not be read.
    #[error("cannot read {file} of process {pid}")]
    Proc {
        /// The process.
        pid: i32,
        /// Which file.
        file: &'static str,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// `/proc/PID/maps` is not in the form we know.
    #[error("cannot understand the mappings of process {pid}")]
    Maps {
        /// The process.
        pid: i32,
        /// Where.
        #[source]
        source: MalformedMaps,
    },
    /// `PAGEMAP_SCAN` failed.
    #[error("cannot scan process {pid} at {addr:#x}")]
    Scan {
        /// The process.
        pid: i32,
        /// Where the scan began.
        addr: u64,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// Memory could not be read, for another reason than that it is not there.
    #[error("cannot read memory of process {pid} at {addr:#x}")]
    Read {
        /// The process.
        pid: i32,
        /// Where the read began.
        addr: u64,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// A page of a frozen process that must be there cannot be read: broken memory, or swap that does not come back.
    #[error("page {addr:#x} of frozen process {pid} cannot be read")]
    Unreadable {
        /// The process.
        pid: i32,
        /// The page.
        addr: u64,
    },
    /// A process that was claimed is no longer there.
    #[error("process {pid} ended while it was frozen")]
    Ended {
        /// The process.
        pid: i32,
    },
}
