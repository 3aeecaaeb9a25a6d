//! The shim's end of the socket to a migration engine.

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::process::CommandExt;
use std::process::{Command, Stdio};
use std::time::Duration;

use nix::sys::signal::Signal;
use nix::sys::socket::{AddressFamily, SockFlag, SockType, socketpair};
use nodeapi::{FromEngine, ToEngine};
use rustix::fs::{OFlags, fcntl_getfl, fcntl_setfl};
use sys::spawn::CommandFds;
use tokio::io::unix::AsyncFd;

use crate::container::Context;
use crate::error::{Error, Result};
use crate::reaper::ExitReceiver;

/// Where an engine finds its socket.
const ENGINE_FD: i32 = 3;

/// Largest message, as on the engine's side.
const MESSAGE_BYTES: usize = 256 << 10;

/// How long an engine may take to open its sockets.
const LISTENING_LIMIT: Duration = Duration::from_secs(10);

/// How much longer an engine may go on that has nothing more to do for the shim
/// when that ends.
const FAREWELL_LIMIT: Duration = Duration::from_secs(1);

/// How long an engine that was asked to stop may take before it is killed.
const STOP_LIMIT: Duration = Duration::from_secs(5);

/// An engine process. Dropping this kills it.
#[derive(Debug)]
pub(crate) struct Engine {
    socket: AsyncFd<OwnedFd>,
    pid: u32,
    exit: Option<ExitReceiver>,
}

impl Engine {
    /// Starts an engine, gives it its job and waits until it listens.
    pub(crate) async fn start(context: &Context, job: &ToEngine) -> Result<Self> {
        let mut engine = Self::spawn(context)?;
        engine.send(job).await?;
        let first = tokio::time::timeout(LISTENING_LIMIT, engine.next())
            .await
            .map_err(|_| Error::Engine {
                what: format!("did not listen within {} s", LISTENING_LIMIT.as_secs()),
            })?;
        match first {
            Some((FromEngine::Listening, _)) => Ok(engine),
            Some((FromEngine::Failed { reason }, _)) => Err(Error::Engine {
                what: format!("failed: {reason}"),
            }),
            Some((message, _)) => Err(Error::Engine {
                what: format!("began with {message:?}"),
            }),
            None => Err(Error::Engine {
                what: format!("ended at once, {}", engine.how_it_ended().await),
            }),
        }
    }

    fn spawn(context: &Context) -> Result<Self> {
        fn failed<E: Into<io::Error>>(source: E) -> Error {
            Error::system("start the migration engine")(source)
        }
        let (ours, theirs) = socketpair(
            AddressFamily::Unix,
            SockType::SeqPacket,
            None,
            SockFlag::SOCK_CLOEXEC,
        )
        .map_err(Error::system("make a socket pair"))?;
        // Only our end: each has its own flags.
        let flags = fcntl_getfl(&ours).map_err(failed)?;
        fcntl_setfl(&ours, flags | OFlags::NONBLOCK).map_err(failed)?;
        let log = || match &context.log {
            Some(log) => log.try_clone().map_or_else(|_| Stdio::null(), Stdio::from),
            None => Stdio::null(),
        };
        // Through /proc, so that it is this very build even if the file was
        // replaced by another.
        let mut command = Command::new("/proc/self/exe");
        command
            .arg0("containerd-shim-sterna-v1")
            .arg("engine")
            .current_dir("/")
            .env_remove("NOTIFY_SOCKET")
            .stdin(Stdio::null())
            .stdout(log())
            .stderr(log());
        command
            .pass_fds(&[(theirs.as_fd(), ENGINE_FD)])
            .map_err(failed)?
            .signal_when_parent_thread_ends(Signal::SIGKILL);
        let (pid, exit) = context
            .reaper
            .spawn(|| command.spawn().map(|child| child.id()))
            .map_err(failed)?;
        drop((command, theirs));
        let socket = crate::io::on_reactor(ours).map_err(failed)?;
        tracing::info!(pid, "engine started");
        Ok(Self {
            socket,
            pid,
            exit: Some(exit),
        })
    }

