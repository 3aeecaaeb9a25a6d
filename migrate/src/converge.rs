//! Another lap, switch over, or give up.
//!
//! After each lap the blackout of a switch-over *now* is expected to be
//!
//! ```text
//! freeze + scan(memory) + written / link + dump + prepare + restore
//! ```
//!
//! The first and the last terms are measured ones ([`Costs`]); `written`
//! is what matters. It is bounded from above: in a time no longer than that in
//! which a lap's pages were written, a program that keeps its ways writes no more
//! distinct pages than that lap found; in a longer one, at most in proportion,
//! because it meets pages again. An upper bound costs at most one more lap, which
//! is short by then. A rate in pages per second would be wrong by orders of
//! magnitude right after the long first lap, where a hot set looks like a slow one.
//!
//! The decision:
//!
//! 1. If it fits the budget, make laps as long as each improves the expectation by
//!    a tenth, then switch. The fixed terms end that soon.
//! 2. If it does not fit, go on: programs have quieter seconds. Until the deadline
//!    where there is one, else for [`MAX_LAPS`] laps, and longer only while that helps.
//! 3. Then give up, with figures, and leave the source alone. A switch-over that
//!    costs more than was allowed is never made.

use std::time::Duration;

use serde::{Deserialize, Serialize};

/// Laps before a switch-over: what the first one left behind is known only after
/// the second.
pub const MIN_LAPS: u32 = 2;
/// Laps without a deadline, if they do not help any more. At 10 Gbit/s and 1 GiB
/// that is half a minute.
pub const MAX_LAPS: u32 = 30;
/// Laps in a row without improvement that count as "does not help any more".
pub const STALLED_LAPS: u32 = 3;
/// What an improvement is: the new expectation is below this part of the best one.
const IMPROVED: f64 = 0.9;
/// Part of the link that the final pages are expected to get.
const LINK_SHARE: f64 = 0.9;
/// A lap that sends less says nothing about the link: latency dominates it.
const BULK_BYTES: u64 = 4 << 20;
/// Bulk laps whose best rate is taken. The best, not the mean: laps are slowed by
/// scanning and by the program, the final one is not.
const RATES: usize = 4;

/// What the caller allows.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Budget {
    /// Switch over only if the blackout is expected to be at most this.
    pub max_blackout: Duration,
    /// The container must be away, or left alone, after this long.
    pub deadline: Option<Duration>,
}

/// What a switch-over costs on this pair of nodes besides moving pages.
///
/// The defaults are measurements on two cores with CRIU 4.2.1 and a Valkey
/// container, rounded up.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Costs {
    /// From asking the freezer until all tasks stand still.
    pub freeze: Duration,
    /// The last look for written pages, per GiB of memory looked at.
    pub scan_per_gib: Duration,
    /// CRIU's images of everything but memory.
    pub dump: Duration,
    /// From the last byte sent until `Prepared` is back.
    pub prepare: Duration,
    /// From `Commit` until the tasks run.
    pub restore: Duration,
}

impl Default for Costs {
    fn default() -> Self {
        Self {
            freeze: Duration::from_millis(5),
            scan_per_gib: Duration::from_micros(400),
            dump: Duration::from_millis(40),
            prepare: Duration::from_millis(10),
            restore: Duration::from_millis(80),
        }
    }
}

impl Costs {
    fn fixed(&self) -> Duration {
        self.freeze + self.dump + self.prepare + self.restore
    }
}

/// One lap, after everything it sent was acknowledged.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct LapSample {
    /// Content of the pages that had been written since the lap before and are not
    /// zero, in bytes before compression.
    pub written_bytes: u64,
    /// What went over the link for them.
    pub sent_bytes: u64,
    /// Memory that was looked at.
    pub scanned_bytes: u64,
    /// From the first look to the last acknowledgement.
    pub duration: Duration,
    /// What the link can carry, in bytes per second, where that is known better
    /// than by what this lap sent.
    pub link_bytes_per_second: Option<u64>,
}

/// What to do after a lap.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Decision {
    /// Make another lap.
    Lap,
    /// Freeze now.
    Switch,
    /// End the migration; the source goes on.
    GiveUp(Reason),
}

/// Why it does not come to a switch-over; the text is for people.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum Reason {
    /// Not even a container that writes nothing would fit the budget.
    #[error(
        "a switch-over takes about {} ms here even if nothing is written, \
         {max_blackout:?} are allowed; allow more",
        floor.as_millis()
    )]
    OutOfReach {
        /// The fixed terms of the expectation.
        floor: Duration,
        /// The budget.
        max_blackout: Duration,
    },
    /// The memory is written faster than it is sent.
    #[error(
        "the blackout would be about {} ms after {laps} laps and does not get shorter, \
         {max_blackout:?} are allowed: the container writes too much for a link of \
         {link_mb_per_second} MB/s; allow more, or give a deadline to wait for a quieter moment",
        expected.as_millis()
    )]
    NotConverging {
        /// Laps made.
        laps: u32,
        /// The blackout of a switch-over now.
        expected: Duration,
        /// The budget.
        max_blackout: Duration,
        /// The link as measured.
        link_mb_per_second: u64,
    },
    /// The time was up before all memory had been sent once.
    #[error(
        "the deadline of {deadline:?} was over before all memory had been sent once; \
         give it more time"
    )]
    FirstLap {
        /// The deadline.
        deadline: Duration,
    },
    /// The time is up, or would be before another lap has ended.
    #[error(
        "the deadline of {deadline:?} leaves no time for another lap after {laps}: \
         the blackout would be about {} ms, {max_blackout:?} are allowed",
        expected.as_millis()
    )]
    Deadline {
        /// Laps made.
        laps: u32,
        /// The blackout of a switch-over now.
        expected: Duration,
        /// The budget.
        max_blackout: Duration,
        /// The deadline.
        deadline: Duration,
    },
}

