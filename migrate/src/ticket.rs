//! Tickets: the right to deliver one container once.
//!
//! Ids and secrets are made by the caller, times are passed in as durations since
//! any fixed moment of the caller's choice (its start, say).

use std::collections::BTreeMap;
use std::fmt;
use std::hint::black_box;
use std::time::Duration;

use crate::error::TicketError;

/// Whether two secrets are the same, in a time that depends on their lengths only:
/// a stranger who measures the answer learns nothing about the content.
pub fn secrets_equal(ours: &[u8], theirs: &[u8]) -> bool {
    if ours.len() != theirs.len() {
        return false;
    }
    let mut difference = 0;
    for (a, b) in ours.iter().zip(theirs) {
        // Kept from the optimiser, which might stop at the first difference.
        difference = black_box(difference | (a ^ b));
    }
    difference == 0
}

/// All tickets of one node that are still good for something.
#[derive(Debug, Default)]
pub struct Register {
    tickets: BTreeMap<String, Entry>,
}

struct Entry {
    secret: Vec<u8>,
    source_node: String,
    expires: Duration,
    redeemed: bool,
}

impl fmt::Debug for Entry {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Entry")
            .field("source_node", &self.source_node)
            .field("expires", &self.expires)
            .field("redeemed", &self.redeemed)
            .finish_non_exhaustive()
    }
}

impl Register {
    /// An empty register.
    pub fn new() -> Self {
        Self::default()
    }

    /// Issues a ticket to `source_node`, to be redeemed before `expires`.
    ///
    /// The id must be new: the caller makes ids out of randomness.
    pub fn issue(&mut self, id: String, secret: Vec<u8>, source_node: String, expires: Duration) {
        self.tickets.insert(
            id,
            Entry {
                secret,
                source_node,
                expires,
                redeemed: false,
            },
        );
    }

    /// Begins a migration: the ticket is good for that once.
    ///
    /// # Errors
    ///
    /// Everything in [`TicketError`] but `NotRedeemed`. A failed attempt does not
    /// use the ticket up, or a stranger could spoil it.
    pub fn redeem(
        &mut self,
        id: &str,
        secret: &[u8],
        peer_node: &str,
        now: Duration,
    ) -> Result<(), TicketError> {
        let entry = self.entry(id, secret, peer_node)?;
        if entry.redeemed {
            return Err(TicketError::Used);
        }
        if now >= entry.expires {
            return Err(TicketError::Expired);
        }
        entry.redeemed = true;
        Ok(())
    }

    /// Admits a further stream of a migration that has begun, or a later session
    /// of it. There is no expiry here: the migration's own timeouts bound it.
    ///
    /// # Errors
    ///
    /// Everything in [`TicketError`] but `Used` and `Expired`.
    pub fn admit(&mut self, id: &str, secret: &[u8], peer_node: &str) -> Result<(), TicketError> {
        match self.entry(id, secret, peer_node)?.redeemed {
            true => Ok(()),
            false => Err(TicketError::NotRedeemed),
        }
    }

    /// Takes a ticket out: its migration is over, or it was withdrawn.
    pub fn retire(&mut self, id: &str) {
        self.tickets.remove(id);
    }

    /// Forgets tickets that nobody came with in time; returns their ids.
    pub fn purge(&mut self, now: Duration) -> Vec<String> {
        let stale: Vec<String> = self
            .tickets
            .iter()
            .filter(|(_, entry)| !entry.redeemed && now >= entry.expires)
            .map(|(id, _)| id.clone())
            .collect();
        for id in &stale {
            self.tickets.remove(id);
        }
        stale
    }

    /// The secret is looked at first: who does not have it learns nothing more.
    fn entry(
        &mut self,
        id: &str,
        secret: &[u8],
        peer_node: &str,
    ) -> Result<&mut Entry, TicketError> {
        let entry = self.tickets.get_mut(id).ok_or(TicketError::Unknown)?;
        if !secrets_equal(&entry.secret, secret) {
            return Err(TicketError::WrongSecret);
        }
        if entry.source_node != peer_node {
            return Err(TicketError::WrongNode);
        }
        Ok(entry)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SECRET: &[u8] = b"0123456789abcdef";
    const AT: fn(u64) -> Duration = Duration::from_secs;

    fn register() -> Register {
        let mut register = Register::new();
        register.issue("t".into(), SECRET.into(), "a".into(), AT(60));
        register
    }

    #[test]
    fn a_ticket_begins_one_migration_and_then_admits_its_streams() {
        let mut register = register();
        assert_eq!(
            register.admit("t", SECRET, "a"),
            Err(TicketError::NotRedeemed)
        );
        assert_eq!(register.redeem("t", SECRET, "a", AT(1)), Ok(()));
        assert_eq!(
            register.redeem("t", SECRET, "a", AT(2)),
            Err(TicketError::Used)
        );
        assert_eq!(register.admit("t", SECRET, "a"), Ok(()));
        register.retire("t");
        assert_eq!(register.admit("t", SECRET, "a"), Err(TicketError::Unknown));
    }

    #[test]
    fn a_wrong_secret_or_node_is_refused_and_does_not_use_the_ticket_up() {
        let mut register = register();
        let wrong = b"0123456789abcdeX";
        assert_eq!(
            register.redeem("t", wrong, "a", AT(1)),
            Err(TicketError::WrongSecret)
        );
        assert_eq!(
            register.redeem("t", SECRET, "c", AT(1)),
            Err(TicketError::WrongNode)
        );
        assert_eq!(
            register.redeem("u", SECRET, "a", AT(1)),
            Err(TicketError::Unknown)
        );
        assert_eq!(register.redeem("t", SECRET, "a", AT(1)), Ok(()));
        assert_eq!(
            register.admit("t", wrong, "a"),
            Err(TicketError::WrongSecret)
        );
    }

    #[test]
    fn a_ticket_that_nobody_came_with_expires_and_is_purged() {
        let mut register = register();
        assert_eq!(register.purge(AT(59)), Vec::<String>::new());
        assert_eq!(
            register.redeem("t", SECRET, "a", AT(60)),
            Err(TicketError::Expired)
        );
        assert_eq!(register.purge(AT(60)), ["t"]);
        assert_eq!(
            register.redeem("t", SECRET, "a", AT(60)),
            Err(TicketError::Unknown)
        );
    }

    #[test]
    fn a_migration_that_has_begun_is_not_purged() {
        let mut register = register();
        register.redeem("t", SECRET, "a", AT(59)).unwrap();
        assert_eq!(register.purge(AT(600)), Vec::<String>::new());
        assert_eq!(register.admit("t", SECRET, "a"), Ok(()));
    }

    #[test]
    fn secrets_are_equal_only_if_every_byte_is() {
        assert!(secrets_equal(SECRET, SECRET));
        assert!(secrets_equal(b"", b""));
        assert!(!secrets_equal(SECRET, &SECRET[1..]));
        for at in 0..SECRET.len() {
            let mut other = SECRET.to_vec();
            other[at] ^= 1;
            assert!(!secrets_equal(SECRET, &other));
        }
    }

    #[test]
    fn a_register_does_not_show_its_secrets() {
        let text = format!("{:?}", register());
        assert!(text.contains("source_node"), "{text}");
        assert!(!text.contains("secret"), "{text}");
    }
}
