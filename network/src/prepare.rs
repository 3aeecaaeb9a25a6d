//! Making a network namespace that looks like the one a container had.

use std::fs::File;
use std::hash::{BuildHasher, RandomState};
use std::io;
use std::net::IpAddr;
use std::os::fd::AsRawFd;
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

use nix::errno::Errno;
use rtnetlink::packet_core::{NLM_F_CREATE, NLM_F_EXCL, NLM_F_REPLACE};
use rtnetlink::packet_route::AddressFamily;
use rtnetlink::packet_route::RouteNetlinkMessage;
use rtnetlink::packet_route::address::{
    AddressAttribute, AddressFlags, AddressHeaderFlags, AddressMessage, CacheInfo,
};
use rtnetlink::packet_route::link::{
    InfoData, InfoKind, InfoVeth, LinkAttribute, LinkInfo, LinkMessage,
};
use rtnetlink::packet_route::neighbour::{
    NeighbourAddress, NeighbourAttribute, NeighbourMessage, NeighbourState,
};
use rtnetlink::packet_route::route::{
    RouteAddress, RouteAttribute, RouteFlags, RouteHeader, RouteMessage, RouteMetric, RouteType,
};

use crate::Prepared;
use crate::describe::unusable;
use crate::description::{Address, Description, Neighbour, Route, RouteKind};
use crate::error::NetworkError;
use crate::link;
use crate::namespace;
use crate::netlink::Netlink;
use crate::sysctl;

/// How many random names are tried for the node's end of the pair.
const NAME_TRIES: u32 = 8;

/// Makes the namespace, from a thread in the node's namespace. Leaves nothing
/// behind when it fails.
pub(crate) fn prepare(
    netns: &Path,
    description: &Description,
    bridge: &str,
) -> Result<Prepared, NetworkError> {
    description.validate()?;
    let mut node = Netlink::open().map_err(NetworkError::kernel("read", "the node's network"))?;
    check_bridge(&mut node, bridge)?;
    namespace::create(netns)?;
    build(&mut node, netns, description)
        .map(|host_interface| Prepared {
            netns: netns.to_owned(),
            host_interface,
            bridge: bridge.to_owned(),
            description: description.clone(),
        })
        .inspect_err(|_| {
            namespace::remove(netns).ok(); // the first error says more
        })
}

fn check_bridge(node: &mut Netlink, bridge: &str) -> Result<(), NetworkError> {
    let refuse = |reason| {
        Err(NetworkError::Bridge {
            bridge: bridge.to_owned(),
            reason,
        })
    };
    match link::named(node, bridge) {
        Err(error) if error.raw_os_error() == Some(nix::libc::ENODEV) => refuse("there is none"),
        Err(error) => Err(NetworkError::kernel("look at", bridge)(error)),
        Ok(link) if !link.is_bridge() => refuse("it is not a bridge"),
        Ok(link) => unusable(&link).map_or(Ok(()), refuse),
    }
}

/// Returns the name of the node's end.
fn build(
    node: &mut Netlink,
    netns: &Path,
    description: &Description,
) -> Result<String, NetworkError> {
    let namespace = File::open(netns).map_err(NetworkError::kernel("open", netns.display()))?;
    let name = make_pair(node, &namespace, netns, description)?;
    connect(node, netns, &name, description).inspect_err(|_| {
        // Both ends at once; without this the pair would stay until the kernel
        // gets around to the namespace. The first error says more.
        if let Ok(link) = link::named(node, &name) {
            node.call(link::delete(link.index), 0).ok();
        }
    })?;
    Ok(name)
}

fn connect(
    node: &mut Netlink,
    netns: &Path,
    name: &str,
    description: &Description,
) -> Result<(), NetworkError> {
    let index = link::named(node, name)
        .map_err(NetworkError::kernel("look at", name))?
        .index;
    isolate(name)?;
    node.call(link::up(index), 0)
        .map_err(NetworkError::kernel("bring up", name))?;
    sys::netns::within(netns, || configure(description))
        .map_err(NetworkError::kernel("enter", netns.display()))?
}

