//! Raw frames of one network interface (packet(7)).
//!
//! Frames carry a virtio-net header (`PACKET_VNET_HDR`): on virtual devices a
//! frame may be larger than the MTU and its checksum unfinished, and only the
//! header says so. Whoever sends a frame again has to send the header too.

use std::io;
use std::mem;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};

use libc::c_int;

/// Bytes of the virtio-net header before each frame: `struct virtio_net_hdr` of
/// include/uapi/linux/virtio_net.h, without `num_buffers`.
pub const HEADER_BYTES: usize = 10;

/// Largest frame with its header: a GSO packet of 64 KiB and the link layer's part.
pub const MAX_FRAME_BYTES: usize = HEADER_BYTES + (64 << 10) + 64;

/// A raw socket on one interface of the network namespace it was opened in.
#[derive(Debug)]
pub struct PacketSocket(OwnedFd);

impl AsFd for PacketSocket {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

impl AsRawFd for PacketSocket {
    fn as_raw_fd(&self) -> RawFd {
        self.0.as_raw_fd()
    }
}

impl PacketSocket {
    /// Opens a non-blocking socket for all frames that arrive at the interface
    /// with this index. Frames that leave through it are not seen.
    ///
    /// # Errors
    ///
    /// Those of socket(2), setsockopt(2) and bind(2); `PermissionDenied` without
    /// CAP_NET_RAW.
    pub fn open(interface: u32) -> io::Result<Self> {
        let protocol = (libc::ETH_P_ALL as u16).to_be();
        let flags = libc::SOCK_RAW | libc::SOCK_NONBLOCK | libc::SOCK_CLOEXEC;
        // Protocol 0: nothing is received before the socket is bound.
        // SAFETY: takes no pointers.
        let number = check(unsafe { libc::socket(libc::AF_PACKET, flags, 0) })?;
        // SAFETY: socket returned a new descriptor that nobody else owns.
        let socket = Self(unsafe { OwnedFd::from_raw_fd(number) });
        socket.enable(libc::PACKET_VNET_HDR)?;
        socket.enable(libc::PACKET_IGNORE_OUTGOING)?;
        let index = i32::try_from(interface).map_err(|_| io::ErrorKind::InvalidInput)?;
        let address = libc::sockaddr_ll {
            sll_family: libc::AF_PACKET as u16,
            sll_protocol: protocol,
            sll_ifindex: index,
            sll_hatype: 0,
            sll_pkttype: 0,
            sll_halen: 0,
            sll_addr: [0; 8],
        };
        // SAFETY: `address` is a sockaddr_ll, lives through the call, and its size
        // is the one given.
        check(unsafe {
            libc::bind(
                socket.0.as_raw_fd(),
                (&raw const address).cast(),
                mem::size_of_val(&address) as libc::socklen_t,
            )
        })?;
        Ok(socket)
    }

    fn enable(&self, option: c_int) -> io::Result<()> {
        let on: c_int = 1;
        // SAFETY: the option's value is an int; `on` lives through the call.
        check(unsafe {
            libc::setsockopt(
                self.0.as_raw_fd(),
                libc::SOL_PACKET,
                option,
                (&raw const on).cast(),
                mem::size_of_val(&on) as libc::socklen_t,
            )
        })?;
        Ok(())
    }

    /// Reads one frame with its header into `buffer`; returns its length.
    ///
    /// # Errors
    ///
    /// `WouldBlock` when there is none; those of recv(2).
    pub fn receive(&self, buffer: &mut [u8]) -> io::Result<usize> {
        nix::sys::socket::recv(
            self.0.as_raw_fd(),
            buffer,
            nix::sys::socket::MsgFlags::empty(),
        )
        .map_err(io::Error::from)
    }

    /// Sends one frame with its header.
    ///
    /// # Errors
    ///
    /// `WouldBlock` when the interface's queue is full; those of send(2).
    pub fn send(&self, frame: &[u8]) -> io::Result<()> {
        nix::sys::socket::send(
            self.0.as_raw_fd(),
            frame,
            nix::sys::socket::MsgFlags::empty(),
        )?;
        Ok(())
    }
}

fn check(result: c_int) -> io::Result<c_int> {
    if result < 0 {
        Err(io::Error::last_os_error())
    } else {
        Ok(result)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_frame_that_one_socket_sends_through_loopback_arrives_at_another() {
        let index = nix::net::if_::if_nametoindex("lo").unwrap();
        let (Ok(receiver), Ok(sender)) = (PacketSocket::open(index), PacketSocket::open(index))
        else {
            eprintln!("skipped: opening packet sockets needs CAP_NET_RAW");
            return;
        };
        // An Ethernet frame of a type that nobody uses: header, addresses, type.
        let mut frame = vec![0; HEADER_BYTES + 60];
        frame[HEADER_BYTES + 12..HEADER_BYTES + 14].copy_from_slice(&[0x88, 0xb5]);
        frame[HEADER_BYTES + 14] = 42;
        sender.send(&frame).unwrap();
        let mut buffer = vec![0; MAX_FRAME_BYTES];
        let deadline = std::time::Instant::now() + std::time::Duration::from_secs(5);
        loop {
            match receiver.receive(&mut buffer) {
                Ok(length) if buffer[..length] == frame[..] => return,
                Ok(_) => {}
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                    assert!(
                        std::time::Instant::now() < deadline,
                        "the frame did not arrive"
                    );
                    std::thread::sleep(std::time::Duration::from_millis(1));
                }
                Err(error) => panic!("{error}"),
            }
        }
    }
}
