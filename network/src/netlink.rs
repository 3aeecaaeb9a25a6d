//! One blocking conversation with the kernel's rtnetlink.
//!
//! A netlink socket belongs to the network namespace of the thread that opened
//! it, and most of what we do takes a visit to a namespace on a thread of its
//! own: there, blocking calls are the simple thing, and each takes microseconds.

use std::io;

use rtnetlink::packet_core::{
    NLM_F_ACK, NLM_F_DUMP, NLM_F_DUMP_INTR, NLM_F_REQUEST, NetlinkMessage, NetlinkPayload,
};
use rtnetlink::packet_route::RouteNetlinkMessage;
use rtnetlink::sys::{Socket, SocketAddr, protocols::NETLINK_ROUTE};

/// How often a dump is asked for again that changed while it was read.
const DUMP_TRIES: u32 = 10;

/// A socket in one namespace.
#[derive(Debug)]
pub(crate) struct Netlink {
    socket: Socket,
    sequence: u32,
}

impl Netlink {
    /// Opens a socket in the namespace of the calling thread.
    pub(crate) fn open() -> io::Result<Self> {
        let mut socket = Socket::new(NETLINK_ROUTE)?;
        socket.bind_auto()?;
        socket.connect(&SocketAddr::new(0, 0))?;
        Ok(Self {
            socket,
            sequence: 0,
        })
    }

    /// Asks for everything that matches.
    pub(crate) fn dump(
        &mut self,
        message: &RouteNetlinkMessage,
    ) -> io::Result<Vec<RouteNetlinkMessage>> {
        for _ in 0..DUMP_TRIES {
            let request = encode(message.clone(), NLM_F_REQUEST | NLM_F_DUMP);
            let (answers, interrupted) = self.exchange(request)?;
            if !interrupted {
                return Ok(answers);
            }
        }
        Err(io::Error::from(io::ErrorKind::ResourceBusy))
    }

    /// Asks for one object, or changes something; returns what was asked for.
    pub(crate) fn call(
        &mut self,
        message: RouteNetlinkMessage,
        flags: u16,
    ) -> io::Result<Vec<RouteNetlinkMessage>> {
        self.send(encode(message, NLM_F_REQUEST | NLM_F_ACK | flags))
    }

    /// Sends what [`encode`] prepared.
    pub(crate) fn send(&mut self, request: Vec<u8>) -> io::Result<Vec<RouteNetlinkMessage>> {
        self.exchange(request).map(|(answers, _)| answers)
    }

    /// Answers, and whether what was dumped changed meanwhile.
    fn exchange(&mut self, mut request: Vec<u8>) -> io::Result<(Vec<RouteNetlinkMessage>, bool)> {
        self.sequence += 1;
        request[SEQUENCE].copy_from_slice(&self.sequence.to_ne_bytes());
        self.socket.send(&request, 0)?;
        let mut answers = Vec::new();
        let mut interrupted = false;
        loop {
            let (packet, _) = self.socket.recv_from_full()?;
            let mut rest = &packet[..];
            while !rest.is_empty() {
                let message = NetlinkMessage::<RouteNetlinkMessage>::deserialize(rest)
                    .map_err(|error| io::Error::new(io::ErrorKind::InvalidData, error))?;
                let length = (message.header.length as usize).next_multiple_of(4).max(16);
                rest = rest.get(length..).unwrap_or_default();
                if message.header.sequence_number != self.sequence {
                    continue; // the rest of a conversation that was given up
                }
                interrupted |= message.header.flags & NLM_F_DUMP_INTR != 0;
                match message.payload {
                    NetlinkPayload::InnerMessage(answer) => answers.push(answer),
                    NetlinkPayload::Error(error) if error.code.is_some() => {
                        return Err(error.to_io());
                    }
                    NetlinkPayload::Error(_) | NetlinkPayload::Done(_) => {
                        return Ok((answers, interrupted));
                    }
                    _ => {}
                }
            }
        }
    }
}

/// Where a message has its sequence number.
const SEQUENCE: std::ops::Range<usize> = 8..12;

/// The bytes of a request. [`Netlink::send`] numbers them.
pub(crate) fn encode(message: RouteNetlinkMessage, flags: u16) -> Vec<u8> {
    let mut message = NetlinkMessage::from(message);
    message.header.flags = flags;
    message.finalize();
    let mut bytes = vec![0; message.buffer_len()];
    message.serialize(&mut bytes);
    bytes
}
