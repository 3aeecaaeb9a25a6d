//! Waiting for what has to happen, with an end.

use std::time::{Duration, Instant};

/// How long something may take that takes moments: long, because the machine
/// may be slow and this is not about speed.
pub const DEADLINE: Duration = Duration::from_secs(30);

const INTERVAL: Duration = Duration::from_millis(50);

/// Asks until there is an answer.
#[track_caller]
pub fn eventually<T>(what: &str, ask: impl FnMut() -> Option<T>) -> T {
    eventually_within(DEADLINE, what, ask)
}

/// [`eventually`] with a deadline of its own.
#[track_caller]
pub fn eventually_within<T>(deadline: Duration, what: &str, ask: impl FnMut() -> Option<T>) -> T {
    wait_for(deadline, ask).unwrap_or_else(|| panic!("not within {} s: {what}", deadline.as_secs()))
}

/// Asks until there is an answer; none where that does not come in time.
pub(crate) fn wait_for<T>(deadline: Duration, mut ask: impl FnMut() -> Option<T>) -> Option<T> {
    let begun = Instant::now();
    loop {
        if let Some(answer) = ask() {
            return Some(answer);
        }
        if begun.elapsed() >= deadline {
            return None;
        }
        std::thread::sleep(INTERVAL);
    }
}
