//! May this container go from that node to this one?
//!
//! The source's agent sends what its node is ([`Facts`]) and what the container
//! needs ([`Needs`]); the destination's agent looks at its own node ([`Facts`],
//! [`Found`]) and answers with an [`Agreement`] or with *all* reasons against it.
//! Nothing has been touched by then.

use std::fmt::{self, Debug};
use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use crate::cpu::{self, Cpu};
use crate::version::Version;

/// Versions of the protocol that this build speaks, newest first: the current one
/// and the one before.
///
/// * 1: the first.
pub const PROTOCOL_VERSIONS: &[u32] = &[1];

/// The oldest CRIU that works on current kernels: it repairs mounts on those that
/// have 12f147ddd6de (6.16 and all stable branches).
pub const OLDEST_CRIU: Version = Version::new(4, 1, 1);

/// The oldest runc that has been tried; `restore --lazy-pages` is older.
pub const OLDEST_RUNC: Version = Version::new(1, 1, 0);

/// Features of userfaultfd that CRIU asks for in a lazy restore: without the events
/// the page server would not learn of forks and of mappings that move or go.
const LAZY_FEATURES: [(&str, u64); 4] = [
    ("UFFD_FEATURE_EVENT_FORK", 1 << 1),
    ("UFFD_FEATURE_EVENT_REMAP", 1 << 2),
    ("UFFD_FEATURE_EVENT_REMOVE", 1 << 3),
    ("UFFD_FEATURE_EVENT_UNMAP", 1 << 6),
];

/// Room beside the container's memory: images, buffers of the streams, page tables.
const MEMORY_MARGIN_BYTES: u64 = 64 << 20;
/// Most that a container is expected to grow while it is copied. What it holds
/// says little about that: a large one is not filled faster than a small one.
const MEMORY_GROWTH_BYTES: u64 = 512 << 20;

/// What a node is. Both sides gather it, neither believes it blindly.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Facts {
    /// The node's name, as in its certificate.
    pub node: String,
    /// Versions of the migration protocol, newest first.
    pub protocol_versions: Vec<u32>,
    /// As `uname -m` says.
    pub architecture: String,
    /// In bytes.
    pub page_size: u64,
    /// As `uname -r` says; for people.
    pub kernel_release: String,
    /// 1 or 2: what containers on this node get.
    pub cgroup_version: u32,
    /// The feature bits that `UFFDIO_API` offers; none: no userfaultfd.
    pub userfaultfd: Option<u64>,
    /// Writes can be tracked: the self-test passed.
    pub tracking: bool,
    /// The CPU.
    pub cpu: Cpu,
    /// CRIU, if it is installed.
    pub criu: Option<Version>,
    /// runc, if it is installed.
    pub runc: Option<Version>,
    /// containerd; for people.
    pub containerd: Option<Version>,
    /// Memory that can be had without swapping (`MemAvailable`), in bytes.
    pub free_memory_bytes: u64,
}

/// An image that the container was made from.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ImageNeed {
    /// Its name in containerd.
    pub name: String,
    /// The digest of what the name stands for.
    pub digest: String,
    /// The source has all of its content and can send it.
    pub sendable: bool,
}

/// What a container needs of the node it goes to.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Needs {
    /// containerd's namespace.
    pub namespace: String,
    /// containerd's container id.
    pub id: String,
    /// What its processes hold, in bytes.
    pub memory_bytes: u64,
    /// Its image; none where it was made from a directory.
    pub image: Option<ImageNeed>,
    /// Sources of its bind mounts, except what Sterna provides itself.
    pub bind_sources: Vec<PathBuf>,
    /// Namespaces that it joins by path, except the network's where it moves.
    pub namespace_paths: Vec<PathBuf>,
    /// Devices by path.
    pub devices: Vec<PathBuf>,
}

/// What the destination saw when it looked for the needs.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Found {
    /// There is a container of that namespace and id.
    pub container_exists: bool,
    /// The image is there, unpacked or not, with that digest.
    pub image_present: bool,
    /// Bind mount sources that are not there.
    pub missing_bind_sources: Vec<PathBuf>,
    /// Namespaces that are not there.
    pub missing_namespace_paths: Vec<PathBuf>,
    /// Devices that are not there or are others.
    pub missing_devices: Vec<PathBuf>,
}

/// What both sides hold to.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Agreement {
    /// The newest that both speak.
    pub protocol_version: u32,
    /// Memory is copied while the container runs; false: the source's kernel cannot
    /// track writes, everything moves in the freeze.
    pub precopy: bool,
    /// Memory to reserve for staging, in bytes.
    pub staging_limit_bytes: u64,
    /// The image has to be sent first.
    pub send_image: bool,
}