    /// Sends one message.
    pub(crate) async fn send(&self, message: &ToEngine) -> Result<()> {
        let packet = serde_json::to_vec(message).map_err(|error| Error::Engine {
            what: format!("cannot be told: {error}"),
        })?;
        loop {
            let mut ready = self
                .socket
                .writable()
                .await
                .map_err(Error::system("reach the migration engine"))?;
            let sent = ready.try_io(|socket| sys::fdpass::send_with_fds(socket, &packet, &[]));
            match sent {
                Err(_would_block) => {}
                Ok(sent) => {
                    sent.map_err(Error::system("reach the migration engine"))?;
                    return Ok(());
                }
            }
        }
    }

    /// The next message with its descriptors; none when the engine is gone. It
    /// is safe to drop this future: nothing is lost.
    pub(crate) async fn next(&mut self) -> Option<(FromEngine, Vec<OwnedFd>)> {
        let mut packet = vec![0; MESSAGE_BYTES];
        loop {
            let mut ready = match self.socket.readable().await {
                Ok(ready) => ready,
                Err(error) => {
                    tracing::error!(%error, "cannot hear the engine");
                    return None;
                }
            };
            let received = ready.try_io(|socket| sys::fdpass::recv_with_fds(socket, &mut packet));
            match received {
                Err(_would_block) => {}
                Ok(Ok((0, _))) => return None,
                Ok(Ok((length, fds))) => {
                    match serde_json::from_slice::<FromEngine>(&packet[..length]) {
                        Ok(message) => {
                            tracing::info!(engine = self.pid, ?message, "engine says");
                            return Some((message, fds));
                        }
                        // The same build on both ends: see `ipc`.
                        Err(error) => tracing::error!(%error, "cannot understand the engine"),
                    }
                }
                Ok(Err(error)) if error.kind() == io::ErrorKind::Interrupted => {}
                Ok(Err(error)) => {
                    tracing::error!(%error, "cannot hear the engine");
                    return None;
                }
            }
        }
    }

    /// Words for a process that should not have ended.
    pub(crate) async fn how_it_ended(&mut self) -> String {
        let Some(exit) = self.exit.take() else {
            return "its exit is known already".to_owned();
        };
        match tokio::time::timeout(STOP_LIMIT, exit).await {
            Ok(Ok(exit)) => format!("exit status {}", exit.status),
            _ => "it closed its socket and goes on".to_owned(),
        }
    }

    /// It has closed its socket, or should have: makes sure that it is gone, so that
    /// another may act on the container. Words for how it ended.
    pub(crate) async fn end(mut self) -> String {
        let Some(mut exit) = self.exit.take() else {
            return "its exit is known already".to_owned();
        };
        let exit = match tokio::time::timeout(STOP_LIMIT, &mut exit).await {
            Ok(exit) => exit,
            Err(_) => {
                if let Err(error) = sys::signal::send(self.pid.cast_signed(), libc::SIGKILL) {
                    tracing::error!(%error, pid = self.pid, "cannot kill the engine");
                }
                exit.await
            }
        };
        // An error only when the reaper is gone.
        exit.map_or_else(
            |_| String::new(),
            |exit| format!("exit status {}", exit.status),
        )
    }

    /// It has said its last word to us and ends when it has said it to the
    /// others, who may ask late: it is not hurried, unless the shim ends.
    pub(crate) async fn see_off(mut self, context: &Context) {
        let gone = async {
            while self.next().await.is_some() {}
            if let Some(exit) = self.exit.take() {
                // An error only when the reaper is gone.
                drop(exit.await);
            }
        };
        let hurry = async {
            context.shutdown.cancelled().await;
            tokio::time::sleep(FAREWELL_LIMIT).await;
        };
        tokio::select! {
            () = gone => {}
            () = hurry => {}
        }
    }

    /// Asks it to give up and waits for that a little; then it is killed.
    pub(crate) async fn stop(mut self, reason: &str) {
        let cancel = ToEngine::Cancel {
            reason: reason.to_owned(),
        };
        if self.send(&cancel).await.is_ok() {
            let gone = async { while self.next().await.is_some() {} };
            drop(tokio::time::timeout(STOP_LIMIT, gone).await);
        }
    }
}

impl Drop for Engine {
    fn drop(&mut self) {
        // A pid that was reaped may belong to somebody else.
        let reaped = match &mut self.exit {
            None => true,
            Some(exit) => exit.try_recv().is_ok(),
        };
        if !reaped && let Err(error) = sys::signal::send(self.pid.cast_signed(), libc::SIGKILL) {
            tracing::debug!(%error, pid = self.pid, "cannot kill the engine");
        }
    }
}
