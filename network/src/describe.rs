//! Reading a container's network, and whether it can move.

use std::collections::BTreeMap;
use std::fs::File;
use std::io;
use std::net::IpAddr;
use std::os::fd::AsRawFd;
use std::path::Path;

use rtnetlink::packet_route::address::{
    AddressAttribute, AddressFlags, AddressMessage, AddressScope,
};
use rtnetlink::packet_route::neighbour::{
    NeighbourAddress, NeighbourAttribute, NeighbourMessage, NeighbourState,
};
use rtnetlink::packet_route::nsid::{NsidAttribute, NsidMessage};
use rtnetlink::packet_route::route::{
    RouteAddress, RouteAttribute, RouteFlags, RouteHeader, RouteMessage, RouteMetric,
    RouteProtocol, RouteType,
};
use rtnetlink::packet_route::rule::{RuleAttribute, RuleMessage};
use rtnetlink::packet_route::{AddressFamily, RouteNetlinkMessage};

use crate::Attachment;
use crate::description::{Address, Description, Interface, Neighbour, Route, RouteKind};
use crate::error::NetworkError;
use crate::filter;
use crate::link::{self, Link};
use crate::netlink::Netlink;
use crate::sysctl;

/// The kernel's tables `local`, `default` and `main`.
const TABLE_MAIN: u32 = 254;
const TABLE_LOCAL: u32 = 255;

/// Of a lifetime: for good.
const FOREVER: u32 = u32::MAX;

/// What the kernel has in one namespace.
#[derive(Debug, Default)]
struct Inside {
    links: Vec<Link>,
    addresses: Vec<AddressMessage>,
    routes: Vec<RouteMessage>,
    rules: Vec<RuleMessage>,
    neighbours: Vec<NeighbourMessage>,
    /// By interface name; none where the kernel has no IPv6.
    ipv6_off: Vec<String>,
    /// A table of the packet filter that has rules.
    filter: Option<String>,
}

/// Reads the network of the container in `netns`, from a thread in the node's
/// namespace.
pub(crate) fn describe(netns: &Path) -> Result<(Description, Attachment), NetworkError> {
    let namespace = File::open(netns).map_err(NetworkError::kernel("open", netns.display()))?;
    let own = sys::netns::inode(Path::new("/proc/thread-self/ns/net"));
    if own.ok() == sys::netns::inode(netns).ok() {
        return Err(NetworkError::not_movable("it is the node's own"));
    }
    let inside = sys::netns::within(netns, Inside::read)
        .and_then(|inside| inside)
        .map_err(NetworkError::kernel("read the network of", netns.display()))?;
    let interface = inside.interface()?;
    let (port, bridge) = node_side(&namespace, interface)?;
    let settings = sys::netns::within(netns, || sysctl::changed(&interface.name))
        .and_then(|settings| settings)
        .map_err(NetworkError::kernel(
            "read the settings of",
            netns.display(),
        ))?;
    let description = Description {
        settings,
        ..inside.description(interface, &port)?
    };
    description.validate()?;
    let attachment = Attachment {
        netns: netns.to_owned(),
        host_interface: port.name,
        bridge: bridge.name,
    };
    Ok((description, attachment))
}

/// The node's end of a container's interface, and the bridge that it is on.
fn node_side(namespace: &File, interface: &Link) -> Result<(Link, Link), NetworkError> {
    let failed = || NetworkError::kernel("read", "the node's network");
    let not_here = || {
        NetworkError::not_movable(format!(
            "the other end of {} is not in the node's network",
            interface.name
        ))
    };
    let peer = match (interface.peer, interface.peer_namespace) {
        (Some(peer), Some(_)) => peer,
        _ => return Err(not_here()),
    };
    let mut netlink = Netlink::open().map_err(failed())?;
    let port = match link::numbered(&mut netlink, peer) {
        Err(error) if error.raw_os_error() == Some(nix::libc::ENODEV) => return Err(not_here()),
        port => port.map_err(failed())?,
    };
    // The kernel numbers namespaces when it first has to name them, hence after
    // the interface was asked for.
    let number = number_of(&mut netlink, namespace).map_err(failed())?;
    if !port.is_veth() || port.peer != Some(interface.index) || port.peer_namespace != number {
        return Err(not_here());
    }
    let bridge = match port.controller {
        Some(index) => Some(link::numbered(&mut netlink, index).map_err(failed())?),
        None => None,
    };
    let Some(bridge) = bridge.filter(Link::is_bridge) else {
        return Err(NetworkError::not_movable(format!(
            "{} is not on a bridge",
            port.name
        )));
    };
    if let Some(reason) = unusable(&bridge) {
        return Err(NetworkError::not_movable(format!(
            "bridge {} {reason}",
            bridge.name
        )));
    }
    Ok((port, bridge))
}

