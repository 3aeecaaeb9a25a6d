//! Tasks: what containerd knows about running containers.

use std::time::Duration;

use containerd_client::services::v1::{
    CreateTaskRequest, DeleteTaskRequest, GetRequest, KillRequest, ListPidsRequest, StartRequest,
    WaitRequest,
};
use containerd_client::types::Mount;
use containerd_client::types::v1::{Process, Status};
use serde::{Deserialize, Serialize};
use tonic::Code;

use super::{CallError, Namespace, QUICK, failed, found, gone};

/// containerd starts a shim for this one, and the shim its receiving engine.
const CREATE_TIMEOUT: Duration = Duration::from_secs(60);

/// Time for killed processes to be gone: they may have gigabytes to free.
const KILL_TIMEOUT: Duration = Duration::from_secs(30);

/// Where a container's input and output go, as containerd spells it.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Stdio {
    pub(crate) stdin: String,
    pub(crate) stdout: String,
    pub(crate) stderr: String,
    pub(crate) terminal: bool,
}

impl Namespace {
    pub(crate) async fn task(&self, id: &str) -> Result<Option<Process>, CallError> {
        let request = GetRequest {
            container_id: id.into(),
            ..Default::default()
        };
        let answer = self
            .client()
            .tasks()
            .get(self.request(request, QUICK))
            .await
            .map_err(failed(|| format!("read the task of container {id}")));
        Ok(found(answer)?.and_then(|response| response.into_inner().process))
    }

    pub(crate) async fn pids(&self, id: &str) -> Result<Vec<u32>, CallError> {
        let request = ListPidsRequest {
            container_id: id.into(),
        };
        let response = self
            .client()
            .tasks()
            .list_pids(self.request(request, QUICK))
            .await
            .map_err(failed(|| format!("list the processes of container {id}")))?;
        Ok(response
            .into_inner()
            .processes
            .iter()
            .map(|p| p.pid)
            .collect())
    }

    pub(crate) async fn create_task(
        &self,
        id: &str,
        rootfs: Vec<Mount>,
        stdio: Stdio,
    ) -> Result<(), CallError> {
        let request = CreateTaskRequest {
            container_id: id.into(),
            rootfs,
            stdin: stdio.stdin,
            stdout: stdio.stdout,
            stderr: stdio.stderr,
            terminal: stdio.terminal,
            ..Default::default()
        };
        self.client()
            .tasks()
            .create(self.request(request, CREATE_TIMEOUT))
            .await
            .map(drop)
            .map_err(failed(|| format!("create the task of container {id}")))
    }

    /// Returns when the container runs. Of a container that is expected from
    /// another node that is when it has arrived, however long that takes: the
    /// engines have the timeouts.
    pub(crate) async fn start_task(&self, id: &str) -> Result<u32, CallError> {
        let request = StartRequest {
            container_id: id.into(),
            ..Default::default()
        };
        self.client()
            .tasks()
            .start(self.untimed(request))
            .await
            .map(|response| response.into_inner().pid)
            .map_err(failed(|| format!("start container {id}")))
    }

    /// Deletes a task; one that still has processes is killed first.
    pub(crate) async fn remove_task(&self, id: &str) -> Result<(), CallError> {
        let Some(task) = self.task(id).await? else {
            return Ok(());
        };
        if task.status() != Status::Stopped {
            let request = KillRequest {
                container_id: id.into(),
                signal: 9,
                all: true,
                ..Default::default()
            };
            let killed = self
                .client()
                .tasks()
                .kill(self.request(request, KILL_TIMEOUT))
                .await
                .map_err(failed(|| format!("kill container {id}")));
            match killed {
                // A task that never ran has nothing to kill and can be deleted.
                Err(error) if error.code() == Code::FailedPrecondition => {}
                other => gone(other)?,
            }
            if task.status() != Status::Created {
                self.wait_task(id, KILL_TIMEOUT).await?;
            }
        }
        self.delete_task(id).await
    }

    /// Waits until the first process has ended.
    pub(crate) async fn wait_task(&self, id: &str, timeout: Duration) -> Result<(), CallError> {
        let request = WaitRequest {
            container_id: id.into(),
            ..Default::default()
        };
        gone(
            self.client()
                .tasks()
                .wait(self.request(request, timeout))
                .await
                .map_err(failed(|| format!("wait for the end of container {id}"))),
        )
    }

    /// Deletes the task of a container that has ended.
    pub(crate) async fn delete_task(&self, id: &str) -> Result<(), CallError> {
        let request = DeleteTaskRequest {
            container_id: id.into(),
        };
        gone(
            self.client()
                .tasks()
                .delete(self.request(request, KILL_TIMEOUT))
                .await
                .map_err(failed(|| format!("delete the task of container {id}"))),
        )
    }
}
