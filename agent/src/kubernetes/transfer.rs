//! One Migration of a pod of this node: its containers are sent side by side, and
//! how that goes is written into the Migration's `status.transfer`.

use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use jiff::Timestamp;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::Time;
use kube::{Api, Client};
use nodeapi::{ContainerRecord, PodAnnotations};
use oci_spec::runtime::Spec;
use proto::agent as pb;
use proto::agent::migrate_event::Event;
use proto::engine::{Finished, Summary, progress};
use sterna_kube::{
    ContainerTransfer, Migration, PodRef, Transfer as Report, TransferPhase, TransferResult,
};
use tokio::time::{Instant, sleep, timeout};
use tokio_util::sync::CancellationToken;

use super::parking;
use crate::departures::{Departure, Departures};
use crate::node::Node;
use crate::parked::Record;
use crate::parked::deliver::{self, Target, Undelivered};

/// All attempts together: the shim holds the signal that ends the container for
/// 100 s, and the replacement's kubelet waits no longer either.
const ATTEMPTS_TIMEOUT: Duration = Duration::from_secs(85);

/// Shorter than that no attempt is worth it.
const ATTEMPT_MINIMUM: Duration = Duration::from_secs(5);

const ATTEMPT_PAUSE: Duration = Duration::from_secs(1);

/// The last word is said until the API server has it.
const LAST_WORD_TIMEOUT: Duration = Duration::from_secs(60);
const LAST_WORD_PAUSE: Duration = Duration::from_secs(1);
const WRITE_TIMEOUT: Duration = Duration::from_secs(10);

/// What this node has to do for a Migration.
#[derive(Debug, Clone)]
pub(super) struct Plan {
    pub(super) name: String,
    pub(super) namespace: String,
    pub(super) source: PodRef,
    pub(super) target: PodRef,
    containers: Vec<String>,
    max_blackout_ms: u64,
}

impl Plan {
    /// None: nothing, or nothing yet.
    pub(super) fn of(migration: &Migration, node: &str) -> Option<Self> {
        let status = migration.status.as_ref()?;
        let source = status.source_pod.as_ref()?;
        let target = status.target_pod.as_ref()?;
        let ours = source.node.as_deref() == Some(node);
        let over = status.phase.is_final() || migration.metadata.deletion_timestamp.is_some();
        if !ours || target.node.is_none() || over {
            return None;
        }
        Some(Self {
            name: migration.metadata.name.clone()?,
            namespace: migration.metadata.namespace.clone()?,
            source: source.clone(),
            target: target.clone(),
            containers: status.containers.clone(),
            max_blackout_ms: migration.spec.max_blackout_milliseconds.unwrap_or(0).into(),
        })
    }
}

/// How an attempt ended.
enum End {
    Moved(Option<Box<Summary>>),
    Failed {
        reason: String,
        again: bool,
        summary: Option<Box<Summary>>,
    },
}

pub(super) struct Transfer {
    plan: Plan,
    client: Client,
    node: Arc<Node>,
    departures: Arc<Departures>,
    stop: CancellationToken,
    report: Mutex<Report>,
}

impl Transfer {
    pub(super) fn new(
        plan: Plan,
        client: Client,
        node: Arc<Node>,
        departures: Arc<Departures>,
        stop: CancellationToken,
    ) -> Self {
        let named = |name: &String| ContainerTransfer {
            name: name.clone(),
            ..ContainerTransfer::default()
        };
        let report = Report {
            target_uid: Some(plan.target.uid.clone()),
            started_at: Some(Time(Timestamp::now())),
            finished_at: None,
            containers: plan.containers.iter().map(named).collect(),
        };
        Self {
            plan,
            client,
            node,
            departures,
            stop,
            report: Mutex::new(report),
        }
    }

