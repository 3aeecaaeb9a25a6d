//! One connection that writes, and remembers what was acknowledged.

use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use anyhow::Result;

use crate::client::Link;
use crate::dataset::Dataset;
use crate::gap::Gap;

/// Writes per round trip where there is no limit.
const PIPELINE: usize = 64;
/// Most writes per round trip of a writer that is behind.
const LARGEST_BATCH: u64 = 128;
/// How often a limited writer sends.
const TICK: Duration = Duration::from_millis(2);

/// Which keys a writer touches: its own share, and nobody else's.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Share {
    pub(crate) number: usize,
    pub(crate) of: usize,
}

/// What one writer did.
#[derive(Debug, Default)]
pub(crate) struct Written {
    /// Newest acknowledged version of each key that was written.
    pub(crate) versions: HashMap<usize, u64>,
    /// Keys with writes that were never answered, up to that version: they may
    /// or may not have happened.
    pub(crate) unanswered: HashMap<usize, u64>,
    /// Why the connection ended before its time.
    pub(crate) dropped: Option<String>,
}

impl Written {
    /// The newest version that anybody asked to be written.
    fn newest(&self, index: usize) -> u64 {
        let known = |versions: &HashMap<usize, u64>| versions.get(&index).copied().unwrap_or(0);
        known(&self.versions).max(known(&self.unanswered))
    }
}

#[derive(Debug)]
pub(crate) struct Running {
    thread: JoinHandle<Written>,
    pub(crate) gap: Arc<Gap>,
    /// Writes that the server has answered.
    pub(crate) acknowledged: Arc<AtomicU64>,
}

impl Running {
    pub(crate) fn join(self) -> Written {
        self.thread.join().unwrap_or_else(|_| Written {
            dropped: Some("the writer panicked".into()),
            ..Written::default()
        })
    }
}

/// Writes on a thread of its own until `stop`; no limit where `per_second` is none.
pub(crate) fn start(
    link: Link,
    dataset: &Dataset,
    share: Share,
    per_second: Option<f64>,
    stop: &Arc<AtomicBool>,
) -> Result<Running> {
    let gap = Arc::new(Gap::new());
    let acknowledged = Arc::new(AtomicU64::new(0));
    let writer = Writer {
        link,
        dataset: *dataset,
        share,
        pace: Pace::new(per_second),
        random: share.number as u64 + 1,
        stop: Arc::clone(stop),
        gap: Arc::clone(&gap),
        acknowledged: Arc::clone(&acknowledged),
    };
    let thread = std::thread::Builder::new()
        .name(format!("writer {}", share.number))
        .spawn(move || writer.run())?;
    Ok(Running {
        thread,
        gap,
        acknowledged,
    })
}

/// How many writes are due.
#[derive(Debug)]
struct Pace {
    per_second: Option<f64>,
    begun: Instant,
    issued: u64,
    /// Whether more is due.
    behind: bool,
}

impl Pace {
    fn new(per_second: Option<f64>) -> Self {
        Self {
            per_second,
            begun: Instant::now(),
            issued: 0,
            behind: false,
        }
    }

    /// What could not be written in time is written later, as by clients who still
    /// have it to write; after a long pause, a second's worth of it.
    fn due(&mut self) -> usize {
        let Some(rate) = self.per_second else {
            return PIPELINE;
        };
        let due = (self.begun.elapsed().as_secs_f64() * rate) as u64;
        self.issued = self.issued.max(due.saturating_sub(rate as u64 + 1));
        let batch = (due - self.issued).min(LARGEST_BATCH);
        self.issued += batch;
        self.behind = due > self.issued;
        batch as usize
    }

    fn rest(&self) {
        if self.per_second.is_some() && !self.behind {
            std::thread::sleep(TICK);
        }
    }
}

struct Writer {
    link: Link,
    dataset: Dataset,
    share: Share,
    pace: Pace,
    random: u64,
    stop: Arc<AtomicBool>,
    gap: Arc<Gap>,
    acknowledged: Arc<AtomicU64>,
}

impl Writer {
    fn run(mut self) -> Written {
        let mut written = Written::default();
        self.gap.idle();
        while !self.stop.load(Ordering::Relaxed) {
            let due = self.pace.due();
            if due == 0 {
                self.gap.idle();
                self.pace.rest();
                continue;
            }
            let (pipeline, batch) = self.batch(due, &written);
            match pipeline.query::<()>(self.link.connection()) {
                Ok(()) => {
                    self.gap.answered();
                    self.acknowledged
                        .fetch_add(pipeline.len() as u64, Ordering::Relaxed);
                    written.versions.extend(batch);
                }
                Err(error) => {
                    written.unanswered.extend(batch);
                    if !self.link.recover(&error, &self.stop) {
                        break;
                    }
                }
            }
            self.pace.rest();
        }
        written.dropped = self.link.dropped.take();
        written
    }

    /// Writes of new versions, and the newest version of each key in them.
    fn batch(&mut self, due: usize, written: &Written) -> (redis::Pipeline, HashMap<usize, u64>) {
        let mut pipeline = redis::pipe();
        let mut batch = HashMap::with_capacity(due);
        for _ in 0..due {
            let index = self.pick();
            let newest = batch
                .get(&index)
                .copied()
                .unwrap_or_else(|| written.newest(index));
            batch.insert(index, newest + 1);
            pipeline
                .set(Dataset::key(index), self.dataset.value(index, newest + 1))
                .ignore();
        }
        (pipeline, batch)
    }

    /// A key of this writer's share, by xorshift64.
    fn pick(&mut self) -> usize {
        self.random ^= self.random << 13;
        self.random ^= self.random >> 7;
        self.random ^= self.random << 17;
        let Share { number, of } = self.share;
        let keys = (self.dataset.keys() - number).div_ceil(of);
        (self.random as usize % keys) * of + number
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_missed_in_a_pause_is_written_later_but_a_second_of_it_at_most() {
        let mut pace = Pace::new(Some(1000.0));
        assert_eq!(pace.due(), 0);
        pace.begun -= Duration::from_millis(200);
        assert_eq!(pace.due(), LARGEST_BATCH as usize);
        assert!(pace.behind);
        pace.begun -= Duration::from_secs(10);
        let mut written = 0;
        while {
            written += pace.due();
            pace.behind
        } {}
        assert!((1000..2000).contains(&written), "{written}");
    }
}
