//! What the shims of pods may ask: service `sterna.agent.v1.Pods`.

use std::path::PathBuf;
use std::sync::Arc;

use nodeapi::PodContainer;
use proto::agent as pb;
use proto::agent::expect_response::Answer as Said;
use tonic::{Request, Response, Status};

use super::{Answer, Nothing, Place, Pods};
use crate::departures::Departures;

#[derive(Debug)]
pub(crate) struct PodService {
    pods: Arc<Pods>,
    departures: Arc<Departures>,
}

impl PodService {
    pub(crate) fn new(pods: Arc<Pods>, departures: Arc<Departures>) -> Self {
        Self { pods, departures }
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
        let mut reason = "nothing takes it elsewhere".to_owned();
        if let Some(guide) = self.pods.guide() {
            reason = guide.stays(&container).await;
        }
        // Begun by hand, or not quite over.
        let mut moved = false;
        let departure = self.departures.find(&name.namespace, &name.id);
        if let Some(departure) = departure.filter(|departure| departure.order.into_pod.is_some()) {
            let finished = departure.ended().await;
            moved = finished.outcome == "migrated";
            reason = finished.reason;
        }
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
