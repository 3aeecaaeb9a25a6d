//! What filling a container's memory came to.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use crate::PAGE_BYTES;

/// The outcome of [`LazyServer::run`](crate::LazyServer::run).
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct FillReport {
    /// Pages placed with content, those of forked children included.
    pub pages_copied: u64,
    /// The same in bytes.
    pub bytes: u64,
    /// Those among `pages_copied` that were placed before the restore had finished.
    pub prefilled_pages: u64,
    /// Staged pages that forked children had already when their turn came.
    pub present_pages: u64,
    /// Staged pages the process gave up before they were placed: unmapped, discarded, or it ended.
    pub dropped_pages: u64,
    /// Page faults served.
    pub faults: u64,
    /// Those among them for which nothing was staged: zero pages.
    pub zero_faults: u64,
    /// Longest time from when we learned of a fault until its page was there.
    pub fault_latency_max: Duration,
    /// Mean of the same.
    pub fault_latency_mean: Duration,
    /// Processes that were forked while their memory was being filled.
    pub forks: u64,
    /// From when the restore finished until all memory was in place.
    pub duration: Duration,
}

/// The counts behind a report, kept by all threads.
#[derive(Debug, Default)]
pub(super) struct Tally {
    pub(super) copied: AtomicU64,
    pub(super) present: AtomicU64,
    pub(super) dropped: AtomicU64,
    pub(super) zero_faults: AtomicU64,
    pub(super) forks: AtomicU64,
    faults: AtomicU64,
    fault_nanos: AtomicU64,
    fault_nanos_max: AtomicU64,
}

impl Tally {
    /// Counts a fault that took `latency`.
    pub(super) fn fault(&self, latency: Duration) {
        let nanos = u64::try_from(latency.as_nanos()).unwrap_or(u64::MAX);
        add(&self.faults, 1);
        add(&self.fault_nanos, nanos);
        self.fault_nanos_max.fetch_max(nanos, Ordering::Relaxed);
    }

    /// The counts as they are now; what needs a clock or a moment is left at zero.
    pub(super) fn report(&self) -> FillReport {
        let get = |count: &AtomicU64| count.load(Ordering::Relaxed);
        let faults = get(&self.faults);
        let mean = get(&self.fault_nanos).checked_div(faults).unwrap_or(0);
        FillReport {
            pages_copied: get(&self.copied),
            bytes: get(&self.copied) * PAGE_BYTES as u64,
            present_pages: get(&self.present),
            dropped_pages: get(&self.dropped),
            faults,
            zero_faults: get(&self.zero_faults),
            fault_latency_max: Duration::from_nanos(get(&self.fault_nanos_max)),
            fault_latency_mean: Duration::from_nanos(mean),
            forks: get(&self.forks),
            ..FillReport::default()
        }
    }
}

/// Adds to a count.
pub(super) fn add(count: &AtomicU64, more: u64) {
    count.fetch_add(more, Ordering::Relaxed);
}
