//! Extended attributes: which of them move, and how they are read and set.
//!
//! All of `user.*`, `trusted.*` and `security.*` move, and POSIX ACLs. Not:
//!
//! * `trusted.overlay.origin`, `.nlink`, `.uuid`, `.impure` and their `user.`
//!   twins for overlays in user namespaces: handles of inodes of the file system
//!   they lie on, and notes that depend on those. Elsewhere they would name
//!   other files, or none. overlayfs does without them.
//! * `security.evm`: a signature with a key of the node.
//! * What other names a file system shows (`btrfs.compression`, NFS ACLs): its
//!   own settings, that another cannot take.
//!
//! `trusted.overlay.metacopy` is refused: the content of such a file lies in a
//! lower layer, and only an overlay mounted with `metacopy=on` would show it.

use std::path::Path;

use rustix::fs::{XattrFlags, lgetxattr, llistxattr, lremovexattr, lsetxattr};
use rustix::io::Errno;

use crate::error::LayerError;

/// The kernel's XATTR_NAME_MAX and XATTR_SIZE_MAX, in bytes.
const MAX_NAME_BYTES: usize = 255;
const MAX_VALUE_BYTES: usize = 65536;

/// Most attributes of a file and most bytes of all their values together. The
/// kernel lists at most 64 KiB of names; no file system is known that stores
/// more than a few hundred.
const MAX_COUNT: usize = 1024;
const MAX_TOTAL_BYTES: usize = 1 << 20;

/// Names and values.
pub type Xattrs = Vec<(Vec<u8>, Vec<u8>)>;

/// Whether the attribute moves with its file.
pub fn moves(name: &[u8]) -> bool {
    let overlay = name
        .strip_prefix(b"trusted.overlay.")
        .or_else(|| name.strip_prefix(b"user.overlay."));
    match overlay {
        Some(b"origin" | b"nlink" | b"uuid" | b"impure") => false,
        Some(_) => true,
        None => {
            name != b"security.evm"
                && ([&b"user."[..], b"trusted.", b"security."]
                    .iter()
                    .any(|space| name.starts_with(space))
                    || name == b"system.posix_acl_access"
                    || name == b"system.posix_acl_default")
        }
    }
}

pub(crate) fn validate(path: &Path, xattrs: &[(Vec<u8>, Vec<u8>)]) -> Result<(), LayerError> {
    let invalid = |reason| {
        Err(LayerError::Invalid {
            path: path.to_owned(),
            reason,
        })
    };
    if xattrs.len() > MAX_COUNT {
        return invalid("it has too many extended attributes");
    }
    let mut total = 0;
    for (name, value) in xattrs {
        if name.len() > MAX_NAME_BYTES || name.contains(&0) || !moves(name) {
            return invalid("an extended attribute has a name that does not move");
        }
        if value.len() > MAX_VALUE_BYTES {
            return invalid("an extended attribute is too large");
        }
        total += value.len();
    }
    if total > MAX_TOTAL_BYTES {
        return invalid("its extended attributes are too large");
    }
    Ok(())
}

/// Reads the attributes that move, ordered by name. `file` is what to ask the
/// kernel for (not followed if a symbolic link), `path` what to call it.
pub(crate) fn read(file: &Path, path: &Path) -> Result<Xattrs, LayerError> {
    let mut names = match list(file) {
        Ok(names) => names,
        Err(Errno::NOTSUP) => return Ok(Vec::new()),
        Err(errno) => {
            return Err(LayerError::io("list the extended attributes of", path)(
                errno,
            ));
        }
    };
    names.retain(|name| moves(name));
    names.sort();
    let mut xattrs = Vec::with_capacity(names.len());
    for name in names {
        if name.ends_with(b".overlay.metacopy") {
            return Err(LayerError::Unsupported {
                path: path.to_owned(),
                reason: "its content is in a lower layer (overlayfs metacopy)",
            });
        }
        match value(file, &name) {
            Ok(value) => xattrs.push((name, value)),
            Err(Errno::NODATA) => {} // removed in between: the next pass sees it
            Err(errno) => return Err(LayerError::io("read extended attributes of", path)(errno)),
        }
    }
    Ok(xattrs)
}

