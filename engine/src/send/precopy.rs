//! Negotiate, Prepare and PreCopy: everything while the container runs.

use std::fs;
use std::sync::Arc;
use std::time::{Duration, Instant};

use criu::Action;
use migrate::Phase;
use migrate::converge::{Budget, Convergence, Costs, Decision, LapSample};
use migrate::source::Event;
use pages::{LapReport, Tracker};
use proto::engine::Lap;
use proto::engine::progress::Event as News;
use proto::migration as pb;
use proto::migration::destination_message::Message as FromDestination;
use proto::migration::source_message::Message as ToDestination;
use tokio::sync::Mutex;

use super::{PAGE_STREAMS, Sender, limited, make_dir, millis};
use crate::container::Container;
use crate::dump::Dump;
use crate::files::TreeSender;
use crate::link::Dialer;
use crate::send_error::SendError;
use crate::session::Session;
use crate::streams::{PageStreams, SharedStreams};

impl Sender {
    pub(super) async fn negotiate(&mut self) -> Result<Dialer, SendError> {
        let dialer = Dialer::new(
            self.job.peer_address.clone(),
            &self.job.peer_node,
            &self.job.identity_dir,
            &self.job.ticket,
        )?;
        let mut session = limited(Phase::Negotiate, Session::open(&dialer)).await?;
        session
            .say(ToDestination::Hello(pb::Hello {
                protocol_versions: migrate::offer::PROTOCOL_VERSIONS.to_vec(),
                migration_id: self.job.migration_id.clone(),
                ticket_id: self.job.ticket.id.clone(),
                source_node: String::new(),
                page_streams: PAGE_STREAMS,
                precopy: self.figures.tracked,
            }))
            .await?;
        match limited(Phase::Negotiate, session.hear()).await? {
            FromDestination::Welcome(_) => {}
            _ => return Err(SendError::OutOfTurn("something before welcome")),
        }
        self.session = Some(session);
        self.advance(Event::Welcomed)?;
        Ok(dialer)
    }

    /// Lets the destination get ready, opens what the pre-copy needs, and
    /// starts CRIU as far as it goes without touching a task.
    pub(super) async fn prepare(
        &mut self,
        dialer: &Dialer,
        container: &Container,
    ) -> Result<(), SendError> {
        make_dir(&self.work)?;
        let options = container.checkpoint_options(&self.work, self.job.network.is_some());
        let request = container.dump_request(&options)?;
        let descriptors = self.work.join("descriptors.json");
        let descriptors_json = fs::read(&descriptors).map_err(|source| SendError::File {
            action: "read",
            path: descriptors,
            source,
        })?;
        let session = self.session()?;
        session
            .say(ToDestination::PrepareSwitch(pb::PrepareSwitch {
                descriptors_json: descriptors_json.into(),
                restore: Some(pb::RestoreOptions {
                    tcp_established: options.open_tcp,
                    tcp_close: options.tcp_close,
                    file_locks: options.file_locks,
                    ext_unix_sk: options.external_unix_sockets,
                    shell_job: options.terminal,
                }),
            }))
            .await?;
        match limited(Phase::Prepare, session.hear()).await? {
            FromDestination::SwitchReady(_) => {}
            _ => return Err(SendError::OutOfTurn("something before switch-ready")),
        }
        let streams = limited(Phase::Prepare, async {
            Ok(PageStreams::open(dialer, PAGE_STREAMS).await?)
        })
        .await?;
        self.streams = Some(Arc::new(Mutex::new(streams)));
        if let Some(upperdir) = self.job.container.upperdir.clone() {
            let client = dialer.connect().await?;
            let layer = TreeSender::open(client, pb::FileTree::Layer, &upperdir).await?;
            self.layer = Some(layer);
        }
        let dump = self.dump.insert(Dump::spawn(request)?);
        limited(Phase::Prepare, async {
            Ok(dump.until(Action::PreDump).await?)
        })
        .await?;
        self.advance(Event::DestinationReady)?;
        Ok(())
    }

