//! Terminals: how runc hands over their masters, and how these are used.

use std::fs::{self, DirBuilder};
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::task::{Context, Poll, ready};
use std::time::Duration;

use rustix::fs::{OFlags, fcntl_getfl, fcntl_setfl};
use rustix::termios::{Winsize, tcsetwinsize};
use tokio::io::unix::AsyncFd;
use tokio::io::{AsyncRead, AsyncWrite, Interest, ReadBuf};
use tokio::net::{UnixListener, UnixStream};
use tokio::sync::OnceCell;

use crate::error::{Error, Result};

/// How long runc may take to send a terminal's master, as in the Go shim.
const RECEIVE_LIMIT: Duration = Duration::from_secs(30);

/// runc sends the terminal's name beside the descriptor; longer ones are not
/// terminals.
const NAME_BYTES: usize = 4096;

/// A socket on which runc delivers one terminal's master.
#[derive(Debug)]
pub(crate) struct ConsoleSocket {
    path: PathBuf,
    listener: UnixListener,
    /// runc's, once it has come.
    connection: OnceCell<UnixStream>,
}

impl ConsoleSocket {
    /// Listens in `dir`; bundles are too deep for the path of a socket.
    pub(crate) fn bind(dir: &Path) -> Result<Self> {
        static NEXT: AtomicU64 = AtomicU64::new(0);
        DirBuilder::new()
            .recursive(true)
            .mode(0o700)
            .create(dir)
            .map_err(Error::io("create", dir))?;
        let number = NEXT.fetch_add(1, Ordering::Relaxed);
        let path = dir.join(format!("{}-{number}.sock", std::process::id()));
        // Left by a process that had our pid.
        if let Err(error) = fs::remove_file(&path)
            && error.kind() != io::ErrorKind::NotFound
        {
            return Err(Error::io("remove", &path)(error));
        }
        let listener = UnixListener::bind(&path).map_err(Error::io("listen on", &path))?;
        Ok(Self {
            path,
            listener,
            connection: OnceCell::new(),
        })
    }

    /// For `--console-socket`.
    pub(crate) fn path(&self) -> &Path {
        &self.path
    }

    /// Waits for the master, but not for long.
    pub(crate) async fn receive(&self) -> Result<Console> {
        tokio::time::timeout(RECEIVE_LIMIT, self.receive_whenever())
            .await
            .unwrap_or(Err(Error::NoConsole(RECEIVE_LIMIT.as_secs())))
    }

    /// Waits for the master. It is safe to drop this future and call it again.
    pub(crate) async fn receive_whenever(&self) -> Result<Console> {
        let receive = async {
            let accept = async || Ok::<_, io::Error>(self.listener.accept().await?.0);
            receive_master(self.connection.get_or_try_init(accept).await?).await
        };
        receive
            .await
            .and_then(Console::new)
            .map_err(Error::system("receive the console"))
    }
}

impl Drop for ConsoleSocket {
    fn drop(&mut self) {
        if let Err(error) = fs::remove_file(&self.path) {
            tracing::warn!(%error, path = %self.path.display(), "cannot remove a socket");
        }
    }
}

async fn receive_master(stream: &UnixStream) -> io::Result<OwnedFd> {
    loop {
        stream.readable().await?;
        let mut name = [0; NAME_BYTES];
        let received = stream.try_io(Interest::READABLE, || {
            sys::fdpass::recv_with_fds(stream, &mut name)
        });
        match received {
            Ok((_, fds)) => {
                return fds
                    .into_iter()
                    .next()
                    .ok_or_else(|| io::ErrorKind::UnexpectedEof.into());
            }
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
            Err(error) => return Err(error),
        }
    }
}

/// A terminal's master; clones share it.
#[derive(Debug, Clone)]
pub(crate) struct Console(Arc<AsyncFd<OwnedFd>>);

impl Console {
    fn new(master: OwnedFd) -> io::Result<Self> {
        let flags = fcntl_getfl(&master)?;
        fcntl_setfl(&master, flags | OFlags::NONBLOCK)?;
        Ok(Self(Arc::new(super::on_reactor(master)?)))
    }

