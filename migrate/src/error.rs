//! What can go wrong in this crate.

use crate::{destination, source};

/// An event that has no place in the state the machine is in.
///
/// Where the event came from the other node, it broke the protocol: end the
/// session and feed `PeerLost` instead, which every state that has a peer
/// takes. Where it came from this node, it is a bug of the engine.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum IllegalTransition {
    /// On the sending side.
    #[error("the source cannot take event {event:?} in state {state:?}")]
    Source {
        /// Where the machine is, and stays.
        state: source::State,
        /// What it was fed.
        event: source::Event,
    },
    /// On the receiving side.
    #[error("the destination cannot take event {event:?} in state {state:?}")]
    Destination {
        /// Where the machine is, and stays.
        state: destination::State,
        /// What it was fed.
        event: destination::Event,
    },
}

/// Why a ticket does not open the door.
///
/// The caller answers all of them alike to the peer, so that a stranger does
/// not learn which tickets exist; the difference is for the log.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum TicketError {
    /// No such ticket was issued, or it has been purged since.
    #[error("no such ticket")]
    Unknown,
    /// The secret is wrong.
    #[error("the ticket's secret is wrong")]
    WrongSecret,
    /// The secret is right, but the peer's certificate names another node.
    #[error("the ticket was issued to another node")]
    WrongNode,
    /// Its time was over before it was used.
    #[error("the ticket has expired")]
    Expired,
    /// A migration has begun with it already.
    #[error("the ticket has been used already")]
    Used,
    /// A further stream came before the migration's session.
    #[error("no migration has begun with the ticket")]
    NotRedeemed,
}

/// A text that is not the version of a tool.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{text:?} is not a version number")]
pub struct VersionError {
    /// The text, cut to its first 64 characters.
    pub text: String,
}

/// A record on disk that another version of Sterna wrote.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("the record has format {found}, this version of sterna reads format {known}")]
pub struct RecordVersionError {
    /// What the record says.
    pub found: u32,
    /// The only one known here.
    pub known: u32,
}
