//! What clients do with a container that is there.

use std::sync::Arc;

use containerd_shim_protos::api::{ProcessInfo, StateResponse, Status};
use containerd_shim_protos::events::task::{TaskPaused, TaskResumed, TaskStart};
use containerd_shim_protos::protobuf::EnumOrUnknown;
use protobuf::MessageField;
use protobuf::well_known_types::any::Any;

use crate::container::Container;
use crate::error::{Error, Result};
use crate::events::timestamp;
use crate::process::Process;
use crate::reaper::Exit;
use crate::restore;
use crate::state::{Activity, ExecState, State, Verb};
use crate::stats;

/// How long deleting a container that was never started waits for the end of
/// the process that runc had prepared.
const CREATED_EXIT_LIMIT: std::time::Duration = std::time::Duration::from_secs(5);

impl Container {
    /// Starts the first process; answers its pid.
    pub(crate) async fn start(self: &Arc<Self>) -> Result<u32> {
        if let Some(arrival) = &self.arrival {
            self.check(Verb::Start)?;
            // Not under the lock: this may take as long as the migration, and
            // the container must be deletable all along.
            return arrival.start(&self.id).await;
        }
        let _operation = self.operation.lock().await;
        self.check(Verb::Start)?;
        let _gate = self.init.gate.lock().await;
        match &self.checkpoint {
            Some(source) => restore::restore(self, source).await?,
            None => self.runc.start().await?,
        }
        if let Some(cgroup) = self.view().cgroup.clone() {
            cgroup.enable_controllers();
        }
        self.enter(State::Running);
        self.publish_start();
        Ok(self.init.pid())
    }

    /// Announces that the first process runs.
    pub(crate) fn publish_start(&self) {
        self.context.publisher.publish(&TaskStart {
            container_id: self.id.clone(),
            pid: self.init.pid(),
            ..Default::default()
        });
    }

    /// Pauses every process.
    pub(crate) async fn pause(&self) -> Result<()> {
        let _operation = self.operation.lock().await;
        self.check(Verb::Pause)?;
        self.view().pausing = true;
        let paused = self.runc.pause().await;
        if paused.is_ok() {
            self.enter(State::Paused);
        }
        self.view().pausing = false;
        paused?;
        self.context.publisher.publish(&TaskPaused {
            container_id: self.id.clone(),
            ..Default::default()
        });
        Ok(())
    }

    /// Lets paused processes go on.
    pub(crate) async fn resume(&self) -> Result<()> {
        let _operation = self.operation.lock().await;
        self.check(Verb::Resume)?;
        self.runc.resume().await?;
        self.enter(State::Running);
        self.context.publisher.publish(&TaskResumed {
            container_id: self.id.clone(),
            ..Default::default()
        });
        Ok(())
    }

    /// Signals the first process, or all of them.
    pub(crate) async fn kill(&self, signal: u32, all: bool) -> Result<()> {
        if let Some(arrival) = &self.arrival
            && self.view().state == State::Receiving
        {
            arrival.cancel("it was killed");
            return Ok(());
        }
        self.hold_signal(signal).await;
        let activity = self.view().activity;
        if matches!(activity, Activity::Committed | Activity::Undecided) {
            return self.kill_committed(signal).await;
        }
        let _operation = self.operation.lock().await;
        self.runc.kill(signal, all).await.map_err(|error| {
            if error.is_finished() {
                Error::AlreadyFinished
            } else if error.is_missing() {
                Error::NoSuchContainer
            } else {
                Error::Runtime(error)
            }
        })
    }

    /// Changes limits; `resources` is OCI's LinuxResources as JSON.
    pub(crate) async fn update(&self, resources: &[u8]) -> Result<()> {
        let _operation = self.operation.lock().await;
        self.check(Verb::Update)?;
        if let Err(error) = serde_json::from_slice::<serde::de::IgnoredAny>(resources) {
            return Err(Error::InvalidArgument {
                what: format!("resources: {error}"),
            });
        }
        Ok(self.runc.update(resources).await?)
    }