/// The container's end is made inside of its namespace, with its name, number
/// and hardware address, so that it never shows in the node's.
fn make_pair(
    node: &mut Netlink,
    namespace: &File,
    netns: &Path,
    description: &Description,
) -> Result<String, NetworkError> {
    let wanted = &description.interface;
    let mut index = wanted.index;
    let mut tries = 0;
    loop {
        let mut peer = LinkMessage::default();
        peer.header.index = index;
        peer.attributes = vec![
            LinkAttribute::IfName(wanted.name.clone()),
            LinkAttribute::Address(wanted.mac.to_vec()),
            LinkAttribute::Mtu(wanted.mtu),
            LinkAttribute::NetNsFd(namespace.as_raw_fd()),
        ];
        let random = RandomState::new();
        let name = host_name(netns, random.hash_one(0));
        let mut pair = LinkMessage::default();
        pair.attributes = vec![
            LinkAttribute::IfName(name.clone()),
            LinkAttribute::Address(host_mac(random.hash_one(1)).to_vec()),
            LinkAttribute::Mtu(wanted.mtu),
            LinkAttribute::LinkInfo(vec![
                LinkInfo::Kind(InfoKind::Veth),
                LinkInfo::Data(InfoData::Veth(InfoVeth::Peer(peer))),
            ]),
        ];
        let made = node.call(
            RouteNetlinkMessage::NewLink(pair),
            NLM_F_CREATE | NLM_F_EXCL,
        );
        let errno = match made {
            Ok(_) => return Ok(name),
            Err(error) => error,
        };
        match errno.raw_os_error().map(Errno::from_raw) {
            Some(Errno::EEXIST) if tries < NAME_TRIES => tries += 1,
            // Another interface of the new namespace has the number (a tunnel's
            // fallback device). Few programs care.
            Some(Errno::EBUSY) if index != 0 => index = 0,
            _ => {
                return Err(NetworkError::kernel("create the interface", &wanted.name)(
                    errno,
                ));
            }
        }
    }
}

/// Bytes of a node's interface name that tell which namespace it is for.
const PREFIX_BYTES: usize = 8;

/// At most 15 bytes, recognisably ours, the same first half for the same path.
pub(crate) fn host_name(netns: &Path, random: u64) -> String {
    let hash = netns
        .as_os_str()
        .as_bytes()
        .iter()
        .fold(0xcbf2_9ce4_8422_2325_u64, |hash, byte| {
            (hash ^ u64::from(*byte)).wrapping_mul(0x0100_0000_01b3) // FNV-1a
        });
    format!("st{:06x}{:06x}", hash & 0xff_ffff, random & 0xff_ffff)
}

/// A bridge takes the lowest hardware address of its ports for its own unless
/// told otherwise: ours must never be the lowest, or the node's neighbours would
/// lose sight of it.
pub(crate) fn host_mac(random: u64) -> [u8; 6] {
    let [a, b, c, d, e, ..] = random.to_ne_bytes();
    [0xfe, a, b, c, d, e]
}

/// Until it is on the bridge, whatever comes out of the container's end meets the
/// node itself: it must neither answer nor forward.
pub(crate) fn isolate(name: &str) -> Result<(), NetworkError> {
    // 8: answer no ARP request. A kernel without IPv6 has no such directory.
    let settings = [
        (format!("/proc/sys/net/ipv6/conf/{name}/disable_ipv6"), "1"),
        (format!("/proc/sys/net/ipv4/conf/{name}/arp_ignore"), "8"),
        (format!("/proc/sys/net/ipv4/conf/{name}/forwarding"), "0"),
    ];
    for (path, value) in settings {
        match std::fs::write(&path, value) {
            Err(error) if error.kind() == io::ErrorKind::NotFound && path.contains("ipv6") => {}
            result => result.map_err(NetworkError::kernel("write", &path))?,
        }
    }
    Ok(())
}

