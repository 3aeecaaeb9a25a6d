//! The mounts that make up a container's root file system.

use std::fs;
use std::io;
use std::path::{Component, Path, PathBuf};
use std::process::Command;

use containerd_shim_protos::api::Mount;
use nix::errno::Errno;
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use sys::loop_device;

use crate::error::{Error, Result};
use crate::idmapped::OwnerMaps;

/// mount(2) takes one page of options; containerd keeps 512 bytes clear of it.
const OPTIONS_LIMIT: usize = 4096 - 512;

/// Propagation cannot be set together with anything else.
const PROPAGATION: MsFlags = MsFlags::MS_SHARED
    .union(MsFlags::MS_PRIVATE)
    .union(MsFlags::MS_SLAVE)
    .union(MsFlags::MS_UNBINDABLE);

/// One mount as it goes to the kernel.
#[derive(Debug, PartialEq, Eq)]
struct Plan {
    kind: String,
    source: String,
    flags: MsFlags,
    propagation: MsFlags,
    data: String,
    loop_device: bool,
    /// Directory that relative lower directories are below.
    chdir: Option<PathBuf>,
    /// Program for file systems in user space, such as `mount.fuse3`.
    helper: Option<String>,
    /// How the owners of files are shown.
    owners: Option<OwnerMaps>,
}

/// Mounts everything in order. What is mounted when one fails stays so that
/// the caller can unmount it: see [`unmount`]. Blocks.
pub(crate) fn mount_all(mounts: &[Mount], rootfs: &Path) -> Result<()> {
    for one in mounts {
        let target = target(rootfs, &one.target)?;
        perform(one, &target)?;
    }
    Ok(())
}

/// The writable layer among the mounts, if there is one.
pub(crate) fn upperdir(mounts: &[Mount]) -> Option<PathBuf> {
    mounts
        .iter()
        .filter(|mount| mount.type_ == "overlay")
        .flat_map(|mount| &mount.options)
        .find_map(|option| option.strip_prefix("upperdir="))
        .map(PathBuf::from)
}

/// A mount point below the root file system, that cannot lead out of it.
fn target(rootfs: &Path, below: &str) -> Result<PathBuf> {
    let mut target = rootfs.to_owned();
    for component in Path::new(below).components() {
        match component {
            Component::Normal(name) => target.push(name),
            Component::RootDir | Component::CurDir => {}
            Component::ParentDir | Component::Prefix(_) => {
                return Err(Error::InvalidArgument {
                    what: format!("mount target {below}"),
                });
            }
        }
        if target.is_symlink() {
            return Err(Error::InvalidArgument {
                what: format!("mount target {below} leads through a symbolic link"),
            });
        }
    }
    if !below.is_empty() {
        fs::create_dir_all(&target).map_err(Error::io("create", &target))?;
    }
    Ok(target)
}

fn plan(one: &Mount) -> Result<Plan> {
    let mut plan = Plan {
        kind: one.type_.clone(),
        source: one.source.clone(),
        flags: MsFlags::empty(),
        propagation: MsFlags::empty(),
        data: String::new(),
        loop_device: false,
        chdir: None,
        helper: None,
        owners: None,
    };
    for program in ["fuse3", "fuse"] {
        if let Some(kind) = plan
            .kind
            .strip_prefix(program)
            .and_then(|rest| rest.strip_prefix('.'))
        {
            plan.kind = kind.to_owned();
            plan.helper = Some(format!("mount.{program}"));
            break;
        }
    }
    let mut data: Vec<String> = Vec::new();
    let (mut uid_map, mut gid_map) = (None, None);
    for option in &one.options {
        match flag(option) {
            Some((flags, true)) => plan.flags.remove(flags),
            Some((flags, false)) => plan.flags.insert(flags),
            None if option == "loop" => plan.loop_device = true,
            None => match option.split_once('=') {
                Some(("uidmap", map)) => uid_map = Some(map),
                Some(("gidmap", map)) => gid_map = Some(map),
                _ => data.push(option.clone()),
            },
        }
    }
    if uid_map.is_some() || gid_map.is_some() {
        plan.owners = uid_map
            .zip(gid_map)
            .and_then(|(uid, gid)| OwnerMaps::parse(uid, gid));
        if plan.owners.is_none() {
            return Err(Error::InvalidArgument {
                what: format!("mount options uidmap={uid_map:?} gidmap={gid_map:?}"),
            });
        }
    }
    plan.propagation = plan.flags & (PROPAGATION | MsFlags::MS_REC);
    if !plan.propagation.intersects(PROPAGATION) {
        plan.propagation = MsFlags::empty();
    }
    plan.flags.remove(PROPAGATION);
    let length: usize = data.iter().map(|option| option.len() + 1).sum();
    if plan.kind == "overlay" && plan.owners.is_none() && length >= OPTIONS_LIMIT {
        plan.chdir = compact(&mut data);
    }
    plan.data = data.join(",");
    Ok(plan)
}

