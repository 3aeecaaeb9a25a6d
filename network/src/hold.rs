//! Keeping a container's packets while it is on its way.
//!
//! Between the freeze on one node and the resumption on the other nobody can
//! take a packet for the container. Were they dropped, its clients would send
//! them again only after their retransmission timeout: 200 ms at least, doubled
//! each time, so that a freeze of 100 ms would look like one of 200, and one of
//! 250 like one of 600. So the destination takes the container's place on the
//! network right after the freeze, with a port that leads to this process, keeps
//! every frame, and passes them on when the container's sockets exist.
//!
//! ```text
//!   bridge --- hold port ==veth== far end --- packet socket --- frames kept
//!                                                                   |
//!   (after the restore)                                             v
//!   bridge --- container's port ==veth== container's interface <----'
//! ```

use std::collections::VecDeque;
use std::hash::{BuildHasher, RandomState};
use std::io;
use std::sync::{Arc, Mutex, PoisonError};

use rtnetlink::packet_core::{NLM_F_ACK, NLM_F_CREATE, NLM_F_EXCL, NLM_F_REQUEST};
use rtnetlink::packet_route::RouteNetlinkMessage;
use rtnetlink::packet_route::link::{
    InfoData, InfoKind, InfoVeth, LinkAttribute, LinkInfo, LinkMessage,
};
use sys::packet::{HEADER_BYTES, MAX_FRAME_BYTES, PacketSocket};
use tokio::io::unix::AsyncFd;
use tokio::task::JoinHandle;

use crate::Prepared;
use crate::error::NetworkError;
use crate::frames;
use crate::link;
use crate::netlink::{Netlink, encode};
use crate::prepare::{host_mac, host_name, isolate};

/// Most that is kept, in bytes: a second of 500 Mbit/s. What comes when it is
/// full is dropped, as it would be without us.
const LIMIT_BYTES: usize = 64 << 20;

/// A place on the network that stands in for a container. Gone when dropped.
#[derive(Debug)]
pub(crate) struct Hold {
    port_name: String,
    enslave: Vec<u8>,
    announcements: Vec<Vec<u8>>,
    socket: Arc<AsyncFd<PacketSocket>>,
    /// Where kept frames are passed on: the node's end of the container's pair.
    container: PacketSocket,
    kept: Arc<Mutex<Kept>>,
    keeper: Option<JoinHandle<()>>,
}

#[derive(Debug, Default)]
struct Kept {
    frames: VecDeque<Vec<u8>>,
    bytes: usize,
    dropped: u64,
}

impl Hold {
    /// Makes the stand-in, not yet on the bridge. From a thread of a runtime, in
    /// the node's namespace.
    pub(crate) fn open(netlink: &mut Netlink, prepared: &Prepared) -> Result<Self, NetworkError> {
        let (port_name, far_name) = make_pair(netlink, prepared)?;
        let opened = Self::connect(netlink, prepared, &port_name, &far_name);
        if opened.is_err() {
            remove(netlink, &port_name);
        }
        opened
    }

    fn connect(
        netlink: &mut Netlink,
        prepared: &Prepared,
        port_name: &str,
        far_name: &str,
    ) -> Result<Self, NetworkError> {
        let mut index = |name: &str| {
            link::named(netlink, name)
                .map(|link| link.index)
                .map_err(NetworkError::kernel("look at", name))
        };
        let (port, far) = (index(port_name)?, index(far_name)?);
        let (container, bridge) = (index(&prepared.host_interface)?, index(&prepared.bridge)?);
        for (name, number) in [(port_name, port), (far_name, far)] {
            isolate(name)?;
            netlink
                .call(link::up(number), 0)
                .map_err(NetworkError::kernel("bring up", name))?;
        }
        let open = |number, name: &str| {
            PacketSocket::open(number)
                .map_err(NetworkError::kernel("open a packet socket on", name))
        };
        let socket = watched(open(far, far_name)?)
            .map_err(NetworkError::kernel("wait for packets on", far_name))?;
        let container = open(container, &prepared.host_interface)?;
        let mac = prepared.description.interface.mac;
        let announcements = prepared
            .description
            .announced()
            .flat_map(|address| frames::announcements(address, mac))
            .map(with_header)
            .collect();
        Ok(Self {
            port_name: port_name.to_owned(),
            enslave: encode(link::enslave(port, bridge), NLM_F_REQUEST | NLM_F_ACK),
            announcements,
            socket: Arc::new(socket),
            container,
            kept: Arc::default(),
            keeper: None,
        })
    }

    /// Takes the container's place: from now on its packets are kept here.
    pub(crate) fn begin(&mut self, netlink: &mut Netlink) -> Result<(), NetworkError> {
        netlink
            .send(self.enslave.clone())
            .map_err(NetworkError::kernel("attach", &self.port_name))?;
        let (socket, kept) = (Arc::clone(&self.socket), Arc::clone(&self.kept));
        self.keeper = Some(tokio::spawn(async move {
            if let Err(error) = keep(&socket, &kept).await {
                tracing::warn!(%error, "packets for the container are not kept");
            }
        }));
        self.announce()
    }

