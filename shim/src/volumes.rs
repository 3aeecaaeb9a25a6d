//! emptyDir volumes: they end with their pod, so that their content has to move with
//! its containers.

use std::collections::BTreeMap;
use std::fs;
use std::io;
use std::path::{Component, Path, PathBuf};

use nodeapi::Volume;

use crate::bundle::Spec;

/// Where the kubelet puts them, below `pods/UID`
/// (k8s.io/kubernetes/pkg/volume/emptydir: `kubernetes.io/empty-dir`, escaped).
const EMPTY_DIRS: [&str; 2] = ["volumes", "kubernetes.io~empty-dir"];

/// Where it mounts directories of volumes that are mounted by `subPath`
/// (pkg/volume/util/subpath): `volume-subpaths/VOLUME/CONTAINER/INDEX`.
const SUBPATHS: &str = "volume-subpaths";

/// The emptyDir volumes of pod `uid` that a container mounts, wholly or in part: names
/// and directories. Others' volumes are none of it, whatever the mount says.
pub(crate) fn empty_dirs(spec: &Spec, uid: &str) -> BTreeMap<String, PathBuf> {
    spec.bind_sources()
        .filter_map(|source| empty_dir(source, uid))
        .filter(|(_, path)| path.is_dir())
        .collect()
}

fn empty_dir(source: &Path, uid: &str) -> Option<(String, PathBuf)> {
    let parts: Vec<&str> = source
        .components()
        .map(|part| match part {
            Component::Normal(name) => name.to_str(),
            Component::RootDir => Some("/"),
            _ => None,
        })
        .collect::<Option<_>>()?;
    let pod = parts.windows(2).position(|pair| pair == ["pods", uid])? + 2;
    let name = match &parts[pod..] {
        [first, second, name] if [*first, *second] == EMPTY_DIRS => name,
        // Of which kind the volume is, only its own directory tells.
        [SUBPATHS, name, _, _] => name,
        _ => return None,
    };
    let path = parts[..pod].iter().chain(&EMPTY_DIRS).chain([name]);
    Some(((*name).to_owned(), path.collect()))
}

/// Removes what arrivals left that nobody brought to their end, all but those of
/// containers that are `arriving`, by id. Blocks.
pub(crate) fn sweep(volumes: &BTreeMap<String, PathBuf>, arriving: impl Fn(&str) -> bool) {
    for path in volumes.values() {
        let entries = match fs::read_dir(path) {
            Ok(entries) => entries,
            Err(error) => {
                tracing::warn!(path = %path.display(), %error, "cannot look for leftovers");
                continue;
            }
        };
        for entry in entries.flatten() {
            let name = entry.file_name();
            let id = name
                .to_str()
                .and_then(|name| name.strip_prefix(Volume::STAGING_PREFIX));
            if id.is_some_and(|id| !arriving(id)) {
                remove(&entry.path());
            }
        }
    }
}

/// Removes the directory in which content arrives with a container, if it is there.
pub(crate) fn remove(staging: &Path) {
    // Follows no symbolic link, neither here nor below.
    if let Err(error) = fs::remove_dir_all(staging)
        && error.kind() != io::ErrorKind::NotFound
    {
        tracing::warn!(path = %staging.display(), %error, "files of a migration are left");
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn find(sources: &[String], uid: &str) -> Vec<(String, PathBuf)> {
        let bundle = tempfile::tempdir().unwrap();
        let mounts: Vec<_> = sources
            .iter()
            .map(|source| json!({"type": "bind", "source": source, "destination": "/x"}))
            .collect();
        let config = json!({"mounts": mounts}).to_string();
        fs::write(bundle.path().join("config.json"), config).unwrap();
        let spec = Spec::read(bundle.path()).unwrap();
        empty_dirs(&spec, uid).into_iter().collect()
    }

    #[test]
    fn emptydirs_of_the_pod_are_found_once_each_and_nothing_else_is() {
        let kubelet = tempfile::tempdir().unwrap();
        let root = kubelet.path().display();
        let cache = format!("{root}/pods/u-1/volumes/kubernetes.io~empty-dir/cache");
        let work = format!("{root}/pods/u-1/volumes/kubernetes.io~empty-dir/work");
        let other = format!("{root}/pods/u-2/volumes/kubernetes.io~empty-dir/cache");
        for path in [&cache, &work, &other] {
            fs::create_dir_all(path).unwrap();
        }
        let sources = [
            cache.clone(),
            cache.clone(),
            other,
            format!("{root}/pods/u-1/volume-subpaths/work/main/0"),
            format!("{root}/pods/u-1/volume-subpaths/claim/main/1"),
            format!("{root}/pods/u-1/volumes/kubernetes.io~configmap/config"),
            format!("{root}/pods/u-1/volumes/kubernetes.io~empty-dir"),
            format!("{root}/pods/u-1/volumes/kubernetes.io~empty-dir/cache/below"),
            format!("{root}/pods/u-1/etc-hosts"),
            format!("{root}/pods/u-1/../u-2/volumes/kubernetes.io~empty-dir/cache"),
            "pods".to_owned(),
        ];
        let found = find(&sources, "u-1");
        assert_eq!(
            found,
            [("cache".into(), cache.into()), ("work".into(), work.into())]
        );
        assert_eq!(find(&sources, "u-3"), []);
    }

    #[test]
    fn leftovers_are_swept_and_files_of_the_pod_are_not() {
        let volume = tempfile::tempdir().unwrap();
        let outside = tempfile::tempdir().unwrap();
        fs::write(outside.path().join("file"), "x").unwrap();
        fs::write(volume.path().join("mine"), "x").unwrap();
        let tree = volume.path().join(".sterna-arriving.old/tree");
        fs::create_dir_all(&tree).unwrap();
        std::os::unix::fs::symlink(outside.path(), tree.join("link")).unwrap();
        let link = volume.path().join(".sterna-arriving.link");
        std::os::unix::fs::symlink(outside.path(), link).unwrap();
        let arriving = volume.path().join(".sterna-arriving.new");
        fs::create_dir(&arriving).unwrap();
        let volumes = BTreeMap::from([("v".to_owned(), volume.path().to_owned())]);
        sweep(&volumes, |id| id == "new");
        assert!(arriving.exists());
        assert_eq!(fs::read_dir(volume.path()).unwrap().count(), 2);
        assert!(outside.path().join("file").exists());
    }
}
