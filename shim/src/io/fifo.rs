//! Fifos and files that containerd named.

use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::fs::{FileTypeExt, OpenOptionsExt};
use std::path::Path;
use std::pin::Pin;
use std::task::{Context, Poll};

use tokio::io::AsyncWrite;
use tokio::net::unix::pipe;

use crate::error::{Error, Result};

/// Whether something of ours keeps the input fifo from ending.
#[derive(Debug)]
pub(super) enum Keeper {
    /// The fifo is not open yet.
    Waiting,
    /// As long as this is open the fifo has a writer.
    Holding {
        /// Never written to.
        _writer: File,
    },
    /// CloseIO came, perhaps before the fifo was opened.
    Closed,
}

impl Keeper {
    pub(super) fn keep(&mut self, writer: File) {
        if !matches!(self, Self::Closed) {
            *self = Self::Holding { _writer: writer };
        }
    }
}

/// Opens an input fifo for reading, and a writer that keeps it from ending.
pub(super) fn open_input(path: &Path) -> Result<(pipe::Receiver, File)> {
    let receiver = pipe::OpenOptions::new()
        .open_receiver(path)
        .map_err(Error::io("open", path))?;
    let keeper = OpenOptions::new()
        .write(true)
        .custom_flags(libc::O_NONBLOCK)
        .open(path)
        .map_err(Error::io("open", path))?;
    Ok((receiver, keeper))
}

/// Where output ends.
#[derive(Debug)]
pub(super) enum Sink {
    /// A fifo, or the pipe of a logger.
    Pipe(pipe::Sender),
    /// A file.
    File(tokio::fs::File),
    /// Thrown away.
    Nowhere,
}

impl Sink {
    /// A path that containerd named: most often a fifo, else a file that exists.
    pub(super) async fn open(path: &Path) -> Result<Self> {
        let kind = fs::metadata(path).map_err(Error::io("open", path))?;
        if kind.file_type().is_fifo() {
            // For reading too: the fifo keeps a reader while containerd is away,
            // and opening it waits for nobody.
            return pipe::OpenOptions::new()
                .read_write(true)
                .open_sender(path)
                .map(Self::Pipe)
                .map_err(Error::io("open", path));
        }
        tokio::fs::OpenOptions::new()
            .append(true)
            .open(path)
            .await
            .map(Self::File)
            .map_err(Error::io("open", path))
    }

    /// A file that is made if need be.
    pub(super) async fn append(path: &Path) -> Result<Self> {
        if let Some(parent) = path.parent() {
            fs::create_dir_all(parent).map_err(Error::io("create", parent))?;
        }
        tokio::fs::OpenOptions::new()
            .append(true)
            .create(true)
            .mode(0o644)
            .open(path)
            .await
            .map(Self::File)
            .map_err(Error::io("open", path))
    }

    /// The writing end of a pipe.
    pub(super) fn pipe(writer: OwnedFd) -> Result<Self> {
        pipe::Sender::from_owned_fd(writer)
            .map(Self::Pipe)
            .map_err(Error::system("use a pipe"))
    }
}

impl AsyncWrite for Sink {
    fn poll_write(
        self: Pin<&mut Self>,
        context: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        match self.get_mut() {
            Self::Pipe(pipe) => Pin::new(pipe).poll_write(context, bytes),
            Self::File(file) => Pin::new(file).poll_write(context, bytes),
            Self::Nowhere => Poll::Ready(Ok(bytes.len())),
        }
    }

    fn poll_flush(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        match self.get_mut() {
            Self::Pipe(pipe) => Pin::new(pipe).poll_flush(context),
            Self::File(file) => Pin::new(file).poll_flush(context),
            Self::Nowhere => Poll::Ready(Ok(())),
        }
    }

    fn poll_shutdown(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.poll_flush(context)
    }
}
