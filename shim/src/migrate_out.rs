//! A container on its way to another node.
//!
//! ```text
//!   Idle --Send--> Sending --Committed--> Committed --(CRIU ends the tasks)--> exit
//!     ^               |                       |
//!     +--- Sent(Stayed), engine gone          +-- engine gone: it stays frozen here
//! ```
//!
//! All along containerd sees a running container. Until the commit a signal is
//! passed on, and a container that dies of it does not move. After the commit
//! the container lives on the other node: a signal is answered with "process
//! already finished", as for one that has just ended, and the exit follows when
//! CRIU ends the tasks. Should the engine die between commit and that, nobody
//! here knows whether the other node has it: the container stays frozen, is
//! shown as `sending`, and only SIGKILL, which does not let it run again, is
//! carried out, for whoever does know.

use std::sync::Arc;

use nodeapi::{FromEngine, Outcome, SendJob, Ticket, ToEngine};
use proto::shim::control::SendRequest;

use crate::container::Container;
use crate::engine_link::Engine;
use crate::error::{Error, Result};
use crate::state::{Activity, Verb};

/// Starts to send; answers when the engine listens.
pub(crate) async fn send(container: &Arc<Container>, request: SendRequest) -> Result<()> {
    let network = match request.network_json.as_str() {
        "" => None,
        json => Some(
            serde_json::from_str(json).map_err(|error| Error::InvalidArgument {
                what: format!("network: {error}"),
            })?,
        ),
    };
    begin(container)?;
    let job = ToEngine::Send(Box::new(SendJob {
        migration_id: request.migration_id,
        container: container.facts(),
        init_pid: container.init.pid(),
        ticket: Ticket {
            id: request.ticket_id,
            secret: request.ticket_secret,
        },
        peer_address: request.peer_address,
        peer_node: request.peer_node,
        identity_dir: request.identity_dir.into(),
        max_blackout_ms: request.max_blackout_ms,
        deadline_ms: Some(request.deadline_ms).filter(|&limit| limit != 0),
        network,
    }));
    match Engine::start(&container.context, &job).await {
        Ok(engine) => {
            container.view().sender_pid = Some(engine.pid());
            let followed = watch(Arc::clone(container), engine);
            container.context.last_work.spawn(followed);
            Ok(())
        }
        Err(error) => {
            container.set_activity(Activity::Idle);
            Err(error)
        }
    }
}

/// Takes the container for a migration, if nothing else goes on.
fn begin(container: &Container) -> Result<()> {
    let not_sendable = |reason| Error::NotSendable {
        id: container.id.clone(),
        reason,
    };
    container.check(Verb::Send)?;
    let Ok(_operation) = container.operation.try_lock() else {
        return Err(not_sendable("another operation is running on it"));
    };
    {
        let mut view = container.view();
        if view.activity != Activity::Idle {
            return Err(Error::Migrating(container.id.clone()));
        }
        if view.init_ended {
            return Err(not_sendable("it has ended"));
        }
        view.activity = Activity::Sending;
    }
    container.publish_record();
    Ok(())
}

/// Follows an engine to its end.
async fn watch(container: Arc<Container>, mut engine: Engine) {
    let mut committed = false;
    let outcome = loop {
        let message = tokio::select! {
            message = engine.next() => message,
            // The engine goes with the shim.
            () = container.context.shutdown.cancelled() => return,
        };
        match message {
            Some((FromEngine::Committed, _)) => {
                committed = true;
                container.set_activity_if_alive(Activity::Committed);
            }
            Some((FromEngine::Sent(outcome), _)) => break Some(outcome),
            Some((message, _)) => tracing::error!(?message, "not for a sender"),
            None => break None,
        }
    };
    if outcome.is_none() {
        container.view().sender_pid = None;
    }
    match (&outcome, committed) {
        (Some(Outcome::Migrated), _) => {
            tracing::info!(id = container.id, "moved away");
        }
        // By its word the engine knows that the commit did not come about.
        (Some(Outcome::Stayed { reason }), _) => {
            tracing::info!(id = container.id, reason, "stays");
            container.set_activity_if_alive(Activity::Idle);
        }
        (None, false) => {
            let ended = engine.how_it_ended().await;
            tracing::error!(id = container.id, ended, "engine died, the container stays");
            container.set_activity_if_alive(Activity::Idle);
        }
        (None, true) => {
            let ended = engine.how_it_ended().await;
            tracing::error!(
                id = container.id,
                ended,
                "engine died after the commit, the container stays frozen"
            );
        }
    }
    if outcome.is_some() {
        engine.see_off(&container.context).await;
        container.view().sender_pid = None;
    }
}

impl Container {
    /// Changes the activity of a container that has not ended.
    fn set_activity_if_alive(&self, activity: Activity) {
        if !self.view().init_ended {
            self.set_activity(activity);
        }
    }

    /// A signal for a container whose move is committed; see the module's
    /// documentation.
    pub(crate) async fn kill_committed(&self, signal: u32) -> Result<()> {
        let (engine_lives, cgroup) = {
            let view = self.view();
            (view.sender_pid.is_some(), view.cgroup.clone())
        };
        if engine_lives || signal != libc::SIGKILL.unsigned_abs() {
            return Err(Error::AlreadyFinished);
        }
        let cgroup = cgroup.ok_or(Error::NoCgroup)?;
        tracing::warn!(id = self.id, "frozen copy of a moved container killed");
        cgroup
            .kill()
            .await
            .map_err(Error::system("kill the container"))
    }
}