/// Makes the attributes that move equal to `xattrs`; others stay.
pub(crate) fn write(
    file: &Path,
    path: &Path,
    xattrs: &[(Vec<u8>, Vec<u8>)],
) -> Result<(), LayerError> {
    let present = match list(file) {
        Ok(names) => names,
        Err(Errno::NOTSUP) if xattrs.is_empty() => return Ok(()),
        Err(errno) => {
            return Err(LayerError::io("list the extended attributes of", path)(
                errno,
            ));
        }
    };
    // A label (security.selinux, security.SMACK64) cannot be taken away, and a
    // file that came without one keeps what this node's policy gave it.
    let removable = |name: &[u8]| {
        moves(name) && (!name.starts_with(b"security.") || name == b"security.capability")
    };
    for name in present.iter().filter(|name| removable(name)) {
        if !xattrs.iter().any(|(wanted, _)| wanted == name) {
            lremovexattr(file, name.as_slice())
                .map_err(LayerError::io("remove an extended attribute of", path))?;
        }
    }
    for (name, value) in xattrs {
        lsetxattr(file, name.as_slice(), value, XattrFlags::empty())
            .map_err(LayerError::io("set an extended attribute of", path))?;
    }
    Ok(())
}

fn list(file: &Path) -> Result<Vec<Vec<u8>>, Errno> {
    let mut buffer = vec![0; 512];
    let length = loop {
        match llistxattr(file, &mut buffer[..]) {
            Ok(length) => break length,
            Err(Errno::RANGE) if buffer.len() < MAX_VALUE_BYTES => {
                buffer.resize(MAX_VALUE_BYTES, 0)
            }
            Err(errno) => return Err(errno),
        }
    };
    let names = buffer[..length].split(|byte| *byte == 0);
    Ok(names
        .filter(|name| !name.is_empty())
        .map(<[u8]>::to_vec)
        .collect())
}

fn value(file: &Path, name: &[u8]) -> Result<Vec<u8>, Errno> {
    let mut buffer = vec![0; 256];
    loop {
        match lgetxattr(file, name, &mut buffer[..]) {
            Ok(length) => {
                buffer.truncate(length);
                return Ok(buffer);
            }
            Err(Errno::RANGE) if buffer.len() < MAX_VALUE_BYTES => {
                buffer.resize(MAX_VALUE_BYTES, 0)
            }
            Err(errno) => return Err(errno),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_belongs_to_one_file_system_does_not_move() {
        for name in [
            "user.a",
            "trusted.overlay.opaque",
            "trusted.overlay.redirect",
            "trusted.x",
        ] {
            assert!(moves(name.as_bytes()), "{name}");
        }
        for name in [
            "security.capability",
            "security.selinux",
            "system.posix_acl_default",
        ] {
            assert!(moves(name.as_bytes()), "{name}");
        }
        for name in [
            "trusted.overlay.origin",
            "user.overlay.nlink",
            "security.evm",
            "btrfs.compression",
        ] {
            assert!(!moves(name.as_bytes()), "{name}");
        }
        assert!(!moves(b"") && !moves(b"system.nfs4_acl"));
    }

    #[test]
    fn too_many_and_too_large_attributes_are_refused() {
        let path = Path::new("a");
        let large = |count| vec![(b"user.a".to_vec(), vec![0; 60000]); count];
        validate(path, &large(2)).unwrap();
        validate(path, &large(20)).unwrap_err();
        validate(path, &vec![(b"user.a".to_vec(), vec![]); 1025]).unwrap_err();
        validate(path, &[(b"user.a".to_vec(), vec![0; 65537])]).unwrap_err();
    }
}
