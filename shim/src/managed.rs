//! What a managed container of a pod asks of sternad: whether it has a state
//! somewhere, when it is created, and whether it is to be left alone, when it is
//! told to end.

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use hyper_util::rt::TokioIo;
use nodeapi::{PodAnnotations, PodContainer};
use proto::agent as pb;
use proto::agent::expect_response::Answer;
use proto::agent::pods_client::PodsClient;
use tokio::net::UnixStream;
use tokio::time::Instant;
use tonic::transport::{Channel, Endpoint};

use crate::bundle::Spec;
use crate::container::{Container, Context};
use crate::error::{Error, Result};
use crate::state::State;

/// A state that has not begun to come by then does not come. sternad's own limit
/// is 90 s; the kubelet's, for creating and starting together, two minutes.
const EXPECT_TIMEOUT: Duration = Duration::from_secs(95);

/// Longest time that a signal waits. The kubelet waits for the grace period and
/// two minutes more, and counts the grace period from when the signal was
/// delivered.
const HOLD_TIMEOUT: Duration = Duration::from_secs(100);

const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);

/// A sternad that is restarted is back by then; what it was asked is asked again.
const AWAY_TIMEOUT: Duration = Duration::from_secs(10);
const AWAY_PAUSE: Duration = Duration::from_millis(200);

/// The container's place in its pod, if it has one and is managed.
pub(crate) fn managed(spec: &Spec) -> Option<PodAnnotations> {
    PodAnnotations::read(|name| spec.annotation(name)).filter(|pod| pod.managed)
}

/// Serves `Create` of a managed container: afterwards its permission to receive
/// lies ready if there is a state for it. Fails where there is one that does not
/// come, unless the pod's owner would rather have it start from nothing.
pub(crate) async fn await_state(
    context: &Arc<Context>,
    id: &str,
    pod: &PodAnnotations,
    upperdir: Option<&Path>,
) -> Result<()> {
    let request = pb::ExpectRequest {
        container: Some(container_name(context, id)),
        name: Some(to_wire(&pod.name)),
        upperdir: upperdir.map_or_else(String::new, |path| path.display().to_string()),
    };
    let asked = persistent(|| async { connect(context).await?.expect(request.clone()).await });
    let reason = match tokio::time::timeout(EXPECT_TIMEOUT, asked).await {
        Ok(Ok(response)) => match response.into_inner().answer {
            Some(Answer::Fresh(_) | Answer::Expected(_)) => return Ok(()),
            Some(Answer::NotRestored(lost)) => lost.reason,
            None => "sternad gives an answer of another version".to_owned(),
        },
        Ok(Err(status)) => format!(
            "sternad cannot say whether it has a state: {}",
            status.message()
        ),
        Err(_) => "sternad does not say whether it has a state".to_owned(),
    };
    if pod.cold_start {
        tracing::warn!(id, container = %pod.name, reason, "starts without its state");
        return Ok(());
    }
    Err(Error::NotReceived {
        id: id.to_owned(),
        reason,
    })
}

impl Container {
    /// Holds a signal back while the container is on its way to another node, or
    /// may soon be. Returns when it is to be delivered; to a container that has
    /// moved it comes too late, as it should.
    pub(crate) async fn hold_signal(&self, signal: u32) {
        let Some(pod) = &self.pod else { return };
        if signal == libc::SIGKILL.unsigned_abs() || self.view().state != State::Running {
            return;
        }
        let id = &self.id;
        tracing::info!(id, signal, "holding the signal");
        let request = pb::LeavingRequest {
            container: Some(container_name(&self.context, id)),
            name: Some(to_wire(pod)),
        };
        let asked =
            persistent(|| async { connect(&self.context).await?.leaving(request.clone()).await });
        tokio::select! {
            _ = self.init.wait() => tracing::info!(id, "ended while its signal was held"),
            answer = asked => match answer {
                Ok(answer) => tracing::info!(id, answer = ?answer.into_inner(), "releasing the signal"),
                Err(status) => tracing::warn!(
                    id,
                    reason = status.message(),
                    "releasing the signal: sternad cannot say whether the container leaves"
                ),
            },
            () = tokio::time::sleep(HOLD_TIMEOUT) => {
                tracing::warn!(id, "releasing the signal: the container has not left in time");
            }
        }
    }
}

/// Asks until there is an answer; the last error, once nobody has been there to
/// give one for a while.
async fn persistent<T, F>(ask: impl Fn() -> F) -> std::result::Result<T, tonic::Status>
where
    F: Future<Output = std::result::Result<T, tonic::Status>>,
{
    let mut away_since = Instant::now();
    loop {
        let asked = Instant::now();
        let status = match ask().await {
            Ok(answer) => return Ok(answer),
            Err(status) => status,
        };
        // It was there, and has just gone away.
        if asked.elapsed() > AWAY_PAUSE {
            away_since = Instant::now();
        }
        if away_since.elapsed() > AWAY_TIMEOUT {
            return Err(status);
        }
        tokio::time::sleep(AWAY_PAUSE).await;
    }
}

async fn connect(context: &Context) -> std::result::Result<PodsClient<Channel>, tonic::Status> {
    let path = context.run_dir.agent_socket();
    let shown = path.display().to_string();
    let connector = tower::service_fn(move |_| {
        let path = path.clone();
        async move { UnixStream::connect(path).await.map(TokioIo::new) }
    });
    // The URI is never resolved: the connector knows where to go.
    let channel = Endpoint::from_static("http://sternad")
        .connect_timeout(CONNECT_TIMEOUT)
        .connect_with_connector(connector)
        .await
        .map_err(|error| {
            tonic::Status::unavailable(format!("it does not answer at {shown} ({error})"))
        })?;
    Ok(PodsClient::new(channel))
}

fn container_name(context: &Context, id: &str) -> pb::ContainerName {
    pb::ContainerName {
        namespace: context.namespace.clone(),
        id: id.to_owned(),
    }
}

fn to_wire(name: &PodContainer) -> pb::PodContainer {
    pb::PodContainer {
        namespace: name.namespace.clone(),
        pod: name.pod.clone(),
        uid: name.uid.clone(),
        container: name.container.clone(),
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicU32, Ordering};

    use super::*;

    #[tokio::test]
    async fn what_was_asked_is_asked_again_while_sternad_restarts() {
        let asked = AtomicU32::new(0);
        let answer = persistent(|| async {
            match asked.fetch_add(1, Ordering::Relaxed) {
                0..3 => Err(tonic::Status::unavailable("it is restarted")),
                number => Ok(number),
            }
        });
        assert_eq!(answer.await.ok(), Some(3));
    }
}
