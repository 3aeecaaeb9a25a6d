//! Starting a migration's engine on this node and listening to it.

use std::path::Path;
use std::time::Duration;

use hyper_util::rt::TokioIo;
use proto::engine as epb;
use proto::engine::engine_client::EngineClient;
use proto::shim::control::SendRequest;
use proto::shim::control_ttrpc::ControlClient;
use tokio::net::UnixStream;
use tonic::transport::{Channel, Endpoint};
use tonic::{Request, Status, Streaming};

use crate::peer::within;
use crate::side::{Failure, Side};

/// The shim starts a process and waits for its socket.
const SEND_TIMEOUT: Duration = Duration::from_secs(15);

const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);

/// An engine answers a cancellation at once, whatever it is doing.
const CANCEL_TIMEOUT: Duration = Duration::from_secs(10);

/// A running engine.
#[derive(Debug, Clone)]
pub(crate) struct Engine {
    client: EngineClient<Channel>,
}

impl Engine {
    /// Has the shim start it.
    pub(crate) async fn start(shim_socket: &Path, request: SendRequest) -> Result<Self, Failure> {
        let failed = |text: String| Failure::new(Side::SourceShim, text);
        let address = format!("unix://{}", shim_socket.display());
        let send = async {
            let client = ttrpc::asynchronous::Client::connect(&address).await?;
            let context = ttrpc::context::with_duration(SEND_TIMEOUT);
            ControlClient::new(client).send(context, &request).await
        };
        let response = tokio::time::timeout(SEND_TIMEOUT, send)
            .await
            .map_err(|_| failed(format!("the shim at {address} does not answer")))?
            .map_err(|error| {
                failed(format!(
                    "the shim cannot start the migration: {}",
                    words(&error)
                ))
            })?;
        Self::connect(Path::new(&response.engine_socket)).await
    }

    pub(crate) async fn connect(socket: &Path) -> Result<Self, Failure> {
        let path = socket.to_owned();
        let connector = tower::service_fn(move |_| {
            let path = path.clone();
            async move { UnixStream::connect(path).await.map(TokioIo::new) }
        });
        // The URI is never resolved: the connector knows where to go.
        let channel = Endpoint::from_static("http://engine")
            .connect_timeout(CONNECT_TIMEOUT)
            .connect_with_connector(connector)
            .await
            .map_err(|error| {
                let text = format!(
                    "the engine at {} cannot be reached: {error}",
                    socket.display()
                );
                Failure::new(Side::SourceShim, text)
            })?;
        Ok(Self {
            client: EngineClient::new(channel),
        })
    }

    /// Connects and listens.
    pub(crate) async fn attach(socket: &Path) -> Result<(Self, Streaming<epb::Progress>), Failure> {
        let engine = Self::connect(socket).await?;
        let events = engine.watch().await?;
        Ok((engine, events))
    }

    pub(crate) async fn watch(&self) -> Result<Streaming<epb::Progress>, Failure> {
        self.client
            .clone()
            .watch(Request::new(epb::WatchRequest {}))
            .await
            .map(tonic::Response::into_inner)
            .map_err(|status| {
                let text = format!("the engine cannot be watched: {}", status.message());
                Failure::new(Side::SourceShim, text)
            })
    }

    /// The destination vouches that the container does not run there and will not:
    /// after the commit this gives it back to this node.
    pub(crate) async fn hand_back(&self, reason: &str) -> Result<(), Status> {
        let request = within(
            CANCEL_TIMEOUT,
            epb::HandBackRequest {
                reason: reason.into(),
            },
        );
        self.client.clone().hand_back(request).await.map(drop)
    }

    /// An operator vouches that the container is the destination's: after the commit
    /// this ends its copy here.
    pub(crate) async fn let_go(&self, reason: &str) -> Result<(), Status> {
        let request = within(
            CANCEL_TIMEOUT,
            epb::LetGoRequest {
                reason: reason.into(),
            },
        );
        self.client.clone().let_go(request).await.map(drop)
    }

    /// Before the commit this stops the migration.
    pub(crate) async fn cancel(&self, reason: &str) -> Result<(), Status> {
        let request = within(
            CANCEL_TIMEOUT,
            epb::CancelRequest {
                reason: reason.into(),
            },
        );
        self.client.clone().cancel(request).await.map(drop)
    }
}

/// What the shim said, without ttrpc's own words around it.
fn words(error: &ttrpc::Error) -> String {
    match error {
        ttrpc::Error::RpcStatus(status) => status.message.clone(),
        other => other.to_string(),
    }
}
