//! Interfaces, as far as we have to know them.

use std::io;

use rtnetlink::packet_core::DefaultNla;
use rtnetlink::packet_route::link::{
    AfSpecInet6, AfSpecUnspec, BridgeStpState, In6AddrGenMode, InfoBridge, InfoBridgePort,
    InfoData, InfoKind, InfoPortData, LinkAttribute, LinkExtentMask, LinkFlags, LinkInfo,
    LinkMessage,
};
use rtnetlink::packet_route::{AddressFamily, RouteNetlinkMessage};

use crate::netlink::Netlink;

/// One interface of a namespace.
#[derive(Debug, Clone, Default)]
pub(crate) struct Link {
    pub(crate) index: u32,
    pub(crate) name: String,
    pub(crate) kind: Option<InfoKind>,
    pub(crate) loopback: bool,
    pub(crate) up: bool,
    pub(crate) mac: Vec<u8>,
    pub(crate) mtu: u32,
    /// Number of the bridge that it is a port of.
    pub(crate) controller: Option<u32>,
    /// Of a veth: the other end's number there.
    pub(crate) peer: Option<u32>,
    /// The other end's namespace, by this namespace's number for it; none: this one.
    pub(crate) peer_namespace: Option<i32>,
    /// Of a bridge.
    pub(crate) spanning_tree: bool,
    pub(crate) vlan_filtering: bool,
    /// Of a bridge's port.
    pub(crate) hairpin: bool,
    pub(crate) isolated: bool,
}

impl From<LinkMessage> for Link {
    fn from(message: LinkMessage) -> Self {
        let flags = message.header.flags;
        let mut link = Self {
            index: message.header.index,
            loopback: flags.contains(LinkFlags::Loopback),
            up: flags.contains(LinkFlags::Up),
            ..Self::default()
        };
        for attribute in message.attributes {
            match attribute {
                LinkAttribute::IfName(name) => link.name = name,
                LinkAttribute::Address(mac) => link.mac = mac,
                LinkAttribute::Mtu(mtu) => link.mtu = mtu,
                LinkAttribute::Controller(index) => link.controller = Some(index),
                LinkAttribute::Link(index) => link.peer = Some(index),
                LinkAttribute::LinkNetNsId(id) => link.peer_namespace = Some(id),
                LinkAttribute::LinkInfo(infos) => {
                    infos.into_iter().for_each(|info| link.inform(info))
                }
                _ => {}
            }
        }
        link
    }
}

impl Link {
    fn inform(&mut self, info: LinkInfo) {
        match info {
            LinkInfo::Kind(kind) => self.kind = Some(kind),
            LinkInfo::Data(InfoData::Bridge(settings)) => {
                for setting in settings {
                    match setting {
                        InfoBridge::StpState(state) => {
                            self.spanning_tree = state != BridgeStpState::Disabled;
                        }
                        InfoBridge::VlanFiltering(on) => self.vlan_filtering = on,
                        _ => {}
                    }
                }
            }
            LinkInfo::PortData(InfoPortData::BridgePort(settings)) => {
                for setting in settings {
                    match setting {
                        InfoBridgePort::HairpinMode(on) => self.hairpin = on,
                        InfoBridgePort::Isolated(on) => self.isolated = on,
                        _ => {}
                    }
                }
            }
            _ => {}
        }
    }

    pub(crate) fn is_bridge(&self) -> bool {
        self.kind == Some(InfoKind::Bridge)
    }

    pub(crate) fn is_veth(&self) -> bool {
        self.kind == Some(InfoKind::Veth)
    }
}

/// All interfaces.
pub(crate) fn all(netlink: &mut Netlink) -> io::Result<Vec<Link>> {
    let mut request = LinkMessage::default();
    request
        .attributes
        .push(LinkAttribute::ExtMask(vec![LinkExtentMask::SkipStats]));
    let answers = netlink.dump(&RouteNetlinkMessage::GetLink(request))?;
    Ok(answers.into_iter().filter_map(link).collect())
}

/// One interface, by name.
pub(crate) fn named(netlink: &mut Netlink, name: &str) -> io::Result<Link> {
    let mut request = LinkMessage::default();
    request
        .attributes
        .push(LinkAttribute::IfName(name.to_owned()));
    one(netlink, request)
}

