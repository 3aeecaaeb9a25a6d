//! What a session and its helper say to each other.
//!
//! ```text
//! session -> helper   Prepare, Start, then Answer for each Notify
//! helper -> session   Ready (with the listener), Notify*, Ended
//!                     or, at any time before Ended: Failed
//! ```
//!
//! One message is one JSON packet on a SEQPACKET socket. Both ends are the same
//! build. A closed socket means that the other process is gone.

use std::ffi::OsString;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::PathBuf;
use std::time::{Duration, Instant};

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use crate::request::DumpRequest;

/// The largest packet; the kernel's default socket buffer (`wmem_default`) holds
/// little more. A request with a thousand mounts has about half of it.
const PACKET_BYTES: usize = 192 << 10;

/// Which of CRIU's system calls are asked about.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) enum Asked {
    /// None: CRIU is under no filter, and there is no listener.
    Nothing,
    /// Limits of other processes only.
    Limits,
    /// Those and what has to do with memory.
    Memory,
}

/// Session to helper.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) enum ToHelper {
    /// Load libcriu, execute CRIU and let it wait.
    Prepare {
        criu: PathBuf,
        search_path: OsString,
        asked: Asked,
    },
    /// Dump.
    Start(Box<DumpRequest>),
    /// Go on after a notification, or abort.
    Answer { go_on: bool },
}

/// Helper to session.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) enum FromHelper {
    /// CRIU waits; the seccomp listener comes with this, where there is one.
    Ready,
    /// CRIU waits for an answer.
    Notify { action: String },
    /// The dump is over, and CRIU has let go of the tasks.
    Ended(Ending),
    /// It did not come to a dump.
    Failed { reason: String },
}

/// How a dump ended.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) enum Ending {
    /// As it should.
    Done,
    /// The session said no.
    Aborted { action: String },
    /// CRIU says no, or died; the library's result.
    Failed { result: i32, criu: Option<String> },
}

/// One end of the socket.
#[derive(Debug)]
pub(crate) struct Channel(OwnedFd);

impl From<OwnedFd> for Channel {
    fn from(socket: OwnedFd) -> Self {
        Self(socket)
    }
}

impl AsFd for Channel {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

impl Channel {
    pub(crate) fn send<T: Serialize>(
        &self,
        message: &T,
        files: &[BorrowedFd<'_>],
    ) -> io::Result<()> {
        let packet = serde_json::to_vec(message)?;
        if packet.len() > PACKET_BYTES {
            return Err(io::ErrorKind::FileTooLarge.into());
        }
        sys::fdpass::send_with_fds(&self.0, &packet, files)?;
        Ok(())
    }

    /// The next message; `None` when the other end is gone. Blocks.
    pub(crate) fn receive<T: DeserializeOwned>(&self) -> io::Result<Option<(T, Vec<OwnedFd>)>> {
        let mut packet = vec![0; PACKET_BYTES];
        let (length, files) = match sys::fdpass::recv_with_fds(&self.0, &mut packet) {
            // The other end died with our last message unread.
            Err(error) if error.kind() == io::ErrorKind::ConnectionReset => return Ok(None),
            result => result?,
        };
        if length == 0 {
            return Ok(None);
        }
        Ok(Some((serde_json::from_slice(&packet[..length])?, files)))
    }

    /// Whether there is something to [`receive`](Self::receive) within `timeout`.
    pub(crate) fn wait(&self, timeout: Duration) -> io::Result<bool> {
        let deadline = Instant::now() + timeout;
        loop {
            let left = deadline.saturating_duration_since(Instant::now());
            // Rounded up, so that a millisecond that has begun does not spin.
            let left_ms = left
                .as_micros()
                .div_ceil(1000)
                .try_into()
                .unwrap_or(i32::MAX);
            let mut files = [PollFd::new(self.as_fd(), PollFlags::POLLIN)];
            match poll(
                &mut files,
                PollTimeout::try_from(left_ms).unwrap_or(PollTimeout::MAX),
            ) {
                Err(nix::Error::EINTR) => {}
                Ok(0) if left_ms == 0 => return Ok(false),
                Ok(0) => {}
                result => return result.map(|_| true).map_err(Into::into),
            }
        }
    }
}

/// A connected pair of SEQPACKET sockets, close-on-exec.
pub(crate) fn packet_pair() -> io::Result<(OwnedFd, OwnedFd)> {
    use nix::sys::socket::{AddressFamily, SockFlag, SockType, socketpair};
    let kind = SockType::SeqPacket;
    Ok(socketpair(
        AddressFamily::Unix,
        kind,
        None,
        SockFlag::SOCK_CLOEXEC,
    )?)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::request::ExternalMount;

    fn pair() -> (Channel, Channel) {
        let (a, b) = packet_pair().unwrap();
        (a.into(), b.into())
    }

    #[test]
    fn a_request_with_a_thousand_mounts_fits() {
        let (session, helper) = pair();
        let mut request = DumpRequest::new(7, "/images");
        let path = PathBuf::from("/var/lib/some/rather/long/mount/point/in/the/container");
        let mount = ExternalMount {
            key: path.clone(),
            value: path,
        };
        request.external_mounts = vec![mount; 1000];
        session
            .send(&ToHelper::Start(Box::new(request.clone())), &[])
            .unwrap();
        match helper.receive().unwrap().unwrap() {
            (ToHelper::Start(received), _) => assert_eq!(*received, request),
            (other, _) => panic!("{other:?}"),
        }
    }

    #[test]
    fn a_peer_that_is_gone_is_no_error_but_the_end() {
        let (session, helper) = pair();
        session
            .send(&ToHelper::Answer { go_on: true }, &[])
            .unwrap();
        drop(helper);
        assert!(session.wait(Duration::ZERO).unwrap());
        assert!(session.receive::<FromHelper>().unwrap().is_none());
    }

    #[test]
    fn waiting_ends_with_the_time_or_with_a_message() {
        let (session, helper) = pair();
        assert!(!session.wait(Duration::from_millis(5)).unwrap());
        helper.send(&FromHelper::Ready, &[]).unwrap();
        assert!(session.wait(Duration::from_secs(60)).unwrap());
    }

    #[test]
    fn bytes_that_are_no_message_are_an_error() {
        let (session, helper) = pair();
        sys::fdpass::send_with_fds(&helper, b"{\"Sterna\":1}", &[]).unwrap();
        let error = session.receive::<FromHelper>().unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::InvalidData);
    }
}
