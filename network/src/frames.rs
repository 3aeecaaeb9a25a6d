//! The frames that tell a network where an address is now.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

const BROADCAST: [u8; 6] = [0xff; 6];
const ARP: u16 = 0x0806;
const IPV6: u16 = 0x86dd;

/// ff02::1, every node on the link, and its hardware address.
const ALL_NODES: Ipv6Addr = Ipv6Addr::new(0xff02, 0, 0, 0, 0, 0, 0, 1);
const ALL_NODES_MAC: [u8; 6] = [0x33, 0x33, 0, 0, 0, 1];

/// What to send so that every neighbour and every bridge learns that `address`
/// is at `mac`, and through which port.
pub(crate) fn announcements(address: IpAddr, mac: [u8; 6]) -> Vec<Vec<u8>> {
    match address {
        // Both forms, because implementations differ in which they believe
        // (RFC 5227 section 3).
        IpAddr::V4(address) => vec![arp(1, address, mac), arp(2, address, mac)],
        IpAddr::V6(address) => vec![neighbour_advertisement(address, mac)],
    }
}

fn ethernet(destination: [u8; 6], source: [u8; 6], protocol: u16) -> Vec<u8> {
    let mut frame = Vec::with_capacity(86);
    frame.extend_from_slice(&destination);
    frame.extend_from_slice(&source);
    frame.extend_from_slice(&protocol.to_be_bytes());
    frame
}

/// RFC 826; sender and target address are the announced one.
fn arp(operation: u16, address: Ipv4Addr, mac: [u8; 6]) -> Vec<u8> {
    let mut frame = ethernet(BROADCAST, mac, ARP);
    frame.extend_from_slice(&[0, 1, 8, 0, 6, 4]); // Ethernet, IPv4, lengths of both addresses
    frame.extend_from_slice(&operation.to_be_bytes());
    frame.extend_from_slice(&mac);
    frame.extend_from_slice(&address.octets());
    frame.extend_from_slice(if operation == 1 { &[0; 6] } else { &mac });
    frame.extend_from_slice(&address.octets());
    frame
}

/// RFC 4861 section 4.4: unsolicited, overriding, with the hardware address.
fn neighbour_advertisement(address: Ipv6Addr, mac: [u8; 6]) -> Vec<u8> {
    const OVERRIDE: u8 = 0x20;
    const TARGET_LINK_LAYER_ADDRESS: u8 = 2;
    let mut message = vec![136, 0, 0, 0, OVERRIDE, 0, 0, 0];
    message.extend_from_slice(&address.octets());
    message.extend_from_slice(&[TARGET_LINK_LAYER_ADDRESS, 1]);
    message.extend_from_slice(&mac);
    let checksum = checksum(address, ALL_NODES, &message);
    message[2..4].copy_from_slice(&checksum.to_be_bytes());

    let mut frame = ethernet(ALL_NODES_MAC, mac, IPV6);
    frame.extend_from_slice(&[0x60, 0, 0, 0, 0, message.len() as u8, ICMPV6, 255]);
    frame.extend_from_slice(&address.octets());
    frame.extend_from_slice(&ALL_NODES.octets());
    frame.extend_from_slice(&message);
    frame
}

const ICMPV6: u8 = 58;

/// RFC 4443 section 2.3, over the pseudo header and the message.
fn checksum(source: Ipv6Addr, destination: Ipv6Addr, message: &[u8]) -> u16 {
    let mut covered = Vec::with_capacity(40 + message.len());
    covered.extend_from_slice(&source.octets());
    covered.extend_from_slice(&destination.octets());
    covered.extend_from_slice(&(message.len() as u32).to_be_bytes());
    covered.extend_from_slice(&[0, 0, 0, ICMPV6]);
    covered.extend_from_slice(message);
    let mut sum: u32 = covered
        .chunks(2)
        .map(|pair| u32::from(pair[0]) << 8 | pair.get(1).copied().map_or(0, u32::from))
        .sum();
    while sum > 0xffff {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    !(sum as u16)
}

#[cfg(test)]
mod tests {
    use super::*;

    const MAC: [u8; 6] = [2, 0, 0, 0, 0, 7];

    #[test]
    fn an_ipv4_address_is_announced_as_request_and_reply() {
        let frames = announcements("10.0.0.9".parse().unwrap(), MAC);
        assert_eq!(frames.len(), 2);
        for (frame, operation) in frames.iter().zip([1, 2]) {
            assert_eq!(frame.len(), 42);
            assert_eq!(frame[..6], BROADCAST);
            assert_eq!(frame[6..12], MAC);
            assert_eq!(frame[20..22], [0, operation]);
            assert_eq!(frame[22..28], MAC);
            assert_eq!(
                frame[28..32],
                frame[38..42],
                "sender and target are the same address"
            );
        }
    }

    #[test]
    fn the_checksum_is_the_one_of_the_standard() {
        // A real advertisement of fe80::1 with 02:00:00:00:00:01, computed by hand.
        let frame = &announcements("fe80::1".parse().unwrap(), [2, 0, 0, 0, 0, 1])[0];
        assert_eq!(frame.len(), 14 + 40 + 32);
        let message = &frame[54..];
        let covered = checksum("fe80::1".parse().unwrap(), ALL_NODES, message);
        assert_eq!(
            covered, 0,
            "over a message with its checksum the sum is zero"
        );
        assert_eq!(frame[21], 255, "hop limit");
    }
}