/// The laps of one migration, and what they lead to.
#[derive(Debug, Clone)]
pub struct Convergence {
    budget: Budget,
    costs: Costs,
    laps: u32,
    last: Option<LapSample>,
    /// What is expected to be written at a switch-over now.
    pending_bytes: f64,
    /// Bytes per second of the latest bulk laps.
    rates: Vec<f64>,
    /// The best expectation so far.
    best: Option<Duration>,
    /// Laps since `best` was reached.
    stalled: u32,
}

impl Convergence {
    /// Before the first lap.
    pub fn new(budget: Budget, costs: Costs) -> Self {
        Self {
            budget,
            costs,
            laps: 0,
            last: None,
            pending_bytes: 0.0,
            rates: Vec::new(),
            best: None,
            stalled: 0,
        }
    }

    /// Laps observed.
    pub fn laps(&self) -> u32 {
        self.laps
    }

    /// Takes note of a lap.
    pub fn observe(&mut self, lap: LapSample) {
        self.observe_rate(&lap);
        // The freeze itself gives the program a little more time to write.
        let exposed = lap.duration + self.costs.freeze;
        self.pending_bytes = match self.last {
            // Anything may have been written since.
            None => lap.written_bytes as f64,
            Some(before) => {
                let gathered = before.duration.max(Duration::from_millis(1));
                let longer = exposed.as_secs_f64() / gathered.as_secs_f64();
                lap.written_bytes as f64 * longer.max(1.0)
            }
        };
        // No program has written more than there is.
        self.pending_bytes = self
            .pending_bytes
            .min(lap.scanned_bytes.max(lap.written_bytes) as f64);
        self.laps += 1;
        self.last = Some(lap);

        let expected = self.expected_blackout();
        match self.best {
            Some(best) if expected >= best.mul_f64(IMPROVED) => self.stalled += 1,
            _ => {
                self.best = Some(expected);
                self.stalled = 0;
            }
        }
    }

    /// The blackout of a switch-over now; before the first lap, that of a container
    /// that writes nothing.
    pub fn expected_blackout(&self) -> Duration {
        self.floor() + self.transfer()
    }

    /// What to do `elapsed` after the start of the migration.
    ///
    /// To be asked after each lap, and at the deadline while a lap runs: `Lap` then
    /// means to let it go on.
    pub fn decide(&self, elapsed: Duration) -> Decision {
        let max_blackout = self.budget.max_blackout;
        if self.laps == 0 {
            return match self.budget.deadline {
                Some(deadline) if elapsed >= deadline => {
                    Decision::GiveUp(Reason::FirstLap { deadline })
                }
                _ => Decision::Lap,
            };
        }
        let expected = self.expected_blackout();
        let floor = self.floor();
        if floor > max_blackout {
            return Decision::GiveUp(Reason::OutOfReach {
                floor,
                max_blackout,
            });
        }
        // No lap is begun that would end after the deadline, as far as one can tell;
        // how long the second one takes, one cannot.
        let next = match self.laps < MIN_LAPS {
            true => Duration::ZERO,
            false => self.transfer(),
        };
        let due = self
            .budget
            .deadline
            .filter(|deadline| elapsed + next >= *deadline);
        let improving = self.stalled == 0 || self.laps < MIN_LAPS;
        if expected <= max_blackout && (!improving || due.is_some()) {
            return Decision::Switch;
        }
        if let Some(deadline) = due {
            return Decision::GiveUp(Reason::Deadline {
                laps: self.laps,
                expected,
                max_blackout,
                deadline,
            });
        }
        let helps = self.stalled < STALLED_LAPS;
        if self.budget.deadline.is_none() && self.laps >= MAX_LAPS && !helps {
            return Decision::GiveUp(Reason::NotConverging {
                laps: self.laps,
                expected,
                max_blackout,
                link_mb_per_second: (self.link() / 1e6) as u64,
            });
        }
        Decision::Lap
    }

    /// The expectation for a container that writes nothing.
    fn floor(&self) -> Duration {
        let scanned = self.last.map_or(0, |lap| lap.scanned_bytes);
        let gib = scanned as f64 / f64::from(1 << 30);
        self.costs.fixed() + self.costs.scan_per_gib.mul_f64(gib)
    }

    /// How long the pending pages take over the link.
    fn transfer(&self) -> Duration {
        let link = self.link();
        if link <= 0.0 {
            return Duration::ZERO;
        }
        // A day stands for "never": Duration cannot hold what a link of no speed takes.
        let seconds = (self.pending_bytes / (link * LINK_SHARE)).min(86_400.0);
        Duration::from_secs_f64(seconds)
    }

    /// Bytes per second; 0 before anything is known.
    fn link(&self) -> f64 {
        self.rates.iter().copied().fold(0.0, f64::max)
    }

    fn observe_rate(&mut self, lap: &LapSample) {
        if let Some(known) = lap.link_bytes_per_second {
            self.rates = vec![known.max(1) as f64];
        } else if lap.sent_bytes >= BULK_BYTES || self.rates.is_empty() {
            let seconds = lap.duration.as_secs_f64().max(1e-6);
            // A byte per second, so that a container without memory has a link, too.
            self.rates.push((lap.sent_bytes as f64 / seconds).max(1.0));
            if self.rates.len() > RATES {
                self.rates.remove(0);
            }
        }
    }
}

#[cfg(test)]
#[path = "converge_tests.rs"]
mod tests;