    pub(super) async fn run(self) {
        tracing::info!("begins");
        self.locate_target().await;
        let containers = self.plan.containers.iter();
        futures::future::join_all(containers.map(|name| self.container(name))).await;
        self.report_mut().finished_at = Some(Time(Timestamp::now()));
        let begun = Instant::now();
        while !self.write().await && begun.elapsed() < LAST_WORD_TIMEOUT {
            sleep(LAST_WORD_PAUSE).await;
        }
    }

    /// Where the target's node is: its name need not be that of a host.
    async fn locate_target(&self) {
        let name = self.plan.target.node.clone().unwrap_or_default();
        let nodes: Api<k8s_openapi::api::core::v1::Node> = Api::all(self.client.clone());
        let found = match timeout(WRITE_TIMEOUT, nodes.get(&name)).await {
            Ok(Ok(found)) => found,
            Ok(Err(error)) => {
                return tracing::warn!("cannot find out where node {name} is: {error}");
            }
            Err(_) => return tracing::warn!("the API server does not answer"),
        };
        let addresses = found.status.and_then(|status| status.addresses);
        let mut addresses = addresses.into_iter().flatten();
        let internal = addresses.find(|address| address.type_ == "InternalIP");
        if let (Some(internal), Ok(name)) = (internal, name.parse()) {
            self.node.learn(name, &internal.address);
        }
    }

    /// Brings one container's state to the target.
    async fn container(&self, name: &str) {
        // What waits here, or is about to, is not sent from where it runs.
        let mut parked = self.node.parked.find(&self.plan.source.uid, name);
        if parked.is_none() {
            match self.send(name).await {
                Some(_) => return,
                // It came to wait here meanwhile.
                None => parked = self.node.parked.find(&self.plan.source.uid, name),
            }
        }
        if let Some(record) = parked {
            self.deliver(name, record).await;
        }
    }

    /// Delivers a state that waits here, again until it is there or called off.
    async fn deliver(&self, name: &str, mut record: Record) {
        let node = self.plan.target.node.as_deref().unwrap_or_default();
        let target = node.parse().map(|node| Target {
            pod: self.plan.target.name.clone(),
            uid: self.plan.target.uid.clone(),
            node,
        });
        let bytes = record.memory_bytes();
        self.change(name, |container| {
            container.phase = TransferPhase::Parked;
            container.memory_bytes = Some(bytes);
        });
        let mut last = None;
        let (result, reason) = loop {
            let attempt = async {
                let target = target
                    .as_ref()
                    .map_err(|error| Undelivered::Never(format!("node {node:?}: {error}")))?;
                if deliver::settle(&self.node, &mut record, &target.uid).await? {
                    return Ok(None);
                }
                let called_off = self.stop.cancelled();
                let sent = deliver::deliver(&self.node, &mut record, target, called_off);
                sent.await.map(Some)
            };
            match attempt.await {
                Ok(sent) => {
                    tracing::info!(container = name, "has its state");
                    let blackout = Timestamp::now().duration_since(record.since);
                    self.change(name, |container| {
                        container.sent_bytes = sent;
                        container.blackout_milliseconds = u64::try_from(blackout.as_millis()).ok();
                    });
                    break (TransferResult::Succeeded, None);
                }
                Err(Undelivered::Never(reason)) => break (TransferResult::Failed, Some(reason)),
                Err(Undelivered::Again(reason)) => {
                    tracing::warn!(container = name, reason, "its state waits on");
                    let reason = (!self.stop.is_cancelled()).then_some(reason);
                    if last != reason {
                        last.clone_from(&reason);
                        self.update(name, |container| {
                            container.phase = TransferPhase::Parked;
                            container.reason = reason;
                        })
                        .await;
                    }
                }
            }
            if self.stop.is_cancelled() {
                return;
            }
            sleep(ATTEMPT_PAUSE).await;
            match self.node.parked.find(&self.plan.source.uid, name) {
                Some(now) => record = now,
                None => break (TransferResult::Failed, Some("its state was removed".into())),
            }
        };
        self.update(name, |container| {
            container.phase = TransferPhase::Finished;
            container.result = Some(result);
            container.reason = reason;
        })
        .await;
    }

