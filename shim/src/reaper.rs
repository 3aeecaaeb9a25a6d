//! The one place where children are reaped.
//!
//! Every child of the shim ends here: runc and other helpers that it spawned,
//! and the container processes that runc left behind, which the kernel hands
//! over because the shim is a subreaper. Nobody else may call wait(2).
//!
//! A helper's pid is known before its exit can be reaped, because the spawn
//! happens under the reaper's lock. A container process is spawned by runc, so
//! that it may end before its pid has been read: an [`Expectation`] opened
//! before runc runs keeps every exit until the pid is claimed.

use std::collections::HashMap;
use std::io;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::SystemTime;

use rustix::process::{WaitOptions, WaitStatus, wait};
use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio::sync::oneshot;

/// How a process ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Exit {
    /// The exit status, or 128 and the number of the signal.
    pub(crate) status: u32,
    /// When it was reaped.
    pub(crate) at: SystemTime,
}

impl Exit {
    /// An exit that nobody reaped, as of now.
    pub(crate) fn assumed(status: u32) -> Self {
        Self {
            status,
            at: SystemTime::now(),
        }
    }

    fn of(status: WaitStatus) -> Option<Self> {
        let code = match (status.exit_status(), status.terminating_signal()) {
            (Some(code), _) => code,
            (None, Some(signal)) => 128 + signal,
            (None, None) => return None,
        };
        Some(Self::assumed(code.unsigned_abs()))
    }
}

/// Resolves when the process has been reaped. An error cannot happen while the
/// reaper lives, which is as long as the process.
pub(crate) type ExitReceiver = oneshot::Receiver<Exit>;

#[derive(Debug, Default)]
struct Inner {
    waiting: HashMap<i32, oneshot::Sender<Exit>>,
    /// Open expectations with the exits of strangers since they were opened.
    expecting: HashMap<u64, Vec<(i32, Exit)>>,
    next_expectation: u64,
}

/// See the module's documentation.
#[derive(Debug, Default)]
pub(crate) struct Reaper(Mutex<Inner>);

impl Reaper {
    /// Spawns a child. `spawn` answers its pid.
    pub(crate) fn spawn(
        &self,
        spawn: impl FnOnce() -> io::Result<u32>,
    ) -> io::Result<(u32, ExitReceiver)> {
        let mut inner = self.lock();
        let pid = spawn()?;
        let (sender, receiver) = oneshot::channel();
        inner.waiting.insert(pid.cast_signed(), sender);
        Ok((pid, receiver))
    }

    /// To be opened before something runs that leaves a process behind.
    pub(crate) fn expect(self: &Arc<Self>) -> Expectation {
        let mut inner = self.lock();
        let key = inner.next_expectation;
        inner.next_expectation += 1;
        inner.expecting.insert(key, Vec::new());
        Expectation {
            reaper: Arc::clone(self),
            key,
        }
    }

    /// Reaps until nothing is left to reap, now and whenever a child ends.
    pub(crate) async fn run(self: Arc<Self>, mut children: Signal) {
        loop {
            self.reap();
            if children.recv().await.is_none() {
                return;
            }
        }
    }

    /// The signal that [`run`](Self::run) wants; taken before the first spawn.
    pub(crate) fn signal() -> io::Result<Signal> {
        signal(SignalKind::child())
    }

    fn reap(&self) {
        loop {
            // The lock covers the wait: see `spawn`.
            let mut inner = self.lock();
            match wait(WaitOptions::NOHANG) {
                Ok(Some((pid, status))) => {
                    if let Some(exit) = Exit::of(status) {
                        inner.exited(pid.as_raw_nonzero().get(), exit);
                    }
                }
                Ok(None) | Err(rustix::io::Errno::CHILD) => return,
                Err(rustix::io::Errno::INTR) => {}
                Err(error) => {
                    tracing::error!(%error, "cannot reap children");
                    return;
                }
            }
        }
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        // Nothing here panics half-way through a change.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Inner {
    fn exited(&mut self, pid: i32, exit: Exit) {
        tracing::debug!(pid, status = exit.status, "reaped");
        match self.waiting.remove(&pid) {
            // A receiver that was dropped no longer wants to know.
            Some(sender) => drop(sender.send(exit)),
            None => {
                for exits in self.expecting.values_mut() {
                    exits.push((pid, exit));
                }
            }
        }
    }
}

/// Keeps the exits of strangers until one of them is claimed.
#[derive(Debug)]
pub(crate) struct Expectation {
    reaper: Arc<Reaper>,
    key: u64,
}

impl Expectation {
    /// The process was `pid`; it may have ended already.
    pub(crate) fn claim(self, pid: u32) -> ExitReceiver {
        let pid = pid.cast_signed();
        let (sender, receiver) = oneshot::channel();
        let mut inner = self.reaper.lock();
        let seen = inner
            .expecting
            .get(&self.key)
            .and_then(|exits| exits.iter().find(|(seen, _)| *seen == pid))
            .map(|(_, exit)| *exit);
        match seen {
            Some(exit) => drop(sender.send(exit)),
            None => drop(inner.waiting.insert(pid, sender)),
        }
        receiver
    }
}

impl Drop for Expectation {
    fn drop(&mut self) {
        self.reaper.lock().expecting.remove(&self.key);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    // Fed by hand: a test process must not reap the children of other tests.
    fn exited(reaper: &Reaper, pid: i32, status: u32) {
        reaper.lock().exited(pid, Exit::assumed(status));
    }

    #[test]
    fn an_exit_reaches_who_spawned_the_process() {
        let reaper = Arc::new(Reaper::default());
        let (pid, mut exit) = reaper.spawn(|| Ok(7)).unwrap();
        assert!(exit.try_recv().is_err());
        exited(&reaper, pid.cast_signed(), 3);
        assert_eq!(exit.try_recv().unwrap().status, 3);
    }

    #[test]
    fn an_exit_before_the_claim_is_kept_for_it() {
        let reaper = Arc::new(Reaper::default());
        let expectation = reaper.expect();
        exited(&reaper, 41, 1);
        exited(&reaper, 42, 2);
        assert_eq!(expectation.claim(42).try_recv().unwrap().status, 2);
        assert!(reaper.lock().expecting.is_empty());
    }

    #[test]
    fn an_exit_after_the_claim_is_delivered() {
        let reaper = Arc::new(Reaper::default());
        let mut exit = reaper.expect().claim(42);
        exited(&reaper, 42, 9);
        assert_eq!(exit.try_recv().unwrap().status, 9);
    }

    #[test]
    fn an_exit_from_before_the_expectation_is_not_taken_for_a_reused_pid() {
        let reaper = Arc::new(Reaper::default());
        exited(&reaper, 42, 1);
        let mut exit = reaper.expect().claim(42);
        assert!(exit.try_recv().is_err());
    }

    #[test]
    fn two_expectations_see_the_same_exits() {
        let reaper = Arc::new(Reaper::default());
        let (one, two) = (reaper.expect(), reaper.expect());
        exited(&reaper, 1, 10);
        exited(&reaper, 2, 20);
        assert_eq!(two.claim(2).try_recv().unwrap().status, 20);
        assert_eq!(one.claim(1).try_recv().unwrap().status, 10);
    }
}