/// In the new namespace: everything the description says.
fn configure(description: &Description) -> Result<(), NetworkError> {
    let wanted = &description.interface;
    let mut netlink = Netlink::open().map_err(NetworkError::kernel("read", "the new network"))?;
    for link in link::all(&mut netlink).map_err(NetworkError::kernel("read", "the new network"))? {
        if link.loopback {
            netlink
                .call(link::up(link.index), 0)
                .map_err(NetworkError::kernel("bring up", "lo"))?;
        }
    }
    let index = link::named(&mut netlink, &wanted.name)
        .map_err(NetworkError::kernel("look at", &wanted.name))?
        .index;
    // Before there are addresses: some settings decide what the kernel makes of
    // those.
    sysctl::apply(&description.settings)?;
    let ipv6 = switch_ipv6(&wanted.name, wanted.ipv6)?;
    let configure = |netlink: &mut Netlink, message, flags: u16, object: &dyn std::fmt::Display| {
        netlink
            .call(message, flags)
            .map(drop)
            .map_err(NetworkError::kernel("configure", object))
    };
    if ipv6 {
        // The kernel would give itself an address on the link, and first ask
        // for a second whether somebody has it. It did so long ago.
        configure(
            &mut netlink,
            link::generate_address(index, false),
            0,
            &wanted.name,
        )?;
    }
    configure(&mut netlink, link::up(index), 0, &wanted.name)?;
    for address in &description.addresses {
        let message = RouteNetlinkMessage::NewAddress(address_message(address, index));
        configure(
            &mut netlink,
            message,
            NLM_F_CREATE | NLM_F_EXCL,
            &address.address,
        )?;
    }
    // Gateways are reached through routes without one.
    let (near, far): (Vec<_>, Vec<_>) = description
        .routes
        .iter()
        .partition(|route| route.gateway.is_none());
    for route in near.into_iter().chain(far) {
        let message = RouteNetlinkMessage::NewRoute(route_message(route, index));
        let object = format!("{}/{}", route.destination, route.prefix);
        configure(&mut netlink, message, NLM_F_CREATE | NLM_F_EXCL, &object)?;
    }
    for neighbour in &description.neighbours {
        let message = RouteNetlinkMessage::NewNeighbour(neighbour_message(neighbour, index));
        configure(
            &mut netlink,
            message,
            NLM_F_CREATE | NLM_F_REPLACE,
            &neighbour.address,
        )?;
    }
    let own = IpAddr::from(wanted.link_local());
    if ipv6
        && description
            .addresses
            .iter()
            .any(|address| address.address == own)
    {
        configure(
            &mut netlink,
            link::generate_address(index, true),
            0,
            &wanted.name,
        )?;
    }
    Ok(())
}

/// Returns whether the interface speaks IPv6.
fn switch_ipv6(name: &str, on: bool) -> Result<bool, NetworkError> {
    let path = format!("/proc/sys/net/ipv6/conf/{name}/disable_ipv6");
    match std::fs::write(&path, if on { "0" } else { "1" }) {
        Err(error) if error.kind() == io::ErrorKind::NotFound && !on => Ok(false),
        result => result
            .map(|()| on)
            .map_err(NetworkError::kernel("write", path)),
    }
}

fn address_message(address: &Address, index: u32) -> AddressMessage {
    let mut flags = AddressFlags::empty();
    flags.set(AddressFlags::Noprefixroute, address.no_prefix_route);
    // Nobody else can have it: it is being moved.
    flags.set(AddressFlags::Nodad, address.address.is_ipv6());
    let mut message = AddressMessage::default();
    message.header.family = family(address.address);
    message.header.prefix_len = address.prefix;
    message.header.scope = address.scope.into();
    message.header.index = index;
    message.header.flags = AddressHeaderFlags::from_bits_truncate(flags.bits() as u8);
    message.attributes = vec![
        AddressAttribute::Local(address.address),
        AddressAttribute::Address(address.peer.unwrap_or(address.address)),
        AddressAttribute::Flags(flags),
    ];
    if let Some(broadcast) = address.broadcast {
        message
            .attributes
            .push(AddressAttribute::Broadcast(broadcast));
    }
    if let Some((valid, preferred)) = address.lifetime {
        let mut info = CacheInfo::default();
        (info.ifa_valid, info.ifa_preferred) = (valid, preferred);
        message.attributes.push(AddressAttribute::CacheInfo(info));
    }
    message
}

