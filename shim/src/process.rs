//! One process of a container: its pid, its streams, its end.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use tokio::sync::watch;

use crate::io::{Console, ProcessIo, StdioSpec};
use crate::reaper::Exit;

/// What the first process and the added ones have in common.
#[derive(Debug)]
pub(crate) struct Process {
    /// The container's id, or the exec id.
    pub(crate) id: String,
    /// What containerd named for its streams.
    pub(crate) stdio: StdioSpec,
    /// Held while the process comes into being, until the event that says so is
    /// published: an exit must not overtake it.
    pub(crate) gate: Arc<tokio::sync::Mutex<()>>,
    live: Mutex<Live>,
    exit: watch::Sender<Option<Exit>>,
}

#[derive(Debug, Default)]
struct Live {
    pid: u32,
    io: Option<Arc<ProcessIo>>,
    console: Option<Console>,
    input_closed: bool,
}

impl Process {
    /// A process that does not exist yet.
    pub(crate) fn new(id: String, stdio: StdioSpec) -> Self {
        Self {
            id,
            stdio,
            gate: Arc::default(),
            live: Mutex::default(),
            exit: watch::Sender::new(None),
        }
    }

    fn live(&self) -> MutexGuard<'_, Live> {
        self.live.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// 0 before it exists.
    pub(crate) fn pid(&self) -> u32 {
        self.live().pid
    }

    /// It exists.
    pub(crate) fn set_pid(&self, pid: u32) {
        self.live().pid = pid;
    }

    /// Its streams are there.
    pub(crate) fn attach(&self, io: ProcessIo, console: Option<Console>) {
        let mut live = self.live();
        if live.input_closed {
            io.close_input();
        }
        live.io = Some(Arc::new(io));
        live.console = console;
    }

    /// See [`ProcessIo::close_input`]; kept in mind if the streams come later.
    pub(crate) fn close_input(&self) {
        let mut live = self.live();
        live.input_closed = true;
        if let Some(io) = &live.io {
            io.close_input();
        }
    }

    /// The terminal, if it has one now.
    pub(crate) fn console(&self) -> Option<Console> {
        self.live().console.clone()
    }

    /// Lets the streams go, after the rest of the output.
    pub(crate) async fn finish_io(&self) {
        let io = self.take_io();
        if let Some(io) = io {
            io.finish().await;
        }
    }

    /// Lets the streams go at once.
    pub(crate) async fn abort_io(&self) {
        let io = self.take_io();
        if let Some(io) = io {
            io.abort().await;
        }
    }

    fn take_io(&self) -> Option<Arc<ProcessIo>> {
        let mut live = self.live();
        live.console = None;
        live.io.take()
    }

    /// How it ended, if it did.
    pub(crate) fn exit(&self) -> Option<Exit> {
        *self.exit.borrow()
    }

    /// It ended; the first word counts.
    pub(crate) fn set_exit(&self, exit: Exit) {
        self.exit.send_if_modified(|known| {
            let first = known.is_none();
            if first {
                *known = Some(exit);
            }
            first
        });
    }

    /// Waits for its end.
    pub(crate) async fn wait(&self) -> Exit {
        let mut exit = self.exit.subscribe();
        loop {
            if let Some(exit) = *exit.borrow_and_update() {
                return exit;
            }
            if exit.changed().await.is_err() {
                // Not while `self` holds the sender.
                return Exit::assumed(255);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn everybody_who_waits_hears_of_the_first_exit() {
        let process = Arc::new(Process::new("web".into(), StdioSpec::default()));
        let early = tokio::spawn({
            let process = Arc::clone(&process);
            async move { process.wait().await }
        });
        tokio::task::yield_now().await;
        process.set_exit(Exit::assumed(3));
        process.set_exit(Exit::assumed(4));
        assert_eq!(early.await.unwrap().status, 3);
        assert_eq!(process.wait().await.status, 3);
    }
}
