//! Whether a namespace filters packets.
//!
//! Rules of nftables (and of iptables on top of it) belong to a namespace and
//! are not carried. Losing them would be silent and could open what was closed.

use std::io;

use rtnetlink::packet_core::{NLM_F_DUMP, NLM_F_REQUEST};
use rtnetlink::sys::{Socket, SocketAddr, protocols::NETLINK_NETFILTER};

// From the kernel's nfnetlink.h and nf_tables.h.
const NFNL_SUBSYS_NFTABLES: u16 = 10 << 8;
const NFT_MSG_NEWRULE: u16 = NFNL_SUBSYS_NFTABLES | 6;
const NFT_MSG_GETRULE: u16 = NFNL_SUBSYS_NFTABLES | 7;
const NFTA_RULE_TABLE: u16 = 1;
const NLMSG_ERROR: u16 = 2;
const NLMSG_DONE: u16 = 3;

const HEADER_BYTES: usize = 16;
/// `struct nfgenmsg`: family, version, resource; zeros ask for all.
const GENERAL_BYTES: usize = 4;

/// The first table in the calling thread's namespace that has rules.
pub(crate) fn table_with_rules() -> io::Result<Option<String>> {
    let mut socket = match Socket::new(NETLINK_NETFILTER) {
        Err(error) if error.raw_os_error() == Some(nix::libc::EPROTONOSUPPORT) => return Ok(None),
        socket => socket?,
    };
    socket.bind_auto()?;
    socket.connect(&SocketAddr::new(0, 0))?;
    let length = (HEADER_BYTES + GENERAL_BYTES) as u32;
    let mut request = length.to_ne_bytes().to_vec();
    request.extend_from_slice(&NFT_MSG_GETRULE.to_ne_bytes());
    request.extend_from_slice(&(NLM_F_REQUEST | NLM_F_DUMP).to_ne_bytes());
    request.resize(length as usize, 0);
    socket.send(&request, 0)?;
    loop {
        let (packet, _) = socket.recv_from_full()?;
        let mut rest = &packet[..];
        while let Some((kind, body, next)) = split(rest) {
            match kind {
                NLMSG_DONE => return Ok(None),
                // A kernel without nftables does not know what is meant.
                NLMSG_ERROR => return Ok(None),
                NFT_MSG_NEWRULE => match table(body) {
                    // CRIU's own lock, of a dump that came to nothing.
                    Some(name) if name.starts_with("CRIU") => {}
                    name => return Ok(Some(name.unwrap_or_default())),
                },
                _ => {}
            }
            rest = next;
        }
    }
}

/// A message's type and body, and what comes after it.
fn split(bytes: &[u8]) -> Option<(u16, &[u8], &[u8])> {
    let length = u32::from_ne_bytes(bytes.get(..4)?.try_into().ok()?) as usize;
    let kind = u16::from_ne_bytes(bytes.get(4..6)?.try_into().ok()?);
    let body = bytes.get(HEADER_BYTES..length)?;
    Some((
        kind,
        body,
        bytes.get(length.next_multiple_of(4)..).unwrap_or_default(),
    ))
}

/// The table's name in a rule.
fn table(body: &[u8]) -> Option<String> {
    let mut rest = body.get(GENERAL_BYTES..)?;
    loop {
        let length = usize::from(u16::from_ne_bytes(rest.get(..2)?.try_into().ok()?));
        let kind = u16::from_ne_bytes(rest.get(2..4)?.try_into().ok()?);
        if kind == NFTA_RULE_TABLE {
            let name = rest.get(4..length)?;
            return Some(
                String::from_utf8_lossy(name)
                    .trim_end_matches('\0')
                    .to_owned(),
            );
        }
        rest = rest.get(length.max(4).next_multiple_of(4)..)?;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_rules_table_is_found_and_damage_is_no_panic() {
        let mut body = vec![2, 0, 0, 0];
        body.extend_from_slice(&[6, 0, 2, 0, b'i', 0, 0, 0]);
        body.extend_from_slice(&[9, 0, 1, 0, b'n', b'a', b'm', b'e', 0, 0, 0, 0]);
        assert_eq!(table(&body), Some("name".into()));
        for length in 0..body.len() {
            table(&body[..length]);
        }
        let mut message = ((16 + body.len()) as u32).to_ne_bytes().to_vec();
        message.extend_from_slice(&NFT_MSG_NEWRULE.to_ne_bytes());
        message.resize(HEADER_BYTES, 0);
        message.extend_from_slice(&body);
        assert_eq!(split(&message).unwrap().0, NFT_MSG_NEWRULE);
        assert!(split(&message[..20]).is_none());
    }
}
