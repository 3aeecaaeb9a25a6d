//! Where a path inside a root directory leads, as the container sees it.

use std::collections::VecDeque;
use std::ffi::OsString;
use std::fs;
use std::io;
use std::path::{Component, Path, PathBuf};

/// Like the kernel's limit, and that of Go's `securejoin`.
const MAX_LINKS: usize = 255;

/// Resolves the symbolic links of `path` as if `root` were the root directory;
/// what does not exist stays as it is written. The result begins with `/`, which
/// means `root`.
///
/// This is `securejoin.SecureJoin` of Go, on which runc's names for mounts depend.
/// It does not protect from somebody who changes links at the same time.
pub(crate) fn resolve_in(root: &Path, path: &Path) -> io::Result<PathBuf> {
    let mut resolved = PathBuf::from("/");
    let mut pending = parts(path);
    let mut links = 0;
    while let Some(part) = pending.pop_front() {
        if part == ".." {
            resolved.pop();
            continue;
        }
        let next = resolved.join(&part);
        let on_host = root.join(next.strip_prefix("/").unwrap_or(&next));
        match fs::read_link(on_host) {
            Ok(target) => {
                links += 1;
                if links > MAX_LINKS {
                    return Err(io::Error::from_raw_os_error(libc::ELOOP));
                }
                if target.is_absolute() {
                    resolved = PathBuf::from("/");
                }
                for part in parts(&target).into_iter().rev() {
                    pending.push_front(part);
                }
            }
            // EINVAL: it is there and no link.
            Err(error)
                if matches!(
                    error.raw_os_error(),
                    Some(libc::EINVAL | libc::ENOENT | libc::ENOTDIR)
                ) =>
            {
                resolved = next;
            }
            Err(error) => return Err(error),
        }
    }
    Ok(resolved)
}

fn parts(path: &Path) -> VecDeque<OsString> {
    path.components()
        .filter_map(|component| match component {
            Component::Normal(name) => Some(name.to_owned()),
            Component::ParentDir => Some("..".into()),
            Component::RootDir | Component::CurDir | Component::Prefix(_) => None,
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::symlink;

    use super::*;

    #[test]
    fn links_lead_where_the_container_would_see_them() {
        let root = tempfile::tempdir().unwrap();
        let root = root.path();
        fs::create_dir_all(root.join("run/lock")).unwrap();
        fs::create_dir_all(root.join("var")).unwrap();
        symlink("/run", root.join("var/run")).unwrap();
        symlink("../../../../run/./lock", root.join("var/lock")).unwrap();
        symlink("loop", root.join("loop")).unwrap();
        let resolve = |path: &str| resolve_in(root, Path::new(path));
        assert_eq!(resolve("/var/run/x/y").unwrap(), Path::new("/run/x/y"));
        assert_eq!(resolve("/var/lock").unwrap(), Path::new("/run/lock"));
        assert_eq!(resolve("var/./run/../etc//").unwrap(), Path::new("/etc"));
        assert_eq!(
            resolve("/../../nowhere/file").unwrap(),
            Path::new("/nowhere/file")
        );
        assert_eq!(resolve("/").unwrap(), Path::new("/"));
        assert_eq!(
            resolve("/loop").unwrap_err().raw_os_error(),
            Some(libc::ELOOP)
        );
    }
}
