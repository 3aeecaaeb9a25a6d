//! Negotiate, Prepare and PreCopy: everything while the container runs.

use std::fs;
use std::time::Duration;

use criu::Action;
use migrate::Phase;
use migrate::converge::{Budget, Convergence, Costs, Decision, LapSample};
use migrate::source::Event;
use pages::LapReport;
use proto::engine::Lap;
use proto::engine::progress::Event as News;
use proto::migration as pb;
use proto::migration::destination_message::Message as FromDestination;
use proto::migration::source_message::Message as ToDestination;

use super::copier::Copier;
use super::{PAGE_STREAMS, Sender, limited, make_dir, millis};
use crate::container::Container;
use crate::dump::Dump;
use crate::files::{Tree, TreeSender};
use crate::link::Dialer;
use crate::send_error::SendError;
use crate::session::Session;
use crate::streams::PageStreams;
use crate::tmpfs::Programs;

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
        // Where they do not allow a dump, nothing is to be begun.
        self.read_filters().await?;
        make_dir(&self.work)?;
        let options = container.checkpoint_options(&self.work, self.job.network.is_some());
        let request = container.dump_request(&options)?;
        let descriptors = self.work.join("descriptors.json");
        let descriptors_json = fs::read(&descriptors).map_err(|source| SendError::File {
            action: "read",
            path: descriptors,
            source,
        })?;
        let volumes = self.job.container.volumes.clone().into_iter();
        let volumes = volumes.map(|volume| volume.name);
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
                volumes: volumes.collect(),
            }))
            .await?;
        match limited(Phase::Prepare, session.hear()).await? {
            FromDestination::SwitchReady(ready) if ready.reads_trees => {
                let directory = self.programs_directory();
                let made = Programs::make(directory.clone());
                self.programs = made.map_err(|source| SendError::File {
                    action: "make",
                    path: directory,
                    source,
                })?;
            }
            FromDestination::SwitchReady(_) => {}
            _ => return Err(SendError::OutOfTurn("something before switch-ready")),
        }
        let streams = limited(Phase::Prepare, async {
            Ok(PageStreams::open(dialer, PAGE_STREAMS).await?)
        })
        .await?;
        let files = self.open_files(dialer).await?;
        self.copier = Some(Copier::new(self.figures.tracked, streams, files));
        let dump = self
            .dump
            .insert(Dump::spawn(request, self.programs.as_ref())?);
        limited(Phase::Prepare, async {
            Ok(dump.until(Action::PreDump).await?)
        })
        .await?;
        self.advance(Event::DestinationReady)?;
        Ok(())
    }

    /// A stream for each tree of files, all on one connection.
    async fn open_files(&self, dialer: &Dialer) -> Result<Vec<TreeSender>, SendError> {
        let container = &self.job.container;
        let layer = container.upperdir.iter().map(|root| (Tree::Layer, root));
        let volumes = (0..).zip(&container.volumes);
        let volumes = volumes.map(|(number, volume)| (Tree::Volume(number), &volume.path));
        let mut files = Vec::new();
        let mut client = None;
        for (tree, root) in layer.chain(volumes) {
            let client = match &client {
                Some(client) => client,
                None => client.insert(dialer.connect().await?),
            };
            files.push(TreeSender::open(client.clone(), tree, root).await?);
        }
        Ok(files)
    }

    /// Copies memory and files while the container runs, until a switch-over
    /// fits the budget.
    pub(super) async fn pre_copy(&mut self, container: &Container) -> Result<(), SendError> {
        self.files_pass(container).await?;
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

    async fn lap(&mut self, container: &Container) -> Result<LapReport, SendError> {
        let report = self.copier()?.lap(container.processes()?).await?;
        self.figures.laps = report.number;
        if report.number == 1 {
            self.figures.memory_bytes = report.bytes;
        }
        Ok(report)
    }

    async fn files_pass(&mut self, container: &Container) -> Result<(), SendError> {
        let bytes = self
            .copier()?
            .files_pass(container.processes()?, false)
            .await?;
        self.figures.layer_bytes = bytes;
        Ok(())
    }

    /// The last steps before the freeze: files, then mappings, then memory, the
    /// fastest-changing last.
    pub(super) async fn catch_up(&mut self, container: &Container) -> Result<(), SendError> {
        self.files_pass(container).await?;
        if self.figures.tracked {
            self.copier()?.prepare_smaps().await?;
            self.lap(container).await?;
        }
        self.read_filters().await
    }

    /// Reads the seccomp filters of tasks that have come since the last time, for
    /// CRIU, which may not. In the freeze that is none, as a rule.
    pub(super) async fn read_filters(&mut self) -> Result<(), SendError> {
        let mut filters = std::mem::take(&mut self.seccomp);
        let root = i32::try_from(self.job.init_pid).map_err(|_| SendError::Worker)?;
        let read = move || filters.update(root).map(|()| filters);
        self.seccomp = tokio::task::spawn_blocking(read)
            .await
            .map_err(|_| SendError::Worker)??;
        Ok(())
    }
}

/// What a lap has to send to tell how fast the link is.
const BULK_BYTES: u64 = 4 << 20;
/// Where it sent less: 1 Gbit/s, in bytes per second.
const ASSUMED_LINK: u64 = 110_000_000;

fn sample(report: &LapReport) -> LapSample {
    LapSample {
        written_bytes: report.bytes,
        sent_bytes: report.bytes,
        scanned_bytes: report.scanned_bytes,
        duration: report.duration,
        // A short lap is all latency and says nothing of the link.
        link_bytes_per_second: (report.bytes < BULK_BYTES).then_some(ASSUMED_LINK),
    }
}
