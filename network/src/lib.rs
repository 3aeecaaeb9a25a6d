//! Moves a container's address to another node on the same network.
//!
//! A container that has a network namespace of its own with one veth pair, whose
//! other end is a port of a bridge, keeps its addresses, its hardware address and
//! hence its connections when it moves to a node with a bridge in the same layer 2
//! network:
//!
//! ```text
//!   source                                    destination
//!   describe(netns)          ---------->      prepare(netns, description, bridge)
//!                                             Prepared::open() -> Switch
//!                        (frozen)             Switch::hold()
//!   detach(attachment)
//!                                             Switch::attach(), Switch::announce()
//!   remove(netns)        or, if it comes to nothing:
//!   reattach(attachment)                      remove(netns)
//! ```
//!
//! At any time at most one of the two ends can send or receive, so that nobody
//! ever sees two owners of an address. "The node's namespace" is that of the
//! calling thread everywhere.
//!
//! Everything else is refused by [`describe`] with a reason: the node's own
//! network, other kinds of interfaces, several of them, routing rules and tables,
//! rules of a packet filter, bridges with a spanning tree or VLANs.
//!
//! Not carried and not noticed: traffic shaping, rules of the old iptables
//! (before nftables), multicast routes, IPsec.

mod describe;
mod description;
mod error;
mod filter;
mod frames;
mod hold;
mod link;
mod namespace;
mod netlink;
mod prepare;
mod switch;
mod sysctl;

use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

pub use description::{Address, Description, Interface, Neighbour, Route, RouteKind};
pub use error::NetworkError;
pub use switch::Switch;

use link::PortState;

/// How a container's address is attached to its node.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Attachment {
    /// The container's network namespace.
    pub netns: PathBuf,
    /// The node's end of the container's veth pair.
    pub host_interface: String,
    /// The bridge that it is a port of.
    pub bridge: String,
}

/// A network namespace made ready for a container that is on its way.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Prepared {
    /// The container's network namespace.
    pub netns: PathBuf,
    /// The node's end of the container's veth pair.
    pub host_interface: String,
    /// The bridge that it is going to be a port of.
    pub bridge: String,
    /// What was prepared.
    pub description: Description,
}

impl Prepared {
    /// Opens everything that attaching takes, ahead of the moment that counts.
    pub async fn open(&self) -> Result<Switch, NetworkError> {
        let prepared = self.clone();
        blocking(move || Switch::open(prepared)).await
    }
}

/// Reads the network of a container.
///
/// # Errors
///
/// [`NetworkError::NotMovable`] if it is of a kind that cannot be moved.
pub async fn describe(netns: &Path) -> Result<(Description, Attachment), NetworkError> {
    let netns = netns.to_owned();
    blocking(move || describe::describe(&netns)).await
}

/// Makes a namespace with that network, which is complete (addresses, routes,
/// everything up) but not connected: nothing arrives and nothing gets out.
///
/// The namespace gets a name as `ip netns add` gives it: `netns`, usually below
/// `/run/netns`, where nothing may be yet. After an error nothing is left. If the
/// future is dropped the work goes on; call [`remove`] then.
pub async fn prepare(
    netns: &Path,
    description: &Description,
    bridge: &str,
) -> Result<Prepared, NetworkError> {
    let (netns, description, bridge) = (netns.to_owned(), description.clone(), bridge.to_owned());
    blocking(move || prepare::prepare(&netns, &description, &bridge)).await
}

/// Connects what was prepared. [`Prepared::open`] and [`Switch::attach`] do the
/// same with most of the work ahead of time.
pub async fn attach(prepared: &Prepared) -> Result<(), NetworkError> {
    prepared.open().await?.attach().await
}

/// Tells the network where the container's addresses are now, three times within
/// a quarter of a second; returns after the last time.
pub async fn announce(prepared: &Prepared) -> Result<(), NetworkError> {
    prepared.open().await?.announce_all().await
}

/// Disconnects a container: nothing arrives and nothing gets out any more, not
/// even what the kernel answers for it. [`reattach`] undoes it without a trace.
pub async fn detach(attachment: &Attachment) -> Result<(), NetworkError> {
    let attachment = attachment.clone();
    blocking(move || switch::set_port(&attachment, PortState::Listening)).await
}

/// Connects a container again that was disconnected by [`detach`].
pub async fn reattach(attachment: &Attachment) -> Result<(), NetworkError> {
    let attachment = attachment.clone();
    blocking(move || switch::set_port(&attachment, PortState::Forwarding)).await
}

/// Removes a container's namespace and the veth pair that leads to it. That there
/// is none is fine.
pub async fn remove(netns: &Path) -> Result<(), NetworkError> {
    let netns = netns.to_owned();
    blocking(move || prepare::remove(&netns)).await
}

/// The one door to blocking work: visits to namespaces take threads of their own,
/// and netlink answers as soon as nobody else changes the network.
async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> Result<T, NetworkError> + Send + 'static,
) -> Result<T, NetworkError> {
    match tokio::task::spawn_blocking(work).await {
        Ok(result) => result,
        Err(error) => match error.try_into_panic() {
            Ok(panic) => std::panic::resume_unwind(panic),
            Err(_) => Err(NetworkError::Interrupted),
        },
    }
}
