//! The containers of one shim.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use containerd_shim_protos::api::CreateTaskRequest;
use containerd_shim_protos::events::task::TaskDelete;
use protobuf::MessageField;

use crate::container::{Container, Context};
use crate::create;
use crate::error::{Error, Result};
use crate::events::timestamp;
use crate::reaper::Exit;
use crate::rest::Rest;

/// A container, or the promise of one.
#[derive(Debug)]
enum Entry {
    /// `Create` is working: the id is taken, nothing can be asked of it.
    Coming,
    There(Arc<Container>),
}

/// See the module's documentation.
#[derive(Debug)]
pub(crate) struct Pod {
    pub(crate) context: Arc<Context>,
    containers: Mutex<HashMap<String, Entry>>,
    rest: Rest,
}

impl Pod {
    /// A pod without containers.
    pub(crate) fn new(context: Arc<Context>) -> Self {
        Self {
            context,
            containers: Mutex::default(),
            rest: Rest::default(),
        }
    }

    /// For the server, which has it watched.
    pub(crate) fn rest(&self) -> Rest {
        self.rest.clone()
    }

    fn containers(&self) -> MutexGuard<'_, HashMap<String, Entry>> {
        self.containers
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }

    /// Creates a container; answers the pid of its first process, or 0.
    pub(crate) async fn create(&self, request: CreateTaskRequest) -> Result<u32> {
        let id = request.id.clone();
        self.rest.disturb();
        {
            let mut containers = self.containers();
            if containers.contains_key(&id) {
                return Err(Error::ContainerExists(id));
            }
            containers.insert(id.clone(), Entry::Coming);
        }
        match create::create(Arc::clone(&self.context), request).await {
            Ok(container) => {
                let pid = container.init.pid();
                self.containers().insert(id, Entry::There(container));
                Ok(pid)
            }
            Err(error) => {
                self.containers().remove(&id);
                Err(error)
            }
        }
    }

    /// A container that is there.
    pub(crate) fn container(&self, id: &str) -> Result<Arc<Container>> {
        self.rest.disturb();
        match self.containers().get(id) {
            Some(Entry::There(container)) => Ok(Arc::clone(container)),
            Some(Entry::Coming) | None => Err(Error::NoContainer),
        }
    }

    /// All containers that are there.
    pub(crate) fn all(&self) -> Vec<Arc<Container>> {
        self.containers()
            .values()
            .filter_map(|entry| match entry {
                Entry::There(container) => Some(Arc::clone(container)),
                Entry::Coming => None,
            })
            .collect()
    }

    /// Deletes a container and tells containerd.
    pub(crate) async fn delete(&self, id: &str) -> Result<(u32, Exit)> {
        let container = self.container(id)?;
        let (pid, exit) = container.delete().await?;
        self.containers().remove(id);
        self.context.publisher.publish(&TaskDelete {
            container_id: id.to_owned(),
            pid,
            exit_status: exit.status,
            exited_at: MessageField::some(timestamp(exit.at)),
            ..Default::default()
        });
        Ok((pid, exit))
    }

    /// Ends the shim if it has nothing left.
    pub(crate) fn end_if_empty(&self) {
        if self.containers().is_empty() {
            self.context.shutdown.cancel();
        }
    }

    /// What an operator sees on SIGUSR1.
    pub(crate) fn dump(&self) {
        let containers = self.all();
        tracing::info!(containers = containers.len(), "state of the shim");
        for container in containers {
            let busy = container.operation.try_lock().is_err();
            let view = container.view();
            tracing::info!(
                id = container.id,
                pid = container.init.pid(),
                state = ?view.state,
                activity = ?view.activity,
                busy,
                execs = ?view
                    .execs
                    .values()
                    .map(|exec| (&exec.process.id, exec.process.pid(), exec.state()))
                    .collect::<Vec<_>>(),
                cgroup = ?view.cgroup,
                "container"
            );
        }
    }
}
