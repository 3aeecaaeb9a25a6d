//! How long a client waited for answers.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

/// The longest time between two answers to one client, and the longest since
/// somebody last asked. Written by one thread, read by another.
#[derive(Debug)]
pub(crate) struct Gap {
    epoch: Instant,
    last_us: AtomicU64,
    longest_us: AtomicU64,
    window_us: AtomicU64,
}

impl Gap {
    pub(crate) fn new() -> Self {
        Self {
            epoch: Instant::now(),
            last_us: AtomicU64::new(0),
            longest_us: AtomicU64::new(0),
            window_us: AtomicU64::new(0),
        }
    }

    fn now_us(&self) -> u64 {
        u64::try_from(self.epoch.elapsed().as_micros()).unwrap_or(u64::MAX)
    }

    /// An answer came.
    pub(crate) fn answered(&self) {
        let now = self.now_us();
        let waited = now.saturating_sub(self.last_us.swap(now, Ordering::Relaxed));
        self.longest_us.fetch_max(waited, Ordering::Relaxed);
        self.window_us.fetch_max(waited, Ordering::Relaxed);
    }

    /// Nothing was asked since the last answer: that time is not waited.
    pub(crate) fn idle(&self) {
        self.last_us.store(self.now_us(), Ordering::Relaxed);
    }

    /// The longest time between two answers so far.
    pub(crate) fn longest(&self) -> Duration {
        Duration::from_micros(self.longest_us.load(Ordering::Relaxed))
    }

    /// The longest since the last call of this, with the answer that is being
    /// waited for now.
    pub(crate) fn take(&self) -> Duration {
        let waiting = self
            .now_us()
            .saturating_sub(self.last_us.load(Ordering::Relaxed));
        Duration::from_micros(self.window_us.swap(0, Ordering::Relaxed).max(waiting))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_window_forgets_what_was_taken_and_the_whole_does_not() {
        let gap = Gap::new();
        std::thread::sleep(Duration::from_millis(20));
        gap.answered();
        assert!(gap.take() >= Duration::from_millis(20));
        gap.answered();
        assert!(gap.longest() >= Duration::from_millis(20));
        assert!(gap.take() < gap.longest());
    }

    #[test]
    fn an_idle_client_has_not_waited_and_an_unanswered_one_has() {
        let gap = Gap::new();
        std::thread::sleep(Duration::from_millis(20));
        gap.idle();
        gap.answered();
        assert!(gap.longest() < Duration::from_millis(20));
        std::thread::sleep(Duration::from_millis(20));
        assert!(gap.take() >= Duration::from_millis(20));
    }
}
