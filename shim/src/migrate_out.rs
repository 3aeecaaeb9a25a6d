//! A container on its way to another node.
//!
//! ```text
//!   Idle --Send--> Sending --Committed--> Committed --(its tasks are ended)--> exit
//!     ^               |                    |     |                              ^
//!     |               |                    |     +--Undecided--> Undecided -----+
//!     +-- Sent(Stayed), at any time -------+----------------------/
//! ```
//!
//! All along containerd sees a running container. Until the commit a signal is
//! passed on, and a container that dies of it does not move. After the commit
//! the container lives on the other node, or nobody here knows: a signal is
//! answered with "process already finished", as for one that has just ended, and
//! the exit follows when the tasks are ended. While the other node cannot be
//! asked, SIGKILL is carried out, because it lets nothing run: whoever sends it
//! does not want the container any more.
//!
//! An engine that dies is followed by another one, which finds on disk how far
//! the migration had come. There is never more than one that acts.

use std::sync::Arc;
use std::time::Duration;

use nodeapi::{FromEngine, Outcome, SendJob, Ticket, ToEngine};
use proto::shim::control::SendRequest;

use crate::container::Container;
use crate::engine_link::Engine;
use crate::error::{Error, Result};
use crate::state::{Activity, Verb};

/// Between two engines of which the first died at once, or did not start.
const NEXT_ENGINE_PAUSE: Duration = Duration::from_secs(1);

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
    let job = Box::new(SendJob {
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
    });
    match Engine::start(&container.context, &ToEngine::Send(job.clone())).await {
        Ok(engine) => {
            let followed = see_through(Arc::clone(container), engine, job);
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

/// How following an engine ended.
enum Followed {
    /// It said how the migration ended.
    To(Outcome),
    /// It died.
    Died,
    /// It ends with the shim.
    ShimEnds,
}

/// Follows engines until one of them says how the migration ended.
async fn see_through(container: Arc<Container>, mut engine: Engine, job: Box<SendJob>) {
    let mut pause = Duration::ZERO;
    loop {
        match follow(&container, &mut engine).await {
            Followed::To(outcome) => {
                match outcome {
                    Outcome::Migrated => tracing::info!(id = container.id, "moved away"),
                    Outcome::Stayed { reason } => {
                        tracing::info!(id = container.id, reason, "stays");
                        container.set_activity_if_alive(Activity::Idle);
                    }
                }
                return engine.see_off(&container.context).await;
            }
            Followed::ShimEnds => return,
            Followed::Died => {}
        }
        let ended = engine.end().await;
        tracing::error!(id = container.id, ended, "engine died, another follows");
        let next = async {
            tokio::time::sleep(pause).await;
            next_engine(&container, &job).await
        };
        engine = tokio::select! {
            engine = next => engine,
            () = container.context.shutdown.cancelled() => return,
        };
        pause = NEXT_ENGINE_PAUSE;
    }
}

async fn follow(container: &Container, engine: &mut Engine) -> Followed {
    loop {
        let message = tokio::select! {
            message = engine.next() => message,
            // The engine goes with the shim.
            () = container.context.shutdown.cancelled() => return Followed::ShimEnds,
        };
        match message {
            Some((FromEngine::Committed, _)) => {
                container.set_activity_if_alive(Activity::Committed);
            }
            Some((FromEngine::Undecided, _)) => {
                tracing::warn!(id = container.id, "undecided: it stands still here");
                container.set_activity_if_alive(Activity::Undecided);
            }
            Some((FromEngine::Sent(outcome), _)) => return Followed::To(outcome),
            Some((message, _)) => tracing::error!(?message, "not for a sender"),
            None => return Followed::Died,
        }
    }
}

/// The engine that brings to its end what a dead one had begun. Without one the
/// container might stand still for good, so that it is tried until there is one.
async fn next_engine(container: &Container, job: &SendJob) -> Engine {
    let order = ToEngine::Recover(Box::new(job.clone()));
    loop {
        match Engine::start(&container.context, &order).await {
            Ok(engine) => return engine,
            Err(error) => {
                tracing::error!(
                    id = container.id,
                    error = error.chain(),
                    "no engine to follow"
                );
            }
        }
        tokio::time::sleep(NEXT_ENGINE_PAUSE).await;
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
        let (undecided, cgroup) = {
            let view = self.view();
            (view.activity == Activity::Undecided, view.cgroup.clone())
        };
        if !undecided || signal != libc::SIGKILL.unsigned_abs() {
            return Err(Error::AlreadyFinished);
        }
        let cgroup = cgroup.ok_or(Error::NoCgroup)?;
        tracing::warn!(id = self.id, "killed where it stands still, undecided");
        cgroup
            .kill()
            .await
            .map_err(Error::system("kill the container"))
    }
}
