//! What the shims of pods may ask: service `sterna.agent.v1.Pods`.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use nodeapi::PodContainer;
use proto::agent as pb;
use proto::agent::expect_response::Answer as Said;
use tokio::time::{Instant, sleep};
use tonic::{Code, Request, Response, Status};

use super::{Answer, Leaving, Nothing, Place, Pods};
use crate::departures::Departures;
use crate::node::Node;

/// Shims hold a signal for 100 s.
const HOLD_TIMEOUT: Duration = Duration::from_secs(95);

/// A state that cannot be kept three times cannot be kept.
const ATTEMPTS: u32 = 3;
const ATTEMPT_MINIMUM: Duration = Duration::from_secs(5);
const ATTEMPT_PAUSE: Duration = Duration::from_secs(1);

/// While others are on their way, or it is itself.
const TURN_PAUSE: Duration = Duration::from_millis(250);

#[derive(Debug, Clone)]
pub(crate) struct PodService {
    node: Arc<Node>,
    pods: Arc<Pods>,
    departures: Arc<Departures>,
}

impl PodService {
    pub(crate) fn new(node: Arc<Node>, pods: Arc<Pods>, departures: Arc<Departures>) -> Self {
        Self {
            node,
            pods,
            departures,
        }
    }

    /// Holds a container's end until it is decided; whether its state is elsewhere,
    /// and else why not.
    async fn until_decided(
        &self,
        name: &pb::ContainerName,
        container: &PodContainer,
    ) -> (bool, String) {
        let begun = Instant::now();
        let mut reason = "nothing takes it elsewhere".to_owned();
        if let Some(guide) = self.pods.guide() {
            match guide.leaves(container).await {
                Leaving::Stays(why) => reason = why,
                Leaving::Waits => {
                    let limit = HOLD_TIMEOUT.saturating_sub(begun.elapsed());
                    let (this, name, container) = (self.clone(), name.clone(), container.clone());
                    // Its shim does not wait for the answer once the container has
                    // ended, and then this future is dropped.
                    let parked =
                        tokio::spawn(async move { this.park(&name, &container, limit).await });
                    return match parked.await {
                        Ok(Ok(())) => (true, "its state waits here".to_owned()),
                        Ok(Err(reason)) => (false, reason),
                        Err(_) => (false, "keeping its state ended in a panic".to_owned()),
                    };
                }
            }
        }
        // Begun by hand, or not quite over.
        let departure = self.departures.find(&name.namespace, &name.id);
        match departure.filter(|departure| departure.order.into_pod.is_some()) {
            Some(departure) => {
                let finished = departure.ended().await;
                (finished.outcome == "migrated", finished.reason)
            }
            None => (false, reason),
        }
    }

    /// Has a container's state wait on this node, and the container end; and says so.
    async fn park(
        &self,
        name: &pb::ContainerName,
        container: &PodContainer,
        limit: Duration,
    ) -> Result<(), String> {
        let parked = self.try_park(name, container, limit).await;
        if let Some(guide) = self.pods.guide() {
            let told = parked.as_ref().copied().map_err(String::as_str);
            guide.waits(container, told).await;
        }
        parked
    }

    async fn try_park(
        &self,
        name: &pb::ContainerName,
        container: &PodContainer,
        limit: Duration,
    ) -> Result<(), String> {
        let begun = Instant::now();
        let (mut attempts, mut pause) = (0, TURN_PAUSE);
        loop {
            let left = limit.saturating_sub(begun.elapsed());
            let is_here = || {
                self.node
                    .parked
                    .is_here(&container.uid, &container.container)
            };
            let reason = match self.departures.park(name, &container.uid, left) {
                // Committed when nobody was there to say so.
                Err(_) if is_here() => return Ok(()),
                Err(status) if status.code() == Code::NotFound => {
                    return Err(status.message().to_owned());
                }
                Err(status) => status.message().to_owned(),
                Ok(departure) => {
                    let finished = departure.ended().await;
                    if finished.outcome == "migrated" || is_here() {
                        return Ok(());
                    }
                    attempts += 1;
                    pause = ATTEMPT_PAUSE;
                    finished.reason
                }
            };
            tracing::warn!(%container, reason, attempts, "its state does not wait here yet");
            if attempts == ATTEMPTS || begun.elapsed() + ATTEMPT_MINIMUM > limit {
                return Err(format!("its state cannot wait here: {reason}"));
            }
            sleep(pause).await;
        }
    }
}

#[tonic::async_trait]
impl pb::pods_server::Pods for PodService {
    async fn expect(
        &self,
        request: Request<pb::ExpectRequest>,
    ) -> Result<Response<pb::ExpectResponse>, Status> {
        let request = request.into_inner();
        let name = request.container.unwrap_or_default();
        let container = named(request.name)?;
        let place = Place {
            namespace: name.namespace,
            id: name.id,
            upperdir: Some(request.upperdir)
                .filter(|path| !path.is_empty())
                .map(PathBuf::from),
        };
        let id = place.id.clone();
        let answer = self.pods.expect(&container, place).await;
        tracing::info!(%container, id, ?answer, "a container asks for its state");
        let answer = match answer {
            Answer::Expected => Said::Expected(pb::Expected {}),
            Answer::Nothing(Nothing::Fresh) => Said::Fresh(pb::Fresh {}),
            Answer::Nothing(Nothing::Lost(reason)) => Said::NotRestored(pb::NotRestored { reason }),
        };
        Ok(Response::new(pb::ExpectResponse {
            answer: Some(answer),
        }))
    }

    async fn leaving(
        &self,
        request: Request<pb::LeavingRequest>,
    ) -> Result<Response<pb::LeavingResponse>, Status> {
        let request = request.into_inner();
        let name = request.container.unwrap_or_default();
        let container = named(request.name)?;
        tracing::info!(%container, id = name.id, "a container is told to end");
        let (moved, reason) = self.until_decided(&name, &container).await;
        tracing::info!(%container, id = name.id, moved, reason, "a container's end is decided");
        Ok(Response::new(pb::LeavingResponse { moved, reason }))
    }
}

fn named(name: Option<pb::PodContainer>) -> Result<PodContainer, Status> {
    name.and_then(from_wire)
        .ok_or_else(|| Status::invalid_argument("no pod was named"))
}

/// A name that names something.
pub(crate) fn from_wire(name: pb::PodContainer) -> Option<PodContainer> {
    let complete = !name.uid.is_empty() && !name.container.is_empty();
    complete.then_some(PodContainer {
        namespace: name.namespace,
        pod: name.pod,
        uid: name.uid,
        container: name.container,
    })
}

pub(crate) fn to_wire(name: &PodContainer) -> pb::PodContainer {
    pb::PodContainer {
        namespace: name.namespace.clone(),
        pod: name.pod.clone(),
        uid: name.uid.clone(),
        container: name.container.clone(),
    }
}
