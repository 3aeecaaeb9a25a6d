//! Events to containerd, in the order in which they were published.

use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use containerd_shim_protos::api::ForwardRequest;
use containerd_shim_protos::events::task::{
    TaskCreate, TaskDelete, TaskExecAdded, TaskExecStarted, TaskExit, TaskOOM, TaskPaused,
    TaskResumed, TaskStart,
};
use containerd_shim_protos::shim::event::Envelope;
use containerd_shim_protos::shim_async::{Client, EventsClient};
use containerd_shim_protos::topics;
use protobuf::MessageField;
use protobuf::well_known_types::timestamp::Timestamp;
use tokio::sync::{mpsc, oneshot};

use crate::any::{Packed, to_any};

/// How long one attempt may take, as in the Go shim.
const ATTEMPT_TIMEOUT: Duration = Duration::from_secs(5);

/// How long an event is worth delivering. containerd asks for the state of all
/// tasks when it starts, so that older events say nothing new.
const LIFETIME: Duration = Duration::from_secs(60);

/// Pause between attempts while containerd is away.
const RETRY_PAUSE: Duration = Duration::from_secs(1);

/// A message with its topic.
pub(crate) trait Event: Packed {
    /// containerd's name for it.
    const TOPIC: &'static str;
}

macro_rules! event {
    ($($message:ty => $topic:ident),* $(,)?) => {
        $(impl Event for $message { const TOPIC: &'static str = topics::$topic; })*
    };
}

event! {
    TaskCreate => TASK_CREATE_EVENT_TOPIC,
    TaskStart => TASK_START_EVENT_TOPIC,
    TaskExit => TASK_EXIT_EVENT_TOPIC,
    TaskDelete => TASK_DELETE_EVENT_TOPIC,
    TaskExecAdded => TASK_EXEC_ADDED_EVENT_TOPIC,
    TaskExecStarted => TASK_EXEC_STARTED_EVENT_TOPIC,
    TaskPaused => TASK_PAUSED_EVENT_TOPIC,
    TaskResumed => TASK_RESUMED_EVENT_TOPIC,
    TaskOOM => TASK_OOM_EVENT_TOPIC,
}

enum Order {
    Forward(Box<Envelope>, Instant),
    Drain(oneshot::Sender<()>),
}

/// Publishes events; never waits for containerd.
#[derive(Debug, Clone)]
pub(crate) struct Publisher {
    namespace: String,
    queue: mpsc::UnboundedSender<Order>,
}

impl Publisher {
    /// Starts the one worker that delivers to the ttrpc socket at `address`.
    pub(crate) fn start(namespace: &str, address: &str) -> Self {
        // Unbounded: whoever publishes an exit must never wait for containerd,
        // and what piles up while it is away dies of age.
        let (queue, orders) = mpsc::unbounded_channel();
        let address = match address.strip_prefix("unix://") {
            Some(_) => address.to_owned(),
            None => format!("unix://{address}"),
        };
        tokio::spawn(deliver(address, orders));
        Self {
            namespace: namespace.to_owned(),
            queue,
        }
    }

    /// Queues an event.
    pub(crate) fn publish<E: Event>(&self, event: &E) {
        let event = match to_any(event) {
            Ok(event) => event,
            Err(error) => {
                tracing::error!(topic = E::TOPIC, %error, "cannot encode an event");
                return;
            }
        };
        let envelope = Envelope {
            timestamp: MessageField::some(timestamp(SystemTime::now())),
            namespace: self.namespace.clone(),
            topic: E::TOPIC.to_owned(),
            event: MessageField::some(event),
            ..Default::default()
        };
        tracing::debug!(topic = E::TOPIC, "publish");
        // The worker lives as long as this process.
        drop(
            self.queue
                .send(Order::Forward(Box::new(envelope), Instant::now())),
        );
    }

    /// Waits until everything queued so far is delivered or given up.
    pub(crate) async fn drain(&self, limit: Duration) {
        let (done, drained) = oneshot::channel();
        drop(self.queue.send(Order::Drain(done)));
        if tokio::time::timeout(limit, drained).await.is_err() {
            tracing::warn!("events are left that containerd did not take");
        }
    }
}

async fn deliver(address: String, mut orders: mpsc::UnboundedReceiver<Order>) {
    let mut client: Option<EventsClient> = None;
    while let Some(order) = orders.recv().await {
        match order {
            Order::Forward(envelope, queued) => {
                forward(&address, &mut client, *envelope, queued).await;
            }
            Order::Drain(done) => drop(done.send(())),
        }
    }
}

/// Delivers one event, trying again until it is too old: the events behind it
/// wait, because containerd relies on their order.
async fn forward(
    address: &str,
    client: &mut Option<EventsClient>,
    envelope: Envelope,
    queued: Instant,
) {
    let topic = envelope.topic.clone();
    let request = ForwardRequest {
        envelope: MessageField::some(envelope),
        ..Default::default()
    };
    loop {
        let error = match attempt(address, client, &request).await {
            Ok(()) => return,
            Err(error) => error,
        };
        if let ttrpc::Error::RpcStatus(status) = &error {
            // containerd understood and refused; it would again.
            tracing::warn!(topic, status = status.message(), "event refused");
            return;
        }
        *client = None;
        if queued.elapsed() > LIFETIME {
            tracing::warn!(topic, %error, "event dropped");
            return;
        }
        tokio::time::sleep(RETRY_PAUSE).await;
    }
}

async fn attempt(
    address: &str,
    client: &mut Option<EventsClient>,
    request: &ForwardRequest,
) -> ttrpc::Result<()> {
    let client = match client {
        Some(client) => client,
        None => client.insert(EventsClient::new(Client::connect(address).await?)),
    };
    let context = ttrpc::context::with_duration(ATTEMPT_TIMEOUT);
    client.forward(context, request).await?;
    Ok(())
}

/// A point in time as protobuf writes it.
pub(crate) fn timestamp(at: SystemTime) -> Timestamp {
    // The clock of a node stands after 1970.
    let since = at.duration_since(UNIX_EPOCH).unwrap_or_default();
    Timestamp {
        seconds: since.as_secs().cast_signed(),
        nanos: since.subsec_nanos().cast_signed(),
        ..Default::default()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn events_are_packed_with_the_bare_type_name() {
        let any = to_any(&TaskStart {
            container_id: "web".into(),
            pid: 7,
            ..Default::default()
        })
        .unwrap();
        assert_eq!(any.type_url, "containerd.events.TaskStart");
    }

    #[test]
    fn a_timestamp_counts_from_1970() {
        let at = UNIX_EPOCH + Duration::new(5, 6);
        let timestamp = timestamp(at);
        assert_eq!((timestamp.seconds, timestamp.nanos), (5, 6));
    }
}