/// Reasons against a migration, as scripts know them.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum RefusalCode {
    /// Source and destination are one node.
    SameNode,
    /// No protocol version in common.
    ProtocolVersion,
    /// Another architecture.
    Architecture,
    /// Another page size.
    PageSize,
    /// The other cgroup version.
    CgroupVersion,
    /// The destination's kernel lacks what a lazy restore needs.
    Userfaultfd,
    /// The destination's CPU lacks instructions.
    CpuFlags,
    /// The destination's CPU saves registers differently.
    CpuRegisters,
    /// No CRIU on one of the nodes.
    CriuMissing,
    /// CRIU on one of the nodes is too old.
    CriuTooOld,
    /// The destination's CRIU is older than the source's.
    CriuOlderThanSource,
    /// No runc on the destination.
    RuncMissing,
    /// The destination's runc is too old.
    RuncTooOld,
    /// Not enough free memory.
    Memory,
    /// A container of that name is there already.
    ContainerExists,
    /// The image is neither there nor can it be sent.
    ImageMissing,
    /// Bind mount sources are missing.
    BindSourceMissing,
    /// Namespaces are missing.
    NamespaceMissing,
    /// Devices are missing.
    DeviceMissing,
}

/// One reason against a migration.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Refusal {
    /// For scripts.
    pub code: RefusalCode,
    /// For people: what differs, and what to do about it.
    pub sentence: String,
}

impl fmt::Display for Refusal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.sentence)
    }
}

/// The newest version that both lists hold; 0 is no version.
pub fn common_version(offered: &[u32], spoken: &[u32]) -> Option<u32> {
    offered
        .iter()
        .copied()
        .filter(|version| *version != 0 && spoken.contains(version))
        .max()
}

/// Free memory that a container of that size needs on arrival, in bytes: a tenth
/// more than it holds, but no more than 512 MiB, because it grows while it is
/// copied, and a margin. One that grows more is given up before the commit.
pub fn memory_room(memory_bytes: u64) -> u64 {
    memory_bytes
        .saturating_add((memory_bytes / 10).min(MEMORY_GROWTH_BYTES))
        .saturating_add(MEMORY_MARGIN_BYTES)
}

/// Decides on the destination whether the container may come.
///
/// # Errors
///
/// Every reason against it, in the order of [`RefusalCode`].
pub fn negotiate(
    source: &Facts,
    needs: &Needs,
    local: &Facts,
    found: &Found,
) -> Result<Agreement, Vec<Refusal>> {
    let mut refusals = Refusals(Vec::new());
    compare_nodes(source, local, &mut refusals);
    compare_cpus(source, local, &mut refusals);
    compare_tools(source, local, &mut refusals);
    compare_needs(needs, local, found, &mut refusals);

    match common_version(&source.protocol_versions, &local.protocol_versions) {
        Some(protocol_version) if refusals.0.is_empty() => Ok(Agreement {
            protocol_version,
            precopy: source.tracking,
            staging_limit_bytes: memory_room(needs.memory_bytes),
            send_image: needs.image.is_some() && !found.image_present,
        }),
        _ => Err(refusals.0),
    }
}

struct Refusals(Vec<Refusal>);

impl Refusals {
    fn add(&mut self, code: RefusalCode, sentence: String) {
        self.0.push(Refusal { code, sentence });
    }
}

fn compare_nodes(source: &Facts, local: &Facts, refusals: &mut Refusals) {
    let (from, to) = (&source.node, &local.node);
    if from == to {
        refusals.add(
            RefusalCode::SameNode,
            format!("the container is on node {to:?} already; name another one"),
        );
    }
    if common_version(&source.protocol_versions, &local.protocol_versions).is_none() {
        refusals.add(
            RefusalCode::ProtocolVersion,
            format!(
                "node {from:?} speaks the migration protocol in versions {:?}, node {to:?} in {:?}; \
                 upgrade sterna on the older node",
                source.protocol_versions, local.protocol_versions
            ),
        );
    }
    if source.architecture != local.architecture {
        refusals.add(
            RefusalCode::Architecture,
            format!(
                "node {from:?} is {:?}, node {to:?} is {:?}; choose a node of the same architecture",
                source.architecture, local.architecture
            ),
        );
    }
    if source.page_size != local.page_size {
        refusals.add(
            RefusalCode::PageSize,
            format!(
                "node {from:?} has pages of {} bytes, node {to:?} of {}; choose a node whose kernel \
                 has the same page size",
                source.page_size, local.page_size
            ),
        );
    }
    if source.cgroup_version != local.cgroup_version {
        refusals.add(
            RefusalCode::CgroupVersion,
            format!(
                "node {from:?} runs containers under cgroup v{}, node {to:?} under v{}; choose a node \
                 with the same cgroup version",
                source.cgroup_version, local.cgroup_version
            ),
        );
    }
    let features = local.userfaultfd.unwrap_or(0);
    let lacking: Vec<&str> = LAZY_FEATURES
        .into_iter()
        .filter(|(_, bit)| features & bit == 0)
        .map(|(name, _)| name)
        .collect();
    if !lacking.is_empty() {
        refusals.add(
            RefusalCode::Userfaultfd,
            format!(
                "the kernel of node {to:?} ({:?}) lacks userfaultfd features that a lazy restore needs: \
                 {}; use a kernel with CONFIG_USERFAULTFD",
                local.kernel_release,
                lacking.join(", ")
            ),
        );
    }
}