    /// Sends one container from where it runs, again if that fails and may work later.
    /// None: its state waits here.
    async fn send(&self, name: &str) -> Option<TransferResult> {
        let begun = Instant::now();
        let (result, reason, summary) = loop {
            if self.node.parked.find(&self.plan.source.uid, name).is_some() {
                return None;
            }
            let left = ATTEMPTS_TIMEOUT.saturating_sub(begun.elapsed());
            match self.attempt(name, left).await {
                End::Moved(summary) => break (TransferResult::Succeeded, None, summary),
                End::Failed {
                    reason,
                    again,
                    summary,
                } => {
                    tracing::warn!(container = name, reason, again, "not sent");
                    let left = ATTEMPTS_TIMEOUT.saturating_sub(begun.elapsed());
                    if !again || self.stop.is_cancelled() || left < ATTEMPT_MINIMUM {
                        break (TransferResult::Failed, Some(reason), summary);
                    }
                    self.update(name, |container| container.reason = Some(reason))
                        .await;
                }
            }
            sleep(ATTEMPT_PAUSE).await;
        };
        self.update(name, |container| {
            container.phase = TransferPhase::Finished;
            container.result = Some(result);
            container.reason = reason;
            if let Some(summary) = summary {
                fill_in(container, &summary);
            }
        })
        .await;
        Some(result)
    }

    async fn attempt(&self, name: &str, left: Duration) -> End {
        let departure = match self.depart(name, left) {
            Ok(departure) => departure,
            Err(end) => return end,
        };
        let mut followed = std::pin::pin!(self.follow(name, &departure));
        tokio::select! {
            end = &mut followed => return end,
            () = self.stop.cancelled() => {}
        }
        if let Err(status) = departure.cancel("its Migration was called off").await {
            tracing::info!(reason = status.message(), "too late to call it off");
        }
        followed.await
    }

    fn depart(&self, name: &str, left: Duration) -> Result<Arc<Departure>, End> {
        let failed = |reason: String, again| End::Failed {
            reason,
            again,
            summary: None,
        };
        let record = match find(&self.node, &self.plan.source.uid, name) {
            Ok(Some(record)) => record,
            Ok(None) => return Err(failed("it does not run under Sterna here".into(), false)),
            Err(error) => return Err(failed(format!("{error:#}"), true)),
        };
        // An earlier sternad's, or a moment ago's.
        let departure = self.departures.find(&record.namespace, &record.id);
        if let Some(departure) = departure
            && departure.order.into_pod.as_ref() == Some(&self.plan.target.uid)
        {
            return Ok(departure);
        }
        let request = pb::MigrateRequest {
            container: Some(pb::ContainerName {
                namespace: record.namespace,
                id: record.id,
            }),
            node: self.plan.target.node.clone().unwrap_or_default(),
            max_blackout_ms: self.plan.max_blackout_ms,
            deadline_ms: u64::try_from(left.as_millis()).unwrap_or(u64::MAX),
            into_pod: self.plan.target.uid.clone(),
        };
        self.departures
            .start(request)
            .map_err(|status| failed(status.message().to_owned(), true))
    }

    /// Relays what happens to the container until it is over.
    async fn follow(&self, name: &str, departure: &Departure) -> End {
        let mut last = Finished::default();
        let mut number = 0;
        while let Some(event) = departure.events.get(number).await {
            number += 1;
            match event.event {
                Some(Event::Refused(refused)) => return refusal(&refused.reasons),
                Some(Event::Progress(progress)) => match progress.event {
                    Some(progress::Event::Phase(begun)) => {
                        let phase = phase(&begun.phase);
                        self.update(name, |container| container.phase = phase).await;
                    }
                    Some(progress::Event::Lap(lap)) => {
                        self.update(name, |container| container.laps = Some(lap.number))
                            .await;
                    }
                    Some(progress::Event::Bytes(bytes)) => {
                        // Written with the next change.
                        self.change(name, |container| {
                            container.sent_bytes = Some(bytes.memory_sent);
                            container.memory_bytes = Some(bytes.memory_total);
                        });
                    }
                    Some(progress::Event::Finished(finished)) => last = finished,
                    None => {}
                },
                _ => {}
            }
        }
        let summary = last.summary.map(Box::new);
        match last.outcome.as_str() {
            "migrated" => End::Moved(summary),
            // "unknown": people have to look, another attempt does not help.
            outcome => End::Failed {
                reason: format!("{}: {}", last.side, last.reason),
                again: matches!(outcome, "failed" | "handed-back"),
                summary,
            },
        }
    }

