//! States that wait on this node's disk for a pod to take them.
//!
//! ```text
//!  a pod's container ──engine──> recorder ──> PARKED/UID/CONTAINER/   (departures)
//!                                             └──> deliver ──> the node of the pod that takes it
//! ```
//!
//! For the source's engine this node is a destination like any other; for the node of
//! the pod that takes the state it is a source like any other: both speak the
//! migration protocol. What may happen to a state is [`migrate::parked`]; that its
//! container has ended is decided by the record's `Parked`, and nowhere else.

pub(crate) mod deliver;
mod record;

use std::collections::HashMap;
use std::fs::{self, DirBuilder};
use std::io;
use std::os::unix::fs::DirBuilderExt as _;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use anyhow::Context as _;
use engine::park::{Committed, Files, Recorder, Word};
use jiff::Timestamp;
use migrate::arrival::{ArrivalRecord, ArrivalState};
use migrate::commit::Format;
use migrate::parked::{Event, State, Taker};
use nodeapi::{PodContainer, RunDir, Ticket};

pub(crate) use self::record::Record;

/// A state that is about to come.
#[derive(Debug)]
pub(crate) struct Expected<'a> {
    pub(crate) pod: &'a PodContainer,
    /// containerd's namespace and id of its container.
    pub(crate) namespace: &'a str,
    pub(crate) id: &'a str,
    pub(crate) migration_id: &'a str,
    /// This node, by its certificate.
    pub(crate) node: &'a str,
    pub(crate) facts: serde_json::Value,
    pub(crate) needs: serde_json::Value,
}

/// All states that wait here, and those that are coming.
#[derive(Debug)]
pub(crate) struct Parked {
    root: PathBuf,
    run_dir: RunDir,
    /// Most that one state may be, in bytes.
    limit: u64,
    /// By ticket; held also by whoever changes a record.
    coming: Mutex<HashMap<String, Coming>>,
}

/// One that is coming.
#[derive(Debug)]
struct Coming {
    recorder: Recorder,
    migration_id: String,
    pod: record::PodName,
}