/// Flags behind an option, and whether the option clears them.
fn flag(option: &str) -> Option<(MsFlags, bool)> {
    Some(match option {
        "async" => (MsFlags::MS_SYNCHRONOUS, true),
        "atime" => (MsFlags::MS_NOATIME, true),
        "bind" => (MsFlags::MS_BIND, false),
        "defaults" => (MsFlags::empty(), false),
        "dev" => (MsFlags::MS_NODEV, true),
        "diratime" => (MsFlags::MS_NODIRATIME, true),
        "dirsync" => (MsFlags::MS_DIRSYNC, false),
        "exec" => (MsFlags::MS_NOEXEC, true),
        "mand" => (MsFlags::MS_MANDLOCK, false),
        "noatime" => (MsFlags::MS_NOATIME, false),
        "nodev" => (MsFlags::MS_NODEV, false),
        "nodiratime" => (MsFlags::MS_NODIRATIME, false),
        "noexec" => (MsFlags::MS_NOEXEC, false),
        "nomand" => (MsFlags::MS_MANDLOCK, true),
        "norelatime" => (MsFlags::MS_RELATIME, true),
        "nostrictatime" => (MsFlags::MS_STRICTATIME, true),
        "nosuid" => (MsFlags::MS_NOSUID, false),
        "private" => (MsFlags::MS_PRIVATE, false),
        "rbind" => (MsFlags::MS_BIND.union(MsFlags::MS_REC), false),
        "relatime" => (MsFlags::MS_RELATIME, false),
        "remount" => (MsFlags::MS_REMOUNT, false),
        "ro" => (MsFlags::MS_RDONLY, false),
        "rprivate" => (MsFlags::MS_PRIVATE.union(MsFlags::MS_REC), false),
        "rshared" => (MsFlags::MS_SHARED.union(MsFlags::MS_REC), false),
        "rslave" => (MsFlags::MS_SLAVE.union(MsFlags::MS_REC), false),
        "rw" => (MsFlags::MS_RDONLY, true),
        "shared" => (MsFlags::MS_SHARED, false),
        "slave" => (MsFlags::MS_SLAVE, false),
        "strictatime" => (MsFlags::MS_STRICTATIME, false),
        "suid" => (MsFlags::MS_NOSUID, true),
        "sync" => (MsFlags::MS_SYNCHRONOUS, false),
        _ => return None,
    })
}

/// Makes the lower directories relative to the directory they share, which is
/// answered; leaves them alone if they share none.
fn compact(options: &mut [String]) -> Option<PathBuf> {
    const LOWERDIR: &str = "lowerdir=";
    let option = options
        .iter_mut()
        .find(|option| option.starts_with(LOWERDIR))?;
    let layers: Vec<&str> = option[LOWERDIR.len()..].split(':').collect();
    let (first, rest) = layers.split_first()?;
    if rest.is_empty() {
        return None;
    }
    let mut shared = first.len();
    for layer in rest {
        let same = first
            .bytes()
            .zip(layer.bytes())
            .take_while(|(a, b)| a == b)
            .count();
        shared = shared.min(same);
    }
    // Only whole names: .../1/fs and .../10/fs share `...`, not `.../1`.
    let shared = first[..shared].rfind('/')?;
    if shared == 0 {
        return None;
    }
    let directory = PathBuf::from(&first[..shared]);
    let relative: Vec<&str> = layers.iter().map(|layer| &layer[shared + 1..]).collect();
    *option = format!("{LOWERDIR}{}", relative.join(":"));
    Some(directory)
}

