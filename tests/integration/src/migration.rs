//! Migrations that a test watches.

use std::time::Duration;

use serde::Deserialize;

use crate::container::Running;
use crate::node::{Background, Node};
use crate::wait::{DEADLINE, wait_for};

/// Longer than any migration in these tests takes.
const PATIENCE: Duration = Duration::from_secs(120);

/// What `sterna migrate --json` says about a migration that worked.
#[derive(Debug, Clone, Deserialize)]
pub struct Moved {
    /// userfaultfd, or none.
    pub tracking: String,
    /// Each pass over the memory while the container ran.
    pub laps: Vec<serde_json::Value>,
    /// The container's memory.
    pub memory_bytes: u64,
    /// Time in which it stood still on the source, in milliseconds.
    pub freeze_ms: f64,
    /// Sent because the destination lacked the image.
    pub image_copied_bytes: u64,
}

/// One container under Sterna, as `sterna ps --json` has it.
#[derive(Debug, Clone, Deserialize)]
pub struct Listed {
    /// Its name.
    pub id: String,
    /// running, settling, ...
    pub state: String,
    /// Its first process.
    pub pid: u32,
    /// The process that keeps it.
    pub shim_pid: u32,
    /// Where it is going to or coming from.
    pub peer: Option<String>,
}

/// The containers under Sterna on a node.
#[track_caller]
pub fn listed(node: &Node) -> Vec<Listed> {
    let listing = node.sterna(&["ps", "--json"]);
    serde_json::from_str(listing.success()).unwrap_or_else(|error| panic!("{error}: {listing}"))
}

/// Waits until the container is on the node, with all of its memory.
#[track_caller]
pub fn settled(container: &Running<'_>, node: &Node) -> Listed {
    let name = container.name();
    let running = || {
        let mut all = listed(node).into_iter();
        all.find(|listed| listed.id == name && listed.state == "running")
    };
    wait_for(DEADLINE, running).unwrap_or_else(|| {
        panic!(
            "{name} has not settled on {}:\n{}{}\n--- containerd\n{}\n--- sternad\n{}",
            node.name(),
            node.sterna(&["ps"]).stdout,
            node.ctr(&["task", "list"]).stdout,
            node.log_tail("containerd"),
            node.log_tail("sternad"),
        )
    })
}

/// Moves a container, which has to work, and waits until it has settled.
#[track_caller]
pub fn migrate(container: &Running<'_>, from: &Node, to: &Node) -> Moved {
    migrate_with(container, from, to, &[])
}

/// [`migrate`] with more options of `sterna migrate`.
#[track_caller]
pub fn migrate_with(container: &Running<'_>, from: &Node, to: &Node, options: &[&str]) -> Moved {
    let words = ["migrate", container.name(), "--to", to.name(), "--json"];
    let output = from.sterna(&[&words, options].concat());
    let moved = serde_json::from_str(output.success());
    let moved = moved.unwrap_or_else(|error| panic!("{error}: {output}"));
    settled(container, to);
    moved
}

/// `sterna migrate` at work.
#[derive(Debug)]
pub struct Migration {
    command: Background,
    container: String,
}

impl Migration {
    /// Begins to move a container.
    pub fn start(container: &Running<'_>, from: &Node, to: &Node, options: &[&str]) -> Self {
        // Progress goes to standard error, one line for each phase and lap.
        let script = "exec sterna migrate \"$@\" 2>&1";
        let words = [
            "sh",
            "-c",
            script,
            "sh",
            container.name(),
            "--to",
            to.name(),
        ];
        let command = from.spawn(&[&words, options].concat());
        Self {
            command,
            container: container.name().to_owned(),
        }
    }

    /// Waits until the first lap is over: the container runs, memory travels, and
    /// the other side has prepared everything.
    #[track_caller]
    pub fn wait_for_pre_copy(&mut self) {
        let lap = self
            .command
            .line(PATIENCE, |line| line.starts_with("pre-copy: lap"));
        if lap.is_none() {
            let said = self.command.lines().join("\n");
            panic!(
                "the migration of {} ended before it copied memory:\n{said}",
                self.container
            );
        }
    }

    /// Waits until the source has begun to copy memory.
    #[track_caller]
    pub fn wait_for_begin(&mut self) {
        self.command
            .line(PATIENCE, |line| line == "pre-copy")
            .expect("the migration copies memory");
    }

    /// Its exit code and everything it said.
    #[track_caller]
    pub fn ended(self) -> (i32, String) {
        let output = self.command.end(PATIENCE);
        (output.code(), format!("{}{}", output.stdout, output.stderr))
    }

    /// Everything that a migration says that has to fail.
    #[track_caller]
    pub fn failure(self) -> String {
        self.command.end(PATIENCE).failure()
    }

    /// Everything that a migration says that has to work.
    #[track_caller]
    pub fn success(self) -> String {
        self.command.end(PATIENCE).success().to_owned()
    }
}
