//! Calls to another node's sternad.

use std::io;
use std::time::Duration;

use hyper_util::rt::TokioIo;
use identity::NodeName;
use proto::agent::peer_client::PeerClient;
use rustls::pki_types::ServerName;
use tokio::net::TcpStream;
use tokio::time::timeout;
use tokio_rustls::TlsConnector;
use tonic::transport::{Channel, Endpoint};
use tonic::{Request, Status};

use crate::node::Node;
use crate::side::{Failure, Side};

/// TCP and TLS together.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);

/// A peer that answers no ping for interval plus timeout is gone: long enough for
/// a busy node, short enough that the source does not copy to nobody.
const KEEP_ALIVE_INTERVAL: Duration = Duration::from_secs(2);
const KEEP_ALIVE_TIMEOUT: Duration = Duration::from_secs(4);

/// How often the peer is tried again to find out why it went silent.
const PROBE_TIMEOUT: Duration = Duration::from_secs(2);

/// A connection to another node's sternad.
#[derive(Debug, Clone)]
pub(crate) struct Peer {
    node: NodeName,
    /// host:port
    address: String,
    client: PeerClient<Channel>,
}

/// Whether the node's address is known; if not, the words for it.
pub(crate) async fn resolve(local: &Node, node: &NodeName) -> Result<(), String> {
    let address = local.peer_address(node);
    let Err(error) = tokio::net::lookup_host(&address).await else {
        return Ok(());
    };
    let (host, _) = address.rsplit_once(':').unwrap_or((&address, ""));
    Err(format!(
        "node {node} is unknown here: {host:?} does not resolve ({error}); give its address in [peers] of sternad.toml"
    ))
}

impl Peer {
    /// Connects, and checks that whoever answers is `node`.
    pub(crate) async fn connect(local: &Node, node: &NodeName) -> Result<Self, Failure> {
        let address = local.peer_address(node);
        let tls = local
            .identity
            .client_config(node.as_str())
            .map_err(|error| {
                Failure::new(Side::Source, format!("cannot connect to {node}: {error}"))
            })?;
        // A node name is a DNS name: checked by `NodeName`.
        let server_name = ServerName::try_from(node.as_str().to_owned()).map_err(|error| {
            Failure::new(Side::Source, format!("cannot connect to {node}: {error}"))
        })?;
        let tls = TlsConnector::from(tls);
        let target = address.clone();
        let connector = tower::service_fn(move |_| {
            let (target, server_name, tls) = (target.clone(), server_name.clone(), tls.clone());
            async move {
                let tcp = TcpStream::connect(&target).await?;
                tcp.set_nodelay(true)?;
                Ok::<_, io::Error>(TokioIo::new(tls.connect(server_name, tcp).await?))
            }
        });
        // The URI is never resolved: the connector knows where to go.
        let endpoint = Endpoint::from_static("http://peer")
            .http2_keep_alive_interval(KEEP_ALIVE_INTERVAL)
            .keep_alive_timeout(KEEP_ALIVE_TIMEOUT)
            .keep_alive_while_idle(true);
        let connecting = endpoint.connect_with_connector(connector);
        let channel = match timeout(CONNECT_TIMEOUT, connecting).await {
            Ok(Ok(channel)) => channel,
            Ok(Err(error)) => return Err(unreachable(node, &address, &innermost(&error)).await),
            Err(_) => return Err(unreachable(node, &address, "no answer").await),
        };
        Ok(Self {
            node: node.clone(),
            address,
            client: PeerClient::new(channel),
        })
    }

    pub(crate) fn node(&self) -> &NodeName {
        &self.node
    }

    /// host:port, for the engine.
    pub(crate) fn address(&self) -> &str {
        &self.address
    }

    pub(crate) fn client(&self) -> PeerClient<Channel> {
        self.client.clone()
    }

    /// What a failed call means: the peer's own answer, or why there is none.
    pub(crate) async fn explain(&self, action: &str, status: &Status) -> Failure {
        match std::error::Error::source(status) {
            // The peer answered.
            None => Failure::new(
                Side::DestinationAgent,
                format!("node {} cannot {action}: {}", self.node, status.message()),
            ),
            Some(source) => self.lost(&innermost(source)).await,
        }
    }

    /// Whether the node's sternad can be reached now, and if not, who is to blame.
    pub(crate) async fn probe(&self) -> Result<(), Failure> {
        knock(&self.node, &self.address).await
    }

    /// The connection broke: is it the node's sternad or the way there?
    pub(crate) async fn lost(&self, reason: &str) -> Failure {
        unreachable(&self.node, &self.address, reason).await
    }
}

/// A request that must be answered within `limit`.
pub(crate) fn within<T>(limit: Duration, message: T) -> Request<T> {
    let mut request = Request::new(message);
    request.set_timeout(limit);
    request
}

async fn unreachable(node: &NodeName, address: &str, reason: &str) -> Failure {
    match knock(node, address).await {
        Ok(()) => Failure::new(
            Side::DestinationAgent,
            format!("sternad of node {node} ({address}) ended the connection: {reason}"),
        ),
        Err(failure) => failure,
    }
}

async fn knock(node: &NodeName, address: &str) -> Result<(), Failure> {
    let no_way = |reason: String| {
        let text = format!("node {node} ({address}) cannot be reached: {reason}");
        Failure::new(Side::Link, text)
    };
    match timeout(PROBE_TIMEOUT, TcpStream::connect(address)).await {
        Ok(Ok(_)) => Ok(()),
        Ok(Err(error)) if error.kind() == io::ErrorKind::ConnectionRefused => Err(Failure::new(
            Side::DestinationAgent,
            format!("sternad of node {node} is not running: {address} refuses connections"),
        )),
        Ok(Err(error)) => Err(no_way(error.to_string())),
        Err(_) => Err(no_way(format!(
            "no answer within {} s",
            PROBE_TIMEOUT.as_secs()
        ))),
    }
}

/// The text of the last error of a chain: tonic's outer ones say "transport error".
fn innermost(error: &(dyn std::error::Error + 'static)) -> String {
    let mut innermost = error;
    while let Some(source) = innermost.source() {
        innermost = source;
    }
    innermost.to_string()
}