fn compare_cpus(source: &Facts, local: &Facts, refusals: &mut Refusals) {
    // Between architectures this would list hundreds of flags to no use.
    if source.architecture != local.architecture {
        return;
    }
    let missing = cpu::missing_flags(&source.cpu, &local.cpu);
    if !missing.is_empty() {
        refusals.add(
            RefusalCode::CpuFlags,
            format!(
                "the CPU of node {:?} ({:?}) lacks what programs started on {:?} ({:?}) may use: {}; \
                 choose a node with the same or a newer CPU",
                local.node,
                local.cpu.model,
                source.node,
                source.cpu.model,
                missing.join(" ")
            ),
        );
    }
    if let Err(mismatch) = cpu::check_xsave(&source.cpu, &local.cpu) {
        refusals.add(
            RefusalCode::CpuRegisters,
            format!(
                "the CPU of node {:?} ({:?}) does not save registers as that of {:?} ({:?}) does: \
                 {mismatch}; choose a node with the same CPU model",
                local.node, local.cpu.model, source.node, source.cpu.model
            ),
        );
    }
}

fn compare_tools(source: &Facts, local: &Facts, refusals: &mut Refusals) {
    for facts in [source, local] {
        let node = &facts.node;
        match facts.criu {
            None => refusals.add(
                RefusalCode::CriuMissing,
                format!(
                    "there is no criu on node {node:?}; install version {OLDEST_CRIU} or newer"
                ),
            ),
            Some(criu) if criu < OLDEST_CRIU => refusals.add(
                RefusalCode::CriuTooOld,
                format!("criu on node {node:?} is {criu}; install version {OLDEST_CRIU} or newer"),
            ),
            Some(_) => {}
        }
        // One node in both roles is complained about once.
        if source.node == local.node {
            break;
        }
    }
    if let (Some(theirs), Some(ours)) = (source.criu, local.criu)
        && ours < theirs
    {
        refusals.add(
            RefusalCode::CriuOlderThanSource,
            format!(
                "criu on node {:?} is {ours} and does not restore what {theirs} on node {:?} dumps; \
                 install version {theirs} or newer there",
                local.node, source.node
            ),
        );
    }
    match local.runc {
        None => refusals.add(
            RefusalCode::RuncMissing,
            format!(
                "there is no runc on node {:?}; install version {OLDEST_RUNC} or newer",
                local.node
            ),
        ),
        Some(runc) if runc < OLDEST_RUNC => refusals.add(
            RefusalCode::RuncTooOld,
            format!(
                "runc on node {:?} is {runc}; install version {OLDEST_RUNC} or newer",
                local.node
            ),
        ),
        Some(_) => {}
    }
}

fn compare_needs(needs: &Needs, local: &Facts, found: &Found, refusals: &mut Refusals) {
    let node = &local.node;
    let room = memory_room(needs.memory_bytes);
    if room > local.free_memory_bytes {
        refusals.add(
            RefusalCode::Memory,
            format!(
                "node {node:?} has {} MiB of memory free, the container needs {} MiB to arrive; \
                 free some or choose another node",
                local.free_memory_bytes >> 20,
                room.div_ceil(1 << 20)
            ),
        );
    }
    if found.container_exists {
        refusals.add(
            RefusalCode::ContainerExists,
            format!(
                "there is a container {:?} in namespace {:?} on node {node:?} already; delete it",
                needs.id, needs.namespace
            ),
        );
    }
    if let Some(image) = &needs.image
        && !found.image_present
        && !image.sendable
    {
        refusals.add(
            RefusalCode::ImageMissing,
            format!(
                "node {node:?} does not have the image {:?} ({:?}), and the source does not have all \
                 of its content to send; pull it there",
                image.name, image.digest
            ),
        );
    }
    for (code, what, missing) in [
        (
            RefusalCode::BindSourceMissing,
            "sources of bind mounts",
            &found.missing_bind_sources,
        ),
        (
            RefusalCode::NamespaceMissing,
            "namespaces that the container joins",
            &found.missing_namespace_paths,
        ),
        (
            RefusalCode::DeviceMissing,
            "devices of the container",
            &found.missing_devices,
        ),
    ] {
        if !missing.is_empty() {
            refusals.add(
                code,
                format!(
                    "node {node:?} lacks {what}: {}; provide them there",
                    list(missing)
                ),
            );
        }
    }
}

/// Quoted, because it came from another node and goes to a terminal.
fn list<T: Debug>(items: &[T]) -> String {
    let quoted: Vec<String> = items.iter().map(|item| format!("{item:?}")).collect();
    quoted.join(", ")
}

#[cfg(test)]
#[path = "offer_tests.rs"]
mod tests;