fn perform(one: &Mount, target: &Path) -> Result<()> {
    let plan = plan(one)?;
    let failed = |source: io::Error| Error::Mount {
        what: format!(
            "mount source: {:?}, target: {:?}, fstype: {}, flags: {:#x}, data: {:?}",
            one.source,
            target,
            one.type_,
            plan.flags.bits(),
            plan.data
        ),
        source,
    };
    if let Some(helper) = &plan.helper {
        return run_helper(helper, one, &plan.kind, target).map_err(failed);
    }
    // Detaches itself when this returns, unless it is mounted by then.
    let device = match plan.loop_device {
        true => {
            let read_only = plan.flags.contains(MsFlags::MS_RDONLY);
            Some(loop_device::attach(Path::new(&plan.source), read_only).map_err(failed)?)
        }
        false => None,
    };
    let source = match &device {
        Some(device) => device.path(),
        None => Path::new(&plan.source),
    };
    let first = || -> nix::Result<()> {
        let skip = plan.flags.contains(MsFlags::MS_REMOUNT) && plan.data.is_empty();
        if !skip {
            mount(
                Some(source),
                target,
                Some(plan.kind.as_str()).filter(|kind| !kind.is_empty()),
                plan.flags,
                Some(plan.data.as_str()).filter(|data| !data.is_empty()),
            )?;
        }
        Ok(())
    };
    match (&plan.owners, &plan.chdir) {
        (Some(owners), _) if plan.kind == "overlay" => {
            owners.mount_overlay(plan.flags, &plan.data, target)
        }
        (_, Some(directory)) => within(directory, first),
        (_, None) => first().map_err(io::Error::from),
    }
    .map_err(failed)?;
    let change = |flags| {
        mount::<str, Path, str, str>(None, target, None, flags, None)
            .map_err(|error| failed(error.into()))
    };
    if !plan.propagation.is_empty() {
        change(plan.propagation)?;
    }
    // A bind mount takes its own flags only when it is mounted again.
    if plan.flags.contains(MsFlags::MS_BIND | MsFlags::MS_RDONLY) {
        change(plan.flags | MsFlags::MS_REMOUNT)?;
    }
    match &plan.owners {
        Some(owners) if plan.kind != "overlay" => owners.map_mount(target).map_err(failed),
        _ => Ok(()),
    }
}

/// Runs `work` with another working directory, on a thread that shares it with
/// nobody.
fn within(directory: &Path, work: impl FnOnce() -> nix::Result<()> + Send) -> io::Result<()> {
    std::thread::scope(|scope| {
        let thread = scope.spawn(|| {
            nix::sched::unshare(nix::sched::CloneFlags::CLONE_FS)?;
            nix::unistd::chdir(directory)?;
            work().map_err(io::Error::from)
        });
        thread
            .join()
            .unwrap_or_else(|_| Err(io::ErrorKind::Other.into()))
    })
}

fn run_helper(helper: &str, one: &Mount, kind: &str, target: &Path) -> io::Result<()> {
    // The shim's reaper would take the helper's exit from `status`, so that
    // this asks the mount table instead.
    let options: Vec<&str> = one.options.iter().map(String::as_str).collect();
    let mut command = Command::new(helper);
    command.arg(&one.source).arg(target);
    if !options.is_empty() {
        command.args(["-o", &options.join(",")]);
    }
    command.args(["-t", kind]);
    let _status = command.status();
    if is_mount_point(target)? {
        return Ok(());
    }
    Err(io::Error::other(format!("{helper} did not mount it")))
}

fn is_mount_point(path: &Path) -> io::Result<bool> {
    Ok(mount_points()?.iter().any(|point| point == path))
}

/// Binds what is mounted at `from`, with all below it, to `to`.
pub(crate) fn bind(from: &Path, to: &Path) -> Result<()> {
    let flags = MsFlags::MS_BIND | MsFlags::MS_REC;
    mount::<Path, Path, str, str>(Some(from), to, None, flags, None)
        .map_err(|error| Error::io("bind the root file system to", to)(error.into()))
}

/// Unmounts everything at and below `path`, the newest first. Nothing mounted
/// is fine.
pub(crate) fn unmount(path: &Path) -> io::Result<()> {
    let mut points: Vec<PathBuf> = mount_points()?
        .into_iter()
        .filter(|point| point.starts_with(path))
        .collect();
    points.reverse();
    for point in points {
        match umount2(&point, MntFlags::UMOUNT_NOFOLLOW) {
            Ok(()) | Err(Errno::EINVAL | Errno::ENOENT) => {}
            // Somebody looks into it; gone for everybody else at once.
            Err(Errno::EBUSY) => umount2(&point, MntFlags::MNT_DETACH)?,
            Err(error) => return Err(error.into()),
        }
    }
    Ok(())
}

/// Mount points of this mount namespace, in the order they were mounted.
fn mount_points() -> io::Result<Vec<PathBuf>> {
    Ok(parse_mount_points(&fs::read_to_string(
        "/proc/thread-self/mountinfo",
    )?))
}

fn parse_mount_points(mountinfo: &str) -> Vec<PathBuf> {
    mountinfo
        .lines()
        .filter_map(|line| line.split(' ').nth(4))
        .map(|point| PathBuf::from(unescape(point)))
        .collect()
}

