//! The engine's end of the socket to its shim.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;

use nodeapi::{FromEngine, ToEngine};
use tokio::sync::mpsc;

/// Largest message in either direction: a job with its network description.
const MESSAGE_BYTES: usize = 256 << 10;

/// What can go wrong between engine and shim.
#[derive(Debug, thiserror::Error)]
pub(crate) enum IpcError {
    #[error("cannot reach the shim")]
    Socket(#[source] io::Error),
    #[error("the shim is gone")]
    Closed,
    #[error("cannot understand the shim")]
    Format(#[source] serde_json::Error),
}

/// Sends to the shim; clones share the socket. One message is one packet.
#[derive(Debug, Clone)]
pub(crate) struct ToShim(Arc<OwnedFd>);

impl ToShim {
    /// Sends one message; a packet this small never blocks for long.
    pub(crate) fn send(&self, message: &FromEngine) -> Result<(), IpcError> {
        self.send_with(message, &[])
    }

    /// Sends `Guard` with the descriptor that it is about.
    pub(crate) fn send_guard(&self, fd: BorrowedFd<'_>) -> Result<(), IpcError> {
        self.send_with(&FromEngine::Guard, &[fd])
    }

    fn send_with(&self, message: &FromEngine, fds: &[BorrowedFd<'_>]) -> Result<(), IpcError> {
        let packet = serde_json::to_vec(message).map_err(IpcError::Format)?;
        sys::fdpass::send_with_fds(self.0.as_fd(), &packet, fds).map_err(IpcError::Socket)?;
        Ok(())
    }
}

/// Reads one message; blocks.
fn receive(socket: BorrowedFd<'_>) -> Result<ToEngine, IpcError> {
    let mut packet = vec![0; MESSAGE_BYTES];
    let (length, _fds) =
        sys::fdpass::recv_with_fds(socket, &mut packet).map_err(IpcError::Socket)?;
    if length == 0 {
        return Err(IpcError::Closed);
    }
    serde_json::from_slice(&packet[..length]).map_err(IpcError::Format)
}

/// Reads the job, then turns the socket into a sender and a queue of messages.
/// The queue ends when the shim is gone.
pub(crate) fn open(
    socket: OwnedFd,
) -> Result<(ToEngine, ToShim, mpsc::UnboundedReceiver<ToEngine>), IpcError> {
    let job = receive(socket.as_fd())?;
    let socket = Arc::new(socket);
    let (queue, messages) = mpsc::unbounded_channel();
    let reader = Arc::clone(&socket);
    std::thread::Builder::new()
        .name("shim".into())
        .spawn(move || {
            // Bounded by the shim, which is our own code and sends a handful.
            while let Ok(message) = receive(reader.as_fd()) {
                if queue.send(message).is_err() {
                    break;
                }
            }
        })
        .map_err(IpcError::Socket)?;
    Ok((job, ToShim(socket), messages))
}
