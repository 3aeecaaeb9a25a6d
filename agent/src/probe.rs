//! What this node's kernel and tools can do, found out in a child process.
//!
//! The kernel's self-test forks and libcriu is loaded into whoever asks for it:
//! neither belongs into a process with threads that lives for months.

use std::process::Stdio;
use std::time::Duration;

use anyhow::{Context as _, ensure};
use serde::{Deserialize, Serialize};

/// Argument with which sternad starts itself as the child.
pub(crate) const SUBCOMMAND: &str = "probe";

/// The self-test and `criu --version` take some 50 ms.
const TIMEOUT: Duration = Duration::from_secs(15);

/// The child's answer.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Probe {
    /// Why writes to memory cannot be tracked; none: they can.
    pub(crate) no_tracking: Option<String>,
    /// Feature bits of userfaultfd, or why there is none.
    pub(crate) userfaultfd: Result<u64, String>,
    /// Version of a CRIU that will do, or why there is none.
    pub(crate) criu: Result<String, String>,
}

impl Probe {
    /// In the child.
    pub(crate) fn here() -> Self {
        let features = sys::uffd::Userfaultfd::create(false).and_then(|uffd| uffd.handshake(0));
        Self {
            no_tracking: pages::self_test().err().map(|error| chain(&error)),
            userfaultfd: features.map_err(|error| error.to_string()),
            criu: criu::Tools::find()
                .map(|tools| tools.version.to_string())
                .map_err(|error| chain(&error)),
        }
    }

    /// In the parent.
    pub(crate) async fn ask() -> anyhow::Result<Self> {
        let child = tokio::process::Command::new("/proc/self/exe")
            .arg(SUBCOMMAND)
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .kill_on_drop(true)
            .output();
        let output = tokio::time::timeout(TIMEOUT, child)
            .await
            .context("the self-test takes too long")?
            .context("cannot run the self-test")?;
        ensure!(
            output.status.success(),
            "the self-test ended with {}: {}",
            output.status,
            String::from_utf8_lossy(&output.stderr).trim()
        );
        serde_json::from_slice(&output.stdout).context("cannot understand the self-test's answer")
    }
}

/// An error and its causes in one line.
fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        text.push_str(": ");
        text.push_str(&error.to_string());
        cause = error.source();
    }
    text
}
