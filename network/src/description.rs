//! What a container's network looks like from inside.

use std::collections::BTreeMap;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use serde::{Deserialize, Serialize};

use crate::error::NetworkError;
use crate::sysctl;

/// The kernel's IFNAMSIZ without the terminating zero.
const MAX_NAME_BYTES: usize = 15;

/// Most addresses, routes and neighbours that are taken from a peer. Containers
/// have a handful.
const MAX_ADDRESSES: usize = 64;
const MAX_ROUTES: usize = 1024;

/// Everything in a container's network namespace that has to be the same on
/// another node.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Description {
    /// The one interface besides `lo`.
    pub interface: Interface,
    /// Its addresses, in the kernel's order: the first IPv4 address of a subnet
    /// is the one that is used as a source.
    pub addresses: Vec<Address>,
    /// Routes of the main table, without those that follow from addresses.
    pub routes: Vec<Route>,
    /// Neighbours that somebody entered for good, and those that it has met: a
    /// kernel that has to ask for one asks before the container is attached, hears
    /// nothing, and waits a second with every answer to a client.
    pub neighbours: Vec<Neighbour>,
    /// Settings that differ from those of a new namespace: values by their path
    /// below `/proc/sys/net`.
    pub settings: BTreeMap<String, String>,
}

/// A container's end of a veth pair.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Interface {
    /// Its name in the container.
    pub name: String,
    /// Its number in the container.
    pub index: u32,
    /// Its hardware address.
    pub mac: [u8; 6],
    /// Largest packet, in bytes.
    pub mtu: u32,
    /// Whether it speaks IPv6.
    pub ipv6: bool,
    /// Whether the bridge sends back to it what it sent to itself.
    pub hairpin: bool,
    /// Whether the bridge keeps it apart from other such ports.
    pub isolated: bool,
}

/// An address of the interface.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Address {
    /// The address.
    pub address: IpAddr,
    /// Length of the subnet's prefix, in bits.
    pub prefix: u8,
    /// The other end, where the address is of a point-to-point kind.
    pub peer: Option<IpAddr>,
    /// The subnet's broadcast address.
    pub broadcast: Option<Ipv4Addr>,
    /// The kernel's number of the scope: 0 universe, 253 link, 254 host.
    pub scope: u8,
    /// The subnet has no route of its own.
    pub no_prefix_route: bool,
    /// Seconds for which it is to be valid and preferred; none: for good.
    pub lifetime: Option<(u32, u32)>,
}

/// A route of the main table.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Route {
    /// Where to; unspecified with a prefix of 0 for the default route.
    pub destination: IpAddr,
    /// Length of the destination's prefix, in bits.
    pub prefix: u8,
    /// What happens to packets.
    pub kind: RouteKind,
    /// The next hop.
    pub gateway: Option<IpAddr>,
    /// The next hop is on the link, whatever the addresses say.
    pub onlink: bool,
    /// The source address to prefer.
    pub source: Option<IpAddr>,
    /// The kernel's numbers of scope and of who made the route.
    pub scope: u8,
    /// See `scope`.
    pub protocol: u8,
    /// Type of service that it is for; 0: all.
    pub tos: u8,
    /// Lower ones win.
    pub priority: Option<u32>,
    /// Largest packet, in bytes.
    pub mtu: Option<u32>,
    /// Largest segment to advertise, in bytes.
    pub advmss: Option<u32>,
}

/// What a route does.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum RouteKind {
    /// Sends packets on.
    Unicast,
    /// Drops packets.
    Blackhole,
    /// Refuses packets.
    Unreachable,
    /// Forbids packets.
    Prohibit,
}

/// A neighbour that need not be asked for at first.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Neighbour {
    /// Its address.
    pub address: IpAddr,
    /// Its hardware address.
    pub mac: [u8; 6],
    /// Entered for good; otherwise the kernel makes sure of it after a while.
    pub permanent: bool,
}

impl Description {
    /// Whether a container could have this network. A peer says what it likes.
    pub fn validate(&self) -> Result<(), NetworkError> {
        let invalid = |reason| Err(NetworkError::Invalid { reason });
        let name = self.interface.name.as_bytes();
        if name.is_empty()
            || name.len() > MAX_NAME_BYTES
            || name
                .iter()
                .any(|byte| !byte.is_ascii_graphic() || b"/:%".contains(byte))
            || [&b"."[..], b"..", b"lo", b"all", b"default"].contains(&name)
        {
            return invalid("an interface cannot have this name");
        }
        let mac = self.interface.mac;
        if mac[0] & 1 == 1 || mac == [0; 6] {
            return invalid("an interface cannot have this hardware address");
        }
        // Ethernet's smallest by the standard for IPv4, and what a veth takes at most.
        if !(68..=65535).contains(&self.interface.mtu) {
            return invalid("an interface cannot have this MTU");
        }
        if self.addresses.is_empty() || self.addresses.len() > MAX_ADDRESSES {
            return invalid("too few or too many addresses");
        }
        if self.routes.len() > MAX_ROUTES || self.neighbours.len() > MAX_ROUTES {
            return invalid("too many routes or neighbours");
        }
        if !self.addresses.iter().all(Address::is_plausible) {
            return invalid("an address that no interface has");
        }
        if !self.routes.iter().all(Route::is_plausible) {
            return invalid("a route that cannot be");
        }
        sysctl::validate(&self.settings)
    }

