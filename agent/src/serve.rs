//! sternad at work: both doors, until it is told to stop.

use std::ffi::{OsStr, OsString};
use std::fs;
use std::io;
use std::os::linux::net::SocketAddrExt as _;
use std::os::unix::ffi::OsStrExt as _;
use std::os::unix::fs::{DirBuilderExt as _, PermissionsExt as _};
use std::os::unix::net::{SocketAddr, UnixDatagram};
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use anyhow::{Context as _, bail};
use proto::agent::agent_server::AgentServer;
use proto::agent::peer_server::PeerServer;
use proto::agent::pods_server::PodsServer;
use tokio::net::{TcpListener, UnixListener, UnixStream};
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tokio_util::sync::CancellationToken;

use crate::arrivals::Arrivals;
use crate::config::Config;
use crate::departures::Departures;
use crate::kubernetes;
use crate::listener;
use crate::local_service::LocalService;
use crate::node::Node;
use crate::peer_service::PeerService;
use crate::pods::Pods;
use crate::pods::service::PodService;
use crate::startup;
use crate::sweep;

/// Largest message that another node may send: a container's description of at
/// most 2 MiB and everything around it.
const MESSAGE_LIMIT_BYTES: usize = 4 << 20;

/// Calls that one peer may have open at a time.
const STREAMS_PER_PEER: u32 = 64;

const KEEP_ALIVE_INTERVAL: Duration = Duration::from_secs(2);
const KEEP_ALIVE_TIMEOUT: Duration = Duration::from_secs(4);

/// Open calls get this long to end after SIGTERM.
const STOP_TIMEOUT: Duration = Duration::from_secs(5);

/// Runs until SIGTERM or SIGINT.
pub(crate) async fn run(config: Config, notify_socket: Option<OsString>) -> anyhow::Result<()> {
    let started = SystemTime::now();
    let node = Node::load(config)?;
    let socket = node.run_dir.agent_socket();
    make_run_dir(node.run_dir.path())?;
    let local = bind_local(&socket).await?;
    if let Err(error) = startup::clean_files(&node) {
        tracing::warn!("cannot clean {}: {error}", node.run_dir.path().display());
    }
    node.parked.clean();
    let tcp = TcpListener::bind(node.config.listen)
        .await
        .with_context(|| format!("cannot listen on {}", node.config.listen))?;
    let mut terminate = signal(SignalKind::terminate())?;
    let mut interrupt = signal(SignalKind::interrupt())?;

    let stop = CancellationToken::new();
    let pods = Arc::new(Pods::new());
    let arrivals = Arrivals::new(Arc::clone(&node), Arc::clone(&pods));
    let departures = Departures::new(Arc::clone(&node));
    if let Some(config) = &node.config.kubernetes {
        kubernetes::start(config, Arc::clone(&node), &pods, Arc::clone(&departures)).await?;
    }
    departures.resume();
    tokio::spawn(sweep::follow_deletions(Arc::clone(&node)));
    tokio::spawn(startup::clean_containerd(Arc::clone(&node), started));

    let peers = listener::accept(Arc::clone(&node), tcp, stop.clone());
    let peer_service = PeerServer::new(PeerService::new(Arc::clone(&node), Arc::clone(&arrivals)))
        .max_decoding_message_size(MESSAGE_LIMIT_BYTES);
    let peer_server = tonic::transport::Server::builder()
        .http2_keepalive_interval(Some(KEEP_ALIVE_INTERVAL))
        .http2_keepalive_timeout(Some(KEEP_ALIVE_TIMEOUT))
        .max_concurrent_streams(STREAMS_PER_PEER)
        .add_service(peer_service)
        .serve_with_incoming_shutdown(ReceiverStream::new(peers), stop.clone().cancelled_owned());
    let pod_service = PodService::new(Arc::clone(&node), pods, Arc::clone(&departures));
    let local_service = LocalService::new(Arc::clone(&node), arrivals, departures);
    let local_server = tonic::transport::Server::builder()
        .add_service(AgentServer::new(local_service))
        .add_service(PodsServer::new(pod_service))
        .serve_with_incoming_shutdown(
            ReceiverStream::new(accept_root(local, stop.clone())),
            stop.clone().cancelled_owned(),
        );
    let servers = async { tokio::try_join!(peer_server, local_server) };
    tokio::pin!(servers);

    tracing::info!(
        node = %node.name,
        listen = %node.config.listen,
        socket = %socket.display(),
        version = env!("CARGO_PKG_VERSION"),
        "sternad is up"
    );
    notify(notify_socket.as_deref(), "READY=1");
    let signal = tokio::select! {
        ended = &mut servers => {
            ended.context("cannot serve")?;
            bail!("the servers ended by themselves");
        }
        _ = terminate.recv() => "SIGTERM",
        _ = interrupt.recv() => "SIGINT",
    };
    tracing::info!(
        signal,
        "stopping: running migrations go on without this process"
    );
    notify(notify_socket.as_deref(), "STOPPING=1");
    stop.cancel();
    // Streams of running migrations do not end by themselves.
    drop(tokio::time::timeout(STOP_TIMEOUT, servers).await);
    match fs::remove_file(&socket) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => {
            tracing::warn!(%error, "cannot remove {}", socket.display());
        }
        _ => {}
    }
    Ok(())
}