    /// Copies memory and files while the container runs, until a switch-over
    /// fits the budget.
    pub(super) async fn pre_copy(&mut self, container: &Container) -> Result<(), SendError> {
        self.layer_pass(container, false).await?;
        if !self.figures.tracked {
            // The kernel cannot track writes: all memory goes in the freeze.
            return Ok(());
        }
        let budget = Budget {
            max_blackout: Duration::from_millis(self.job.max_blackout_ms),
            deadline: self.job.deadline_ms.map(Duration::from_millis),
        };
        let mut convergence = Convergence::new(budget, Costs::default());
        loop {
            let report = self.lap(container).await?;
            convergence.observe(sample(&report));
            self.log.push(News::Lap(Lap {
                number: report.number,
                pages: report.pages,
                zero_pages: report.zero_pages,
                bytes: report.bytes,
                duration_ms: millis(report.duration),
                expected_blackout_ms: millis(convergence.expected_blackout()),
            }));
            self.advance(Event::LapDone)?;
            match convergence.decide(self.log.elapsed()) {
                Decision::Lap => {}
                Decision::Switch => break,
                Decision::GiveUp(reason) => {
                    return Err(SendError::NoConvergence(reason.to_string()));
                }
            }
        }
        Ok(())
    }

    /// One pass over memory, until the destination has acknowledged it.
    pub(super) async fn lap(&mut self, container: &Container) -> Result<LapReport, SendError> {
        let processes = container.processes()?;
        let stop = Arc::clone(&self.stop_lap);
        let begun = Instant::now();
        let mut report = self
            .with_tracker(move |tracker, streams| {
                tracker
                    .lap(&processes, streams, &stop)
                    .map_err(SendError::Track)
            })
            .await?;
        // Until it has arrived it does not count: this is how fast the link is.
        self.streams()?.lock().await.drain().await?;
        report.duration = begun.elapsed();
        self.figures.laps = report.number;
        if report.number == 1 {
            self.figures.memory_bytes = report.bytes;
        }
        Ok(report)
    }

    /// Runs one blocking operation of the tracker with the page streams.
    pub(super) async fn with_tracker<T: Send + 'static>(
        &mut self,
        operation: impl FnOnce(&mut Tracker, &mut PageStreams) -> Result<T, SendError> + Send + 'static,
    ) -> Result<T, SendError> {
        let tracker = Arc::clone(self.tracker.get_or_insert_with(|| {
            let tracker = if self.figures.tracked {
                Tracker::new()
            } else {
                Tracker::untracked()
            };
            Arc::new(std::sync::Mutex::new(tracker))
        }));
        let mut streams = self.streams()?.lock_owned().await;
        let (streams, result) = tokio::task::spawn_blocking(move || {
            let mut tracker = tracker.lock().map_err(|_| SendError::Worker)?;
            let result = operation(&mut tracker, &mut streams);
            Ok::<_, SendError>((streams, result))
        })
        .await
        .map_err(|_| SendError::Worker)??;
        // A broken stream explains a sink that closed.
        match streams.failure() {
            Some(failure) => Err(failure.into()),
            None => result,
        }
    }

    pub(super) fn streams(&self) -> Result<SharedStreams, SendError> {
        self.streams.clone().ok_or(SendError::Worker)
    }

    /// Copies the writable layer: everything first, then what changed.
    pub(super) async fn layer_pass(
        &mut self,
        container: &Container,
        strict: bool,
    ) -> Result<(), SendError> {
        let Some(mut layer) = self.layer.take() else {
            return Ok(());
        };
        let processes = container.processes()?;
        let (layer, report) = tokio::task::spawn_blocking(move || {
            layer.suspect_mapped_by(&processes);
            let report = layer.pass(strict);
            (layer, report)
        })
        .await
        .map_err(|_| SendError::Worker)?;
        self.figures.layer_bytes = layer.bytes();
        self.layer = Some(layer);
        report?;
        Ok(())
    }

    /// The last steps before the freeze: files, then mappings, then memory, the
    /// fastest-changing last.
    pub(super) async fn catch_up(&mut self, container: &Container) -> Result<(), SendError> {
        self.layer_pass(container, false).await?;
        if let Some(layer) = &mut self.layer {
            layer.flush().await?;
        }
        if self.figures.tracked {
            self.with_tracker(|tracker, _| {
                tracker.prepare_smaps();
                Ok(())
            })
            .await?;
            self.lap(container).await?;
        }
        Ok(())
    }
}

fn sample(report: &LapReport) -> LapSample {
    LapSample {
        written_bytes: report.bytes,
        sent_bytes: report.bytes,
        scanned_bytes: report.scanned_bytes,
        duration: report.duration,
        link_bytes_per_second: None,
    }
}