/// Why a port of the bridge could not be switched as we do it.
pub(crate) fn unusable(bridge: &Link) -> Option<&'static str> {
    if bridge.spanning_tree {
        Some("runs a spanning tree, which keeps a new port closed for long")
    } else if bridge.vlan_filtering {
        Some("filters VLANs, which are not carried")
    } else {
        None
    }
}

/// This namespace's number for another one; none if it has not needed one.
fn number_of(netlink: &mut Netlink, namespace: &File) -> io::Result<Option<i32>> {
    let mut request = NsidMessage::default();
    request
        .attributes
        .push(NsidAttribute::Fd(namespace.as_raw_fd() as u32));
    let answers = netlink.call(RouteNetlinkMessage::GetNsId(request), 0)?;
    Ok(answers.into_iter().find_map(|answer| match answer {
        RouteNetlinkMessage::NewNsId(message) => {
            message
                .attributes
                .into_iter()
                .find_map(|attribute| match attribute {
                    NsidAttribute::Id(id) if id >= 0 => Some(id),
                    _ => None,
                })
        }
        _ => None,
    }))
}

impl Inside {
    /// Of the namespace of the calling thread.
    fn read() -> io::Result<Self> {
        let mut netlink = Netlink::open()?;
        let mut inside = Self {
            links: link::all(&mut netlink)?,
            ..Self::default()
        };
        let requests = [
            RouteNetlinkMessage::GetAddress(AddressMessage::default()),
            RouteNetlinkMessage::GetRoute(RouteMessage::default()),
            RouteNetlinkMessage::GetRule(RuleMessage::default()),
            RouteNetlinkMessage::GetNeighbour(NeighbourMessage::default()),
        ];
        for request in requests {
            for answer in netlink.dump(&request)? {
                match answer {
                    RouteNetlinkMessage::NewAddress(message) => inside.addresses.push(message),
                    RouteNetlinkMessage::NewRoute(message) => inside.routes.push(message),
                    RouteNetlinkMessage::NewRule(message) => inside.rules.push(message),
                    RouteNetlinkMessage::NewNeighbour(message) => inside.neighbours.push(message),
                    _ => {}
                }
            }
        }
        for link in &inside.links {
            let switch = format!("/proc/sys/net/ipv6/conf/{}/disable_ipv6", link.name);
            match std::fs::read_to_string(switch) {
                Ok(value) if value.trim() == "0" => {}
                _ => inside.ipv6_off.push(link.name.clone()),
            }
        }
        inside.filter = filter::table_with_rules()?;
        Ok(inside)
    }

    /// The one interface that the container has.
    fn interface(&self) -> Result<&Link, NetworkError> {
        let used = |link: &&Link| {
            // Tunnel modules leave a fallback device in every new namespace.
            let idle = !link.is_veth() && !link.up && !self.has_address(link);
            !link.loopback && !idle
        };
        let mut used = self.links.iter().filter(used);
        let interface = match (used.next(), used.next()) {
            (None, _) => return Err(NetworkError::not_movable("it has no interface")),
            (Some(interface), None) => interface,
            (Some(_), Some(_)) => {
                return Err(NetworkError::not_movable("it has more than one interface"));
            }
        };
        if !interface.is_veth() {
            let kind = interface
                .kind
                .as_ref()
                .map_or("physical".into(), ToString::to_string);
            return Err(NetworkError::not_movable(format!(
                "{} is not a veth interface but {kind}",
                interface.name
            )));
        }
        if !interface.up {
            return Err(NetworkError::not_movable(format!(
                "{} is down",
                interface.name
            )));
        }
        if !self.has_address(interface) {
            return Err(NetworkError::not_movable(format!(
                "{} has no address",
                interface.name
            )));
        }
        Ok(interface)
    }

