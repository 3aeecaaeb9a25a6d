//! What the tests on real nodes stand on: labs of nodes, containers in them,
//! clients of those containers, and a look at what was left over.
//!
//! A test runs only with `STERNA_INTEGRATION=1`, as root and with the built
//! programs: `hack/test` sees to all of that. Without it every test says that
//! it is skipped. See `docs/testing.md`.
//!
//! Nothing here asserts how long something takes: deadlines only keep a broken
//! test from hanging.

mod caches;
mod cluster;
mod container;
mod cri;
mod cri_api;
mod events;
mod http;
mod lab;
mod leftovers;
mod load;
mod migration;
mod moment;
mod node;
mod output;
mod published;
mod replay;
mod task_api;
mod wait;

pub use caches::Caches;
pub use cluster::{Cluster, Deployment, Objects};
pub use container::{Container, Running, STERNA, runtime};
pub use cri::{Cri, Pod, PodContainer, RUNC_HANDLER, STERNA_HANDLER};
pub use cri_api::{ContainerEvents, CriApi, Sandbox, SandboxContainer};
pub use events::Events;
pub use http::Http;
pub use lab::{Lab, SharedLab, skip};
pub use leftovers::Inventory;
pub use load::{Load, Mark, Verdict};
pub use migration::{Listed, Migration, Moved, listed, migrate, migrate_with, settled};
pub use moment::{Moment, Victim};
pub use node::{Background, Cgroup, Flavour, Node, SlowLink};
pub use output::Output;
pub use published::{Published, Writer};
pub use replay::{StolenTicket, TicketThief};
pub use task_api::TaskApi;
pub use wait::{DEADLINE, eventually, eventually_within};
