//! What can go wrong.

use std::fmt::Display;
use std::io;
use std::path::PathBuf;

/// A container's network that could not be described, prepared or switched.
#[derive(Debug, thiserror::Error)]
pub enum NetworkError {
    /// The container's network is of a kind that we cannot move.
    #[error("the network does not move: {reason}")]
    NotMovable {
        /// Why, for people.
        reason: String,
    },
    /// The kernel said no.
    #[error("cannot {action} {object}")]
    Kernel {
        /// What was tried.
        action: &'static str,
        /// On what: an interface, an address, a path.
        object: String,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// There is a namespace already where one was to be made.
    #[error("there is a network namespace already: {}", .netns.display())]
    Exists {
        /// Its path.
        netns: PathBuf,
    },
    /// The node's bridge cannot be used.
    #[error("cannot use bridge {bridge}: {reason}")]
    Bridge {
        /// Its name.
        bridge: String,
        /// What is wrong with it.
        reason: &'static str,
    },
    /// A peer described a network that no container has.
    #[error("the description of the network is not valid: {reason}")]
    Invalid {
        /// What is wrong.
        reason: &'static str,
    },
    /// The process is about to end.
    #[error("interrupted by the end of the process")]
    Interrupted,
}

impl NetworkError {
    pub(crate) fn kernel(
        action: &'static str,
        object: impl Display,
    ) -> impl FnOnce(io::Error) -> Self {
        let object = object.to_string();
        move |source| Self::Kernel {
            action,
            object,
            source,
        }
    }

    pub(crate) fn not_movable(reason: impl Into<String>) -> Self {
        Self::NotMovable {
            reason: reason.into(),
        }
    }
}
