//! Why a container did not arrive.

use std::io;
use std::path::PathBuf;
use std::time::Duration;

use migrate::destination::Event;
use nodeapi::ToEngine;
use proto::migration::source_message::Message as FromSource;

use crate::link;
use crate::memory::MemoryError;

/// Why a container did not arrive.
#[derive(Debug, thiserror::Error)]
pub(crate) enum ReceiveError {
    #[error("cannot {action} {path}")]
    File {
        action: &'static str,
        path: PathBuf,
        #[source]
        source: io::Error,
    },
    #[error("cannot talk to the shim")]
    Shim(#[from] crate::ipc::IpcError),
    #[error("the shim is gone")]
    ShimGone,
    #[error("cannot begin the arrival record")]
    Record(#[from] nodeapi::FileError),
    #[error("cannot take connections")]
    Link(#[from] link::LinkError),
    #[error("the source did not {what} within {} s", limit.as_secs())]
    Timeout { what: &'static str, limit: Duration },
    #[error("the source is gone: {0}")]
    SourceLost(String),
    #[error("the source gave up: {0}")]
    Aborted(String),
    #[error("given up here: {0}")]
    Cancelled(String),
    #[error("{0}")]
    Damaged(String),
    #[error("the source said {0} out of turn")]
    OutOfTurn(&'static str),
    #[error("the source speaks only versions {0:?} of the migration protocol")]
    Version(Vec<u32>),
    #[error("cannot read CRIU's images")]
    Images(#[source] criu::images::ImageError),
    #[error("the restore failed: {0}")]
    Restore(String),
    #[error("cannot fill memory in")]
    Fill(#[from] MemoryError),
    #[error("cannot bring the content of volume {name}")]
    Volume {
        name: String,
        #[source]
        source: layer::LayerError,
    },
    #[error("cannot attach the container's address")]
    Network(#[source] network::NetworkError),
}

impl ReceiveError {
    /// What this failure is to the state machine.
    pub(crate) fn event(&self) -> Event {
        match self {
            Self::Aborted(_) => Event::Abort,
            Self::SourceLost(_) | Self::OutOfTurn(_) => Event::PeerLost,
            Self::Timeout { .. } => Event::PhaseTimedOut,
            Self::Cancelled(_) => Event::CancelRequested,
            Self::File { .. }
            | Self::Shim(_)
            | Self::ShimGone
            | Self::Record(_)
            | Self::Link(_)
            | Self::Damaged(_)
            | Self::Version(_)
            | Self::Images(_)
            | Self::Restore(_)
            | Self::Fill(_)
            | Self::Volume { .. }
            | Self::Network(_) => Event::LocalFailure,
        }
    }

    /// Why a word of the shim ends the reception.
    pub(crate) fn spoken(message: Option<ToEngine>) -> Self {
        match message {
            Some(ToEngine::RestoreFailed { reason }) => Self::Restore(reason),
            Some(ToEngine::Cancel { reason }) => Self::Cancelled(reason),
            Some(_) => Self::Cancelled("the shim spoke out of turn".into()),
            None => Self::Cancelled("the shim is gone".into()),
        }
    }

    /// Why a message of the source ends it.
    pub(crate) fn unexpected(message: FromSource) -> Self {
        match message {
            FromSource::Abort(abort) => Self::Aborted(abort.reason),
            FromSource::Hello(_) => Self::OutOfTurn("hello"),
            FromSource::PrepareSwitch(_) => Self::OutOfTurn("prepare-switch"),
            FromSource::Freezing(_) => Self::OutOfTurn("freezing"),
            FromSource::Detached(_) => Self::OutOfTurn("detached"),
            FromSource::Final(_) => Self::OutOfTurn("final"),
            FromSource::Commit(_) => Self::OutOfTurn("commit"),
        }
    }
}