    fn report_mut(&self) -> std::sync::MutexGuard<'_, Report> {
        // Every change under the lock is a few assignments.
        self.report.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn change(&self, name: &str, change: impl FnOnce(&mut ContainerTransfer)) {
        let mut report = self.report_mut();
        let mut containers = report.containers.iter_mut();
        if let Some(container) = containers.find(|container| container.name == name) {
            change(container);
        }
    }

    async fn update(&self, name: &str, change: impl FnOnce(&mut ContainerTransfer)) {
        self.change(name, change);
        self.write().await;
    }

    /// Whether the API server has it now. Whoever waits for the state does not
    /// wait for this: what is not written is written with the next change.
    async fn write(&self) -> bool {
        let report = self.report_mut().clone();
        let written = parking::apply(&self.client, &self.plan.namespace, &self.plan.name, &report);
        let problem = match timeout(WRITE_TIMEOUT, written).await {
            Ok(Ok(())) => return true,
            Ok(Err(error)) => error.to_string(),
            Err(_) => "the API server does not answer".to_owned(),
        };
        tracing::warn!(problem, "cannot write how the transfer goes");
        false
    }
}

/// The record of a pod's container, by what the CRI wrote into its specification.
fn find(node: &Node, uid: &str, container: &str) -> anyhow::Result<Option<ContainerRecord>> {
    for record in ContainerRecord::list(&node.run_dir)? {
        let Ok(text) = std::fs::read(record.bundle.join("config.json")) else {
            continue; // it is being removed
        };
        let spec: Spec = serde_json::from_slice(&text)?;
        let annotations = spec.annotations().as_ref();
        let pod = PodAnnotations::read(|key| Some(annotations?.get(key)?.as_str()));
        // A kubelet keeps those that ended for a while.
        let runs = record.state != nodeapi::RunState::Stopped;
        if runs && pod.is_some_and(|pod| pod.name.uid == uid && pod.name.container == container) {
            return Ok(Some(record));
        }
    }
    Ok(None)
}

fn refusal(reasons: &[pb::Reason]) -> End {
    let texts: Vec<&str> = reasons.iter().map(|reason| reason.text.as_str()).collect();
    // What the two agents say of each other passes: too many at a time, an earlier
    // attempt that is being taken back.
    let passing = |reason: &pb::Reason| matches!(reason.subject.as_str(), "agent" | "container");
    End::Failed {
        reason: texts.join("; "),
        again: reasons.iter().all(passing),
        summary: None,
    }
}

fn phase(name: &str) -> TransferPhase {
    match name {
        "pre-copy" => TransferPhase::Copying,
        "freeze" => TransferPhase::Freezing,
        "commit" | "resume" => TransferPhase::Committed,
        _ => TransferPhase::Negotiating,
    }
}

fn fill_in(container: &mut ContainerTransfer, summary: &Summary) {
    container.laps = Some(summary.laps);
    container.sent_bytes = Some(summary.sent_bytes + summary.layer_bytes + summary.image_bytes);
    container.memory_bytes = Some(summary.memory_bytes);
    container.freeze_milliseconds = Some(summary.freeze_us.div_ceil(1000));
    container.blackout_milliseconds = Some(summary.blackout_us.div_ceil(1000));
}