impl Parked {
    pub(crate) fn new(root: &Path, run_dir: &RunDir, limit: u64) -> Arc<Self> {
        Arc::new(Self {
            root: root.to_owned(),
            run_dir: run_dir.clone(),
            limit,
            coming: Mutex::default(),
        })
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<String, Coming>> {
        // What is on disk is whole at any time.
        self.coming.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn directory(&self, pod: &record::PodName) -> anyhow::Result<PathBuf> {
        record::directory(&self.root, &pod.uid, &pod.container)
    }

    /// What an earlier sternad left: a state that was coming will not come any more.
    ///
    /// To be called before anybody is served.
    pub(crate) fn clean(&self) {
        for record in self.all() {
            let cleaned = match &record.state {
                State::Coming { .. } => {
                    let (uid, container) = (&record.pod.uid, &record.pod.container);
                    self.abandon(uid, container).map(drop)
                }
                State::Gone => self
                    .directory(&record.pod)
                    .and_then(|directory| remove(&directory)),
                State::Parked | State::Taken(_) | State::Restored { .. } => Ok(()),
            };
            if let Err(error) = cleaned {
                tracing::warn!("cannot clean up after a state: {error:#}");
            }
        }
    }

    /// Who records what comes with a ticket.
    pub(crate) fn recorder(&self, ticket_id: &str) -> Option<Recorder> {
        let coming = self.lock();
        coming.get(ticket_id).map(|coming| coming.recorder.clone())
    }

    /// A migration that was to bring a state here is over: it is here, or given up.
    pub(crate) fn end(&self, migration_id: &str) -> anyhow::Result<()> {
        let ended = {
            let mut coming = self.lock();
            let ticket = coming
                .iter()
                .find(|(_, coming)| coming.migration_id == migration_id)
                .map(|(ticket, _)| ticket.clone());
            ticket.and_then(|ticket| coming.remove(&ticket))
        };
        match ended {
            Some(ended) => self.abandon(&ended.pod.uid, &ended.pod.container).map(drop),
            None => Ok(()),
        }
    }

    /// Gets ready for a state, which comes with this ticket.
    pub(crate) fn expect(
        self: &Arc<Self>,
        expected: Expected<'_>,
        ticket: &Ticket,
    ) -> anyhow::Result<()> {
        let pod = record::PodName::from(expected.pod);
        let directory = self.directory(&pod)?;
        let mut coming = self.lock();
        let earlier = Record::read(&directory)?;
        anyhow::ensure!(
            earlier.is_none_or(|earlier| earlier.state == State::Gone),
            "the state of {} is here already",
            expected.pod
        );
        remove(&directory)?;
        if let Some(parent) = directory.parent() {
            DirBuilder::new()
                .recursive(true)
                .mode(0o700)
                .create(parent)
                .with_context(|| format!("cannot make {}", parent.display()))?;
        }
        let commit = {
            let (this, pod, ticket_id) = (Arc::clone(self), pod.clone(), ticket.id.clone());
            move || this.commit(&pod, &ticket_id)
        };
        let recorder = Recorder::begin(
            Files::at(&directory),
            ticket.clone(),
            expected.migration_id.to_owned(),
            self.limit,
            commit,
        )?;
        let record = Record {
            format: Format::CURRENT,
            pod: pod.clone(),
            namespace: expected.namespace.to_owned(),
            facts: expected.facts,
            needs: expected.needs,
            since: Timestamp::now(),
            state: State::Coming {
                ticket_id: ticket.id.clone(),
            },
        };
        record.write(&directory)?;
        nodeapi::arrival::open(
            &self.run_dir,
            &ArrivalRecord {
                format: Format::CURRENT,
                migration_id: expected.migration_id.to_owned(),
                ticket_id: ticket.id.clone(),
                source_node: expected.node.to_owned(),
                namespace: expected.namespace.to_owned(),
                container_id: expected.id.to_owned(),
                state: ArrivalState::Open,
            },
        )?;
        coming.insert(
            ticket.id.clone(),
            Coming {
                recorder,
                migration_id: expected.migration_id.to_owned(),
                pod,
            },
        );
        Ok(())
    }

    /// THE COMMIT POINT of a container's end: with the record's `Parked` the state is
    /// here, and the container is ended. Blocks.
    fn commit(&self, pod: &record::PodName, ticket_id: &str) -> Committed {
        let one_at_a_time = self.lock();
        let committed = self.try_commit(pod, ticket_id);
        drop(one_at_a_time);
        let Err(error) = committed else {
            return Committed::Yes;
        };
        tracing::error!("a state cannot be kept: {error:#}");
        match self.abandon(&pod.uid, &pod.container) {
            Ok(true) => Committed::No(format!("{error:#}")),
            Ok(false) => Committed::Undecided,
            Err(error) => {
                tracing::error!("nor given up: {error:#}");
                Committed::Undecided
            }
        }
    }

    fn try_commit(&self, pod: &record::PodName, ticket_id: &str) -> anyhow::Result<()> {
        let directory = self.directory(pod)?;
        let mut record = Record::read(&directory)?.context("it was given up")?;
        match &record.state {
            State::Coming { ticket_id: own } if own == ticket_id => {
                record.since = Timestamp::now();
                record.advance(&directory, Event::Recorded)?;
            }
            State::Parked => {}
            other => anyhow::bail!("it is {other:?}"),
        }
        // For whoever asks when this process is gone.
        let decided = nodeapi::arrival::decide(&self.run_dir, ticket_id, ArrivalState::Ran)?;
        anyhow::ensure!(
            decided == Some(ArrivalState::Ran),
            "it was given up before ({decided:?})"
        );
        Ok(())
    }

    /// Gives up a state that was coming. False: it is here by now.
    pub(crate) fn abandon(&self, uid: &str, container: &str) -> anyhow::Result<bool> {
        let directory = record::directory(&self.root, uid, container)?;
        let mut coming = self.lock();
        let Some(mut record) = Record::read(&directory)? else {
            remove(&directory)?;
            return Ok(true);
        };
        let State::Coming { ticket_id } = record.state.clone() else {
            return Ok(record.state == State::Gone);
        };
        // First the word that it is not here, for a source that may have committed.
        let fenced = nodeapi::arrival::decide(&self.run_dir, &ticket_id, ArrivalState::Fenced)?;
        anyhow::ensure!(
            fenced != Some(ArrivalState::Ran),
            "it was said to be here, and its record says otherwise"
        );
        coming.remove(&ticket_id);
        record.advance(&directory, Event::Abandoned)?;
        remove(&directory)?;
        Ok(true)
    }

    /// The state of a pod's container.
    pub(crate) fn find(&self, uid: &str, container: &str) -> Option<Record> {
        let directory = record::directory(&self.root, uid, container).ok()?;
        let record = Record::read(&directory).unwrap_or_else(|error| {
            tracing::error!("{error:#}");
            None
        });
        record.filter(|record| record.state != State::Gone)
    }

    /// Whether it is: written as a whole, and whatever has become of it since.
    pub(crate) fn is_here(&self, uid: &str, container: &str) -> bool {
        let record = self.find(uid, container);
        record.is_some_and(|record| !matches!(record.state, State::Coming { .. }))
    }

    /// All of them. One that cannot be understood is left for people to look at.
    pub(crate) fn all(&self) -> Vec<Record> {
        let pods = entries(&self.root).into_iter();
        pods.flat_map(|pod| entries(&pod))
            .filter_map(|directory| match Record::read(&directory) {
                Ok(record) => record,
                Err(error) => {
                    tracing::error!("{error:#}");
                    None
                }
            })
            .collect()
    }

    /// A pod's node has everything: from now on nobody else may have it.
    fn take(&self, record: &mut Record, taker: Taker) -> anyhow::Result<()> {
        self.advance(record, Event::Take(taker))
    }

    /// That node's word.
    fn settle(&self, record: &mut Record, word: &Word) -> anyhow::Result<()> {
        match word {
            Word::HandedBack(_) => self.advance(record, Event::HandedBack),
            Word::Running => {
                self.advance(record, Event::Ran)?;
                // What is kept is that it ran.
                let emptied = self
                    .directory(&record.pod)
                    .and_then(|directory| record::remove_all_but_it(&directory));
                if let Err(error) = emptied {
                    tracing::warn!("content of a state is left: {error:#}");
                }
                Ok(())
            }
        }
    }

    /// Removes a state that nobody wants, or of which nobody asks any more. False: it
    /// is another pod's, or may be.
    pub(crate) fn discard(&self, uid: &str, container: &str) -> anyhow::Result<bool> {
        let directory = record::directory(&self.root, uid, container)?;
        let _one_at_a_time = self.lock();
        let Some(mut record) = Record::read(&directory)? else {
            return Ok(true);
        };
        let event = match record.state {
            State::Parked => Event::Dropped,
            State::Restored { .. } => Event::Forgotten,
            State::Gone => {
                remove(&directory)?;
                return Ok(true);
            }
            State::Coming { .. } | State::Taken(_) => return Ok(false),
        };
        record.advance(&directory, event)?;
        remove(&directory)?;
        tracing::info!(pod = record.pod.pod, uid, container, "a state is removed");
        Ok(true)
    }

    /// As the record stands on disk, which others may have changed.
    fn advance(&self, record: &mut Record, event: Event) -> anyhow::Result<()> {
        let directory = self.directory(&record.pod)?;
        let _one_at_a_time = self.lock();
        let mut now = Record::read(&directory)?.context("the state is gone")?;
        now.advance(&directory, event)?;
        *record = now;
        Ok(())
    }
}

fn entries(directory: &Path) -> Vec<PathBuf> {
    let Ok(listing) = fs::read_dir(directory) else {
        return Vec::new();
    };
    listing.flatten().map(|entry| entry.path()).collect()
}

/// A container's directory; the pod's goes with the last one.
fn remove(directory: &Path) -> anyhow::Result<()> {
    match fs::remove_dir_all(directory) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => {
            return Err(error).context(format!("cannot remove {}", directory.display()));
        }
        _ => {}
    }
    if let Some(pod) = directory.parent() {
        // Another container's is in it.
        drop(fs::remove_dir(pod));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::record::tests::record;
    use super::*;

    struct Lab {
        temp: tempfile::TempDir,
        parked: Arc<Parked>,
        ticket: Ticket,
    }

    impl Lab {
        fn new() -> Self {
            let temp = tempfile::tempdir().unwrap();
            let parked = parked(temp.path());
            let ticket = Ticket {
                id: "t-1".into(),
                secret: "s".into(),
            };
            let lab = Self {
                temp,
                parked,
                ticket,
            };
            lab.expect().unwrap();
            lab
        }

        fn expect(&self) -> anyhow::Result<()> {
            let pod = PodContainer {
                namespace: "shop".into(),
                pod: "cart-0".into(),
                uid: "u-1".into(),
                container: "cache".into(),
            };
            let expected = Expected {
                pod: &pod,
                namespace: "k8s.io",
                id: "c",
                migration_id: "m",
                node: "a",
                facts: serde_json::json!({}),
                needs: serde_json::json!({}),
            };
            self.parked.expect(expected, &self.ticket)
        }

        fn commit(&self) -> Committed {
            let pod = record(State::Parked).pod;
            self.parked.commit(&pod, &self.ticket.id)
        }

        fn state(&self) -> Option<State> {
            self.parked.find("u-1", "cache").map(|record| record.state)
        }

        fn said(&self) -> Option<ArrivalState> {
            let dir = RunDir::at(self.temp.path().join("run"));
            let record = nodeapi::arrival::read(&dir, &self.ticket.id).unwrap();
            record.map(|record| record.state)
        }
    }

    fn parked(temp: &Path) -> Arc<Parked> {
        Parked::new(
            &temp.join("parked"),
            &RunDir::at(temp.join("run")),
            u64::MAX,
        )
    }

    fn taker(pod: &str) -> Taker {
        Taker {
            pod: pod.into(),
            migration_id: "m2".into(),
            ticket_id: "t-2".into(),
            node: "b".into(),
            address: "b:7443".into(),
        }
    }

    #[tokio::test]
    async fn what_is_committed_is_here_and_what_is_given_up_is_not() {
        let lab = Lab::new();
        assert!(lab.parked.recorder("t-1").is_some());
        assert!(lab.expect().is_err(), "one at a time");
        assert_eq!(lab.commit(), Committed::Yes);
        assert_eq!(lab.commit(), Committed::Yes);
        assert_eq!(lab.state(), Some(State::Parked));
        assert_eq!(lab.said(), Some(ArrivalState::Ran));
        assert!(!lab.parked.abandon("u-1", "cache").unwrap(), "too late");
        assert_eq!(lab.state(), Some(State::Parked));

        let lab = Lab::new();
        assert!(lab.parked.abandon("u-1", "cache").unwrap());
        assert_eq!(lab.state(), None);
        assert_eq!(lab.said(), Some(ArrivalState::Fenced));
        assert!(matches!(lab.commit(), Committed::No(_)));
        assert!(entries(&lab.temp.path().join("parked")).is_empty());
    }

    #[tokio::test]
    async fn a_restart_keeps_what_is_here_and_gives_up_what_was_coming() {
        let lab = Lab::new();
        parked(lab.temp.path()).clean();
        assert_eq!(lab.state(), None);
        assert_eq!(lab.said(), Some(ArrivalState::Fenced));

        let lab = Lab::new();
        assert_eq!(lab.commit(), Committed::Yes);
        parked(lab.temp.path()).clean();
        assert_eq!(lab.state(), Some(State::Parked));
    }

    #[tokio::test]
    async fn one_pod_has_it_until_its_node_hands_it_back() {
        let lab = Lab::new();
        assert_eq!(lab.commit(), Committed::Yes);
        let mut record = lab.parked.find("u-1", "cache").unwrap();
        let mut second = record.clone();
        lab.parked.take(&mut record, taker("r")).unwrap();
        assert!(lab.parked.take(&mut second, taker("x")).is_err());
        assert!(!lab.parked.discard("u-1", "cache").unwrap());
        lab.parked
            .settle(&mut record, &Word::HandedBack(String::new()))
            .unwrap();
        lab.parked.take(&mut second, taker("x")).unwrap();
        lab.parked.settle(&mut second, &Word::Running).unwrap();
        let restored = State::Restored { pod: "x".into() };
        assert_eq!(lab.state(), Some(restored));
        let directory = lab.temp.path().join("parked/u-1/cache");
        assert_eq!(entries(&directory), [directory.join("record.json")]);
        assert!(lab.parked.discard("u-1", "cache").unwrap());
        assert!(entries(&lab.temp.path().join("parked")).is_empty());
    }
}