    fn has_address(&self, link: &Link) -> bool {
        self.addresses
            .iter()
            .any(|address| address.header.index == link.index)
    }

    fn description(&self, interface: &Link, port: &Link) -> Result<Description, NetworkError> {
        self.check_rules()?;
        if let Some(table) = &self.filter {
            return Err(NetworkError::not_movable(format!(
                "it filters packets (table {table})"
            )));
        }
        let mac = <[u8; 6]>::try_from(&interface.mac[..])
            .map_err(|_| NetworkError::not_movable("its hardware address is not of six bytes"))?;
        Ok(Description {
            interface: Interface {
                name: interface.name.clone(),
                index: interface.index,
                mac,
                mtu: interface.mtu,
                ipv6: !self.ipv6_off.contains(&interface.name),
                hairpin: port.hairpin,
                isolated: port.isolated,
            },
            addresses: self
                .addresses
                .iter()
                .filter(|message| message.header.index == interface.index)
                .filter_map(address)
                .collect(),
            routes: self
                .routes
                .iter()
                .filter_map(|message| self.route(message, interface).transpose())
                .collect::<Result<_, _>>()?,
            neighbours: self
                .neighbours
                .iter()
                .filter(|message| message.header.ifindex == interface.index)
                .filter_map(neighbour)
                // Those that were met only save time.
                .scan(0, |met, neighbour| {
                    *met += usize::from(!neighbour.permanent);
                    Some((*met <= MAX_MET).then_some(neighbour))
                })
                .flatten()
                .collect(),
            settings: BTreeMap::new(),
        })
    }

    /// Only the rules that every namespace starts with. Those of multicast
    /// routing come in the same dump, as families of their own.
    fn check_rules(&self) -> Result<(), NetworkError> {
        let usual = |rule: &RuleMessage| {
            let priority = rule
                .attributes
                .iter()
                .find_map(|attribute| match attribute {
                    RuleAttribute::Priority(priority) => Some(*priority),
                    _ => None,
                });
            matches!(
                (priority.unwrap_or(0), rule.header.table),
                (0, 255) | (32766, 254) | (32767, 253)
            )
        };
        let ip = |rule: &&RuleMessage| {
            matches!(
                rule.header.family,
                AddressFamily::Inet | AddressFamily::Inet6
            )
        };
        if self.rules.iter().filter(ip).all(usual) {
            Ok(())
        } else {
            Err(NetworkError::not_movable("it has routing rules"))
        }
    }

