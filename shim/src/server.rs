//! The server: one per pod, from `start` until its last container is gone.

use std::fs;
use std::os::fd::AsFd;
use std::os::unix::net::UnixListener as StdUnixListener;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use anyhow::Context as _;
use futures::stream;
use nix::unistd::{Pid, setpgid};
use nodeapi::RunDir;
use tokio::net::{UnixListener, UnixStream};
use tokio::signal::unix::{SignalKind, signal};
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;
use ttrpc::r#async::Server;
use ttrpc::r#async::transport::Listener;

use crate::args::Invocation;
use crate::container::Context;
use crate::control;
use crate::events::Publisher;
use crate::logging;
use crate::pod::Pod;
use crate::reaper::Reaper;
use crate::service;

/// How long the last events may take to be delivered.
const DRAIN_LIMIT: Duration = Duration::from_secs(5);

/// How long engines may take to end with the shim.
const LAST_WORK_LIMIT: Duration = Duration::from_secs(3);

/// How long a thread without work is kept; most work is done by the one thread
/// of the runtime.
const THREAD_KEEP_ALIVE: Duration = Duration::from_secs(1);

/// Serves until the shim has nothing left to do. Standard input is the
/// listening socket: see `bootstrap`.
pub(crate) fn serve(invocation: &Invocation) -> anyhow::Result<()> {
    let bundle = std::env::current_dir().context("no working directory")?;
    // Without a log the containers still have to be served.
    let log = logging::start(&bundle, invocation.debug).ok();
    let listener = take_listener()?;
    // May be so already, and fails for a session's leader, where it is not needed.
    if let Err(error) = setpgid(Pid::from_raw(0), Pid::from_raw(0)) {
        tracing::debug!(%error, "no process group of its own");
    }
    sys::spawn::become_subreaper().context("cannot become a subreaper")?;
    // One thread: runc's life is bound to the thread that spawns it, and the
    // work here is waiting.
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .thread_keep_alive(THREAD_KEEP_ALIVE)
        .build()
        .context("cannot start the runtime")?;
    let served = runtime.block_on(run(invocation, listener, log));
    if let Err(error) = &served {
        tracing::error!("{error:#}");
    }
    // Whatever still runs must not keep the process.
    runtime.shutdown_background();
    served
}

fn take_listener() -> anyhow::Result<StdUnixListener> {
    let socket = std::io::stdin()
        .as_fd()
        .try_clone_to_owned()
        .context("no listening socket on standard input")?;
    let null = fs::File::open("/dev/null").context("cannot open /dev/null")?;
    rustix::stdio::dup2_stdin(&null).context("cannot close standard input")?;
    let listener = StdUnixListener::from(socket);
    listener
        .set_nonblocking(true)
        .context("standard input is no socket")?;
    Ok(listener)
}

async fn run(
    invocation: &Invocation,
    listener: StdUnixListener,
    log: Option<Arc<fs::File>>,
) -> anyhow::Result<()> {
    let socket: PathBuf = listener
        .local_addr()
        .ok()
        .and_then(|address| address.as_pathname().map(Path::to_owned))
        .context("the listening socket has no path")?;
    let reaper = Arc::new(Reaper::default());
    let children = Reaper::signal().context("cannot hear of children")?;
    tokio::spawn(Arc::clone(&reaper).run(children));
    let ttrpc_address = std::env::var("TTRPC_ADDRESS").context("TTRPC_ADDRESS is not set")?;
    let publisher = Publisher::start(&invocation.namespace, &ttrpc_address);
    let pod = Arc::new(Pod::new(Arc::new(Context {
        namespace: invocation.namespace.clone(),
        socket: socket.clone(),
        run_dir: RunDir::default(),
        reaper,
        publisher: publisher.clone(),
        log,
        shutdown: CancellationToken::new(),
        last_work: TaskTracker::new(),
        brought: Mutex::default(),
    })));

    let listener = UnixListener::from_std(listener).context("cannot use the socket")?;
    let mut server = Server::new()
        .add_listener(Listener::new(Box::pin(stream::unfold(listener, accept))))
        .register_service(service::services(&pod))
        .register_service(control::services(&pod));
    server.start().await.context("cannot serve")?;
    tokio::spawn(pod.rest().watch());
    tracing::info!(pid = std::process::id(), id = invocation.id, "serving");

    wait_for_end(&pod).await?;
    // First of all: a `start` that comes now must not join a server that ends.
    if let Err(error) = fs::remove_file(&socket) {
        tracing::warn!(%error, "the socket is left");
    }
    pod.context.shutdown.cancel();
    pod.context.last_work.close();
    let last_work = tokio::time::timeout(LAST_WORK_LIMIT, pod.context.last_work.wait());
    let (ended, ()) = tokio::join!(last_work, publisher.drain(DRAIN_LIMIT));
    if ended.is_err() {
        tracing::warn!("an engine does not end");
    }
    if let Err(error) = server.shutdown().await {
        tracing::debug!(%error, "connections did not end");
    }
    Ok(())
}

/// The next connection from a process of our user; others are closed.
async fn accept(listener: UnixListener) -> Option<(std::io::Result<UnixStream>, UnixListener)> {
    loop {
        let stream = match listener.accept().await {
            Ok((stream, _)) => stream,
            Err(error) => {
                // Out of descriptors, say: not again at once.
                tokio::time::sleep(Duration::from_millis(50)).await;
                return Some((Err(error), listener));
            }
        };
        match stream.peer_cred() {
            Ok(peer) if peer.uid() == nix::unistd::geteuid().as_raw() => {
                return Some((Ok(stream), listener));
            }
            Ok(peer) => tracing::warn!(uid = peer.uid(), "a stranger connected"),
            Err(error) => tracing::warn!(%error, "somebody connected"),
        }
    }
}

/// Returns when the last container is gone or somebody ends the shim.
async fn wait_for_end(pod: &Pod) -> anyhow::Result<()> {
    let mut terminate = signal(SignalKind::terminate()).context("cannot hear SIGTERM")?;
    let mut interrupt = signal(SignalKind::interrupt()).context("cannot hear SIGINT")?;
    let mut dump = signal(SignalKind::user_defined1()).context("cannot hear SIGUSR1")?;
    loop {
        tokio::select! {
            () = pod.context.shutdown.cancelled() => return Ok(()),
            _ = terminate.recv() => {
                tracing::info!("SIGTERM");
                return Ok(());
            }
            _ = interrupt.recv() => {
                tracing::info!("SIGINT");
                return Ok(());
            }
            _ = dump.recv() => pod.dump(),
        }
    }
}