/// One interface, by number.
pub(crate) fn numbered(netlink: &mut Netlink, index: u32) -> io::Result<Link> {
    one(netlink, with_index(index))
}

fn one(netlink: &mut Netlink, request: LinkMessage) -> io::Result<Link> {
    let answers = netlink.call(RouteNetlinkMessage::GetLink(request), 0)?;
    answers
        .into_iter()
        .find_map(link)
        .ok_or_else(|| io::ErrorKind::NotFound.into())
}

fn link(answer: RouteNetlinkMessage) -> Option<Link> {
    match answer {
        RouteNetlinkMessage::NewLink(message) => Some(message.into()),
        _ => None,
    }
}

fn with_index(index: u32) -> LinkMessage {
    let mut message = LinkMessage::default();
    message.header.index = index;
    message
}

/// Brings an interface up.
pub(crate) fn up(index: u32) -> RouteNetlinkMessage {
    let mut message = with_index(index);
    message.header.flags = LinkFlags::Up;
    message.header.change_mask = LinkFlags::Up;
    RouteNetlinkMessage::SetLink(message)
}

/// Removes an interface, with the other end if it is a veth.
pub(crate) fn delete(index: u32) -> RouteNetlinkMessage {
    RouteNetlinkMessage::DelLink(with_index(index))
}

/// Puts an interface on a bridge.
pub(crate) fn enslave(index: u32, bridge: u32) -> RouteNetlinkMessage {
    let mut message = with_index(index);
    message.attributes.push(LinkAttribute::Controller(bridge));
    RouteNetlinkMessage::SetLink(message)
}

/// Whether the kernel gives the interface an IPv6 address of its own.
pub(crate) fn generate_address(index: u32, generate: bool) -> RouteNetlinkMessage {
    let mut message = with_index(index);
    message.attributes.push(address_generation(generate));
    RouteNetlinkMessage::SetLink(message)
}

pub(crate) fn address_generation(generate: bool) -> LinkAttribute {
    let mode = if generate {
        In6AddrGenMode::Eui64
    } else {
        In6AddrGenMode::None
    };
    LinkAttribute::AfSpecUnspec(vec![AfSpecUnspec::Inet6(vec![AfSpecInet6::AddrGenMode(
        mode,
    )])])
}

/// Settings of a bridge's port; see the kernel's `if_link.h`.
#[derive(Debug, Clone, Copy)]
pub(crate) enum PortSetting {
    State(PortState),
    Hairpin(bool),
    Isolated(bool),
}

/// States of a bridge's port; see the kernel's `if_bridge.h`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum PortState {
    /// Frames neither come nor go. Without a spanning tree the kernel leaves a
    /// port in this state, whatever happens to other ports; a *blocking* port it
    /// would open again, a *disabled* one when its carrier comes back.
    Listening = 1,
    /// Frames come and go.
    Forwarding = 3,
}

/// Changes settings of a bridge's port.
pub(crate) fn set_port(index: u32, settings: &[PortSetting]) -> RouteNetlinkMessage {
    const IFLA_PROTINFO: u16 = 12;
    const NLA_F_NESTED: u16 = 1 << 15;
    const IFLA_BRPORT_STATE: u16 = 1;
    const IFLA_BRPORT_MODE: u16 = 4;
    const IFLA_BRPORT_ISOLATED: u16 = 33;
    let mut nested = Vec::new();
    for setting in settings {
        let (kind, value) = match *setting {
            PortSetting::State(state) => (IFLA_BRPORT_STATE, state as u8),
            PortSetting::Hairpin(on) => (IFLA_BRPORT_MODE, on.into()),
            PortSetting::Isolated(on) => (IFLA_BRPORT_ISOLATED, on.into()),
        };
        nested.extend_from_slice(&5_u16.to_ne_bytes()); // header and one byte
        nested.extend_from_slice(&kind.to_ne_bytes());
        nested.extend_from_slice(&[value, 0, 0, 0]);
    }
    let mut message = with_index(index);
    message.header.interface_family = AddressFamily::Bridge;
    // By hand: the library leaves the mark of a nested attribute out, and
    // without it the kernel takes the attribute for its old one-byte form.
    let attribute = DefaultNla::new(IFLA_PROTINFO | NLA_F_NESTED, nested);
    message.attributes.push(LinkAttribute::Other(attribute));
    RouteNetlinkMessage::SetLink(message)
}
