//! Node certificates and mutual TLS.
//!
//! Nodes that may exchange containers hold certificates of one authority. A
//! certificate names its node (DNS subject alternative name) and is good for both
//! ends of a connection. Every connection is TLS 1.3, HTTP/2, and both ends show
//! their certificate: nothing here can be configured down.
//!
//! ```text
//! ca.crt     the authority's certificate                 on every node
//! ca.key     the authority's key, mode 0600              only where `Authority::init` ran
//! node.crt   this node's certificate                     on every node
//! node.key   this node's key, mode 0600                  on every node
//! ```
//!
//! The TLS server name of a connection says what the connection is for, not whom
//! it is for: `<ticket>.ticket.sterna` for the connections of one migration, the
//! node's name for everything else. So the client checks the node's name
//! ([`NodeIdentity::client_config`]) whatever server name it sends.

mod authority;
mod error;
mod files;
mod node;
pub mod sni;
mod tls;

pub use authority::{Authority, NODE_VALIDITY};
pub use error::{IdentityError, InvalidNodeName, PeerNameError};
pub use node::{Certificate, NodeIdentity, NodeName};
pub use sni::{parse_ticket_name, ticket_server_name};
pub use tls::{ALPN, peer_node};
