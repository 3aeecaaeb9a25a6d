//! Exit codes, as the help text lists them.

use std::process::ExitCode;

use tonic::{Code, Status};

/// How a command ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Exit {
    /// Done.
    Success = 0,
    /// It failed; of a migration: the reason says where the container is.
    Failed = 1,
    /// The question makes no sense: also what clap uses.
    Usage = 2,
    /// Refused before anything was touched.
    Refused = 3,
    /// Cancelled: the container stays.
    Cancelled = 4,
    /// sternad does not answer.
    NoAgent = 5,
}

impl From<Exit> for ExitCode {
    fn from(exit: Exit) -> Self {
        Self::from(exit as u8)
    }
}

impl Exit {
    /// Of an answer that is an error.
    pub(crate) fn of(status: &Status) -> Self {
        match status.code() {
            Code::NotFound | Code::FailedPrecondition | Code::ResourceExhausted => Self::Refused,
            Code::InvalidArgument => Self::Usage,
            Code::Unavailable => Self::NoAgent,
            _ => Self::Failed,
        }
    }
}
