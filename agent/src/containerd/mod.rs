//! containerd's API, as far as migrations need it.

pub(crate) mod content;
pub(crate) mod image;
pub(crate) mod snapshot;
pub(crate) mod task;

use std::collections::HashMap;
use std::error::Error as _;
use std::fmt;
use std::path::Path;
use std::time::Duration;

use anyhow::Context as _;
use containerd_client::Client;
use containerd_client::events::ContainerDelete;
use containerd_client::services::v1::{
    Container, CreateContainerRequest, CreateRequest, DeleteContainerRequest, DeleteRequest,
    GetContainerRequest, Lease, ListContainersRequest, ListNamespacesRequest, ListRequest,
    SubscribeRequest, UpdateContainerRequest,
};
use containerd_client::types::Envelope;
use hyper_util::rt::TokioIo;
use prost::Message as _;
use prost_types::FieldMask;
use tokio::net::UnixStream;
use tonic::metadata::{Ascii, MetadataValue};
use tonic::transport::{Channel, Endpoint};
use tonic::{Code, Request, Status, Streaming};

/// Calls that only read or write containerd's database.
const QUICK: Duration = Duration::from_secs(10);

/// A list of containers with their specifications: containerd itself sends no
/// more than 16 MiB in one message.
const LIST_LIMIT_BYTES: usize = 16 << 20;

/// containerd collects what a lease protects once this time has passed, should
/// we never come back to delete the lease.
const LEASE_LIFETIME: Duration = Duration::from_secs(60 * 60);

/// A call that containerd refused or did not answer.
#[derive(Debug)]
pub(crate) struct CallError {
    action: String,
    status: Box<Status>,
}

impl fmt::Display for CallError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { action, status } = self;
        if self.is_lost() {
            return write!(f, "containerd did not answer when it was to {action}");
        }
        match status.message() {
            // How containerd says that the shim's end of the connection is gone.
            closed if closed.contains("ttrpc: closed") => {
                write!(f, "containerd cannot {action}: its shim ended ({closed})")
            }
            message => write!(f, "containerd cannot {action}: {message}"),
        }
    }
}

impl std::error::Error for CallError {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        self.status.source()
    }
}

impl CallError {
    pub(crate) fn code(&self) -> Code {
        self.status.code()
    }

    /// containerd did not answer, as opposed to answering with an error: only a
    /// status that was made on this side has a source.
    pub(crate) fn is_lost(&self) -> bool {
        self.status.source().is_some()
    }
}

/// `Ok(None)` where containerd says that there is no such thing.
pub(crate) fn found<T>(result: Result<T, CallError>) -> Result<Option<T>, CallError> {
    match result {
        Ok(value) => Ok(Some(value)),
        Err(error) if error.code() == Code::NotFound => Ok(None),
        Err(error) => Err(error),
    }
}

/// That it was not there is fine.
pub(crate) fn gone<T>(result: Result<T, CallError>) -> Result<(), CallError> {
    found(result).map(drop)
}

/// This node's containerd. Connects when first used and again whenever it must.
#[derive(Debug, Clone)]
pub(crate) struct Containerd {
    channel: Channel,
}

impl Containerd {
    pub(crate) fn new(socket: &Path) -> Self {
        let socket = socket.to_owned();
        let connector = tower::service_fn(move |_| {
            let socket = socket.clone();
            async move { UnixStream::connect(socket).await.map(TokioIo::new) }
        });
        // The URI is never resolved: the connector knows where to go.
        let channel =
            Endpoint::from_static("http://containerd").connect_with_connector_lazy(connector);
        Self { channel }
    }

    /// Everything in one namespace.
    pub(crate) fn namespace(&self, name: &str) -> anyhow::Result<Namespace> {
        Ok(Namespace {
            channel: self.channel.clone(),
            header: name
                .parse()
                .with_context(|| format!("{name:?} cannot be a containerd namespace"))?,
            lease: None,
        })
    }