fn route_message(route: &Route, index: u32) -> RouteMessage {
    let mut message = RouteMessage::default();
    message.header = RouteHeader {
        address_family: family(route.destination),
        destination_prefix_length: route.prefix,
        tos: route.tos,
        table: RouteHeader::RT_TABLE_MAIN,
        protocol: route.protocol.into(),
        scope: route.scope.into(),
        kind: match route.kind {
            RouteKind::Unicast => RouteType::Unicast,
            RouteKind::Blackhole => RouteType::BlackHole,
            RouteKind::Unreachable => RouteType::Unreachable,
            RouteKind::Prohibit => RouteType::Prohibit,
        },
        flags: if route.onlink {
            RouteFlags::Onlink
        } else {
            RouteFlags::empty()
        },
        ..RouteHeader::default()
    };
    let attributes = &mut message.attributes;
    if route.prefix > 0 {
        attributes.push(RouteAttribute::Destination(RouteAddress::from(
            route.destination,
        )));
    }
    if route.kind == RouteKind::Unicast {
        attributes.push(RouteAttribute::Oif(index));
    }
    attributes.extend(
        route
            .gateway
            .map(|address| RouteAttribute::Gateway(address.into())),
    );
    attributes.extend(
        route
            .source
            .map(|address| RouteAttribute::PrefSource(address.into())),
    );
    attributes.extend(route.priority.map(RouteAttribute::Priority));
    let metrics: Vec<_> = route
        .mtu
        .map(RouteMetric::Mtu)
        .into_iter()
        .chain(route.advmss.map(RouteMetric::Advmss))
        .collect();
    if !metrics.is_empty() {
        attributes.push(RouteAttribute::Metrics(metrics));
    }
    message
}

fn neighbour_message(neighbour: &Neighbour, index: u32) -> NeighbourMessage {
    let mut message = NeighbourMessage::default();
    message.header.family = family(neighbour.address);
    message.header.ifindex = index;
    message.header.state = if neighbour.permanent {
        NeighbourState::Permanent
    } else {
        NeighbourState::Stale
    };
    message.attributes = vec![
        NeighbourAttribute::Destination(match neighbour.address {
            IpAddr::V4(address) => NeighbourAddress::Inet(address),
            IpAddr::V6(address) => NeighbourAddress::Inet6(address),
        }),
        NeighbourAttribute::LinkLocalAddress(neighbour.mac.to_vec()),
    ];
    message
}

fn family(address: IpAddr) -> AddressFamily {
    if address.is_ipv4() {
        AddressFamily::Inet
    } else {
        AddressFamily::Inet6
    }
}

/// Takes the namespace away, and the interfaces that lead out of it. That there
/// is none is fine.
pub(crate) fn remove(netns: &Path) -> Result<(), NetworkError> {
    let is_namespace = sys::netns::within(netns, || {
        let mut netlink = Netlink::open()?;
        for link in link::all(&mut netlink)?
            .iter()
            .filter(|link| link.is_veth())
        {
            match netlink.call(link::delete(link.index), 0) {
                Err(error) if error.raw_os_error() == Some(nix::libc::ENODEV) => {}
                result => drop(result?),
            }
        }
        Ok(())
    });
    match is_namespace {
        // EINVAL: a file that nothing is mounted on (any more).
        Err(error)
            if error.kind() == io::ErrorKind::NotFound
                || error.raw_os_error() == Some(nix::libc::EINVAL) => {}
        result => result
            .and_then(|removed| removed)
            .map_err(NetworkError::kernel(
                "remove the interfaces of",
                netns.display(),
            ))?,
    }
    remove_strays(netns)?;
    namespace::remove(netns)
}

/// In the node's namespace: what a process left that was killed, by its name. A
/// container's own pair is gone by now.
fn remove_strays(netns: &Path) -> Result<(), NetworkError> {
    let failed = || NetworkError::kernel("remove what is left of", netns.display());
    let name = host_name(netns, 0);
    let prefix = &name[..PREFIX_BYTES];
    let mut netlink = Netlink::open().map_err(failed())?;
    for link in link::all(&mut netlink).map_err(failed())? {
        if !link.is_veth() || !link.name.starts_with(prefix) {
            continue;
        }
        match netlink.call(link::delete(link.index), 0) {
            // Its peer went first.
            Err(error) if error.raw_os_error() == Some(nix::libc::ENODEV) => {}
            result => drop(result.map_err(failed())?),
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_nodes_end_has_a_name_that_fits() {
        let name = host_name(Path::new("/run/netns/sterna-a-very-long-name"), u64::MAX);
        assert_eq!(name.len(), 14);
        assert_eq!(
            name[..8],
            host_name(Path::new("/run/netns/sterna-a-very-long-name"), 0)[..8]
        );
        assert_ne!(name, host_name(Path::new("/run/netns/another"), u64::MAX));
    }

    #[test]
    fn a_nodes_end_never_gives_a_bridge_its_address() {
        let mac = host_mac(12345);
        assert!(mac[0] == 0xfe && mac[0] & 1 == 0);
    }
}
