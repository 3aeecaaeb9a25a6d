//! Containers on their way from this node to others.

mod describe;
mod engine;
mod events;
mod leave;
mod note;
mod resume;
mod run;
mod watch;

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use identity::NodeName;
use migrate::commit::CommitRecord;
use nodeapi::{ContainerRecord, RunState};
use proto::agent as pb;
use proto::agent::migrate_event::Event;
use proto::engine::{Finished, Progress, progress};
use tokio::sync::{mpsc, oneshot};
use tonic::Status;
use tracing::Instrument as _;

pub(crate) use self::describe::{Described, Stop, bind_sources, describe};
use self::engine::Engine;
pub(crate) use self::events::EventLog;
use crate::node::Node;
use crate::process;

/// What a user asked for, checked.
#[derive(Debug, Clone)]
pub(crate) struct Order {
    pub(crate) migration_id: String,
    pub(crate) record: ContainerRecord,
    pub(crate) destination: NodeName,
    pub(crate) max_blackout: Duration,
    /// Time for everything; none: as long as it takes.
    pub(crate) deadline: Option<Duration>,
    /// Uid of the pod that is to have the container's state; none: the container
    /// itself moves.
    pub(crate) into_pod: Option<String>,
}

impl Order {
    /// Its state is to wait on this node: the pod that it names is its own.
    pub(crate) fn parks_on(&self, node: &Node) -> bool {
        self.destination == node.name
    }
}

/// Someone wants a migration to stop.
#[derive(Debug)]
pub(crate) struct CancelOrder {
    pub(crate) reason: String,
    /// Whether it stops.
    pub(crate) answer: oneshot::Sender<Result<(), Status>>,
}

/// One container on its way.
#[derive(Debug)]
pub(crate) struct Departure {
    pub(crate) order: Order,
    pub(crate) events: EventLog,
    cancels: mpsc::Sender<CancelOrder>,
}

enum Begin {
    Anew,
    From(Box<note::Note>),
}

/// All containers on their way from this node.
#[derive(Debug)]
pub(crate) struct Departures {
    node: Arc<Node>,
    /// By namespace and id: one migration per container.
    running: Mutex<HashMap<(String, String), Arc<Departure>>>,
}

impl Departures {
    pub(crate) fn new(node: Arc<Node>) -> Arc<Self> {
        Arc::new(Self {
            node,
            running: Mutex::default(),
        })
    }

    fn running(&self) -> std::sync::MutexGuard<'_, HashMap<(String, String), Arc<Departure>>> {
        // Every change under the lock is one insertion or removal.
        self.running.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn find(&self, namespace: &str, id: &str) -> Option<Arc<Departure>> {
        self.running()
            .get(&(namespace.to_owned(), id.to_owned()))
            .cloned()
    }

    /// Begins a migration, which then runs by itself.
    pub(crate) fn start(
        self: &Arc<Self>,
        request: pb::MigrateRequest,
    ) -> Result<Arc<Departure>, Status> {
        let order = self.check(request)?;
        self.launch(order, Begin::Anew)
    }

    /// Begins to have a container of a pod end here, and its state wait on this node.
    pub(crate) fn park(
        self: &Arc<Self>,
        name: &pb::ContainerName,
        uid: &str,
        limit: Duration,
    ) -> Result<Arc<Departure>, Status> {
        let record = find_record(&self.node, name)?;
        if self.find(&record.namespace, &record.id).is_none() {
            check_movable_now(&record)?;
        }
        let order = Order {
            migration_id: uuid::Uuid::new_v4().to_string(),
            record,
            destination: self.node.name.clone(),
            // It will stand still for as long as it takes to make another pod.
            max_blackout: limit,
            deadline: Some(limit),
            into_pod: Some(uid.to_owned()),
        };
        self.launch(order, Begin::Anew)
    }

    /// Takes up what an earlier sternad left under way.
    pub(crate) fn resume(self: &Arc<Self>) {
        for note in note::Note::list(&self.node) {
            let launched = match note.order() {
                Ok(order) => self.launch(order, Begin::From(Box::new(note))).map(drop),
                Err(error) => Err(Status::internal(error.to_string())),
            };
            if let Err(status) = launched {
                tracing::warn!(
                    reason = status.message(),
                    "cannot take a migration up again"
                );
            }
        }
    }

