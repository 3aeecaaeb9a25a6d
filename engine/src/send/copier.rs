//! What copies: the tracker of memory with its page streams, and the trees of
//! files. Everything here blocks somewhere; the copier is its door.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Instant;

use pages::{Claims, LapReport, Process, TrackError, Tracker};
use proto::migration as pb;

use crate::files::{Mapped, TreeSender};
use crate::send_error::SendError;
use crate::streams::PageStreams;

/// The tracker and the streams it writes to; busy on one thread at a time.
#[derive(Debug)]
struct Memory {
    tracker: Tracker,
    streams: PageStreams,
}

/// Copies a container's memory and files, in passes.
#[derive(Debug)]
pub(super) struct Copier {
    memory: Arc<Mutex<Memory>>,
    /// The writable layer, where the container has one, and its volumes.
    files: Arc<Mutex<Vec<TreeSender>>>,
    /// Tells a lap to end early.
    stop: Arc<AtomicBool>,
}

impl Copier {
    /// `tracked`: whether this kernel can track writes.
    pub(super) fn new(tracked: bool, streams: PageStreams, files: Vec<TreeSender>) -> Self {
        let tracker = if tracked {
            Tracker::new()
        } else {
            Tracker::untracked()
        };
        Self {
            memory: Arc::new(Mutex::new(Memory { tracker, streams })),
            files: Arc::new(Mutex::new(files)),
            stop: Arc::default(),
        }
    }

    /// One pass over memory, until the destination has acknowledged it: that is
    /// how fast the link is.
    pub(super) async fn lap(&self, processes: Vec<Process>) -> Result<LapReport, SendError> {
        let stop = Arc::clone(&self.stop);
        let begun = Instant::now();
        let (mut report, sent) = self
            .with_memory(move |memory| {
                let lap = memory.tracker.lap(&processes, &mut memory.streams, &stop);
                Ok((lap.map_err(SendError::Track)?, memory.streams.sent()))
            })
            .await?;
        sent.arrived().await?;
        report.duration = begun.elapsed();
        Ok(report)
    }

    /// Reads what CRIU will want to know of mappings; while the container runs.
    pub(super) async fn prepare_smaps(&self) -> Result<(), SendError> {
        self.with_memory(|memory| {
            memory.tracker.prepare_smaps();
            Ok(())
        })
        .await
    }

    /// What the page engine owns, now that the container stands still.
    pub(super) async fn claim(&self, processes: Vec<Process>) -> Result<Arc<Claims>, SendError> {
        self.with_memory(move |memory| {
            memory
                .tracker
                .claim(&processes)
                .map(Arc::new)
                .map_err(SendError::Track)
        })
        .await
    }

    /// The last pass over memory, in the freeze.
    pub(super) async fn final_lap(&self, claims: Arc<Claims>) -> Result<LapReport, SendError> {
        self.with_memory(move |memory| {
            memory
                .tracker
                .final_lap(&claims, &mut memory.streams)
                .map_err(SendError::Track)
        })
        .await
    }

    /// One pass over the writable layer and the volumes: everything first, then what
    /// changed. Returns their content sent so far, in bytes.
    pub(super) async fn files_pass(
        &self,
        processes: Vec<Process>,
        strict: bool,
    ) -> Result<u64, SendError> {
        let files = Arc::clone(&self.files);
        blocking(move || {
            let mut files = files.lock().map_err(|_| SendError::Worker)?;
            if files.is_empty() {
                return Ok(0);
            }
            let mapped = Mapped::by(&processes);
            for tree in files.iter_mut() {
                tree.suspect(&mapped);
                tree.pass(strict)?;
                tree.flush_later()?;
            }
            Ok(files.iter().map(TreeSender::bytes).sum())
        })
        .await
    }

    /// The account of everything sent, for `Final`.
    pub(super) async fn account(
        &self,
        images: pb::TreeTotal,
        spaces: Vec<pb::Space>,
    ) -> Result<pb::Final, SendError> {
        let streams = self
            .with_memory(|memory| Ok(memory.streams.totals()))
            .await?;
        let mut trees = vec![images];
        let files = self.files.lock().map_err(|_| SendError::Worker)?;
        trees.extend(files.iter().map(TreeSender::total));
        Ok(pb::Final {
            streams,
            spaces,
            trees,
        })
    }

    /// Page content sent so far, in bytes.
    pub(super) async fn sent_bytes(&self) -> Result<u64, SendError> {
        self.with_memory(|memory| Ok(memory.streams.bytes())).await
    }

    /// Ends tracking; waits for a pass that is under way, which ends early.
    pub(super) async fn disarm(self) {
        self.stop.store(true, Ordering::Relaxed);
        let Self { memory, .. } = self;
        let disarmed = blocking(move || {
            // The lock is free once the pass has ended, and nobody takes it again.
            drop(memory.lock());
            if let Some(memory) =
                Arc::into_inner(memory).and_then(|memory| memory.into_inner().ok())
            {
                memory.tracker.disarm();
            }
            Ok(())
        })
        .await;
        if disarmed.is_err() {
            tracing::error!("tracking ended with a panic; its descriptors are closed with it");
        }
    }

    async fn with_memory<T: Send + 'static>(
        &self,
        operation: impl FnOnce(&mut Memory) -> Result<T, SendError> + Send + 'static,
    ) -> Result<T, SendError> {
        let memory = Arc::clone(&self.memory);
        blocking(move || {
            let mut memory = memory.lock().map_err(|_| SendError::Worker)?;
            let result = operation(&mut memory);
            // A broken stream explains a sink that closed.
            let failure = match &result {
                Err(SendError::Track(TrackError::Sink(_))) => memory.streams.why_closed(),
                _ => memory.streams.failure(),
            };
            match failure {
                Some(failure) => Err(failure.into()),
                None => result,
            }
        })
        .await
    }
}

async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> Result<T, SendError> + Send + 'static,
) -> Result<T, SendError> {
    tokio::task::spawn_blocking(work)
        .await
        .unwrap_or(Err(SendError::Worker))
}