fn make_run_dir(path: &Path) -> anyhow::Result<()> {
    fs::DirBuilder::new()
        .recursive(true)
        .mode(0o700)
        .create(path)
        .with_context(|| format!("cannot create {}", path.display()))
}

/// The socket for the command line; refuses if another sternad answers there.
async fn bind_local(path: &Path) -> anyhow::Result<UnixListener> {
    match UnixStream::connect(path).await {
        Ok(_) => bail!("another sternad listens on {}", path.display()),
        Err(error) if error.kind() == io::ErrorKind::ConnectionRefused => fs::remove_file(path)
            .with_context(|| format!("cannot remove the old socket {}", path.display()))?,
        Err(_) => {}
    }
    let listener =
        UnixListener::bind(path).with_context(|| format!("cannot listen on {}", path.display()))?;
    fs::set_permissions(path, fs::Permissions::from_mode(0o600))
        .with_context(|| format!("cannot protect {}", path.display()))?;
    Ok(listener)
}

/// Connections of root's processes; others are closed. The file's mode says the
/// same: this holds where a directory was made too open.
fn accept_root(
    listener: UnixListener,
    stop: CancellationToken,
) -> mpsc::Receiver<io::Result<UnixStream>> {
    let (queue, connections) = mpsc::channel(16);
    tokio::spawn(async move {
        loop {
            let accepted = tokio::select! {
                accepted = listener.accept() => accepted,
                () = stop.cancelled() => return,
            };
            match accepted {
                Ok((stream, _)) if stream.peer_cred().is_ok_and(|peer| peer.uid() == 0) => {
                    if queue.send(Ok(stream)).await.is_err() {
                        return;
                    }
                }
                Ok(_) => tracing::warn!("refused a local connection that is not root's"),
                Err(error) => {
                    tracing::warn!(%error, "cannot accept a local connection");
                    tokio::time::sleep(Duration::from_millis(100)).await;
                }
            }
        }
    });
    connections
}

/// Tells systemd, if it wants to know (sd_notify(3)).
fn notify(socket: Option<&OsStr>, state: &str) {
    let Some(path) = socket else { return };
    let sent = notify_address(path)
        .and_then(|address| UnixDatagram::unbound()?.send_to_addr(state.as_bytes(), &address));
    if let Err(error) = sent {
        tracing::warn!(%error, "cannot notify the service manager");
    }
}

/// A path, or, with an @ before it, a name in the abstract namespace.
fn notify_address(path: &OsStr) -> io::Result<SocketAddr> {
    match path.as_bytes().strip_prefix(b"@") {
        Some(name) => SocketAddr::from_abstract_name(name),
        None => SocketAddr::from_pathname(path),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_service_manager_is_found_by_path_and_by_abstract_name() {
        let temp = tempfile::tempdir().unwrap();
        let path = temp.path().join("notify");
        let manager = UnixDatagram::bind(&path).unwrap();
        notify(Some(path.as_os_str()), "READY=1");
        let mut buffer = [0; 64];
        let length = manager.recv(&mut buffer).unwrap();
        assert_eq!(&buffer[..length], b"READY=1");

        let abstract_name = notify_address(OsStr::new("@/org/systemd")).unwrap();
        assert_eq!(abstract_name.as_abstract_name(), Some(&b"/org/systemd"[..]));
        notify(None, "READY=1");
    }
}
