//! The one TCP port: connections of migrations go to the engines, or are answered in
//! the place of one that is gone; the others are other sternads'.
//!
//! Whoever can reach the port can connect. Until a client has shown a certificate
//! it costs one slot, one buffer of 16 KiB and a few seconds at most, and its bytes
//! decide nothing but which of two doors it is sent to; both ask for a certificate.

use std::io;
use std::os::fd::AsFd;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use tokio::io::{AsyncRead, AsyncReadExt as _, AsyncWrite, AsyncWriteExt as _, Interest, ReadBuf};
use tokio::net::{TcpListener, TcpStream, UnixStream};
use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc};
use tokio::time::timeout;
use tokio_rustls::TlsAcceptor;
use tokio_rustls::server::TlsStream;
use tokio_util::sync::CancellationToken;
use tonic::transport::server::Connected;

use crate::answers;
use crate::node::Node;

/// TLS after the hello has come: two round trips and a signature.
const HANDSHAKE_TIMEOUT: Duration = Duration::from_secs(5);

/// Giving a connection to an engine on this node.
const HAND_OVER_TIMEOUT: Duration = Duration::from_secs(2);

/// After a failed accept, usually for want of file descriptors.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// TLS record of the fatal alert `unrecognized_name` (RFC 8446 section 6): tells
/// an engine that its ticket is not known here, or no longer.
const UNKNOWN_TICKET: [u8; 7] = [21, 3, 3, 0, 2, 2, 112];

/// A connection from another node's sternad, which has proved which node it is.
#[derive(Debug)]
pub(crate) struct PeerStream {
    stream: TlsStream<TcpStream>,
    node: PeerNode,
    _slot: OwnedSemaphorePermit,
}

/// The node at the other end of a connection, found in a request's extensions.
#[derive(Debug, Clone)]
pub(crate) struct PeerNode(pub(crate) Arc<str>);

impl Connected for PeerStream {
    type ConnectInfo = PeerNode;

    fn connect_info(&self) -> PeerNode {
        self.node.clone()
    }
}

impl AsyncRead for PeerStream {
    fn poll_read(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_read(context, buffer)
    }
}

impl AsyncWrite for PeerStream {
    fn poll_write(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write(context, bytes)
    }

    fn poll_flush(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(context)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(context)
    }
}

/// Accepts until `stop`; other sternads' connections come out of the queue.
pub(crate) fn accept(
    node: Arc<Node>,
    listener: TcpListener,
    stop: CancellationToken,
) -> mpsc::Receiver<io::Result<PeerStream>> {
    let (queue, connections) = mpsc::channel(16);
    let slots = Arc::new(Semaphore::new(node.config.limits.connections));
    let tls = TlsAcceptor::from(node.identity.server_config());
    tokio::spawn(async move {
        loop {
            // Above the limit the kernel's backlog waits, and no one is accepted.
            let next = async {
                let slot = Arc::clone(&slots).acquire_owned().await;
                (slot, listener.accept().await)
            };
            let (slot, accepted) = tokio::select! {
                next = next => next,
                () = stop.cancelled() => return,
            };
            let Ok(slot) = slot else { return };
            let (stream, address) = match accepted {
                Ok(accepted) => accepted,
                Err(error) => {
                    tracing::warn!(%error, "cannot accept a connection");
                    tokio::time::sleep(ACCEPT_PAUSE).await;
                    continue;
                }
            };
            let (node, tls, queue) = (Arc::clone(&node), tls.clone(), queue.clone());
            tokio::spawn(async move {
                match route(&node, &tls, stream, slot).await {
                    // A full queue would mean that the server has ended.
                    Ok(Some(stream)) => drop(queue.send(Ok(stream)).await),
                    Ok(None) => {}
                    // The client's doing, and anyone's: no warning.
                    Err(error) => tracing::debug!(%address, "connection refused: {error:#}"),
                }
            });
        }
    });
    connections
}

