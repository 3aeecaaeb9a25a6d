//! A reader that asks every millisecond and notes how long it waited.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use anyhow::Result;

use crate::client::Link;
use crate::gap::Gap;

const INTERVAL: Duration = Duration::from_millis(1);

/// What the probe saw.
#[derive(Debug, Default)]
pub(crate) struct Probed {
    pub(crate) answers: u64,
    /// Why the connection ended before its time.
    pub(crate) dropped: Option<String>,
    latencies_us: Vec<u32>,
}

impl Probed {
    /// A percentile of the time to answer, in microseconds.
    pub(crate) fn percentile(&self, percent: usize) -> u64 {
        let mut sorted = self.latencies_us.clone();
        sorted.sort_unstable();
        let index = sorted.len() * percent / 100;
        sorted.get(index).copied().unwrap_or_default().into()
    }
}

#[derive(Debug)]
pub(crate) struct Running {
    thread: JoinHandle<Probed>,
    pub(crate) gap: Arc<Gap>,
}

impl Running {
    pub(crate) fn join(self) -> Probed {
        self.thread.join().unwrap_or_else(|_| Probed {
            dropped: Some("the probe panicked".into()),
            ..Probed::default()
        })
    }
}

/// Probes on a thread of its own until `stop`.
pub(crate) fn start(mut link: Link, stop: &Arc<AtomicBool>) -> Result<Running> {
    let gap = Arc::new(Gap::new());
    let (stop, seen) = (Arc::clone(stop), Arc::clone(&gap));
    let thread = std::thread::Builder::new()
        .name("probe".into())
        .spawn(move || {
            let mut probed = Probed::default();
            seen.idle();
            while !stop.load(Ordering::Relaxed) {
                let asked = Instant::now();
                match redis::cmd("GET")
                    .arg("probe")
                    .query::<String>(link.connection())
                {
                    Ok(_) => {
                        seen.answered();
                        probed.answers += 1;
                        let latency =
                            u32::try_from(asked.elapsed().as_micros()).unwrap_or(u32::MAX);
                        probed.latencies_us.push(latency);
                    }
                    Err(error) => {
                        if !link.recover(&error, &stop) {
                            break;
                        }
                    }
                }
                std::thread::sleep(INTERVAL.saturating_sub(asked.elapsed()));
            }
            probed.dropped = link.dropped.take();
            probed
        })?;
    Ok(Running { thread, gap })
}