    pub(crate) async fn version(&self) -> Result<String, CallError> {
        let mut request = Request::new(());
        request.set_timeout(QUICK);
        Client::from(self.channel.clone())
            .version()
            .version(request)
            .await
            .map(|response| response.into_inner().version)
            .map_err(failed(|| "tell its version".into()))
    }

    /// Deleted containers, from now on.
    pub(crate) async fn container_deletions(&self) -> Result<Deletions, CallError> {
        let request = SubscribeRequest {
            filters: vec!["topic==\"/containers/delete\"".into()],
        };
        let events = Client::from(self.channel.clone())
            .events()
            .subscribe(Request::new(request))
            .await
            .map_err(failed(|| "subscribe to events".into()))?;
        Ok(Deletions(events.into_inner()))
    }

    pub(crate) async fn namespaces(&self) -> Result<Vec<String>, CallError> {
        let mut request = Request::new(ListNamespacesRequest::default());
        request.set_timeout(QUICK);
        let response = Client::from(self.channel.clone())
            .namespaces()
            .list(request)
            .await
            .map_err(failed(|| "list namespaces".into()))?;
        let namespaces = response.into_inner().namespaces;
        Ok(namespaces.into_iter().map(|n| n.name).collect())
    }
}

/// Containers that are being deleted.
#[derive(Debug)]
pub(crate) struct Deletions(Streaming<Envelope>);

impl Deletions {
    /// Namespace and id of the next one; none when containerd ends.
    pub(crate) async fn next(&mut self) -> Result<Option<(String, String)>, CallError> {
        let message = self.0.message().await;
        let envelope = message.map_err(failed(|| "go on telling events".into()))?;
        // An event that cannot be understood names nobody.
        Ok(envelope.map(|envelope| {
            let event = envelope
                .event
                .map(|any| ContainerDelete::decode(any.value.as_slice()));
            let id = event
                .and_then(Result::ok)
                .map(|event| event.id)
                .unwrap_or_default();
            (envelope.namespace, id)
        }))
    }
}

/// One namespace of containerd, optionally under a lease: what is made under a
/// lease is not collected while the lease exists.
#[derive(Debug, Clone)]
pub(crate) struct Namespace {
    channel: Channel,
    header: MetadataValue<Ascii>,
    lease: Option<MetadataValue<Ascii>>,
}

impl Namespace {
    fn client(&self) -> Client {
        Client::from(self.channel.clone())
    }

    fn request<T>(&self, message: T, timeout: Duration) -> Request<T> {
        let mut request = self.untimed(message);
        request.set_timeout(timeout);
        request
    }

    fn untimed<T>(&self, message: T) -> Request<T> {
        let mut request = Request::new(message);
        let metadata = request.metadata_mut();
        metadata.insert("containerd-namespace", self.header.clone());
        if let Some(lease) = &self.lease {
            metadata.insert("containerd-lease", lease.clone());
        }
        request
    }

    // ---- leases ----

    /// Makes a lease, or takes the one of that name, and works under it.
    pub(crate) async fn lease(&self, id: &str) -> anyhow::Result<Self> {
        let expires = crate::clock::rfc3339(std::time::SystemTime::now() + LEASE_LIFETIME);
        let labels = HashMap::from([("containerd.io/gc.expire".to_owned(), expires)]);
        let request = CreateRequest {
            id: id.to_owned(),
            labels,
        };
        let created = self
            .client()
            .leases()
            .create(self.request(request, QUICK))
            .await
            .map_err(failed(|| format!("create lease {id}")));
        match created {
            Err(error) if error.code() != Code::AlreadyExists => return Err(error.into()),
            _ => {}
        }
        Ok(Self {
            lease: Some(
                id.parse()
                    .with_context(|| format!("{id:?} cannot name a lease"))?,
            ),
            ..self.clone()
        })
    }

    pub(crate) async fn delete_lease(&self, id: &str) -> Result<(), CallError> {
        let request = DeleteRequest {
            id: id.to_owned(),
            sync: false,
        };
        gone(
            self.client()
                .leases()
                .delete(self.request(request, QUICK))
                .await
                .map_err(failed(|| format!("delete lease {id}"))),
        )
    }

