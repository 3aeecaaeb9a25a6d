//! Connections between the two engines: mutual TLS, one gRPC channel each.
//!
//! The source dials the destination's sternad and names the ticket as TLS
//! server name; sternad hands the raw connection to the engine that waits
//! there, which ends TLS itself. sternad never sees what passes.

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use hyper_util::rt::TokioIo;
use identity::NodeIdentity;
use nodeapi::Ticket;
use proto::migration::migration_client::MigrationClient;
use rustls::pki_types::ServerName;
use tokio::io::{AsyncRead, AsyncWrite, Interest, ReadBuf};
use tokio::net::{TcpStream, UnixListener, UnixStream};
use tokio::sync::mpsc;
use tokio_rustls::{TlsAcceptor, TlsConnector};
use tonic::metadata::{Ascii, MetadataValue};
use tonic::service::Interceptor;
use tonic::service::interceptor::InterceptedService;
use tonic::transport::{Channel, Endpoint};
use tonic::{Request, Status};

/// Metadata key that carries the ticket's secret on every call.
pub(crate) const TICKET_KEY: &str = "sterna-ticket";

/// Largest message that either side accepts: a batch of one MiB with its records.
pub(crate) const MESSAGE_BYTES: usize = 4 << 20;

/// HTTP/2 windows. More than twice the product of 10 Gbit/s and 5 ms.
const WINDOW_BYTES: u32 = 16 << 20;
/// HTTP/2 frames of 16 KiB cost half the throughput.
const FRAME_BYTES: u32 = 256 << 10;
/// How long a connection may take to come up, TLS included.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);
/// A peer that answers no ping for this long is gone.
const KEEP_ALIVE_INTERVAL: Duration = Duration::from_secs(2);
const KEEP_ALIVE_TIMEOUT: Duration = Duration::from_secs(4);

/// What can go wrong on the way to the peer.
#[derive(Debug, thiserror::Error)]
pub(crate) enum LinkError {
    #[error("cannot use this node's certificate")]
    Identity(#[source] identity::IdentityError),
    #[error("the ticket cannot be used as a name")]
    Name,
    #[error("cannot reach {address}")]
    Connect {
        address: String,
        #[source]
        source: tonic::transport::Error,
    },
    #[error("cannot listen for connections")]
    Listen(#[source] io::Error),
}

/// Adds the ticket to each call.
#[derive(Clone)]
pub(crate) struct WithTicket(MetadataValue<Ascii>);

impl std::fmt::Debug for WithTicket {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("WithTicket")
    }
}

impl Interceptor for WithTicket {
    fn call(&mut self, mut request: Request<()>) -> Result<Request<()>, Status> {
        request.metadata_mut().insert(TICKET_KEY, self.0.clone());
        Ok(request)
    }
}

pub(crate) type Client = MigrationClient<InterceptedService<Channel, WithTicket>>;

/// Dials the destination; one call, one TCP connection.
#[derive(Debug, Clone)]
pub(crate) struct Dialer {
    address: String,
    name: ServerName<'static>,
    ticket: WithTicket,
    tls: Arc<rustls::ClientConfig>,
}

impl Dialer {
    pub(crate) fn new(
        address: String,
        peer_node: &str,
        identity_dir: &Path,
        ticket: &Ticket,
    ) -> Result<Self, LinkError> {
        let identity = NodeIdentity::load(identity_dir).map_err(LinkError::Identity)?;
        let name = ServerName::try_from(identity::ticket_server_name(&ticket.id))
            .map_err(|_| LinkError::Name)?;
        let mut secret =
            MetadataValue::try_from(ticket.secret.as_str()).map_err(|_| LinkError::Name)?;
        secret.set_sensitive(true);
        let tls = identity
            .client_config(peer_node)
            .map_err(LinkError::Identity)?;
        Ok(Self {
            address,
            name,
            ticket: WithTicket(secret),
            tls,
        })
    }