    /// `None` for routes that come by themselves.
    fn route(
        &self,
        message: &RouteMessage,
        interface: &Link,
    ) -> Result<Option<Route>, NetworkError> {
        let RouteHeader {
            address_family,
            destination_prefix_length,
            tos,
            protocol,
            kind,
            ..
        } = message.header;
        let unspecified: IpAddr = match address_family {
            AddressFamily::Inet => IpAddr::from([0; 4]),
            AddressFamily::Inet6 => IpAddr::from([0; 16]),
            _ => return Ok(None),
        };
        let mut route = Route {
            destination: unspecified,
            prefix: destination_prefix_length,
            kind: RouteKind::Unicast,
            gateway: None,
            onlink: message.header.flags.contains(RouteFlags::Onlink),
            source: None,
            scope: message.header.scope.into(),
            protocol: protocol.into(),
            tos,
            priority: None,
            mtu: None,
            advmss: None,
        };
        let mut table = u32::from(message.header.table);
        let mut elsewhere = false;
        let mut strange = None;
        for attribute in &message.attributes {
            match attribute {
                RouteAttribute::Table(number) => table = *number,
                RouteAttribute::Destination(address) => {
                    route.destination = plain(address).unwrap_or(unspecified)
                }
                RouteAttribute::Gateway(address) => route.gateway = plain(address),
                RouteAttribute::PrefSource(address) => route.source = plain(address),
                RouteAttribute::Priority(priority) => route.priority = Some(*priority),
                RouteAttribute::Oif(index) => elsewhere = *index != interface.index,
                RouteAttribute::Metrics(metrics) => {
                    for metric in metrics {
                        match metric {
                            RouteMetric::Mtu(mtu) => route.mtu = Some(*mtu),
                            RouteMetric::Advmss(advmss) => route.advmss = Some(*advmss),
                            _ => {}
                        }
                    }
                }
                RouteAttribute::MultiPath(_) => strange = Some("a route with several ways"),
                RouteAttribute::Encap(_) | RouteAttribute::EncapType(_) => {
                    strange = Some("a route through a tunnel")
                }
                RouteAttribute::Via(_) => {
                    strange = Some("a route through the other protocol family")
                }
                RouteAttribute::Source(_) => strange = Some("a route for certain sources"),
                _ => {}
            }
        }
        if table == TABLE_LOCAL
            || protocol == RouteProtocol::Kernel
            || message.header.flags.contains(RouteFlags::Cloned)
        {
            return Ok(None);
        }
        route.kind = match kind {
            RouteType::Unicast if elsewhere => return Ok(None),
            RouteType::Unicast => RouteKind::Unicast,
            RouteType::BlackHole => RouteKind::Blackhole,
            RouteType::Unreachable => RouteKind::Unreachable,
            RouteType::Prohibit => RouteKind::Prohibit,
            _ => {
                strange = Some("a route of an unusual kind");
                RouteKind::Unicast
            }
        };
        if table != TABLE_MAIN {
            strange = Some("a routing table of its own");
        }
        match strange {
            Some(what) => Err(NetworkError::not_movable(format!("it has {what}"))),
            None => Ok(Some(route)),
        }
    }
}

fn address(message: &AddressMessage) -> Option<Address> {
    let (mut local, mut other, mut broadcast, mut lifetime) = (None, None, None, None);
    let mut flags = AddressFlags::from_bits_retain(message.header.flags.bits().into());
    for attribute in &message.attributes {
        match attribute {
            AddressAttribute::Local(address) => local = Some(*address),
            AddressAttribute::Address(address) => other = Some(*address),
            AddressAttribute::Broadcast(address) => broadcast = Some(*address),
            AddressAttribute::Flags(all) => flags = *all,
            AddressAttribute::CacheInfo(info) if info.ifa_valid != FOREVER => {
                lifetime = Some((info.ifa_valid, info.ifa_preferred));
            }
            _ => {}
        }
    }
    let address = local.or(other)?;
    Some(Address {
        address,
        prefix: message.header.prefix_len,
        peer: other.filter(|other| *other != address),
        broadcast,
        scope: match message.header.scope {
            AddressScope::Universe => 0,
            scope => scope.into(),
        },
        no_prefix_route: flags.contains(AddressFlags::Noprefixroute),
        lifetime,
    })
}

fn plain(address: &RouteAddress) -> Option<IpAddr> {
    match address {
        RouteAddress::Inet(address) => Some((*address).into()),
        RouteAddress::Inet6(address) => Some((*address).into()),
        _ => None,
    }
}

/// Only those that somebody entered; the others may be wrong on another node and
/// are found again.
/// Most neighbours that are carried because the container has met them.
const MAX_MET: usize = 512;

fn neighbour(message: &NeighbourMessage) -> Option<Neighbour> {
    use NeighbourState::{Delay, Permanent, Probe, Reachable, Stale};
    if ![Permanent, Reachable, Stale, Delay, Probe].contains(&message.header.state) {
        return None;
    }
    let (mut address, mut mac) = (None, None);
    for attribute in &message.attributes {
        match attribute {
            NeighbourAttribute::Destination(NeighbourAddress::Inet(ip)) => {
                address = Some((*ip).into())
            }
            NeighbourAttribute::Destination(NeighbourAddress::Inet6(ip)) => {
                address = Some((*ip).into())
            }
            NeighbourAttribute::LinkLocalAddress(bytes) => {
                mac = <[u8; 6]>::try_from(&bytes[..]).ok()
            }
            _ => {}
        }
    }
    Some(Neighbour {
        address: address?,
        mac: mac?,
        permanent: message.header.state == Permanent,
    })
}
