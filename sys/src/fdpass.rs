//! File descriptors over unix sockets (`SCM_RIGHTS`).
//!
//! Works on any unix socket. On a stream socket the descriptors travel with the
//! first byte of the message, so that messages should be framed by their length;
//! on `SEQPACKET` and `DGRAM` sockets one call is one message.

use std::io;
use std::mem;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::ptr;

/// The most descriptors the kernel takes in one message (`SCM_MAX_FD` in
/// include/net/scm.h).
pub const MAX_FDS: usize = 253;

/// Room for the control message of [`MAX_FDS`] descriptors: 16 bytes of
/// `cmsghdr` and the numbers. As u64 because a `cmsghdr` has to be aligned so.
const CONTROL_WORDS: usize = 2 + MAX_FDS.div_ceil(2);

/// Sends `bytes` with duplicates of `fds`; returns how many bytes were taken,
/// which on a stream socket may be fewer than there are.
///
/// `bytes` must not be empty when there are descriptors: a stream socket would
/// drop them, and an empty packet looks like the end of the connection.
///
/// # Errors
///
/// Those of sendmsg(2); `BrokenPipe` (never a signal) when the peer is gone;
/// `InvalidInput` for more than [`MAX_FDS`] descriptors or descriptors without
/// bytes.
pub fn send_with_fds(socket: impl AsFd, bytes: &[u8], fds: &[BorrowedFd<'_>]) -> io::Result<usize> {
    if fds.len() > MAX_FDS || (bytes.is_empty() && !fds.is_empty()) {
        return Err(io::ErrorKind::InvalidInput.into());
    }
    let numbers: Vec<RawFd> = fds.iter().map(AsRawFd::as_raw_fd).collect();
    let mut control = [0u64; CONTROL_WORDS];
    let mut vector = libc::iovec {
        iov_base: bytes.as_ptr().cast_mut().cast(),
        iov_len: bytes.len(),
    };
    let mut message = empty_message(&mut vector);
    if !numbers.is_empty() {
        let payload = mem::size_of_val(numbers.as_slice());
        message.msg_control = control.as_mut_ptr().cast();
        message.msg_controllen = control_space(payload) as _;
        // SAFETY: msg_control points at `control`, which lives to the end of this
        // function, is aligned for a cmsghdr and larger than one.
        let header = unsafe { libc::CMSG_FIRSTHDR(&raw const message) };
        let filled = libc::cmsghdr {
            cmsg_len: control_len(payload) as _,
            cmsg_level: libc::SOL_SOCKET,
            cmsg_type: libc::SCM_RIGHTS,
        };
        // SAFETY: CMSG_FIRSTHDR returned a pointer into `control` (msg_controllen
        // is at least one header), aligned and with room for a header.
        unsafe { header.write(filled) };
        // SAFETY: the header is inside `control`; its data follow it there.
        let data = unsafe { libc::CMSG_DATA(header) };
        // SAFETY: `control` has room for MAX_FDS numbers after the header and
        // there are at most that many; source and target do not overlap.
        unsafe { ptr::copy_nonoverlapping(numbers.as_ptr().cast::<u8>(), data, payload) };
    }
    loop {
        // SAFETY: `message` points at `vector`, `bytes` and `control`, which live
        // through the call; the kernel only reads them.
        let sent = unsafe {
            libc::sendmsg(
                socket.as_fd().as_raw_fd(),
                &raw const message,
                libc::MSG_NOSIGNAL,
            )
        };
        match usize::try_from(sent) {
            Ok(sent) => return Ok(sent),
            Err(_) => retry_interrupted()?,
        }
    }
}

/// Receives one message into `buffer`: the number of bytes (0: the peer closed)
/// and the descriptors, all close-on-exec.
///
/// # Errors
///
/// Those of recvmsg(2); `InvalidData` when the packet is longer than `buffer` or
/// descriptors were lost because this process may not open more (in both cases
/// the ones that came are closed).
pub fn recv_with_fds(socket: impl AsFd, buffer: &mut [u8]) -> io::Result<(usize, Vec<OwnedFd>)> {
    let mut control = [0u64; CONTROL_WORDS];
    let mut vector = libc::iovec {
        iov_base: buffer.as_mut_ptr().cast(),
        iov_len: buffer.len(),
    };
    let mut message = empty_message(&mut vector);
    message.msg_control = control.as_mut_ptr().cast();
    message.msg_controllen = mem::size_of_val(&control) as _;
    let received = loop {
        // SAFETY: `message` points at `vector`, `buffer` and `control`, which are
        // writable, of the stated lengths and live through the call.
        let received = unsafe {
            libc::recvmsg(
                socket.as_fd().as_raw_fd(),
                &raw mut message,
                libc::MSG_CMSG_CLOEXEC,
            )
        };
        match usize::try_from(received) {
            Ok(received) => break received,
            Err(_) => retry_interrupted()?,
        }
    };
    // Taken before the checks, so that they are closed whatever these say.
    let fds = received_fds(&message);
    if message.msg_flags & (libc::MSG_TRUNC | libc::MSG_CTRUNC) != 0 {
        return Err(io::ErrorKind::InvalidData.into());
    }
    Ok((received, fds))
}

/// Takes the descriptors out of a message that recvmsg has just filled.
fn received_fds(message: &libc::msghdr) -> Vec<OwnedFd> {
    let mut fds = Vec::new();
    // SAFETY: recvmsg set msg_control and msg_controllen to what it wrote.
    let mut header = unsafe { libc::CMSG_FIRSTHDR(message) };
    while !header.is_null() {
        // SAFETY: the CMSG macros return either null or an aligned pointer to a
        // complete header in the control buffer.
        let head = unsafe { header.read() };
        if head.cmsg_level == libc::SOL_SOCKET && head.cmsg_type == libc::SCM_RIGHTS {
            let count =
                (head.cmsg_len as usize).saturating_sub(control_len(0)) / size_of::<RawFd>();
            // SAFETY: as above; its data follow the header.
            let data = unsafe { libc::CMSG_DATA(header) };
            let mut numbers = vec![-1 as RawFd; count];
            // SAFETY: cmsg_len says that `count` numbers follow the header, and
            // `numbers` has room for as many.
            unsafe {
                ptr::copy_nonoverlapping(
                    data,
                    numbers.as_mut_ptr().cast(),
                    count * size_of::<RawFd>(),
                );
            }
            for number in numbers {
                // SAFETY: the kernel has just installed this descriptor for us
                // and nobody else knows its number.
                fds.push(unsafe { OwnedFd::from_raw_fd(number) });
            }
        }
        // SAFETY: `header` came from the same message.
        header = unsafe { libc::CMSG_NXTHDR(message, header) };
    }
    fds
}

fn empty_message(vector: &mut libc::iovec) -> libc::msghdr {
    // SAFETY: msghdr is plain data (on musl with private padding, hence not a
    // literal) for which all zeros are valid: no name, no control message.
    let mut message: libc::msghdr = unsafe { mem::zeroed() };
    message.msg_iov = vector;
    message.msg_iovlen = 1;
    message
}

fn control_len(payload: usize) -> usize {
    // SAFETY: arithmetic only. MAX_FDS bounds the payload, so it fits a u32.
    unsafe { libc::CMSG_LEN(payload as u32) as usize }
}

fn control_space(payload: usize) -> usize {
    // SAFETY: arithmetic only. MAX_FDS bounds the payload, so it fits a u32.
    unsafe { libc::CMSG_SPACE(payload as u32) as usize }
}

/// `Ok` when the last call was interrupted by a signal, else its error.
fn retry_interrupted() -> io::Result<()> {
    let error = io::Error::last_os_error();
    match error.kind() {
        io::ErrorKind::Interrupted => Ok(()),
        _ => Err(error),
    }
}

#[cfg(test)]
mod tests {
    use std::io::{Read, Seek, Write};
    use std::os::unix::net::UnixStream;

    use nix::sys::socket::{AddressFamily, SockFlag, SockType, socketpair};

    use super::*;

    fn packets() -> (OwnedFd, OwnedFd) {
        socketpair(
            AddressFamily::Unix,
            SockType::SeqPacket,
            None,
            SockFlag::SOCK_CLOEXEC,
        )
        .unwrap()
    }

    #[test]
    fn descriptors_arrive_close_on_exec_and_refer_to_the_same_files() {
        let (a, b) = packets();
        let mut file = tempfile::tempfile().unwrap();
        file.write_all(b"tern").unwrap();
        send_with_fds(&a, b"two", &[file.as_fd(), file.as_fd()]).unwrap();
        let mut buffer = [0; 16];
        let (length, fds) = recv_with_fds(&b, &mut buffer).unwrap();
        assert_eq!((&buffer[..length], fds.len()), (b"two".as_slice(), 2));
        for fd in fds {
            let flags = nix::fcntl::fcntl(&fd, nix::fcntl::FcntlArg::F_GETFD).unwrap();
            assert_eq!(flags, libc::FD_CLOEXEC);
            let mut same = std::fs::File::from(fd);
            let mut text = String::new();
            same.rewind().unwrap();
            same.read_to_string(&mut text).unwrap();
            assert_eq!(text, "tern");
        }
    }

    #[test]
    fn a_stream_socket_and_no_descriptors_work_too() {
        let (a, b) = UnixStream::pair().unwrap();
        assert_eq!(send_with_fds(&a, b"plain", &[]).unwrap(), 5);
        let mut buffer = [0; 16];
        let (length, fds) = recv_with_fds(&b, &mut buffer).unwrap();
        assert_eq!((length, fds.len()), (5, 0));
        drop(a);
        assert_eq!(recv_with_fds(&b, &mut buffer).unwrap().0, 0);
    }

    #[test]
    fn as_many_descriptors_as_the_kernel_takes_go_in_one_message() {
        let (a, b) = packets();
        let file = tempfile::tempfile().unwrap();
        let many = vec![file.as_fd(); MAX_FDS];
        send_with_fds(&a, b"x", &many).unwrap();
        assert_eq!(recv_with_fds(&b, &mut [0; 1]).unwrap().1.len(), MAX_FDS);
        let more = vec![file.as_fd(); MAX_FDS + 1];
        let error = send_with_fds(&a, b"x", &more).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::InvalidInput);
    }

    #[test]
    fn a_packet_longer_than_the_buffer_is_an_error_and_leaks_nothing() {
        let (a, b) = packets();
        let (mut reader, writer) = std::io::pipe().unwrap();
        send_with_fds(&a, b"too long", &[writer.as_fd()]).unwrap();
        drop(writer);
        let error = recv_with_fds(&b, &mut [0; 2]).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::InvalidData);
        // The pipe ends only when every copy of its writing end is closed.
        assert_eq!(reader.read(&mut [0; 1]).unwrap(), 0);
    }

    #[test]
    fn a_peer_that_is_gone_is_an_error_and_not_a_signal() {
        let (a, b) = packets();
        drop(b);
        let error = send_with_fds(&a, b"x", &[]).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::BrokenPipe);
    }
}