    pub(crate) async fn connect(&self) -> Result<Client, LinkError> {
        let (address, name, tls) = (
            self.address.clone(),
            self.name.clone(),
            TlsConnector::from(Arc::clone(&self.tls)),
        );
        let connector = tower::service_fn(move |_| {
            let (address, name, tls) = (address.clone(), name.clone(), tls.clone());
            async move {
                let tcp = TcpStream::connect(&address).await?;
                tcp.set_nodelay(true)?;
                Ok::<_, io::Error>(TokioIo::new(tls.connect(name, tcp).await?))
            }
        });
        // The URI is never resolved: the connector knows where to go.
        let channel = Endpoint::from_static("http://destination")
            .connect_timeout(CONNECT_TIMEOUT)
            .initial_stream_window_size(WINDOW_BYTES)
            .initial_connection_window_size(WINDOW_BYTES)
            .http2_keep_alive_interval(KEEP_ALIVE_INTERVAL)
            .keep_alive_timeout(KEEP_ALIVE_TIMEOUT)
            .keep_alive_while_idle(true)
            .connect_with_connector(connector)
            .await
            .map_err(|source| LinkError::Connect {
                address: self.address.clone(),
                source,
            })?;
        Ok(
            MigrationClient::with_interceptor(channel, self.ticket.clone())
                .max_decoding_message_size(MESSAGE_BYTES)
                .max_encoding_message_size(MESSAGE_BYTES),
        )
    }
}

/// The receiving side's gRPC server settings.
pub(crate) fn server() -> tonic::transport::Server {
    tonic::transport::Server::builder()
        .initial_stream_window_size(WINDOW_BYTES)
        .initial_connection_window_size(WINDOW_BYTES)
        .max_frame_size(FRAME_BYTES)
        .http2_keepalive_interval(Some(KEEP_ALIVE_INTERVAL))
        .http2_keepalive_timeout(Some(KEEP_ALIVE_TIMEOUT))
}

/// A connection whose peer has proved which node it is.
#[derive(Debug)]
pub(crate) struct PeerStream(pub(crate) tokio_rustls::server::TlsStream<TcpStream>);

impl tonic::transport::server::Connected for PeerStream {
    type ConnectInfo = ();
    fn connect_info(&self) -> Self::ConnectInfo {}
}

impl AsyncRead for PeerStream {
    fn poll_read(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        Pin::new(&mut self.0).poll_read(context, buffer)
    }
}

impl AsyncWrite for PeerStream {
    fn poll_write(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &[u8],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.0).poll_write(context, buffer)
    }

    fn poll_flush(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.0).poll_flush(context)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.0).poll_shutdown(context)
    }
}

/// Where sternad hands over the connections of one ticket.
pub(crate) struct Reception {
    listener: UnixListener,
    tls: TlsAcceptor,
    source_node: String,
}

impl Reception {
    pub(crate) fn open(
        socket: &Path,
        identity_dir: &Path,
        source_node: String,
    ) -> Result<Self, LinkError> {
        let identity = NodeIdentity::load(identity_dir).map_err(LinkError::Identity)?;
        let tls = identity.server_config();
        let listener = UnixListener::bind(socket).map_err(LinkError::Listen)?;
        Ok(Self {
            listener,
            tls: TlsAcceptor::from(tls),
            source_node,
        })
    }

    /// Accepts until the returned queue is dropped. A connection that is not
    /// the source node's ends in a log line and nothing else.
    pub(crate) fn accept(self) -> mpsc::Receiver<Result<PeerStream, io::Error>> {
        let (queue, connections) = mpsc::channel(16);
        tokio::spawn(async move {
            loop {
                let accepted = tokio::select! {
                    accepted = self.listener.accept() => accepted,
                    () = queue.closed() => return,
                };
                let handed = match accepted {
                    Ok((handed, _)) => handed,
                    Err(error) => {
                        tracing::warn!(%error, "cannot accept from sternad");
                        continue;
                    }
                };
                let (tls, node, queue) =
                    (self.tls.clone(), self.source_node.clone(), queue.clone());
                tokio::spawn(async move {
                    match tokio::time::timeout(CONNECT_TIMEOUT, welcome(handed, tls, &node)).await {
                        // A full queue means the server is gone.
                        Ok(Ok(stream)) => drop(queue.send(Ok(stream)).await),
                        Ok(Err(error)) => tracing::warn!(%error, "refused a connection"),
                        Err(_) => tracing::warn!("a connection did not finish its handshake"),
                    }
                });
            }
        });
        connections
    }
}

async fn welcome(handed: UnixStream, tls: TlsAcceptor, node: &str) -> io::Result<PeerStream> {
    let fd = receive_fd(&handed).await?;
    let tcp = std::net::TcpStream::from(fd);
    tcp.set_nonblocking(true)?;
    tcp.set_nodelay(true)?;
    let stream = tls.accept(TcpStream::from_std(tcp)?).await?;
    let certificates = stream.get_ref().1.peer_certificates().unwrap_or_default();
    let peer = identity::peer_node(certificates).map_err(io::Error::other)?;
    if peer != node {
        return Err(io::Error::new(
            io::ErrorKind::PermissionDenied,
            format!("node {peer} used a ticket made for node {node}"),
        ));
    }
    Ok(PeerStream(stream))
}

async fn receive_fd(socket: &UnixStream) -> io::Result<OwnedFd> {
    let mut byte = [0];
    let (_, mut fds) = socket
        .async_io(Interest::READABLE, || {
            sys::fdpass::recv_with_fds(socket.as_fd(), &mut byte)
        })
        .await?;
    fds.pop()
        .ok_or_else(|| io::Error::new(io::ErrorKind::InvalidData, "no connection came along"))
}