    /// Removes what is left of a container that does not run.
    pub(crate) async fn delete(&self) -> Result<(u32, Exit)> {
        if let Some(arrival) = &self.arrival {
            // Before the lock, which its end does not need but ours would.
            if self.view().state == State::Receiving {
                arrival.cancel("it was deleted");
                arrival.ended().await;
            }
        }
        let _operation = self.operation.lock().await;
        self.check(Verb::Delete)?;
        let was_created = self.view().state == State::Created;
        if !was_created {
            self.init.finish_io().await;
        }
        // A checkpoint with exit has removed it in runc, and one that was
        // never restored is not there yet.
        let deleted = match self.runc.delete(false).await {
            Err(error) if error.is_missing() => Ok(()),
            deleted => deleted,
        };
        self.init.abort_io().await;
        let unmounted = self.unmount_rootfs().await;
        deleted?;
        unmounted?;
        if was_created
            && tokio::time::timeout(CREATED_EXIT_LIMIT, self.init.wait())
                .await
                .is_err()
        {
            tracing::warn!(pid = self.init.pid(), "the prepared process did not end");
        }
        self.remove_record();
        let exit = self.init.exit().unwrap_or_else(|| Exit::assumed(0));
        Ok((self.init.pid(), exit))
    }

    /// Every process of the container.
    pub(crate) async fn pids(&self) -> Result<Vec<ProcessInfo>> {
        let (cgroup, state) = {
            let view = self.view();
            (view.cgroup.clone(), view.state)
        };
        let mut pids = match (&cgroup, state) {
            (Some(cgroup), _) => cgroup.processes().unwrap_or_default(),
            (None, State::Created | State::Running | State::Paused) => self.runc.ps().await?,
            (None, _) => Vec::new(),
        };
        if pids.is_empty() && state != State::Stopped {
            // containerd takes a container without processes for a leftover and
            // deletes it. One that is on its way is no leftover.
            pids.push(match self.init.pid() {
                0 => std::process::id(),
                pid => pid,
            });
        }
        let execs: Vec<_> = self.view().execs.values().cloned().collect();
        pids.into_iter()
            .map(|pid| {
                let exec = execs
                    .iter()
                    .find(|exec| exec.state() == ExecState::Running && exec.process.pid() == pid);
                let info = match exec {
                    None => MessageField::none(),
                    Some(exec) => MessageField::some(process_details(&exec.process.id)?),
                };
                Ok(ProcessInfo {
                    pid,
                    info,
                    ..Default::default()
                })
            })
            .collect()
    }

    /// What the control group counts.
    pub(crate) async fn stats(&self) -> Result<Any> {
        let cgroup = self.view().cgroup.clone().ok_or(Error::NoCgroup)?;
        tokio::task::spawn_blocking(move || stats::collect(&cgroup))
            .await
            .map_err(Error::Interrupted)?
    }

    /// What containerd shows of the first process.
    pub(crate) fn init_state(&self) -> StateResponse {
        let status = {
            let view = self.view();
            match view.state {
                State::Created | State::CreatedCheckpoint | State::Receiving => Status::CREATED,
                State::Running if view.pausing => Status::PAUSING,
                State::Running => Status::RUNNING,
                State::Paused => Status::PAUSED,
                State::Stopped => Status::STOPPED,
            }
        };
        self.process_state(&self.init, status)
    }

    /// What containerd shows of an added process.
    pub(crate) fn exec_state(&self, exec_id: &str) -> Result<StateResponse> {
        let exec = self.exec(exec_id)?;
        let paused = self.view().state == State::Paused;
        let status = match exec.state() {
            ExecState::Created => Status::CREATED,
            ExecState::Running if paused => Status::PAUSED,
            ExecState::Running => Status::RUNNING,
            ExecState::Stopped => Status::STOPPED,
        };
        let mut response = self.process_state(&exec.process, status);
        response.exec_id = exec_id.to_owned();
        Ok(response)
    }

    fn process_state(&self, process: &Process, status: Status) -> StateResponse {
        let exit = process.exit();
        StateResponse {
            id: process.id.clone(),
            bundle: self.bundle.display().to_string(),
            pid: process.pid(),
            status: EnumOrUnknown::new(status),
            stdin: process.stdio.stdin.clone(),
            stdout: process.stdio.stdout.clone(),
            stderr: process.stdio.stderr.clone(),
            terminal: process.stdio.terminal,
            exit_status: exit.map_or(0, |exit| exit.status),
            exited_at: exit
                .map(|exit| timestamp(exit.at))
                .map_or_else(MessageField::none, MessageField::some),
            ..Default::default()
        }
    }
}

fn process_details(exec_id: &str) -> Result<Any> {
    let details = containerd_shim_protos::shim::oci::ProcessDetails {
        exec_id: exec_id.to_owned(),
        ..Default::default()
    };
    crate::any::to_any(&details).map_err(|error| Error::InvalidArgument {
        what: format!("exec id {exec_id:?}: {error}"),
    })
}
