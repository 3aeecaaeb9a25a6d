//! A migration whose engine died is brought to its end by the next one, which knows
//! what is on disk.

use std::time::{Duration, Instant};

use criu::HELPER_ARGUMENT;
use migrate::Phase;
use migrate::commit::{CommitRecord, CommitState, Recovery, after_restart};
use migrate::source::State;
use nodeapi::FromEngine;
use proto::engine::Summary;

use super::Sender;
use crate::container::{Container, Frozen};
use crate::send_error::SendError;

/// How often to look whether CRIU has gone.
const STEP: Duration = Duration::from_millis(2);
/// Before it is tried again to find a container that must be there.
const AGAIN: Duration = Duration::from_secs(1);
/// Undoing a dump takes CRIU some ten milliseconds.
const WORTH_A_WORD: Duration = Duration::from_secs(5);

impl Sender {
    /// Acts by [`after_restart`]: without a commit record the container goes on
    /// here, with one the destination's word is followed, or waited for.
    pub(super) async fn recover(
        &mut self,
        record: Option<CommitRecord>,
    ) -> Result<Summary, SendError> {
        self.knows_figures = false;
        if let Some(record) = &record {
            tracing::warn!(state = ?record.state, "an engine died after its commit");
            self.phase = Phase::Resume;
            self.log.commit();
            // The one that died may not have come to say so.
            drop(self.shim.send(&FromEngine::Committed));
        }
        // It freezes what it found frozen, in the end: nothing is done before.
        criu_gone().await;
        self.frozen = self.left_frozen(record.as_ref()).await;
        let recovery = after_restart(record.as_ref(), None);
        let Some(record) = record else {
            debug_assert_eq!(recovery, Recovery::Thaw);
            self.unwind(&SendError::EngineDied).await;
            return Err(SendError::EngineDied);
        };
        match recovery {
            Recovery::Thaw => {
                self.state = State::Undecided;
                Err(self.take_back(record, "it was about to go on".into()).await)
            }
            Recovery::Kill => {
                self.state = State::Released;
                Ok(self.end_copy(record).await)
            }
            Recovery::KeepFrozenAndAsk => {
                debug_assert_eq!(record.state, CommitState::Committing);
                self.state = State::Undecided;
                self.resume(record).await
            }
        }
    }

    /// The container as it was left. None: it has ended.
    async fn left_frozen(&self, record: Option<&CommitRecord>) -> Option<Frozen> {
        loop {
            let error = match Container::open(&self.job.container, self.job.init_pid) {
                Ok(container) => return Some(container.left_frozen()),
                Err(error) => crate::error_chain(&error),
            };
            let init = crate::container::init_process(self.job.init_pid).ok();
            let other = |record: &CommitRecord| init != Some(record.init);
            if init.is_none() || record.is_some_and(other) {
                tracing::info!(error, "nothing is left of it");
                return None;
            }
            tracing::error!(error, "cannot get at a container that may stand still");
            tokio::time::sleep(AGAIN).await;
        }
    }
}

/// Waits until CRIU has undone the dump of an engine that died. Its helper was
/// handed to the shim, our parent, by the kernel; so was CRIU, if the helper died,
/// too.
async fn criu_gone() {
    let shim = nix::unistd::getppid().as_raw();
    let begun = Instant::now();
    let mut warned = false;
    while has_criu(shim) {
        if !warned && begun.elapsed() > WORTH_A_WORD {
            warned = true;
            tracing::warn!("CRIU takes long to undo a dump");
        }
        tokio::time::sleep(STEP).await;
    }
}

/// Whether a process is the parent of CRIU or of its helper. A checkpoint of
/// another container of the pod is not among them: its parent lives.
fn has_criu(parent: i32) -> bool {
    let Ok(processes) = std::fs::read_dir("/proc") else {
        return false;
    };
    processes
        .flatten()
        .filter_map(|process| process.file_name().to_str()?.parse::<i32>().ok())
        .any(|pid| parent_of(pid) == Some(parent) && is_criu(pid))
}

fn parent_of(pid: i32) -> Option<i32> {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    // The second field, the name, may hold anything.
    let (_, fields) = stat.rsplit_once(')')?;
    fields.split_whitespace().nth(1)?.parse().ok()
}

fn is_criu(pid: i32) -> bool {
    is_criu_line(&std::fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default())
}

/// `criu swrk 3` soon puts `criu: dump ...` in the place of its arguments.
fn is_criu_line(line: &[u8]) -> bool {
    let second = line.split(|byte| *byte == 0).nth(1);
    line.starts_with(b"criu: ")
        || second.is_some_and(|word| word == HELPER_ARGUMENT.as_bytes() || word == b"swrk")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn criu_is_known_by_what_it_calls_itself() {
        assert!(is_criu_line(b"/usr/sbin/criu\0swrk\x003\0"));
        assert!(is_criu_line(b"criu: dump --rpc -t 1697\0"));
        assert!(!is_criu_line(b"criu-exporter\0--port\x009100\0"));
        assert!(!is_criu_line(b""));
    }

    #[test]
    fn a_helper_is_found_by_its_parent_and_its_argument() {
        let own = nix::unistd::getpid().as_raw();
        assert_eq!(parent_of(own), Some(nix::unistd::getppid().as_raw()));
        assert!(!has_criu(own));
        let temp = tempfile::tempdir().unwrap();
        std::fs::write(temp.path().join(HELPER_ARGUMENT), "read -r line").unwrap();
        let mut helper = std::process::Command::new("sh")
            .arg(HELPER_ARGUMENT)
            .current_dir(temp.path())
            .stdin(std::process::Stdio::piped())
            .spawn()
            .unwrap();
        assert!(has_criu(own));
        drop(helper.stdin.take());
        helper.wait().unwrap();
        assert!(!has_criu(own));
    }
}