    fn launch(self: &Arc<Self>, order: Order, begin: Begin) -> Result<Arc<Departure>, Status> {
        let key = (order.record.namespace.clone(), order.record.id.clone());
        let (cancels, orders) = mpsc::channel(4);
        let departure = Arc::new(Departure {
            order,
            events: EventLog::new(),
            cancels,
        });
        {
            let mut running = self.running();
            if let Some(other) = running.get(&key) {
                return Err(Status::failed_precondition(format!(
                    "container {} is on its way to node {} already (migration {})",
                    key.1, other.order.destination, other.order.migration_id
                )));
            }
            let limit = self.node.config.limits.outgoing;
            if running.len() >= limit {
                return Err(Status::resource_exhausted(format!(
                    "{limit} containers are on their way from this node already (limits.outgoing)"
                )));
            }
            running.insert(key.clone(), Arc::clone(&departure));
        }
        let span = tracing::info_span!(
            "departure",
            migration_id = departure.order.migration_id,
            namespace = key.0,
            container = key.1,
            to = %departure.order.destination,
        );
        let (this, own) = (Arc::clone(self), Arc::clone(&departure));
        tokio::spawn(
            async move {
                match begin {
                    Begin::Anew => run::run(&this.node, &own, orders).await,
                    Begin::From(note) => resume::resume(&this.node, &own, &note, orders).await,
                }
                if own.order.parks_on(&this.node) {
                    run::give_up_parking(&this.node, &own.order);
                }
                this.running().remove(&key);
                own.events.close();
            }
            .instrument(span),
        );
        Ok(departure)
    }

    /// Decides about an undecided container on an operator's word.
    pub(crate) async fn release(
        &self,
        request: pb::ReleaseRequest,
    ) -> Result<pb::ReleaseResponse, Status> {
        let verdict = request.verdict();
        let record = find_record(&self.node, &request.container.unwrap_or_default())?;
        let commit = undecided(&self.node, &record)?;
        // Of an engine that is just dying this fails, and can be said again.
        let engine = Engine::connect(&self.node.run_dir.engine_socket(&commit.migration_id))
            .await
            .map_err(|failure| Status::failed_precondition(failure.reason))?;
        tracing::warn!(
            migration_id = commit.migration_id,
            namespace = record.namespace,
            container = record.id,
            peer = commit.destination_node,
            verdict = verdict.as_str_name(),
            "an operator decides"
        );
        match verdict {
            pb::Verdict::HandedBack => {
                engine
                    .hand_back("an operator vouches that it does not run there")
                    .await?;
            }
            pb::Verdict::Gone => {
                engine
                    .let_go("an operator vouches that it is there")
                    .await?;
            }
            pb::Verdict::Unspecified => {
                return Err(Status::invalid_argument("no verdict was given"));
            }
        }
        Ok(pb::ReleaseResponse {
            migration_id: commit.migration_id,
            peer: commit.destination_node,
        })
    }

    fn check(&self, request: pb::MigrateRequest) -> Result<Order, Status> {
        let name = request.container.unwrap_or_default();
        let record = find_record(&self.node, &name)?;
        let destination: NodeName =
            request
                .node
                .parse()
                .map_err(|error: identity::InvalidNodeName| {
                    Status::invalid_argument(error.to_string())
                })?;
        if destination == self.node.name {
            return Err(Status::invalid_argument(format!(
                "container {} is on node {destination} already",
                record.id
            )));
        }
        // The better reason of two: its state says the same in fewer words.
        if self.find(&record.namespace, &record.id).is_none() {
            check_movable_now(&record)?;
        }
        let max_blackout = match request.max_blackout_ms {
            0 => self.node.config.migration.max_blackout_ms,
            given => given,
        };
        Ok(Order {
            migration_id: uuid::Uuid::new_v4().to_string(),
            record,
            destination,
            max_blackout: Duration::from_millis(max_blackout),
            deadline: (request.deadline_ms != 0)
                .then(|| Duration::from_millis(request.deadline_ms)),
            into_pod: Some(request.into_pod).filter(|uid| !uid.is_empty()),
        })
    }
}

impl Departure {
    /// Waits for the last word.
    pub(crate) async fn ended(&self) -> Finished {
        let mut last = Finished::default();
        let mut number = 0;
        while let Some(event) = self.events.get(number).await {
            number += 1;
            match event.event {
                Some(Event::Progress(Progress {
                    event: Some(progress::Event::Finished(finished)),
                    ..
                })) => last = finished,
                Some(Event::Refused(refused)) => {
                    let texts = refused.reasons.into_iter().map(|reason| reason.text);
                    last.outcome = "refused".into();
                    last.reason = texts.collect::<Vec<_>>().join("; ");
                }
                _ => {}
            }
        }
        last
    }

    /// Asks the migration to stop.
    pub(crate) async fn cancel(&self, reason: &str) -> Result<(), Status> {
        let over = || Status::failed_precondition("the migration is over");
        let (answer, answered) = oneshot::channel();
        let order = CancelOrder {
            reason: reason.to_owned(),
            answer,
        };
        self.cancels.send(order).await.map_err(|_| over())?;
        answered.await.map_err(|_| over())?
    }
}

/// The commit record of a container that nobody decides about.
fn undecided(node: &Node, record: &ContainerRecord) -> Result<CommitRecord, Status> {
    let id = &record.id;
    if record.state != RunState::Undecided {
        return Err(Status::failed_precondition(format!(
            "container {id} is {}, not undecided: there is nothing to decide",
            record.state.name()
        )));
    }
    commit_of(node, record)
        .ok_or_else(|| Status::failed_precondition(format!("container {id} has no commit record")))
}

