//! Freezing a container's control group before CRIU does.
//!
//! CRIU's own way costs a random 100 ms, its waiting step. When it finds the group
//! frozen it goes on at once: it stops every task itself, thaws the group, and
//! freezes it again before it lets the tasks go (unless it kills them).

use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::thread;
use std::time::{Duration, Instant};

/// How often the state is looked at. A freeze takes 0.1 to 10 ms.
const STEP: Duration = Duration::from_micros(100);

/// How often the request is repeated on v1, where it can get lost: a group can stay
/// in "FREEZING" for ever if a task was forking at the wrong moment.
const REPEAT: Duration = Duration::from_millis(20);

/// Why a group is not in the state that was asked for.
#[derive(Debug, thiserror::Error)]
pub enum FreezerError {
    /// Its files cannot be read or written.
    #[error("cannot {operation} {}", path.display())]
    Io {
        /// "read" or "write".
        operation: &'static str,
        /// The file.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// It does not freeze. The request was taken back.
    #[error("{} did not freeze within {} ms", group.display(), waited.as_millis())]
    Timeout {
        /// Its directory.
        group: PathBuf,
        /// How long was waited.
        waited: Duration,
    },
}

/// The control group that freezes a container.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Freezer {
    /// Directory in the v1 `freezer` hierarchy.
    V1(PathBuf),
    /// Directory in the unified hierarchy.
    V2(PathBuf),
}

impl Freezer {
    /// The group's directory: CRIU's `freeze_cgroup`.
    pub fn directory(&self) -> &Path {
        match self {
            Self::V1(directory) | Self::V2(directory) => directory,
        }
    }

    /// The file that lists the group's processes.
    pub fn processes(&self) -> PathBuf {
        self.directory().join("cgroup.procs")
    }

    /// Freezes the group and waits until every task in it stands still.
    ///
    /// # Errors
    ///
    /// After [`FreezerError::Timeout`] the group is thawed again.
    pub fn freeze(&self, timeout: Duration) -> Result<(), FreezerError> {
        let begun = Instant::now();
        let mut asked = begun;
        self.write(true)?;
        while !self.is_frozen()? {
            if begun.elapsed() > timeout {
                self.thaw()?;
                return Err(FreezerError::Timeout {
                    group: self.directory().to_owned(),
                    waited: timeout,
                });
            }
            if asked.elapsed() > REPEAT {
                self.write(true)?;
                asked = Instant::now();
            }
            thread::sleep(STEP);
        }
        Ok(())
    }

    /// Asks for a freeze and does not wait: for tasks that CRIU holds anyway.
    ///
    /// CRIU thaws the group early in a dump. Asked for again at
    /// [`Action::PostDump`](crate::Action::PostDump), it keeps the tasks from
    /// running if CRIU should die before it has killed them. Thaw after the answer:
    /// on v1 frozen tasks do not die.
    ///
    /// # Errors
    ///
    /// When the file cannot be written.
    pub fn freeze_later(&self) -> Result<(), FreezerError> {
        self.write(true)
    }

    /// Thaws the group. Tasks that a tracer holds go on when it lets them.
    ///
    /// # Errors
    ///
    /// When the file cannot be written.
    pub fn thaw(&self) -> Result<(), FreezerError> {
        self.write(false)
    }

    /// Does every task in the group stand still?
    ///
    /// # Errors
    ///
    /// When the file cannot be read.
    pub fn is_frozen(&self) -> Result<bool, FreezerError> {
        let (name, frozen) = match self {
            // "FREEZING" is not yet.
            Self::V1(_) => ("freezer.state", "FROZEN"),
            Self::V2(_) => ("cgroup.events", "frozen 1"),
        };
        let path = self.directory().join(name);
        let text = fs::read_to_string(&path).map_err(|source| FreezerError::Io {
            operation: "read",
            path,
            source,
        })?;
        Ok(text.lines().any(|line| line == frozen))
    }

    fn write(&self, freeze: bool) -> Result<(), FreezerError> {
        let (name, text) = match (self, freeze) {
            (Self::V1(_), true) => ("freezer.state", "FROZEN"),
            (Self::V1(_), false) => ("freezer.state", "THAWED"),
            (Self::V2(_), true) => ("cgroup.freeze", "1"),
            (Self::V2(_), false) => ("cgroup.freeze", "0"),
        };
        let path = self.directory().join(name);
        fs::write(&path, text).map_err(|source| FreezerError::Io {
            operation: "write",
            path,
            source,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_v1_group_is_frozen_when_its_state_says_so() {
        let directory = tempfile::tempdir().unwrap();
        let freezer = Freezer::V1(directory.path().to_owned());
        let state = directory.path().join("freezer.state");
        fs::write(&state, "FREEZING\n").unwrap();
        assert!(!freezer.is_frozen().unwrap());
        // A plain file: what is written is read back.
        freezer.freeze(Duration::from_secs(1)).unwrap();
        freezer.thaw().unwrap();
        assert_eq!(fs::read_to_string(&state).unwrap(), "THAWED");
    }

    #[test]
    fn a_v2_group_that_does_not_freeze_is_thawed_again() {
        let directory = tempfile::tempdir().unwrap();
        let freezer = Freezer::V2(directory.path().to_owned());
        let events = directory.path().join("cgroup.events");
        fs::write(&events, "populated 1\nfrozen 0\n").unwrap();
        let error = freezer.freeze(Duration::from_millis(50)).unwrap_err();
        assert!(matches!(error, FreezerError::Timeout { .. }), "{error}");
        let asked = fs::read_to_string(directory.path().join("cgroup.freeze")).unwrap();
        assert_eq!(asked, "0");
        fs::write(&events, "populated 1\nfrozen 1\n").unwrap();
        freezer.freeze(Duration::from_millis(50)).unwrap();
    }

    #[test]
    fn a_group_that_is_gone_is_an_error_with_its_path() {
        let error = Freezer::V1("/nowhere".into()).is_frozen().unwrap_err();
        assert_eq!(error.to_string(), "cannot read /nowhere/freezer.state");
    }
}
