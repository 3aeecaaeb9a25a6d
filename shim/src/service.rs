//! containerd's task service: requests in, answers out, nothing else.
//!
//! Every operation that changes something runs in a task of its own. ttrpc
//! drops the future of a request whose deadline passes; the operation goes on,
//! and what was asked for is found done by the next question.

use std::collections::HashMap;
use std::sync::Arc;

use async_trait::async_trait;
use containerd_shim_protos::api;
use containerd_shim_protos::shim_async::{Task, create_task};
use protobuf::MessageField;
use protobuf::well_known_types::empty::Empty;
use ttrpc::r#async::{Service, TtrpcContext};

use crate::checkpoint;
use crate::error::{Error, Result};
use crate::events::timestamp;
use crate::pod::Pod;
use crate::reaper::Exit;

/// Name of the service since containerd 2.0.
const TASK_V3: &str = "containerd.task.v3.Task";
/// Its name before; the messages are the same.
const TASK_V2: &str = "containerd.task.v2.Task";

#[derive(Debug)]
struct TaskService(Arc<Pod>);

/// The task service under both of its names.
pub(crate) fn services(pod: &Arc<Pod>) -> HashMap<String, Service> {
    let mut services = create_task(Arc::new(TaskService(Arc::clone(pod))));
    let mut again = create_task(Arc::new(TaskService(Arc::clone(pod))));
    if let Some(service) = again.remove(TASK_V3) {
        services.insert(TASK_V2.to_owned(), service);
    }
    services
}

/// Runs an operation to its end whatever becomes of the request.
async fn detached<T, F>(operation: F) -> ttrpc::Result<T>
where
    T: Send + 'static,
    F: Future<Output = Result<T>> + Send + 'static,
{
    tokio::spawn(operation)
        .await
        .unwrap_or_else(|error| Err(Error::Interrupted(error)))
        .map_err(ttrpc::Error::from)
}

fn delete_response(pid: u32, exit: Exit) -> api::DeleteResponse {
    api::DeleteResponse {
        pid,
        exit_status: exit.status,
        exited_at: MessageField::some(timestamp(exit.at)),
        ..Default::default()
    }
}

#[async_trait]
impl Task for TaskService {
    async fn state(
        &self,
        _: &TtrpcContext,
        request: api::StateRequest,
    ) -> ttrpc::Result<api::StateResponse> {
        let container = self.0.container(&request.id)?;
        match request.exec_id.as_str() {
            "" => Ok(container.init_state()),
            exec_id => Ok(container.exec_state(exec_id)?),
        }
    }

    async fn create(
        &self,
        _: &TtrpcContext,
        request: api::CreateTaskRequest,
    ) -> ttrpc::Result<api::CreateTaskResponse> {
        tracing::info!(id = request.id, bundle = request.bundle, "create");
        let pod = Arc::clone(&self.0);
        let pid = detached(async move { pod.create(request).await }).await?;
        Ok(api::CreateTaskResponse {
            pid,
            ..Default::default()
        })
    }

    async fn start(
        &self,
        _: &TtrpcContext,
        request: api::StartRequest,
    ) -> ttrpc::Result<api::StartResponse> {
        tracing::info!(id = request.id, exec_id = request.exec_id, "start");
        let container = self.0.container(&request.id)?;
        let pid = detached(async move {
            match request.exec_id.as_str() {
                "" => container.start().await,
                exec_id => container.start_exec(exec_id).await,
            }
        })
        .await?;
        Ok(api::StartResponse {
            pid,
            ..Default::default()
        })
    }

    async fn delete(
        &self,
        _: &TtrpcContext,
        request: api::DeleteRequest,
    ) -> ttrpc::Result<api::DeleteResponse> {
        tracing::info!(id = request.id, exec_id = request.exec_id, "delete");
        let pod = Arc::clone(&self.0);
        let (pid, exit) = detached(async move {
            match request.exec_id.as_str() {
                "" => pod.delete(&request.id).await,
                exec_id => {
                    let container = pod.container(&request.id)?;
                    let exec = container.delete_exec(exec_id).await?;
                    let exit = exec.process.exit().unwrap_or_else(|| Exit::assumed(0));
                    Ok((exec.process.pid(), exit))
                }
            }
        })
        .await?;
        Ok(delete_response(pid, exit))
    }

    async fn pids(
        &self,
        _: &TtrpcContext,
        request: api::PidsRequest,
    ) -> ttrpc::Result<api::PidsResponse> {
        let container = self.0.container(&request.id)?;
        Ok(api::PidsResponse {
            processes: container.pids().await?,
            ..Default::default()
        })
    }

