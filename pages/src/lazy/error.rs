//! Why memory was not filled.

use std::io;
use std::path::PathBuf;

use crate::SpaceId;

/// Why memory was not filled. The processes, if any run, must be ended before the guards are closed.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum LazyError {
    /// Cannot wait for CRIU or for page faults.
    #[error("cannot wait for page faults")]
    Wait(#[source] io::Error),
    /// Cannot start a thread.
    #[error("cannot start a thread that fills memory")]
    Thread(#[source] io::Error),
    /// The connection to CRIU does not work.
    #[error("cannot receive from criu on {}", path.display())]
    Receive {
        /// The socket.
        path: PathBuf,
        /// What went wrong.
        #[source]
        source: io::Error,
    },
    /// CRIU sent the pid of a process and no userfaultfd.
    #[error("criu sent no userfaultfd for process {0}")]
    NoUserfaultfd(SpaceId),
    /// CRIU sent a process twice.
    #[error("criu sent process {0} twice")]
    Twice(SpaceId),
    /// CRIU closed the connection before all was restored. What is staged is still there: the restore can be repeated
    /// with another server.
    #[error("criu ended before the restore had finished")]
    RestoreFailed,
    /// Memory is staged for a process that CRIU did not restore.
    #[error("no process was restored for the memory of space {0}")]
    NotRestored(SpaceId),
    /// The userfaultfd of a process does not report what has to be known: forks, and what is unmapped, moved or
    /// discarded.
    #[error("the userfaultfd of space {space} reports too little (features {features:#x})")]
    Deaf {
        /// Whose.
        space: SpaceId,
        /// What it does report: `UFFD_FEATURE_*`.
        features: u64,
    },
    /// Cannot learn what a userfaultfd reports.
    #[error("cannot inspect the userfaultfd of space {space}")]
    Inspect {
        /// Whose.
        space: SpaceId,
        /// What reading /proc/self/fdinfo said.
        #[source]
        source: io::Error,
    },
    /// Cannot make a guard.
    #[error("cannot duplicate the userfaultfd of space {space}")]
    Guard {
        /// Whose.
        space: SpaceId,
        /// What dup(2) said.
        #[source]
        source: io::Error,
    },
    /// A page is staged where the restored process has no mapping that we may fill.
    #[error("no mapping for the page at {addr:#x} of space {space}")]
    Homeless {
        /// Whose page.
        space: SpaceId,
        /// Where it belongs.
        addr: u64,
    },
    /// A restored process has a page already for which another is staged, and nobody can say what is in it.
    ///
    /// Pages that CRIU restores itself have to be taken out of staging ([`Staging::remove`](crate::Staging::remove)). Else it is the work of
    /// huge pages: where CRIU writes one page before a mapping is registered, and huge pages are on for all of the
    /// machine, the 511 around it come into being as zeros. The restore has to run with `PR_SET_THP_DISABLE`.
    #[error("the page at {addr:#x} of space {space} is there already")]
    Occupied {
        /// Whose page.
        space: SpaceId,
        /// Where it is.
        addr: u64,
    },
    /// The machine, or the control group of the container, had no memory for too long.
    #[error("no memory to fill space {space}")]
    NoMemory {
        /// Whose page could not be placed.
        space: SpaceId,
    },
    /// A request for a page failed in a way that has no explanation.
    #[error("cannot place the page at {addr:#x} of space {space}")]
    Place {
        /// Whose page.
        space: SpaceId,
        /// Where it belongs; 0 when reading events failed.
        addr: u64,
        /// What the kernel said.
        #[source]
        source: io::Error,
    },
    /// [`Canceller::cancel`](crate::Canceller::cancel) was called.
    #[error("filling was cancelled")]
    Cancelled,
}
