//! The page server of a restore, on a thread of its own.

use std::io;
use std::os::fd::AsFd;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use pages::{FillOptions, FillReport, LazyError, LazyEvent, LazyServer, Staging, Starter};
use tokio::sync::mpsc;

use crate::arrival::Arrival;
use crate::ipc::ToShim;

/// How long CRIU and runc have the processors to themselves once the tasks are let
/// go. Both are through after 10 to 20 ms.
const PATIENCE: Duration = Duration::from_millis(300);

/// Why memory is not in place.
#[derive(Debug, thiserror::Error)]
pub(crate) enum MemoryError {
    #[error("cannot listen in {path}")]
    Listen {
        path: PathBuf,
        #[source]
        source: io::Error,
    },
    #[error("cannot start a thread")]
    Thread(#[source] io::Error),
    #[error("the page server failed")]
    Server(#[from] LazyError),
    #[error("the page server's thread panicked")]
    Panicked,
}

/// What the loop of the receiver has to know.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum MemoryNews {
    /// CRIU has restored everything and lets the tasks go.
    LetGo,
    /// All memory is in place.
    Filled,
    /// The page server ended without that; [`Memory::filled`] says why.
    Failed,
}

#[derive(Debug)]
enum Report {
    LetGo,
    Ended(Result<FillReport, LazyError>),
}

/// A page server at work.
#[derive(Debug)]
pub(crate) struct Memory {
    reports: mpsc::UnboundedReceiver<Report>,
    starter: Starter,
    outcome: Option<Result<FillReport, MemoryError>>,
}

impl Memory {
    /// Listens in CRIU's work directory and serves from `staging`. Every
    /// userfaultfd is passed on to the shim before it is used, and that the tasks
    /// are let go is written to `arrival` as soon as CRIU says that it is about to:
    /// it does not wait for an answer.
    pub(crate) fn serve(
        work_dir: &Path,
        staging: &Arc<Staging>,
        shim: &ToShim,
        arrival: &Arrival,
    ) -> Result<Self, MemoryError> {
        let server = LazyServer::bind(work_dir).map_err(|source| MemoryError::Listen {
            path: work_dir.to_owned(),
            source,
        })?;
        let (report, reports) = mpsc::unbounded_channel();
        let (staging, shim, arrival) = (Arc::clone(staging), shim.clone(), arrival.clone());
        let (canceller, starter) = (server.canceller(), server.starter());
        let options = FillOptions {
            patience: PATIENCE,
            ..FillOptions::default()
        };
        let serve = move || {
            let outcome = server.run(&staging, options, &mut |event| match event {
                LazyEvent::Handed { guard, .. } => {
                    // Without a shim this process is about to end, and the
                    // container with it.
                    if let Err(error) = shim.send_guard(guard.as_fd()) {
                        tracing::error!(%error, "the shim did not take a guard");
                    }
                }
                LazyEvent::RestoreFinished => match arrival.ran() {
                    // A receiver that is gone ended the process.
                    Ok(true) => drop(report.send(Report::LetGo)),
                    // Whoever gave the restore up kills the tasks. Unserved they
                    // wait for that.
                    Ok(false) => canceller.cancel(),
                    Err(error) => {
                        let error = crate::error_chain(&error);
                        tracing::error!(error, "the tasks are not let go unrecorded");
                        canceller.cancel();
                    }
                },
                LazyEvent::Filled => {}
            });
            drop(report.send(Report::Ended(outcome)));
        };
        std::thread::Builder::new()
            .name("page-server".into())
            .spawn(serve)
            .map_err(MemoryError::Thread)?;
        Ok(Self {
            reports,
            starter,
            outcome: None,
        })
    }

    /// The tasks run and runc is through: all memory is filled in from now on.
    pub(crate) fn tasks_run(&self) {
        self.starter.start();
    }

    /// What happens next; pending for ever once the server has ended.
    pub(crate) async fn next(&mut self) -> MemoryNews {
        if self.outcome.is_some() {
            return std::future::pending().await;
        }
        let outcome = match self.reports.recv().await {
            Some(Report::LetGo) => return MemoryNews::LetGo,
            Some(Report::Ended(outcome)) => outcome.map_err(MemoryError::from),
            None => Err(MemoryError::Panicked),
        };
        let news = match &outcome {
            Ok(_) => MemoryNews::Filled,
            Err(error) => {
                let error = crate::error_chain(error);
                tracing::error!(error, "the page server ended");
                MemoryNews::Failed
            }
        };
        self.outcome = Some(outcome);
        news
    }

    /// Waits for the end of the server; to be called once.
    pub(crate) async fn filled(&mut self) -> Result<FillReport, MemoryError> {
        while self.outcome.is_none() {
            self.next().await;
        }
        self.outcome.take().unwrap_or(Err(MemoryError::Panicked))
    }
}
