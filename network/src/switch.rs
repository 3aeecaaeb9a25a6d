//! Moving traffic: the container's port on and off its bridge, and telling the
//! neighbours.

use std::os::fd::{AsRawFd, OwnedFd};
use std::sync::Arc;
use std::time::Duration;

use nix::ifaddrs::getifaddrs;
use nix::sys::socket::{
    AddressFamily, MsgFlags, SockFlag, SockType, SockaddrLike, bind, send, socket,
};

use crate::error::NetworkError;
use crate::frames;
use crate::hold::Hold;
use crate::link::{self, PortSetting, PortState};
use crate::netlink::{Netlink, encode};
use crate::{Attachment, Prepared};

use rtnetlink::packet_core::{NLM_F_ACK, NLM_F_REQUEST};

/// When announcements are repeated, counted from the one before. The first may
/// fall into a bridge's or switch's change of mind; there is no answer to wait for.
const REPEATS: [Duration; 2] = [Duration::from_millis(50), Duration::from_millis(200)];

/// Everything opened and encoded that attaching a container takes, because its
/// clients wait meanwhile: what is left are one netlink call and a few sends.
#[derive(Debug)]
pub struct Switch {
    prepared: Prepared,
    netlink: Netlink,
    /// In order: onto the bridge, and how the port was.
    attach: Vec<Vec<u8>>,
    announcer: Announcer,
    hold: Option<Hold>,
}

#[derive(Debug, Clone)]
struct Announcer {
    /// A packet socket of the container's interface.
    socket: Arc<OwnedFd>,
    frames: Arc<Vec<Vec<u8>>>,
}

impl Switch {
    /// From a thread in the node's namespace.
    pub(crate) fn open(prepared: Prepared) -> Result<Self, NetworkError> {
        let mut netlink =
            Netlink::open().map_err(NetworkError::kernel("read", "the node's network"))?;
        let mut index = |name: &str| {
            link::named(&mut netlink, name)
                .map(|link| link.index)
                .map_err(NetworkError::kernel("look at", name))
        };
        let (port, bridge) = (index(&prepared.host_interface)?, index(&prepared.bridge)?);
        let interface = &prepared.description.interface;
        let mut attach = vec![link::enslave(port, bridge)];
        if interface.hairpin || interface.isolated {
            let settings = [
                PortSetting::Hairpin(interface.hairpin),
                PortSetting::Isolated(interface.isolated),
            ];
            attach.push(link::set_port(port, &settings));
        }
        let announcer = Announcer::open(&prepared)?;
        let hold = Some(Hold::open(&mut netlink, &prepared)?);
        Ok(Self {
            hold,
            attach: attach
                .into_iter()
                .map(|message| encode(message, NLM_F_REQUEST | NLM_F_ACK))
                .collect(),
            prepared,
            netlink,
            announcer,
        })
    }

    /// Takes the container's place on the network and keeps its packets until
    /// [`attach`](Self::attach). To be called when the source stands still.
    pub async fn hold(&mut self) -> Result<(), NetworkError> {
        match &mut self.hold {
            Some(hold) => hold.begin(&mut self.netlink),
            None => Ok(()),
        }
    }

    /// Says once more that the container's packets belong here, while they are
    /// kept: when the source is known to be silent.
    pub async fn hold_again(&mut self) -> Result<(), NetworkError> {
        self.hold.as_ref().map_or(Ok(()), Hold::announce)
    }

    /// Puts the container's port on the bridge: from now on packets arrive, those
    /// that were kept first.
    ///
    /// Does not yield; takes about 0.1 ms, unless another change of the node's
    /// network is under way.
    pub async fn attach(&mut self) -> Result<(), NetworkError> {
        if let Some(hold) = &self.hold {
            hold.pass_on();
        }
        for request in &self.attach {
            self.netlink
                .send(request.clone())
                .map_err(NetworkError::kernel(
                    "attach",
                    &self.prepared.host_interface,
                ))?;
        }
        if let Some(hold) = self.hold.take() {
            // The bridge has to learn the new port before the old one goes.
            self.announcer.send().map_err(NetworkError::kernel(
                "announce the addresses of",
                self.prepared.netns.display(),
            ))?;
            let passed = hold.end();
            tracing::debug!(passed, "packets that came last were passed on");
        }
        Ok(())
    }

    /// Tells the network where the container's addresses are now: at once, and
    /// twice more in the background within the next quarter of a second.
    pub async fn announce(&self) -> Result<(), NetworkError> {
        self.announcer.send().map_err(NetworkError::kernel(
            "announce the addresses of",
            self.prepared.netns.display(),
        ))?;
        let announcer = self.announcer.clone();
        tokio::spawn(async move {
            if let Err(error) = announcer.repeat().await {
                // The container may have ended meanwhile.
                tracing::debug!(%error, "addresses are not announced again");
            }
        });
        Ok(())
    }

    /// Like [`announce`](Self::announce), and waits for the repetitions.
    pub(crate) async fn announce_all(&self) -> Result<(), NetworkError> {
        let failed =
            || NetworkError::kernel("announce the addresses of", self.prepared.netns.display());
        self.announcer.send().map_err(failed())?;
        self.announcer.repeat().await.map_err(failed())
    }
}

impl Announcer {
    fn open(prepared: &Prepared) -> Result<Self, NetworkError> {
        let interface = &prepared.description.interface;
        let socket = sys::netns::within(&prepared.netns, || {
            // Protocol 0: sends, and receives nothing. The number of the interface
            // comes with its link-layer address; `bind` wants nothing else.
            let socket = socket(
                AddressFamily::Packet,
                SockType::Raw,
                SockFlag::SOCK_CLOEXEC,
                None,
            )?;
            let own = getifaddrs()?
                .filter(|address| address.interface_name == interface.name)
                .filter_map(|address| address.address)
                .find(|address| address.family() == Some(AddressFamily::Packet))
                .ok_or(nix::errno::Errno::ENODEV)?;
            bind(socket.as_raw_fd(), &own)?;
            Ok::<_, nix::errno::Errno>(socket)
        });
        let socket = socket
            .and_then(|socket| Ok(socket?))
            .map_err(NetworkError::kernel(
                "open a packet socket in",
                prepared.netns.display(),
            ))?;
        let frames = prepared
            .description
            .announced()
            .flat_map(|address| frames::announcements(address, interface.mac))
            .collect();
        Ok(Self {
            socket: Arc::new(socket),
            frames: Arc::new(frames),
        })
    }

    fn send(&self) -> std::io::Result<()> {
        for frame in self.frames.iter() {
            send(self.socket.as_raw_fd(), frame, MsgFlags::empty())?;
        }
        Ok(())
    }

    async fn repeat(&self) -> std::io::Result<()> {
        for pause in REPEATS {
            tokio::time::sleep(pause).await;
            self.send()?;
        }
        Ok(())
    }
}

/// Opens or closes the container's port of the node's bridge. It stays a port,
/// with all its settings: as if nothing had happened if the container stays.
pub(crate) fn set_port(attachment: &Attachment, state: PortState) -> Result<(), NetworkError> {
    let name = &attachment.host_interface;
    let action = match state {
        PortState::Listening => "detach",
        PortState::Forwarding => "reattach",
    };
    let mut netlink = Netlink::open().map_err(NetworkError::kernel(action, name))?;
    let port = link::named(&mut netlink, name).map_err(NetworkError::kernel(action, name))?;
    netlink
        .call(link::set_port(port.index, &[PortSetting::State(state)]), 0)
        .map(drop)
        .map_err(NetworkError::kernel(action, name))
}