    pub(crate) async fn leases(&self) -> Result<Vec<Lease>, CallError> {
        let response = self
            .client()
            .leases()
            .list(self.request(ListRequest::default(), QUICK))
            .await
            .map_err(failed(|| "list leases".into()))?;
        Ok(response.into_inner().leases)
    }

    // ---- containers ----

    pub(crate) async fn container(&self, id: &str) -> Result<Option<Container>, CallError> {
        let request = GetContainerRequest { id: id.to_owned() };
        let answer = self
            .client()
            .containers()
            .get(self.request(request, QUICK))
            .await
            .map_err(failed(|| format!("read container {id}")));
        Ok(found(answer)?.and_then(|response| response.into_inner().container))
    }

    /// Containers that carry the label `key`, whatever its value.
    pub(crate) async fn containers_with_label(
        &self,
        key: &str,
    ) -> Result<Vec<Container>, CallError> {
        self.containers(vec![format!("labels.\"{key}\"")]).await
    }

    pub(crate) async fn container_ids(&self) -> Result<Vec<String>, CallError> {
        Ok(self
            .containers(Vec::new())
            .await?
            .into_iter()
            .map(|c| c.id)
            .collect())
    }

    async fn containers(&self, filters: Vec<String>) -> Result<Vec<Container>, CallError> {
        let request = ListContainersRequest { filters };
        let response = self
            .client()
            .containers()
            .max_decoding_message_size(LIST_LIMIT_BYTES)
            .list(self.request(request, QUICK))
            .await
            .map_err(failed(|| "list containers".into()))?;
        Ok(response.into_inner().containers)
    }

    pub(crate) async fn create_container(&self, container: Container) -> Result<(), CallError> {
        let id = container.id.clone();
        let request = CreateContainerRequest {
            container: Some(container),
        };
        self.client()
            .containers()
            .create(self.request(request, QUICK))
            .await
            .map(drop)
            .map_err(failed(|| format!("create container {id}")))
    }

    pub(crate) async fn set_container_labels(
        &self,
        id: &str,
        labels: HashMap<String, String>,
    ) -> Result<(), CallError> {
        let request = UpdateContainerRequest {
            container: Some(Container {
                id: id.to_owned(),
                labels,
                ..Default::default()
            }),
            update_mask: Some(FieldMask {
                paths: vec!["labels".into()],
            }),
        };
        self.client()
            .containers()
            .update(self.request(request, QUICK))
            .await
            .map(drop)
            .map_err(failed(|| format!("label container {id}")))
    }

    pub(crate) async fn delete_container(&self, id: &str) -> Result<(), CallError> {
        let request = DeleteContainerRequest { id: id.to_owned() };
        gone(
            self.client()
                .containers()
                .delete(self.request(request, QUICK))
                .await
                .map_err(failed(|| format!("delete container {id}"))),
        )
    }
}

/// For `map_err`: what containerd could not do.
fn failed(action: impl FnOnce() -> String) -> impl FnOnce(Status) -> CallError {
    |status| CallError {
        action: action(),
        status: Box::new(status),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_containerd_that_is_not_there_counts_as_lost_and_a_refusal_does_not() {
        let temp = tempfile::tempdir().unwrap();
        let nobody = Containerd::new(&temp.path().join("none.sock"));
        assert!(nobody.version().await.unwrap_err().is_lost());

        let refused = failed(|| "x".into())(Status::unavailable("shim: closed"));
        assert!(!refused.is_lost());
    }

    #[tokio::test]
    async fn what_is_not_there_is_none_and_other_errors_stay_errors() {
        let missing = || failed(|| "x".into())(Status::not_found("no"));
        let broken = || failed(|| "x".into())(Status::internal("no"));
        assert!(found::<()>(Err(missing())).unwrap().is_none());
        assert!(gone::<()>(Err(missing())).is_ok());
        assert!(gone::<()>(Err(broken())).is_err());
    }
}
