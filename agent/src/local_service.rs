//! What the command line may ask: service `sterna.agent.v1.Agent`.

use std::pin::Pin;
use std::sync::Arc;

use futures::Stream;
use nodeapi::{ContainerRecord, RunState};
use proto::agent as pb;
use proto::agent::agent_server::Agent;
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Request, Response, Status};

use crate::arrivals::Arrivals;
use crate::departures::{Departures, commit_of, find_record};
use crate::doctor;
use crate::node::Node;
use crate::process;

#[derive(Debug)]
pub(crate) struct LocalService {
    node: Arc<Node>,
    arrivals: Arc<Arrivals>,
    departures: Arc<Departures>,
}

impl LocalService {
    pub(crate) fn new(
        node: Arc<Node>,
        arrivals: Arc<Arrivals>,
        departures: Arc<Departures>,
    ) -> Self {
        Self {
            node,
            arrivals,
            departures,
        }
    }

    async fn status(&self, record: ContainerRecord) -> pb::ContainerStatus {
        let departure = self.departures.find(&record.namespace, &record.id);
        let (migration_id, peer) = match departure {
            Some(departure) => {
                let order = &departure.order;
                (order.migration_id.clone(), order.destination.to_string())
            }
            // Nobody watches it, but it is known where to.
            None if record.state == RunState::Undecided => commit_of(&self.node, &record)
                .map(|commit| (commit.migration_id, commit.destination_node))
                .unwrap_or_default(),
            None => self
                .arrivals
                .find(&record.namespace, &record.id)
                .await
                .unwrap_or_default(),
        };
        let lost = !process::is_alive(record.shim_pid) && record.state != RunState::Stopped;
        pb::ContainerStatus {
            state: if lost { "lost" } else { record.state.name() }.into(),
            namespace: record.namespace,
            id: record.id,
            pid: record.pid,
            shim_pid: record.shim_pid,
            peer,
            migration_id,
        }
    }
}

#[tonic::async_trait]
impl Agent for LocalService {
    async fn list(
        &self,
        request: Request<pb::ListRequest>,
    ) -> Result<Response<pb::ListResponse>, Status> {
        let namespace = request.into_inner().namespace;
        let records = ContainerRecord::list(&self.node.run_dir)
            .map_err(|error| Status::internal(format!("cannot list containers: {error}")))?;
        let mut containers = Vec::new();
        for record in records {
            if namespace.is_empty() || record.namespace == namespace {
                containers.push(self.status(record).await);
            }
        }
        Ok(Response::new(pb::ListResponse {
            node: self.node.name.to_string(),
            containers,
        }))
    }

    type MigrateStream = Pin<Box<dyn Stream<Item = Result<pb::MigrateEvent, Status>> + Send>>;

    async fn migrate(
        &self,
        request: Request<pb::MigrateRequest>,
    ) -> Result<Response<Self::MigrateStream>, Status> {
        let departure = self.departures.start(request.into_inner())?;
        let (events, queue) = mpsc::channel(16);
        tokio::spawn(async move {
            let mut number = 0;
            // Whoever asked may go away: the migration goes on.
            while let Some(event) = departure.events.get(number).await {
                if events.send(Ok(event)).await.is_err() {
                    return;
                }
                number += 1;
            }
        });
        Ok(Response::new(Box::pin(ReceiverStream::new(queue))))
    }

    async fn cancel(
        &self,
        request: Request<pb::CancelRequest>,
    ) -> Result<Response<pb::CancelResponse>, Status> {
        let name = request.into_inner().container.unwrap_or_default();
        let record = find_record(&self.node, &name)?;
        let departure = self
            .departures
            .find(&record.namespace, &record.id)
            .ok_or_else(|| {
                Status::failed_precondition(format!(
                    "container {} is not on its way from this node",
                    record.id
                ))
            })?;
        departure.cancel("cancelled by a user").await?;
        Ok(Response::new(pb::CancelResponse {
            migration_id: departure.order.migration_id.clone(),
        }))
    }

    async fn release(
        &self,
        request: Request<pb::ReleaseRequest>,
    ) -> Result<Response<pb::ReleaseResponse>, Status> {
        self.departures
            .release(request.into_inner())
            .await
            .map(Response::new)
    }

    async fn doctor(
        &self,
        request: Request<pb::DoctorRequest>,
    ) -> Result<Response<pb::DoctorResponse>, Status> {
        let findings = doctor::examine(&self.node, request.into_inner()).await?;
        Ok(Response::new(pb::DoctorResponse { findings }))
    }

    async fn version(
        &self,
        _request: Request<pb::VersionRequest>,
    ) -> Result<Response<pb::VersionResponse>, Status> {
        Ok(Response::new(pb::VersionResponse {
            version: env!("CARGO_PKG_VERSION").into(),
            node: self.node.name.to_string(),
            containerd_version: self.node.containerd.version().await.unwrap_or_default(),
        }))
    }
}