    /// Tells the processes on the terminal its size in characters.
    pub(crate) fn resize(&self, width: u32, height: u32) -> Result<()> {
        let clamp = |size: u32| u16::try_from(size).unwrap_or(u16::MAX);
        tcsetwinsize(
            self.0.get_ref(),
            Winsize {
                ws_row: clamp(height),
                ws_col: clamp(width),
                ws_xpixel: 0,
                ws_ypixel: 0,
            },
        )
        .map_err(Error::system("resize the console"))
    }

    /// Both directions of the terminal.
    pub(super) fn stream(&self) -> ConsoleStream {
        ConsoleStream(Arc::clone(&self.0))
    }
}

/// Reads what processes write to a terminal, and the other way round.
#[derive(Debug)]
pub(super) struct ConsoleStream(Arc<AsyncFd<OwnedFd>>);

impl AsyncRead for ConsoleStream {
    fn poll_read(
        self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        loop {
            let mut guard = ready!(self.0.poll_read_ready(context))?;
            let unfilled = buffer.initialize_unfilled();
            let read = guard.try_io(|master| Ok(rustix::io::read(master, unfilled)?));
            match read {
                Err(_would_block) => {}
                Ok(Ok(length)) => {
                    buffer.advance(length);
                    return Poll::Ready(Ok(()));
                }
                // The last process has closed the terminal: its end.
                Ok(Err(error)) if error.raw_os_error() == Some(libc::EIO) => {
                    return Poll::Ready(Ok(()));
                }
                Ok(Err(error)) => return Poll::Ready(Err(error)),
            }
        }
    }
}

impl AsyncWrite for ConsoleStream {
    fn poll_write(
        self: Pin<&mut Self>,
        context: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        loop {
            let mut guard = ready!(self.0.poll_write_ready(context))?;
            let written = guard.try_io(|master| Ok(rustix::io::write(master, bytes)?));
            match written {
                Err(_would_block) => {}
                Ok(Err(error)) if error.raw_os_error() == Some(libc::EIO) => {
                    return Poll::Ready(Err(io::ErrorKind::BrokenPipe.into()));
                }
                Ok(written) => return Poll::Ready(written),
            }
        }
    }

    fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn poll_shutdown(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }
}

#[cfg(test)]
mod tests {
    use std::os::fd::AsFd;

    use tokio::io::{AsyncReadExt, AsyncWriteExt};

    use super::*;

    #[tokio::test]
    async fn a_terminal_is_received_resized_read_and_written() {
        let dir = tempfile::tempdir().unwrap();
        let socket = ConsoleSocket::bind(dir.path()).unwrap();
        let path = socket.path().to_owned();
        let pty = nix::pty::openpty(None, None).unwrap();
        let mut raw = nix::sys::termios::tcgetattr(&pty.slave).unwrap();
        nix::sys::termios::cfmakeraw(&mut raw);
        nix::sys::termios::tcsetattr(&pty.slave, nix::sys::termios::SetArg::TCSANOW, &raw).unwrap();

        // As runc does it.
        let runc = std::os::unix::net::UnixStream::connect(&path).unwrap();
        sys::fdpass::send_with_fds(&runc, b"/dev/ptmx", &[pty.master.as_fd()]).unwrap();
        drop(pty.master);
        let console = socket.receive().await.unwrap();
        drop(socket);
        assert!(!path.exists());

        console.resize(80, 25).unwrap();
        let size = rustix::termios::tcgetwinsize(&pty.slave).unwrap();
        assert_eq!((size.ws_col, size.ws_row), (80, 25));

        let mut stream = console.stream();
        rustix::io::write(&pty.slave, b"out").unwrap();
        let mut buffer = [0; 8];
        assert_eq!(stream.read(&mut buffer).await.unwrap(), 3);
        stream.write_all(b"in").await.unwrap();
        assert_eq!(rustix::io::read(&pty.slave, &mut buffer).unwrap(), 2);

        drop(pty.slave);
        assert_eq!(stream.read(&mut buffer).await.unwrap(), 0);
    }
}