    /// Addresses that others may know, for announcements.
    pub(crate) fn announced(&self) -> impl Iterator<Item = IpAddr> + '_ {
        self.addresses.iter().map(|address| address.address)
    }
}

impl Address {
    fn is_plausible(&self) -> bool {
        let same_family = |other: &IpAddr| other.is_ipv4() == self.address.is_ipv4();
        self.prefix <= width(self.address)
            && !self.address.is_unspecified()
            && !self.address.is_multicast()
            && !self.address.is_loopback()
            && self.peer.as_ref().is_none_or(same_family)
    }
}

impl Route {
    fn is_plausible(&self) -> bool {
        let same_family = |other: &IpAddr| other.is_ipv4() == self.destination.is_ipv4();
        self.prefix <= width(self.destination)
            && self.gateway.as_ref().is_none_or(same_family)
            && self.source.as_ref().is_none_or(same_family)
    }
}

impl Interface {
    /// The address that the kernel gives itself on the link.
    pub(crate) fn link_local(&self) -> Ipv6Addr {
        let [a, b, c, d, e, f] = self.mac.map(u16::from);
        Ipv6Addr::new(
            0xfe80,
            0,
            0,
            0,
            ((a ^ 2) << 8) | b,
            (c << 8) | 0xff,
            0xfe00 | d,
            (e << 8) | f,
        )
    }
}

fn width(address: IpAddr) -> u8 {
    if address.is_ipv4() { 32 } else { 128 }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;

    pub(crate) fn example() -> Description {
        Description {
            interface: Interface {
                name: "eth0".into(),
                index: 2,
                mac: [0x02, 0x42, 0xac, 0x11, 0, 2],
                mtu: 1450,
                ipv6: true,
                hairpin: true,
                isolated: false,
            },
            addresses: vec![Address {
                address: "10.1.0.5".parse().unwrap(),
                prefix: 24,
                peer: None,
                broadcast: Some("10.1.0.255".parse().unwrap()),
                scope: 0,
                no_prefix_route: false,
                lifetime: None,
            }],
            routes: vec![Route {
                destination: "0.0.0.0".parse().unwrap(),
                prefix: 0,
                kind: RouteKind::Unicast,
                gateway: Some("10.1.0.1".parse().unwrap()),
                onlink: false,
                source: None,
                scope: 0,
                protocol: 3,
                tos: 0,
                priority: None,
                mtu: None,
                advmss: None,
            }],
            neighbours: vec![],
            settings: BTreeMap::new(),
        }
    }

    fn refused(change: impl FnOnce(&mut Description)) {
        let mut description = example();
        description.validate().unwrap();
        change(&mut description);
        description.validate().unwrap_err();
    }

    #[test]
    fn networks_that_cannot_be_are_refused() {
        for name in [
            "",
            "lo",
            "..",
            "a/b",
            "a b",
            "a%d",
            "sixteen-letters-",
            "all",
        ] {
            refused(|d| d.interface.name = name.into());
        }
        refused(|d| d.interface.mac = [0; 6]);
        refused(|d| d.interface.mac[0] = 0x33);
        refused(|d| d.interface.mtu = 67);
        refused(|d| d.interface.mtu = 65536);
        refused(|d| d.addresses.clear());
        refused(|d| d.addresses[0].prefix = 33);
        for address in ["0.0.0.0", "127.0.0.1", "224.0.0.1", "ff02::1", "::1"] {
            refused(|d| d.addresses[0].address = address.parse().unwrap());
        }
        refused(|d| d.addresses[0].peer = Some("fe80::1".parse().unwrap()));
        refused(|d| d.addresses = vec![d.addresses[0].clone(); 65]);
        refused(|d| d.routes[0].gateway = Some("fe80::1".parse().unwrap()));
        refused(|d| d.routes[0].prefix = 33);
        refused(|d| d.routes = vec![d.routes[0].clone(); 1025]);
    }

    #[test]
    fn a_link_local_address_follows_from_the_hardware_address() {
        let expected: Ipv6Addr = "fe80::42:acff:fe11:2".parse().unwrap();
        assert_eq!(example().interface.link_local(), expected);
    }

    #[test]
    fn a_description_survives_the_way_through_a_file() {
        let text = serde_json::to_string(&example()).unwrap();
        assert_eq!(
            serde_json::from_str::<Description>(&text).unwrap(),
            example()
        );
    }
}
