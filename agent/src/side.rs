//! Who failed.

use std::fmt;

/// The part of a migration that failed, as results name it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Side {
    Source,
    SourceContainerd,
    SourceShim,
    DestinationAgent,
    DestinationContainerd,
    DestinationShim,
    Link,
}

impl Side {
    pub(crate) const ALL: [Self; 7] = [
        Self::Source,
        Self::SourceContainerd,
        Self::SourceShim,
        Self::DestinationAgent,
        Self::DestinationContainerd,
        Self::DestinationShim,
        Self::Link,
    ];

    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Source => "source",
            Self::SourceContainerd => "source containerd",
            Self::SourceShim => "source shim",
            Self::DestinationAgent => "destination agent",
            Self::DestinationContainerd => "destination containerd",
            Self::DestinationShim => "destination shim",
            Self::Link => "link",
        }
    }

    /// The side that a peer named; a name that is not ours is the peer's agent.
    pub(crate) fn from_name(name: &str) -> Self {
        Self::ALL
            .into_iter()
            .find(|side| side.name() == name)
            .unwrap_or(Self::DestinationAgent)
    }
}

impl fmt::Display for Side {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// Why a migration failed, and because of whom.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{side}: {reason}")]
pub(crate) struct Failure {
    pub(crate) side: Side,
    pub(crate) reason: String,
}

impl Failure {
    pub(crate) fn new(side: Side, reason: impl Into<String>) -> Self {
        Self {
            side,
            reason: reason.into(),
        }
    }

    /// Of an error on this node; containerd is named where it did not answer.
    pub(crate) fn local(error: &anyhow::Error, ours: Side, containerd: Side) -> Self {
        let lost = error
            .chain()
            .filter_map(|cause| cause.downcast_ref::<crate::containerd::CallError>())
            .any(crate::containerd::CallError::is_lost);
        Self::new(if lost { containerd } else { ours }, format!("{error:#}"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_side_is_found_by_its_name() {
        for side in Side::ALL {
            assert_eq!(Side::from_name(side.name()), side);
        }
        assert_eq!(Side::from_name("moon"), Side::DestinationAgent);
    }
}