async fn route(
    node: &Arc<Node>,
    tls: &TlsAcceptor,
    stream: TcpStream,
    slot: OwnedSemaphorePermit,
) -> anyhow::Result<Option<PeerStream>> {
    stream.set_nodelay(true)?;
    let server_name = identity::sni::peek(&stream).await?;
    let Some(ticket_id) = server_name.as_deref().and_then(identity::parse_ticket_name) else {
        return welcome(tls, stream, slot).await.map(Some);
    };
    if let Some(recorder) = node.parked.recorder(ticket_id) {
        // A state that is to wait here: the source is on this node.
        let stream = welcome(tls, stream, slot).await?;
        anyhow::ensure!(
            *stream.node.0 == *node.name.as_str(),
            "node {} used a ticket of this node's own",
            stream.node.0
        );
        recorder.serve(stream).await?;
        return Ok(None);
    }
    let Err((stream, error)) = hand_over(node, ticket_id, stream).await else {
        return Ok(None);
    };
    let Some(source_node) = answers::source_node(&node.run_dir, ticket_id)? else {
        reject(stream).await?;
        return Err(error);
    };
    let stream = welcome(tls, stream, slot).await?;
    anyhow::ensure!(
        *stream.node.0 == *source_node,
        "node {} asks about a ticket of node {source_node}",
        stream.node.0
    );
    answers::serve(Arc::clone(node), ticket_id, stream).await?;
    Ok(None)
}

/// Ends TLS; whoever has no certificate does not come further.
async fn welcome(
    tls: &TlsAcceptor,
    stream: TcpStream,
    slot: OwnedSemaphorePermit,
) -> anyhow::Result<PeerStream> {
    let stream = timeout(HANDSHAKE_TIMEOUT, tls.accept(stream)).await??;
    let certificates = stream.get_ref().1.peer_certificates().unwrap_or_default();
    let peer = identity::peer_node(certificates)?;
    Ok(PeerStream {
        stream,
        node: PeerNode(peer.into()),
        _slot: slot,
    })
}

/// Gives the connection to the engine that waits for this ticket. That engine
/// checks certificate and secret. Where there is none the connection comes back.
async fn hand_over(
    node: &Node,
    ticket_id: &str,
    stream: TcpStream,
) -> Result<(), (TcpStream, anyhow::Error)> {
    let socket = node.run_dir.ticket_socket(ticket_id);
    let give = async {
        let engine = UnixStream::connect(&socket).await?;
        engine
            .async_io(Interest::WRITABLE, || {
                sys::fdpass::send_with_fds(engine.as_fd(), b"c", &[stream.as_fd()])
            })
            .await
    };
    let error = match timeout(HAND_OVER_TIMEOUT, give).await {
        Ok(Ok(_)) => {
            tracing::debug!(ticket_id, "handed a connection over");
            return Ok(());
        }
        Ok(Err(error)) => {
            anyhow::Error::from(error).context(format!("no engine waits for ticket {ticket_id}"))
        }
        Err(_) => anyhow::anyhow!("the engine of ticket {ticket_id} takes no connections"),
    };
    Err((stream, error))
}

/// Ends a connection whose ticket nobody knows in a way that its client can tell
/// from a broken link.
async fn reject(mut stream: TcpStream) -> io::Result<()> {
    // Closing with unread bytes would reset the connection and lose the alert.
    let mut hello = vec![0; 16 << 10];
    let length = stream.read(&mut hello).await?;
    debug_assert!(length > 0, "the hello was peeked at");
    stream.write_all(&UNKNOWN_TICKET).await?;
    stream.shutdown().await
}

#[cfg(test)]
mod tests {
    use std::os::fd::OwnedFd;

    use identity::{Authority, NodeIdentity};
    use rustls::pki_types::ServerName;
    use tokio::net::UnixListener;
    use tokio_rustls::TlsConnector;

    use super::*;
    use crate::config::Config;

