//! The receiver's side of the arrival record: whether the tasks may be let go, and
//! the word for whoever asks when this process is gone.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use migrate::arrival::{ArrivalRecord, ArrivalState};
use migrate::commit::Format;
use nodeapi::{FileError, ReceiveJob, RunDir};

/// Before a fence that could not be written is tried again: the run directory is
/// full, say.
const FENCE_PAUSE: Duration = Duration::from_millis(500);

/// What was decided about the tasks; first come, first served.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Course {
    Open,
    GivenUp,
    Ran,
}

/// One ticket's record, kept by the engine that receives with it. Clones are the
/// same record.
#[derive(Debug, Clone)]
pub(crate) struct Arrival(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    dir: RunDir,
    ticket_id: String,
    course: Mutex<Course>,
}

impl Arrival {
    /// Begins the record: to be called before anybody can come with the ticket.
    pub(crate) fn open(dir: &RunDir, job: &ReceiveJob) -> Result<Self, FileError> {
        let incoming = &job.incoming;
        let record = ArrivalRecord {
            format: Format::CURRENT,
            migration_id: incoming.migration_id.clone(),
            ticket_id: incoming.ticket.id.clone(),
            source_node: incoming.source_node.clone(),
            namespace: job.container.namespace.clone(),
            container_id: job.container.id.clone(),
            state: ArrivalState::Open,
        };
        nodeapi::arrival::open(dir, &record)?;
        Ok(Self(Arc::new(Inner {
            dir: dir.clone(),
            ticket_id: record.ticket_id,
            course: Mutex::new(Course::Open),
        })))
    }

    fn course(&self) -> MutexGuard<'_, Course> {
        self.0.course.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The tasks are about to be let go: writes that down. False: they must not
    /// be, because the restore was given up, here or by the shim.
    pub(crate) fn ran(&self) -> Result<bool, FileError> {
        let mut course = self.course();
        if *course == Course::GivenUp {
            return Ok(false);
        }
        // Unless it is known to be written, it is not so.
        *course = Course::GivenUp;
        let decided = nodeapi::arrival::decide(&self.0.dir, &self.0.ticket_id, ArrivalState::Ran)?;
        let ran = decided == Some(ArrivalState::Ran);
        if ran {
            *course = Course::Ran;
        }
        Ok(ran)
    }

    /// Decides that the tasks will not be let go. False: they were.
    pub(crate) fn give_up(&self) -> bool {
        let mut course = self.course();
        if *course == Course::Open {
            *course = Course::GivenUp;
        }
        *course == Course::GivenUp
    }

    /// Writes the fence, for which nothing of the container may be left here.
    /// Returns when it is on disk: whoever is told before could be told otherwise
    /// by the next to answer.
    pub(crate) async fn fence(&self) {
        let mut warned = false;
        loop {
            let state = ArrivalState::Fenced;
            match nodeapi::arrival::decide(&self.0.dir, &self.0.ticket_id, state) {
                Ok(_) => return,
                Err(error) if warned => tracing::debug!(%error, "no fence yet"),
                Err(error) => {
                    warned = true;
                    tracing::error!(error = crate::error_chain(&error), "cannot write the fence");
                }
            }
            tokio::time::sleep(FENCE_PAUSE).await;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn arrival() -> (tempfile::TempDir, Arrival) {
        let temp = tempfile::tempdir().unwrap();
        let dir = RunDir::at(temp.path());
        let job = ReceiveJob {
            hostname: None,
            incoming: nodeapi::Incoming {
                migration_id: "m".into(),
                ticket: nodeapi::Ticket {
                    id: "t".into(),
                    secret: "s".into(),
                },
                source_node: "a".into(),
                identity_dir: "/pki".into(),
                network: None,
                memory_limit_bytes: 1,
                upperdir: None,
            },
            container: nodeapi::ContainerFacts {
                namespace: "default".into(),
                id: "web".into(),
                bundle: "/b".into(),
                rootfs: "/b/rootfs".into(),
                runc_root: "/run/runc".into(),
                runc: "runc".into(),
                upperdir: None,
                volumes: Vec::new(),
            },
        };
        let arrival = Arrival::open(&dir, &job).unwrap();
        (temp, arrival)
    }

    fn state(arrival: &Arrival) -> ArrivalState {
        nodeapi::arrival::read(&arrival.0.dir, "t")
            .unwrap()
            .unwrap()
            .state
    }

    #[test]
    fn what_was_given_up_is_not_let_go_any_more() {
        let (_temp, arrival) = arrival();
        assert!(arrival.give_up());
        assert!(!arrival.ran().unwrap());
        assert_eq!(state(&arrival), ArrivalState::Open);
    }

    #[test]
    fn what_was_let_go_is_not_given_up_any_more() {
        let (_temp, arrival) = arrival();
        assert!(arrival.ran().unwrap());
        assert!(!arrival.give_up());
        assert_eq!(state(&arrival), ArrivalState::Ran);
    }

    #[test]
    fn what_the_shim_has_fenced_is_not_let_go() {
        let (_temp, arrival) = arrival();
        nodeapi::arrival::decide(&arrival.0.dir, "t", ArrivalState::Fenced).unwrap();
        assert!(!arrival.ran().unwrap());
        assert!(arrival.give_up());
    }

    #[test]
    fn what_could_not_be_written_did_not_run() {
        let (temp, arrival) = arrival();
        let record = arrival.0.dir.arrival_record("t");
        std::fs::write(&record, "{").unwrap();
        assert!(arrival.ran().is_err());
        assert!(arrival.give_up());
        drop(temp);
    }
}
