//! What a request can fail with, and the one place where that becomes a status.

use std::error::Error as StdError;
use std::io;
use std::path::{Path, PathBuf};

use ttrpc::proto::Code;

use crate::runc::RuncError;
use crate::state::Refusal;

/// Result of everything that serves a request.
pub(crate) type Result<T> = std::result::Result<T, Error>;

/// A request that failed. The texts are those of containerd's Go shim where
/// clients are known to match on them.
#[derive(Debug, thiserror::Error)]
pub(crate) enum Error {
    #[error("container not created: not found")]
    NoContainer,
    #[error("container {0}: already exists")]
    ContainerExists(String),
    #[error("process does not exist {0}: not found")]
    NoProcess(String),
    #[error("id {0}: already exists")]
    ExecExists(String),
    #[error("container {0} init process is not running: failed precondition")]
    InitNotRunning(String),
    #[error("{0}: failed precondition")]
    Refused(#[from] Refusal),
    #[error("container {0} is being migrated: failed precondition")]
    Migrating(String),
    #[error("container {id} cannot be sent, {reason}: failed precondition")]
    NotSendable { id: String, reason: &'static str },
    #[error("process not created: failed precondition")]
    NotStarted,
    #[error("process already finished: not found")]
    AlreadyFinished,
    #[error("no such container: not found")]
    NoSuchContainer,
    #[error("cgroup does not exist: not found")]
    NoCgroup,
    #[error("{what}: invalid argument")]
    InvalidArgument { what: String },
    #[error(transparent)]
    Runtime(#[from] RuncError),
    #[error("cannot {action} {path}")]
    Io {
        action: &'static str,
        path: PathBuf,
        #[source]
        source: io::Error,
    },
    #[error("cannot {action}")]
    System {
        action: &'static str,
        #[source]
        source: io::Error,
    },
    #[error("cannot {action} {path}")]
    Json {
        action: &'static str,
        path: PathBuf,
        #[source]
        source: serde_json::Error,
    },
    #[error("failed to mount rootfs component: {what}")]
    Mount {
        what: String,
        #[source]
        source: io::Error,
    },
    #[error("the console did not come within {0} s")]
    NoConsole(u64),
    #[error("cannot use {0}")]
    RunDir(#[source] nodeapi::FileError, &'static str),
    #[error("checkpoint of {id} failed: {reason} path= {log}")]
    Checkpoint {
        id: String,
        reason: String,
        log: PathBuf,
    },
    #[error("checkpoint of {id} is not possible here: {reason}: failed precondition")]
    CheckpointUnavailable { id: String, reason: String },
    #[error("the migration engine {what}")]
    Engine { what: String },
    #[error("container {id} did not arrive: {reason}")]
    NotReceived { id: String, reason: String },
    #[error("the operation was interrupted: {0}")]
    Interrupted(tokio::task::JoinError),
}

impl Error {
    /// For `map_err` on file operations.
    pub(crate) fn io<'a>(
        action: &'static str,
        path: &'a Path,
    ) -> impl FnOnce(io::Error) -> Self + 'a {
        move |source| Self::Io {
            action,
            path: path.to_owned(),
            source,
        }
    }

    /// For `map_err` on system calls.
    pub(crate) fn system<E: Into<io::Error>>(action: &'static str) -> impl FnOnce(E) -> Self {
        move |source| Self::System {
            action,
            source: source.into(),
        }
    }

    fn code(&self) -> Code {
        match self {
            Self::NoContainer
            | Self::NoProcess(_)
            | Self::AlreadyFinished
            | Self::NoSuchContainer
            | Self::NoCgroup => Code::NOT_FOUND,
            Self::ContainerExists(_) | Self::ExecExists(_) => Code::ALREADY_EXISTS,
            Self::InitNotRunning(_)
            | Self::Refused(_)
            | Self::Migrating(_)
            | Self::NotSendable { .. }
            | Self::NotStarted
            | Self::CheckpointUnavailable { .. } => Code::FAILED_PRECONDITION,
            Self::InvalidArgument { .. } => Code::INVALID_ARGUMENT,
            Self::Runtime(_)
            | Self::Io { .. }
            | Self::System { .. }
            | Self::Json { .. }
            | Self::Mount { .. }
            | Self::NoConsole(_)
            | Self::RunDir(..)
            | Self::Checkpoint { .. }
            | Self::Engine { .. }
            | Self::NotReceived { .. }
            | Self::Interrupted(_) => Code::UNKNOWN,
        }
    }

    /// This error and its causes on one line.
    pub(crate) fn chain(&self) -> String {
        chain(self)
    }
}

/// An error and its causes on one line.
pub(crate) fn chain(error: &dyn StdError) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        text.push_str(": ");
        text.push_str(&error.to_string());
        cause = error.source();
    }
    text
}

impl From<Error> for ttrpc::Error {
    fn from(error: Error) -> Self {
        Self::RpcStatus(ttrpc::get_status(error.code(), error.chain()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_error_carries_its_causes_into_the_status() {
        let error = Error::io("read", Path::new("/x"))(io::ErrorKind::NotFound.into());
        let ttrpc::Error::RpcStatus(status) = error.into() else {
            panic!("not a status");
        };
        assert_eq!(status.code(), Code::UNKNOWN);
        assert_eq!(status.message(), "cannot read /x: entity not found");
    }

    #[test]
    fn what_clients_match_on_reads_as_from_the_go_shim() {
        for (error, code, text) in [
            (
                Error::NoContainer,
                Code::NOT_FOUND,
                "container not created: not found",
            ),
            (
                Error::ExecExists("sh".into()),
                Code::ALREADY_EXISTS,
                "id sh: already exists",
            ),
            (
                Error::Runtime(RuncError::Spawn {
                    program: "no-runc".into(),
                    source: io::ErrorKind::NotFound.into(),
                }),
                Code::UNKNOWN,
                "cannot run \"no-runc\": entity not found",
            ),
            (
                Error::InitNotRunning("web".into()),
                Code::FAILED_PRECONDITION,
                "container web init process is not running: failed precondition",
            ),
            (
                Error::AlreadyFinished,
                Code::NOT_FOUND,
                "process already finished: not found",
            ),
        ] {
            assert_eq!((error.code(), error.chain().as_str()), (code, text));
        }
    }
}