    struct Lab {
        temp: tempfile::TempDir,
        node: Arc<Node>,
        address: std::net::SocketAddr,
        peers: mpsc::Receiver<io::Result<PeerStream>>,
        _stop: tokio_util::sync::DropGuard,
    }

    async fn lab() -> Lab {
        let temp = tempfile::tempdir().unwrap();
        let pki = temp.path().join("b");
        let authority = Authority::init(&temp.path().join("ca")).unwrap();
        authority.enroll(&"b".parse().unwrap(), &pki).unwrap();
        authority
            .enroll(&"a".parse().unwrap(), &temp.path().join("a"))
            .unwrap();
        let mut config = Config {
            identity_dir: pki,
            ..Config::default()
        };
        config.run_dir = temp.path().join("run");
        config.limits.connections = 3;
        let node = Node::load(config).unwrap();
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let stop = CancellationToken::new();
        let peers = accept(Arc::clone(&node), listener, stop.clone());
        Lab {
            temp,
            node,
            address,
            peers,
            _stop: stop.drop_guard(),
        }
    }

    impl Lab {
        async fn dial(
            &self,
            server_name: &str,
        ) -> io::Result<tokio_rustls::client::TlsStream<TcpStream>> {
            let identity = NodeIdentity::load(&self.temp.path().join("a")).unwrap();
            let tls = TlsConnector::from(identity.client_config("b").unwrap());
            let tcp = TcpStream::connect(self.address).await?;
            tls.connect(ServerName::try_from(server_name.to_owned()).unwrap(), tcp)
                .await
        }
    }

    #[tokio::test]
    async fn a_node_is_served_and_known_by_name_though_garbage_came_before_it() {
        let mut lab = lab().await;
        let mut silent = Vec::new();
        for garbage in [
            &b""[..],
            b"\x16\x03\x01",
            b"GET / HTTP/1.1\r\n\r\n",
            b"SSH-2.0-x\r\n",
        ] {
            let mut stream = TcpStream::connect(lab.address).await.unwrap();
            stream.write_all(garbage).await.unwrap();
            if garbage.len() > 3 {
                // Cut off at once.
                assert!(matches!(stream.read(&mut [0; 64]).await, Ok(0) | Err(_)));
            } else {
                silent.push(stream);
            }
        }
        let mut peers = std::mem::replace(&mut lab.peers, mpsc::channel(1).1);
        let (dialed, served) = tokio::join!(lab.dial("b"), peers.recv());
        dialed.unwrap();
        assert_eq!(&*served.unwrap().unwrap().node.0, "a");
    }

    #[tokio::test]
    async fn a_tickets_connection_is_handed_over_with_its_hello_unread() {
        let lab = lab().await;
        let socket = lab.node.run_dir.ticket_socket("t1");
        std::fs::create_dir_all(socket.parent().unwrap()).unwrap();
        let engine = UnixListener::bind(&socket).unwrap();
        let server = TlsAcceptor::from(lab.node.identity.server_config());
        let receive = async {
            let (handed, _) = engine.accept().await.unwrap();
            let mut byte = [0];
            let (_, mut fds) = handed
                .async_io(Interest::READABLE, || {
                    sys::fdpass::recv_with_fds(handed.as_fd(), &mut byte)
                })
                .await
                .unwrap();
            let fd: OwnedFd = fds.pop().unwrap();
            let tcp = std::net::TcpStream::from(fd);
            tcp.set_nonblocking(true).unwrap();
            server
                .accept(TcpStream::from_std(tcp).unwrap())
                .await
                .unwrap()
        };
        let (dialed, received) = tokio::join!(lab.dial("t1.ticket.sterna"), receive);
        dialed.unwrap();
        assert_eq!(received.get_ref().1.server_name(), Some("t1.ticket.sterna"));
    }

    #[tokio::test]
    async fn an_unknown_ticket_is_told_so() {
        let lab = lab().await;
        let error = lab.dial("t2.ticket.sterna").await.unwrap_err();
        assert!(
            format!("{error:?}").contains("UnrecognisedName"),
            "{error:?}"
        );
    }
}
