//! Volumes whose content arrives with the container.

use std::path::PathBuf;
use std::sync::Arc;

use layer::{InPlace, LayerError, Merge, Wins};
use nodeapi::Volume;

use crate::receive_error::ReceiveError;

/// Until the commit their content waits in a hidden place of each; then it is put in
/// place, and taken back if the restore fails.
#[derive(Debug, Default)]
pub(super) struct Volumes(Vec<Arriving>);

#[derive(Debug)]
struct Arriving {
    name: String,
    path: PathBuf,
    merge: Arc<Merge>,
    wins: Wins,
    done: Option<InPlace>,
}

impl Volumes {
    /// Makes the hidden places. They are below the paths of this node's own container
    /// and nowhere else.
    pub(super) fn prepare(volumes: &[Volume], container_id: &str) -> Result<Self, ReceiveError> {
        let staging = Volume::staging_name(container_id);
        let prepare = |volume: &Volume| -> Result<Arriving, ReceiveError> {
            let merge = Merge::prepare(&volume.path, &staging);
            Ok(Arriving {
                name: volume.name.clone(),
                path: volume.path.clone(),
                merge: Arc::new(merge.map_err(failed(&volume.name))?),
                // The first container to come brings all of it. The others have been
                // running elsewhere meanwhile, and this one here.
                wins: match volume.brought {
                    true => Wins::Newer,
                    false => Wins::Arriving,
                },
                done: None,
            })
        };
        Ok(Self(volumes.iter().map(prepare).collect::<Result<_, _>>()?))
    }

    /// Whether these are the ones that the source sends.
    pub(super) fn check(&self, sent: &[String]) -> Result<(), ReceiveError> {
        let here: Vec<&String> = self.0.iter().map(|volume| &volume.name).collect();
        if sent.iter().eq(here.iter().copied()) {
            return Ok(());
        }
        Err(ReceiveError::Damaged(format!(
            "the source sends the volumes {sent:?}, and the container here has {here:?}"
        )))
    }

    /// Where they are built, in order.
    pub(super) fn trees(&self) -> Vec<Arc<Merge>> {
        self.0
            .iter()
            .map(|volume| Arc::clone(&volume.merge))
            .collect()
    }

    /// Puts what has arrived in place, in all of them or in none.
    pub(super) async fn put_in_place(&mut self) -> Result<(), ReceiveError> {
        if self.0.is_empty() {
            return Ok(());
        }
        let put = self.blocking(|volumes| {
            for volume in volumes {
                let done = volume.merge.put_in_place(volume.wins);
                volume.done = Some(done.map_err(failed(&volume.name))?);
            }
            Ok(())
        });
        let put = put.await;
        if put.is_err() {
            self.take_back().await;
        }
        put
    }

    /// Undoes that.
    pub(super) async fn take_back(&mut self) {
        let undone = self.blocking(|volumes| {
            for volume in volumes.iter_mut().rev() {
                if let Some(done) = volume.done.take() {
                    let undone = volume.merge.take_back(done);
                    undone.map_err(failed(&volume.name))?;
                }
            }
            Ok(())
        });
        if let Err(error) = undone.await {
            tracing::error!(
                error = crate::error_chain(&error),
                "a volume keeps what came"
            );
        }
    }

    /// Removes the hidden places and what is left in them.
    pub(super) async fn remove(&mut self) {
        let removed = self.blocking(|volumes| {
            for volume in volumes.drain(..) {
                if let Err(error) = volume.merge.remove() {
                    let error = crate::error_chain(&error);
                    tracing::warn!(path = %volume.path.display(), error, "files are left");
                }
            }
            Ok(())
        });
        // It says itself what it could not do.
        drop(removed.await);
    }

    async fn blocking(
        &mut self,
        work: impl FnOnce(&mut Vec<Arriving>) -> Result<(), ReceiveError> + Send + 'static,
    ) -> Result<(), ReceiveError> {
        if self.0.is_empty() {
            return Ok(());
        }
        let mut volumes = std::mem::take(&mut self.0);
        let worked = tokio::task::spawn_blocking(move || {
            let result = work(&mut volumes);
            (volumes, result)
        });
        match worked.await {
            Ok((volumes, result)) => {
                self.0 = volumes;
                result
            }
            Err(error) => Err(ReceiveError::Damaged(error.to_string())),
        }
    }
}

fn failed(name: &str) -> impl FnOnce(LayerError) -> ReceiveError + use<> {
    let name = name.to_owned();
    move |source| ReceiveError::Volume { name, source }
}

#[cfg(test)]
mod tests {
    use std::fs;

    use layer::{Entry, Item, Limits};

    use super::*;

    fn volume(name: &str, path: &std::path::Path) -> Volume {
        Volume {
            name: name.into(),
            path: path.to_owned(),
            brought: false,
        }
    }

    #[test]
    fn only_the_volumes_that_both_have_can_come() {
        let directory = tempfile::tempdir().unwrap();
        let here = [volume("cache", directory.path())];
        let volumes = Volumes::prepare(&here, "web").unwrap();
        volumes.check(&["cache".into()]).unwrap();
        for sent in [
            &["other".to_owned()][..],
            &[],
            &["cache".into(), "x".into()],
        ] {
            let error = volumes.check(sent).unwrap_err();
            assert!(error.to_string().contains("cache"), "{error}");
        }
        Volumes::default().check(&[]).unwrap();
        Volumes::default().check(&["cache".into()]).unwrap_err();
    }

    #[tokio::test]
    async fn one_volume_that_cannot_be_completed_leaves_the_others_as_they_were() {
        let (one, two) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        fs::write(one.path().join("mine"), "mine").unwrap();
        let here = [volume("one", one.path()), volume("two", two.path())];
        let mut volumes = Volumes::prepare(&here, "web").unwrap();
        let file = Item::Entry(Entry {
            path: "file".into(),
            mode: 0o644,
            uid: rustix::process::geteuid().as_raw(),
            gid: rustix::process::getegid().as_raw(),
            ..Entry::default()
        });
        let mut placer = volumes.trees()[0].placer(Limits::default()).unwrap();
        placer.apply(file).unwrap();
        placer.finish().unwrap();
        fs::remove_dir_all(two.path().join(Volume::staging_name("web"))).unwrap();

        let error = volumes.put_in_place().await.unwrap_err();
        assert!(error.to_string().contains("two"), "{error}");
        assert!(!one.path().join("file").exists());
        volumes.remove().await;
        let left = fs::read_dir(one.path()).unwrap();
        let left: Vec<_> = left.map(|entry| entry.unwrap().file_name()).collect();
        assert_eq!(left, ["mine"]);
    }
}
