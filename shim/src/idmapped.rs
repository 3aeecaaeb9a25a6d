//! Root file systems whose files belong, on disk, to the users of the machine, and
//! in the container to those of its user namespace (`uidmap=`, `gidmap=`).

use std::fmt::Write;
use std::fs;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;

use nix::mount::{MsFlags, mount};
use nix::sched::{CloneFlags, unshare};
use rustix::fs::CWD;
use rustix::mount::{MoveMountFlags, OpenTreeFlags, move_mount, open_tree};
use sys::idmap::{UserNamespace, map_owners};

/// Users and groups, as /proc/PID/uid_map has them.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct OwnerMaps {
    uid: String,
    gid: String,
}

impl OwnerMaps {
    /// From the values of both options: `inside:outside:count,...`.
    pub(crate) fn parse(uid: &str, gid: &str) -> Option<Self> {
        Some(Self {
            uid: lines(uid)?,
            gid: lines(gid)?,
        })
    }

    fn namespace(&self) -> io::Result<UserNamespace> {
        UserNamespace::new(&self.uid, &self.gid)
    }

    /// Shows what is mounted at `target` with its owners mapped, over itself.
    pub(crate) fn map_mount(&self, target: &Path) -> io::Result<()> {
        attach(&mapped(target, &self.namespace()?, false)?, target)
    }

    /// Mounts an overlay whose lower layers are mapped; the upper one is written to
    /// with the owners as they are. Overlayfs wants to find its layers mounted
    /// somewhere: they are in a mount namespace that ends with this call, so that
    /// nothing has to be cleaned up if this process dies.
    pub(crate) fn mount_overlay(
        &self,
        flags: MsFlags,
        data: &str,
        target: &Path,
    ) -> io::Result<()> {
        let namespace = self.namespace()?;
        let overlay = std::thread::scope(|scope| {
            scope
                .spawn(|| assemble(&namespace, flags, data, target))
                .join()
                .unwrap_or_else(|_| Err(io::ErrorKind::Other.into()))
        })?;
        attach(&overlay, target)
    }
}

/// On a thread of its own: an overlay that is mounted nowhere. The layers are put
/// up inside `target`, which nobody else sees.
fn assemble(
    namespace: &UserNamespace,
    flags: MsFlags,
    data: &str,
    target: &Path,
) -> io::Result<OwnedFd> {
    const NONE: Option<&str> = None;
    unshare(CloneFlags::CLONE_NEWNS)?;
    mount(NONE, "/", NONE, MsFlags::MS_REC | MsFlags::MS_PRIVATE, NONE)?;
    mount(Some("tmpfs"), target, Some("tmpfs"), MsFlags::empty(), NONE)?;
    std::env::set_current_dir(target)?;
    let mut options: Vec<String> = Vec::new();
    for option in data.split(',') {
        let Some(layers) = option.strip_prefix("lowerdir=") else {
            options.push(option.to_owned());
            continue;
        };
        let mut names = Vec::new();
        for (number, layer) in layers.split(':').enumerate() {
            let name = number.to_string();
            fs::create_dir(&name)?;
            attach(
                &mapped(Path::new(layer), namespace, true)?,
                Path::new(&name),
            )?;
            names.push(name);
        }
        options.push(format!("lowerdir={}", names.join(":")));
    }
    fs::create_dir("overlay")?;
    let data = options.join(",");
    mount(
        Some("overlay"),
        "overlay",
        Some("overlay"),
        flags,
        Some(data.as_str()),
    )?;
    Ok(open_tree(
        CWD,
        "overlay",
        OpenTreeFlags::OPEN_TREE_CLONE | OpenTreeFlags::OPEN_TREE_CLOEXEC,
    )?)
}

/// A mount of `path`, mounted nowhere, with mapped owners.
fn mapped(path: &Path, namespace: &UserNamespace, read_only: bool) -> io::Result<OwnedFd> {
    let tree = open_tree(
        CWD,
        path,
        OpenTreeFlags::OPEN_TREE_CLONE | OpenTreeFlags::OPEN_TREE_CLOEXEC,
    )?;
    map_owners(&tree, namespace, read_only)?;
    Ok(tree)
}

fn attach(tree: impl AsFd, target: &Path) -> io::Result<()> {
    Ok(move_mount(
        tree,
        "",
        CWD,
        target,
        MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH,
    )?)
}

fn lines(option: &str) -> Option<String> {
    let mut lines = String::new();
    for entry in option.split(',') {
        let numbers: Vec<u32> = entry
            .split(':')
            .map(str::parse)
            .collect::<Result<_, _>>()
            .ok()?;
        let [inside, outside, count] = numbers[..] else {
            return None;
        };
        writeln!(lines, "{inside} {outside} {count}").ok()?;
    }
    Some(lines)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn several_ranges_become_several_lines() {
        let maps = OwnerMaps::parse("0:33:100,100:333:65536", "0:66:100").unwrap();
        assert_eq!(maps.uid, "0 33 100\n100 333 65536\n");
        assert_eq!(maps.gid, "0 66 100\n");
    }

    #[test]
    fn what_is_no_map_is_refused() {
        for wrong in ["", "0", "0:1", "0:1:2:3", "a:1:2", "0:1:2,", "-1:0:1"] {
            assert_eq!(OwnerMaps::parse(wrong, "0:0:1"), None, "{wrong}");
        }
    }
}