/// The commit record of a container that has one.
pub(crate) fn commit_of(node: &Node, record: &ContainerRecord) -> Option<CommitRecord> {
    match nodeapi::commit::of_container(&node.run_dir, &record.namespace, &record.id) {
        Ok(mut records) => records.pop(),
        Err(error) => {
            tracing::error!("{:#}", anyhow::Error::from(error));
            None
        }
    }
}

/// The container that a user means.
pub(crate) fn find_record(
    node: &Node,
    name: &pb::ContainerName,
) -> Result<ContainerRecord, Status> {
    if name.id.is_empty() {
        return Err(Status::invalid_argument("no container was named"));
    }
    let records = ContainerRecord::list(&node.run_dir)
        .map_err(|error| Status::internal(format!("cannot list containers: {error}")))?;
    choose_record(records, name).map_err(|(missing, text)| match missing {
        true => Status::not_found(text),
        false => Status::invalid_argument(text),
    })
}

/// The record of that name, or whether it is missing, and the words for it.
fn choose_record(
    records: Vec<ContainerRecord>,
    name: &pb::ContainerName,
) -> Result<ContainerRecord, (bool, String)> {
    let mut same: Vec<_> = records
        .into_iter()
        .filter(|record| record.id == name.id)
        .filter(|record| name.namespace.is_empty() || record.namespace == name.namespace)
        .collect();
    match same.len() {
        1 => Ok(same.remove(0)),
        0 => {
            let place = match name.namespace.as_str() {
                "" => String::new(),
                namespace => format!(" in namespace {namespace}"),
            };
            Err((
                true,
                format!(
                    "no container {:?} runs under Sterna on this node{place} (sterna ps lists those that do)",
                    name.id
                ),
            ))
        }
        _ => {
            let namespaces: Vec<_> = same
                .iter()
                .map(|record| record.namespace.as_str())
                .collect();
            Err((
                false,
                format!(
                    "there is a container {:?} in the namespaces {}: say which with --namespace",
                    name.id,
                    namespaces.join(", ")
                ),
            ))
        }
    }
}

/// Whether the container is in a state in which it can be sent.
pub(crate) fn check_movable_now(record: &ContainerRecord) -> Result<(), Status> {
    let id = &record.id;
    let text = match record.state {
        RunState::Running if !process::is_alive(record.shim_pid) => {
            format!(
                "the shim of container {id} (pid {}) is dead",
                record.shim_pid
            )
        }
        RunState::Running => return Ok(()),
        RunState::Settling => format!(
            "container {id} arrived a moment ago and its memory is still being filled in: try again"
        ),
        RunState::Paused => format!("container {id} is paused: resume it first"),
        other => format!(
            "container {id} is {}: only a running one can be moved",
            other.name()
        ),
    };
    Err(Status::failed_precondition(text))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn record(namespace: &str, id: &str, state: RunState) -> ContainerRecord {
        ContainerRecord {
            namespace: namespace.into(),
            id: id.into(),
            bundle: "/b".into(),
            shim_pid: std::process::id(),
            shim_socket: "/s".into(),
            pid: 1,
            state,
        }
    }

    fn name(namespace: &str, id: &str) -> pb::ContainerName {
        pb::ContainerName {
            namespace: namespace.into(),
            id: id.into(),
        }
    }

    #[test]
    fn a_container_is_found_by_name_and_an_ambiguous_one_is_asked_about() {
        let records = || {
            vec![
                record("default", "web", RunState::Running),
                record("default", "db", RunState::Running),
                record("other", "web", RunState::Running),
            ]
        };
        assert_eq!(choose_record(records(), &name("", "db")).unwrap().id, "db");
        let web = choose_record(records(), &name("other", "web")).unwrap();
        assert_eq!(web.namespace, "other");
        let (missing, text) = choose_record(records(), &name("", "web")).unwrap_err();
        assert!(!missing && text.contains("default, other"), "{text}");
        let (missing, text) = choose_record(records(), &name("default", "wbe")).unwrap_err();
        assert!(
            missing && text.contains("wbe") && text.contains("namespace default"),
            "{text}"
        );
    }

    #[test]
    fn only_a_running_container_of_a_living_shim_is_moved() {
        assert!(check_movable_now(&record("d", "w", RunState::Running)).is_ok());
        for state in [
            RunState::Created,
            RunState::Paused,
            RunState::Stopped,
            RunState::Checkpointing,
            RunState::Sending,
            RunState::Undecided,
            RunState::Receiving,
            RunState::Settling,
        ] {
            let status = check_movable_now(&record("d", "w", state)).unwrap_err();
            assert!(status.message().contains('w'), "{status}");
        }
        let mut orphan = record("d", "w", RunState::Running);
        orphan.shim_pid = 0;
        assert!(
            check_movable_now(&orphan)
                .unwrap_err()
                .message()
                .contains("dead")
        );
    }
}