/// proc(5): space, tab, newline and backslash are written in octal.
pub(crate) fn unescape(text: &str) -> String {
    text.replace("\\040", " ")
        .replace("\\011", "\t")
        .replace("\\012", "\n")
        .replace("\\134", "\\")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn request(kind: &str, options: &[&str]) -> Mount {
        Mount {
            type_: kind.into(),
            source: "src".into(),
            options: options.iter().map(|&option| option.into()).collect(),
            ..Default::default()
        }
    }

    #[test]
    fn options_become_flags_and_data() {
        let plan = plan(&request(
            "overlay",
            &["ro", "nodev", "dev", "rprivate", "lowerdir=/a:/b", "loop"],
        ))
        .unwrap();
        assert_eq!(plan.flags, MsFlags::MS_RDONLY | MsFlags::MS_REC);
        assert_eq!(plan.propagation, MsFlags::MS_PRIVATE | MsFlags::MS_REC);
        assert_eq!(plan.data, "lowerdir=/a:/b");
        assert!(plan.loop_device);
        assert_eq!(plan.chdir, None);
    }

    #[test]
    fn a_recursive_bind_is_not_taken_for_propagation() {
        let plan = plan(&request("bind", &["rbind", "rw"])).unwrap();
        assert_eq!(plan.flags, MsFlags::MS_BIND | MsFlags::MS_REC);
        assert!(plan.propagation.is_empty());
    }

    #[test]
    fn many_layers_are_named_relative_to_the_directory_they_share() {
        let layers: Vec<String> = (0..150)
            .map(|layer| format!("/var/lib/containerd/snapshots/{layer}/fs"))
            .collect();
        let lowerdir = format!("lowerdir={}", layers.join(":"));
        let plan = plan(&request("overlay", &["upperdir=/u", &lowerdir])).unwrap();
        assert_eq!(
            plan.chdir,
            Some(PathBuf::from("/var/lib/containerd/snapshots"))
        );
        assert!(plan.data.starts_with("upperdir=/u,lowerdir=0/fs:1/fs:"));
        assert!(plan.data.len() < OPTIONS_LIMIT);
    }

    #[test]
    fn layers_that_share_nothing_stay_as_they_are() {
        for layers in ["lowerdir=/a/1:/b/1", "lowerdir=/a/1", "upperdir=/a:/b"] {
            let mut options = vec![layers.to_owned()];
            assert_eq!(compact(&mut options), None);
            assert_eq!(options, [layers]);
        }
    }

    #[test]
    fn a_file_system_in_user_space_names_its_program() {
        let plan = plan(&request("fuse3.fuse-overlayfs", &["lowerdir=/a"])).unwrap();
        assert_eq!(plan.helper.as_deref(), Some("mount.fuse3"));
        assert_eq!(plan.kind, "fuse-overlayfs");
    }

    #[test]
    fn owners_are_mapped_for_users_and_groups_or_not_at_all() {
        let both = plan(&request("overlay", &["uidmap=0:1:2", "gidmap=0:3:4"])).unwrap();
        assert_eq!(both.owners, OwnerMaps::parse("0:1:2", "0:3:4"));
        assert_eq!(both.data, "");
        for options in [&["uidmap=0:1:2"][..], &["uidmap=0:1:2", "gidmap=x"]] {
            assert!(plan(&request("bind", options)).is_err());
        }
    }

    #[test]
    fn a_target_stays_below_the_root_file_system() {
        let rootfs = tempfile::tempdir().unwrap();
        let root = rootfs.path();
        assert_eq!(target(root, "").unwrap(), root);
        assert_eq!(target(root, "/a/b").unwrap(), root.join("a/b"));
        assert!(root.join("a/b").is_dir());
        assert!(target(root, "../x").is_err());
        std::os::unix::fs::symlink("/etc", root.join("link")).unwrap();
        assert!(target(root, "link/x").is_err());
    }

    #[test]
    fn mount_points_are_read_with_their_odd_characters() {
        let points = parse_mount_points(
            "36 35 98:0 / /mnt\\0401 rw,noatime master:1 - ext3 /dev/root rw\n\
             37 35 0:1 / /b rw - tmpfs tmpfs rw\n",
        );
        assert_eq!(points, [PathBuf::from("/mnt 1"), PathBuf::from("/b")]);
    }

    #[test]
    fn the_writable_layer_is_found() {
        let mounts = [
            request("bind", &["upperdir=/no"]),
            request("overlay", &["lowerdir=/a", "upperdir=/u", "workdir=/w"]),
        ];
        assert_eq!(upperdir(&mounts), Some(PathBuf::from("/u")));
        assert_eq!(upperdir(&mounts[..1]), None);
    }

    #[test]
    fn nothing_mounted_is_fine_to_unmount() {
        let dir = tempfile::tempdir().unwrap();
        unmount(dir.path()).unwrap();
    }
}
