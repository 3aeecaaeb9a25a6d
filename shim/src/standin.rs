//! A root file system for runc to prepare while the real one is being written.
//!
//! `runc restore` looks at the root file system before it starts CRIU, and makes
//! missing mount points there. The writable layer of a container on its way is
//! not complete then, and an overlay must not be mounted while somebody changes
//! the directories below it: it remembers what it has found. So runc gets another
//! overlay of the same image with a writable layer of its own. When the real one
//! is complete it is mounted in its place, and over the place where runc has
//! bound the stand-in for CRIU, which goes there by its path.

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use containerd_shim_protos::api::Mount;

use crate::container::Container;
use crate::error::{Error, Result};
use crate::rootfs;

/// Where runc binds the root file system, in its directory for the container
/// (libcontainer/criu_linux.go, `Restore`).
const CRIU_ROOT: &str = "criu-root";

/// See the module's documentation.
#[derive(Debug)]
pub(crate) struct Standin {
    container: Arc<Container>,
    /// The writable layer of the stand-in; none where there is no stand-in, because
    /// the root file system is no overlay: then it is mounted from the beginning.
    scratch: Option<PathBuf>,
}

impl Standin {
    /// Mounts the stand-in as the container's root file system. What it needs lies
    /// beside `work_dir` and goes with it.
    pub(crate) async fn mount(container: &Arc<Container>, work_dir: &Path) -> Result<Self> {
        let scratch = work_dir.with_file_name("standin");
        let root = container.rootfs.clone();
        let mounts = match stand_in(&root.mounts, &scratch) {
            Some(mounts) => mounts,
            None => {
                container.mount_rootfs().await?;
                return Ok(Self {
                    container: Arc::clone(container),
                    scratch: None,
                });
            }
        };
        let made = scratch.clone();
        blocking(move || {
            for directory in [upper(&made), work(&made)] {
                fs::create_dir_all(&directory).map_err(Error::io("create", &directory))?;
            }
            rootfs::mount_all(&mounts, &root.path)
        })
        .await?;
        Ok(Self {
            container: Arc::clone(container),
            scratch: Some(scratch),
        })
    }

    /// Mounts the real root file system wherever the stand-in is.
    pub(crate) async fn replace(&self) -> Result<()> {
        if self.scratch.is_none() {
            return Ok(());
        }
        self.container.unmount_rootfs().await?;
        self.container.mount_rootfs().await?;
        let root = self.container.rootfs.path.clone();
        let bound = self.bound();
        blocking(move || rootfs::bind(&root, &bound)).await
    }

    /// Removes what is left of it behind runc, which has taken the real one from
    /// where it had bound the stand-in.
    pub(crate) async fn remove(self) {
        let (Some(scratch), bound) = (&self.scratch, self.bound()) else {
            return;
        };
        let scratch = scratch.clone();
        let removed = blocking(move || {
            rootfs::unmount(&bound).map_err(Error::io("unmount", &bound))?;
            gone(&bound, fs::remove_dir(&bound))?;
            gone(&scratch, fs::remove_dir_all(&scratch))
        })
        .await;
        if let Err(error) = removed {
            tracing::warn!(error = error.chain(), "a stand-in is left");
        }
    }

    fn bound(&self) -> PathBuf {
        let runc = &self.container.runc;
        runc.root().join(&self.container.id).join(CRIU_ROOT)
    }
}

fn gone(directory: &Path, removed: std::io::Result<()>) -> Result<()> {
    match removed {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
            Err(Error::io("remove", directory)(error))
        }
        _ => Ok(()),
    }
}

/// Removes runc's directory for a container of which it has begun a restore and
/// not finished it: runc itself knows of a container when that is restored.
pub(crate) fn forget(state: &Path) -> Result<()> {
    if state.join("state.json").exists() {
        return Ok(());
    }
    rootfs::unmount(state).map_err(Error::io("unmount", state))?;
    // One by one: whatever else may be there, nothing that is mounted is emptied.
    let bound = state.join(CRIU_ROOT);
    gone(&bound, fs::remove_dir(&bound))?;
    gone(state, fs::remove_dir(state))
}

fn upper(scratch: &Path) -> PathBuf {
    scratch.join("upper")
}

fn work(scratch: &Path) -> PathBuf {
    scratch.join("work")
}

/// The same mounts with another writable layer; none without an overlay that has
/// one.
fn stand_in(mounts: &[Mount], scratch: &Path) -> Option<Vec<Mount>> {
    rootfs::upperdir(mounts)?;
    let mut mounts = mounts.to_vec();
    for mount in mounts.iter_mut().filter(|mount| mount.type_ == "overlay") {
        for option in &mut mount.options {
            if option.starts_with("upperdir=") {
                *option = format!("upperdir={}", upper(scratch).display());
            } else if option.starts_with("workdir=") {
                *option = format!("workdir={}", work(scratch).display());
            }
        }
    }
    Some(mounts)
}

async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> Result<T> + Send + 'static,
) -> Result<T> {
    tokio::task::spawn_blocking(work)
        .await
        .map_err(Error::Interrupted)?
}

#[cfg(test)]
mod tests {
    use super::*;

    fn mount(kind: &str, options: &[&str]) -> Mount {
        Mount {
            type_: kind.into(),
            options: options.iter().map(|&option| option.into()).collect(),
            ..Default::default()
        }
    }

    #[test]
    fn a_stand_in_differs_in_its_writable_layer_alone() {
        let real = [mount(
            "overlay",
            &["index=off", "workdir=/w", "upperdir=/u", "lowerdir=/a:/b"],
        )];
        let standin = stand_in(&real, Path::new("/s")).unwrap();
        assert_eq!(
            standin[0].options,
            [
                "index=off",
                "workdir=/s/work",
                "upperdir=/s/upper",
                "lowerdir=/a:/b"
            ]
        );
    }

    #[test]
    fn without_a_writable_layer_there_is_none() {
        assert_eq!(
            stand_in(&[mount("bind", &["rbind"])], Path::new("/s")),
            None
        );
        let read_only = mount("overlay", &["lowerdir=/a:/b"]);
        assert_eq!(stand_in(&[read_only], Path::new("/s")), None);
    }
}