    /// Says that the container's addresses are here. Worth repeating: the source
    /// may have sent a last packet from its own place meanwhile.
    pub(crate) fn announce(&self) -> Result<(), NetworkError> {
        for frame in &self.announcements {
            self.socket
                .get_ref()
                .send(frame)
                .map_err(NetworkError::kernel("announce from", &self.port_name))?;
        }
        Ok(())
    }

    /// Passes on what is kept so far, in order. Returns how many frames.
    pub(crate) fn pass_on(&self) -> usize {
        let frames = {
            let mut kept = self.kept.lock().unwrap_or_else(PoisonError::into_inner);
            kept.bytes = 0;
            std::mem::take(&mut kept.frames)
        };
        // What cannot be sent is lost like any packet: it is sent again.
        frames
            .iter()
            .filter(|frame| self.container.send(frame).is_ok())
            .count()
    }

    /// Gives the place up, once the container's own port is on the bridge.
    pub(crate) fn end(self) -> usize {
        if let Some(keeper) = &self.keeper {
            keeper.abort();
        }
        // What came since, and what the keeper had not read yet.
        let mut buffer = vec![0; MAX_FRAME_BYTES];
        while let Ok(length) = self.socket.get_ref().receive(&mut buffer) {
            store(&self.kept, &buffer[..length]);
        }
        let passed = self.pass_on();
        let kept = self.kept.lock().unwrap_or_else(PoisonError::into_inner);
        if kept.dropped > 0 {
            tracing::warn!(
                dropped = kept.dropped,
                "more packets came than could be kept"
            );
        }
        passed
    }
}

impl Drop for Hold {
    fn drop(&mut self) {
        if let Some(keeper) = &self.keeper {
            keeper.abort();
        }
        if let Ok(mut netlink) = Netlink::open() {
            remove(&mut netlink, &self.port_name);
        }
    }
}

#[allow(
    deprecated,
    reason = "its replacement is unsafe for types whose descriptor may change; this one's does not"
)]
fn watched(socket: PacketSocket) -> io::Result<AsyncFd<PacketSocket>> {
    AsyncFd::new(socket)
}

async fn keep(socket: &AsyncFd<PacketSocket>, kept: &Mutex<Kept>) -> io::Result<()> {
    let mut buffer = vec![0; MAX_FRAME_BYTES];
    loop {
        let mut ready = socket.readable().await?;
        match ready.try_io(|socket| socket.get_ref().receive(&mut buffer)) {
            Ok(length) => store(kept, &buffer[..length?]),
            Err(_would_block) => {}
        }
    }
}

fn store(kept: &Mutex<Kept>, frame: &[u8]) {
    let mut kept = kept.lock().unwrap_or_else(PoisonError::into_inner);
    if kept.bytes + frame.len() > LIMIT_BYTES {
        kept.dropped += 1;
    } else {
        kept.bytes += frame.len();
        kept.frames.push_back(frame.to_vec());
    }
}

/// A header that says: nothing special, and no checksum is missing.
fn with_header(frame: Vec<u8>) -> Vec<u8> {
    let mut with_header = vec![0; HEADER_BYTES];
    with_header.extend(frame);
    with_header
}

fn make_pair(netlink: &mut Netlink, prepared: &Prepared) -> Result<(String, String), NetworkError> {
    let random = RandomState::new();
    let port_name = host_name(&prepared.netns, random.hash_one(0));
    let far_name = host_name(&prepared.netns, random.hash_one(1));
    let mtu = prepared.description.interface.mtu;
    let end = |name: &str, salt: u8| {
        let mut message = LinkMessage::default();
        message.attributes = vec![
            LinkAttribute::IfName(name.to_owned()),
            LinkAttribute::Address(host_mac(random.hash_one(salt)).to_vec()),
            LinkAttribute::Mtu(mtu),
        ];
        message
    };
    let mut pair = end(&port_name, 2);
    pair.attributes.push(LinkAttribute::LinkInfo(vec![
        LinkInfo::Kind(InfoKind::Veth),
        LinkInfo::Data(InfoData::Veth(InfoVeth::Peer(end(&far_name, 3)))),
    ]));
    netlink
        .call(
            RouteNetlinkMessage::NewLink(pair),
            NLM_F_CREATE | NLM_F_EXCL,
        )
        .map_err(NetworkError::kernel("create the interface", &port_name))?;
    Ok((port_name, far_name))
}

/// Both ends at once; that it is gone already is fine.
fn remove(netlink: &mut Netlink, port_name: &str) {
    if let Ok(link) = link::named(netlink, port_name) {
        netlink.call(link::delete(link.index), 0).ok();
    }
}
