//! Why a container was not sent, and who is to blame.

use std::io;
use std::path::PathBuf;
use std::time::Duration;

use migrate::source::Event;
use migrate::{IllegalTransition, Phase};

use crate::container::ContainerError;
use crate::dump::DumpFailure;
use crate::files::FilesError;
use crate::link::LinkError;
use crate::streams::StreamError;

/// Why a container stays where it is.
#[derive(Debug, thiserror::Error)]
pub(crate) enum SendError {
    #[error("cannot {action} {path}")]
    File {
        action: &'static str,
        path: PathBuf,
        #[source]
        source: io::Error,
    },
    #[error("cancelled: {0}")]
    Cancelled(String),
    #[error("the deadline of {} ms passed", .0.as_millis())]
    Deadline(Duration),
    #[error("{} took longer than {} s", phase.name(), limit.as_secs())]
    Timeout { phase: Phase, limit: Duration },
    #[error("the shim is gone")]
    ShimGone,
    #[error("cannot use the container")]
    Container(#[from] ContainerError),
    #[error("cannot reach the destination")]
    Link(#[from] LinkError),
    #[error("cannot send memory")]
    Stream(#[from] StreamError),
    #[error("cannot send files")]
    Files(#[from] FilesError),
    #[error("the destination is gone: {0}")]
    DestinationLost(String),
    #[error("the destination refuses: {0}")]
    Refused(String),
    #[error("the destination failed in {phase}: {reason}")]
    DestinationFailed { phase: String, reason: String },
    #[error("the destination said {0} out of turn")]
    OutOfTurn(&'static str),
    #[error("cannot track memory")]
    Track(#[source] pages::TrackError),
    #[error("the pre-copy does not converge: {0}")]
    NoConvergence(String),
    #[error("the container's seccomp filters do not go with a dump")]
    Seccomp(#[from] criu::SeccompError),
    #[error("CRIU cannot dump the container")]
    Dump(#[from] DumpFailure),
    #[error("cannot move the container's address")]
    Network(#[source] network::NetworkError),
    #[error("a worker of the engine panicked")]
    Worker,
    #[error("the engine lost its way")]
    Lost(#[from] IllegalTransition),
    #[error("the destination handed the container back: {0}")]
    HandedBack(String),
    #[error("cannot use the commit record")]
    Record(#[source] nodeapi::FileError),
    #[error("the sending engine ended without a word")]
    EngineDied,
    #[error("the container ended here while nobody could say what became of it there")]
    EndedUndecided,
}

impl SendError {
    /// Who failed, as told to people.
    pub(crate) fn side(&self) -> &'static str {
        match self {
            Self::Link(_)
            | Self::Stream(_)
            | Self::DestinationLost(_)
            | Self::Refused(_)
            | Self::DestinationFailed { .. }
            | Self::OutOfTurn(_)
            | Self::HandedBack(_) => "destination",
            Self::Files(FilesError::Stream(_) | FilesError::Ended) => "destination",
            Self::Cancelled(_) => "operator",
            Self::EngineDied => "source shim",
            Self::File { .. }
            | Self::Deadline(_)
            | Self::Timeout { .. }
            | Self::ShimGone
            | Self::Container(_)
            | Self::Files(_)
            | Self::Track(_)
            | Self::NoConvergence(_)
            | Self::Dump(_)
            | Self::Seccomp(_)
            | Self::Network(_)
            | Self::Worker
            | Self::Record(_)
            | Self::EndedUndecided
            | Self::Lost(_) => "source",
        }
    }

    /// What this failure is to the state machine.
    pub(crate) fn event(&self) -> Event {
        match self {
            Self::Refused(_) => Event::Refused,
            Self::DestinationFailed { .. } => Event::DestinationFailed,
            Self::Link(_)
            | Self::Stream(_)
            | Self::DestinationLost(_)
            | Self::OutOfTurn(_)
            | Self::Files(FilesError::Stream(_) | FilesError::Ended) => Event::PeerLost,
            Self::Timeout { .. } => Event::PhaseTimedOut,
            Self::Cancelled(_) | Self::Deadline(_) => Event::CancelRequested,
            Self::NoConvergence(_) => Event::GaveUp,
            Self::HandedBack(_) => Event::HandedBack,
            Self::File { .. }
            | Self::ShimGone
            | Self::Container(_)
            | Self::Files(_)
            | Self::Track(_)
            | Self::Dump(_)
            | Self::Seccomp(_)
            | Self::Network(_)
            | Self::Worker
            | Self::Record(_)
            | Self::EngineDied
            | Self::EndedUndecided
            | Self::Lost(_) => Event::LocalFailure,
        }
    }

    pub(crate) fn outcome(&self) -> &'static str {
        match self {
            Self::Cancelled(_) => "cancelled",
            Self::HandedBack(_) => "handed-back",
            Self::EndedUndecided => "unknown",
            _ => "failed",
        }
    }
}