    async fn pause(&self, _: &TtrpcContext, request: api::PauseRequest) -> ttrpc::Result<Empty> {
        let container = self.0.container(&request.id)?;
        detached(async move { container.pause().await }).await?;
        Ok(Empty::new())
    }

    async fn resume(&self, _: &TtrpcContext, request: api::ResumeRequest) -> ttrpc::Result<Empty> {
        let container = self.0.container(&request.id)?;
        detached(async move { container.resume().await }).await?;
        Ok(Empty::new())
    }

    async fn checkpoint(
        &self,
        _: &TtrpcContext,
        request: api::CheckpointTaskRequest,
    ) -> ttrpc::Result<Empty> {
        tracing::info!(id = request.id, path = request.path, "checkpoint");
        let container = self.0.container(&request.id)?;
        detached(async move { checkpoint::checkpoint(&container, &request).await }).await?;
        Ok(Empty::new())
    }

    async fn kill(&self, _: &TtrpcContext, request: api::KillRequest) -> ttrpc::Result<Empty> {
        tracing::info!(
            id = request.id,
            exec_id = request.exec_id,
            signal = request.signal,
            all = request.all,
            "kill"
        );
        let container = self.0.container(&request.id)?;
        detached(async move {
            match request.exec_id.as_str() {
                "" => container.kill(request.signal, request.all).await,
                exec_id => container.exec(exec_id)?.kill(request.signal),
            }
        })
        .await?;
        Ok(Empty::new())
    }

    async fn exec(
        &self,
        _: &TtrpcContext,
        request: api::ExecProcessRequest,
    ) -> ttrpc::Result<Empty> {
        self.0.container(&request.id)?.add_exec(request)?;
        Ok(Empty::new())
    }

    async fn resize_pty(
        &self,
        _: &TtrpcContext,
        request: api::ResizePtyRequest,
    ) -> ttrpc::Result<Empty> {
        let container = self.0.container(&request.id)?;
        let console = match request.exec_id.as_str() {
            "" => container.init.console(),
            exec_id => container.exec(exec_id)?.process.console(),
        };
        if let Some(console) = console {
            console.resize(request.width, request.height)?;
        }
        Ok(Empty::new())
    }

    async fn close_io(
        &self,
        _: &TtrpcContext,
        request: api::CloseIORequest,
    ) -> ttrpc::Result<Empty> {
        let container = self.0.container(&request.id)?;
        if request.stdin {
            match request.exec_id.as_str() {
                "" => container.init.close_input(),
                exec_id => container.exec(exec_id)?.process.close_input(),
            }
        }
        Ok(Empty::new())
    }

    async fn update(
        &self,
        _: &TtrpcContext,
        request: api::UpdateTaskRequest,
    ) -> ttrpc::Result<Empty> {
        let container = self.0.container(&request.id)?;
        let resources = request.resources.into_option().unwrap_or_default().value;
        detached(async move { container.update(&resources).await }).await?;
        Ok(Empty::new())
    }

    async fn wait(
        &self,
        _: &TtrpcContext,
        request: api::WaitRequest,
    ) -> ttrpc::Result<api::WaitResponse> {
        let container = self.0.container(&request.id)?;
        let exit = match request.exec_id.as_str() {
            "" => container.init.wait().await,
            exec_id => container.exec(exec_id)?.process.wait().await,
        };
        Ok(api::WaitResponse {
            exit_status: exit.status,
            exited_at: MessageField::some(timestamp(exit.at)),
            ..Default::default()
        })
    }

    async fn stats(
        &self,
        _: &TtrpcContext,
        request: api::StatsRequest,
    ) -> ttrpc::Result<api::StatsResponse> {
        let stats = self.0.container(&request.id)?.stats().await?;
        Ok(api::StatsResponse {
            stats: MessageField::some(stats),
            ..Default::default()
        })
    }

    async fn connect(
        &self,
        _: &TtrpcContext,
        request: api::ConnectRequest,
    ) -> ttrpc::Result<api::ConnectResponse> {
        let task_pid = self
            .0
            .container(&request.id)
            .map_or(0, |container| container.init.pid());
        Ok(api::ConnectResponse {
            shim_pid: std::process::id(),
            task_pid,
            ..Default::default()
        })
    }

    async fn shutdown(
        &self,
        _: &TtrpcContext,
        request: api::ShutdownRequest,
    ) -> ttrpc::Result<Empty> {
        tracing::info!(id = request.id, now = request.now, "shutdown");
        self.0.end_if_empty();
        Ok(Empty::new())
    }
}
