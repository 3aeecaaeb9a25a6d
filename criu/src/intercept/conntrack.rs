//! A namespace without tracked connections.
//!
//! CRIU asks for the tracked connections and the expected ones of every network
//! namespace, also of one that it will not restore because it is provided from
//! outside. The kernel walks the node's whole table for each: 13 ms.

use std::io;
use std::os::fd::{AsRawFd, OwnedFd};

use nix::sys::socket::{
    AddressFamily, MsgFlags, Shutdown, SockFlag, SockType, send, shutdown, socketpair,
};

/// `NLMSG_DONE` and `NLM_F_MULTI` of linux/netlink.h.
const DONE: u16 = 3;
const MULTI: u16 = 2;

/// The sequence number of all of CRIU's requests (`CR_NLMSG_SEQ`,
/// criu/include/libnetlink.h).
const SEQUENCE: u32 = 24680;

/// A socket that stands in for netlink's.
#[derive(Debug)]
pub(super) struct EmptyTable {
    /// What CRIU sends its request to and reads the answer from.
    pub(super) theirs: OwnedFd,
    /// Has to stay open until it is through, or the request cannot be sent.
    pub(super) ours: OwnedFd,
}

/// A socket on which the end of an empty list waits, whatever is asked. It keeps
/// messages apart as netlink does, and takes no notice of a destination's address.
pub(super) fn empty_table() -> io::Result<EmptyTable> {
    let (ours, theirs) = socketpair(
        AddressFamily::Unix,
        SockType::SeqPacket,
        None,
        SockFlag::SOCK_CLOEXEC,
    )?;
    send(ours.as_raw_fd(), &end_of_list(), MsgFlags::MSG_NOSIGNAL)?;
    // A CRIU that waits for more, whatever the reason, finds the end of file.
    shutdown(ours.as_raw_fd(), Shutdown::Write)?;
    Ok(EmptyTable { theirs, ours })
}

/// `struct nlmsghdr` and an `int`, the result.
fn end_of_list() -> Vec<u8> {
    let length: u32 = 20;
    let mut message = Vec::with_capacity(length as usize);
    message.extend(length.to_ne_bytes());
    message.extend(DONE.to_ne_bytes());
    message.extend(MULTI.to_ne_bytes());
    message.extend(SEQUENCE.to_ne_bytes());
    message.extend([0; 8]); // sender, result
    message
}

#[cfg(test)]
mod tests {
    use std::io::IoSlice;

    use nix::sys::socket::{NetlinkAddr, recv, sendmsg};

    use super::*;

    #[test]
    fn a_request_to_netlink_can_be_sent_and_the_list_is_empty() {
        let table = empty_table().unwrap();
        let socket = table.theirs.as_raw_fd();
        let kernel = NetlinkAddr::new(0, 0);
        sendmsg(
            socket,
            &[IoSlice::new(b"request")],
            &[],
            MsgFlags::MSG_NOSIGNAL,
            Some(&kernel),
        )
        .unwrap();
        let mut answer = [0; 64];
        let length = recv(socket, &mut answer, MsgFlags::empty()).unwrap();
        assert_eq!(answer[..length], end_of_list());
        assert_eq!(recv(socket, &mut answer, MsgFlags::empty()), Ok(0));
        drop(table.ours);
    }
}
