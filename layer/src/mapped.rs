//! Files that a process can change without the kernel noticing each time.

use std::ffi::OsString;
use std::fs;
use std::io;
use std::os::unix::ffi::OsStringExt;
use std::path::PathBuf;

/// The files of which the process has shared mappings, by the paths that the
/// process itself knows (as long as it did not change its root).
///
/// A store through such a mapping sets the file's times only when it is the
/// first one since the page was last clean, so that times alone do not tell
/// whether such a file changed. Mappings that are not writable at the moment
/// are listed too: `mprotect` makes them so without touching the file.
pub fn shared_writable(pid: i32) -> io::Result<Vec<PathBuf>> {
    let mut paths: Vec<_> = fs::read(format!("/proc/{pid}/maps"))?
        .split(|byte| *byte == b'\n')
        .filter_map(shared_file)
        .collect();
    paths.sort();
    paths.dedup();
    Ok(paths)
}

/// `START-END PERMS OFFSET DEVICE INODE   PATH`, where only a path has slashes.
fn shared_file(line: &[u8]) -> Option<PathBuf> {
    let permissions = line.split(|byte| *byte == b' ').nth(1)?;
    let path = &line[line.iter().position(|byte| *byte == b'/')?..];
    // What has no name any more is CRIU's to carry.
    if permissions.last() != Some(&b's') || path.ends_with(b" (deleted)") {
        return None;
    }
    Some(OsString::from_vec(unescape(path)).into())
}

/// The kernel writes a line feed in a path as `\012` and nothing else so.
fn unescape(path: &[u8]) -> Vec<u8> {
    let mut plain = Vec::with_capacity(path.len());
    let mut rest = path;
    while let Some((first, tail)) = rest.split_first() {
        if let Some(tail) = rest.strip_prefix(b"\\012") {
            plain.push(b'\n');
            rest = tail;
        } else {
            plain.push(*first);
            rest = tail;
        }
    }
    plain
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_shared_mappings_of_named_files_count() {
        let file = |line: &str| shared_file(line.as_bytes());
        assert_eq!(
            file(
                "7f0000000000-7f0000001000 rw-s 00000000 00:1f 77                         /data/a b\\012c"
            ),
            Some("/data/a b\nc".into())
        );
        assert_eq!(
            file("7f0000000000-7f0000001000 r--s 00000000 00:1f 77    /data/a"),
            Some("/data/a".into())
        );
        assert_eq!(
            file("7f0000000000-7f0000001000 rw-p 00000000 00:1f 77    /data/a"),
            None
        );
        assert_eq!(
            file("7f0000000000-7f0000001000 rw-s 00000000 00:1f 77    /memfd:x (deleted)"),
            None
        );
        assert_eq!(
            file("7f0000000000-7f0000001000 rw-s 00000000 00:00 0 "),
            None
        );
        assert_eq!(
            file("7f0000000000-7f0000001000 rw-p 00000000 00:00 0     [heap]"),
            None
        );
        assert_eq!(file(""), None);
    }

    #[test]
    fn a_process_that_is_not_there_is_an_error() {
        assert!(shared_writable(i32::MAX).is_err());
        shared_writable(std::process::id() as i32).unwrap();
    }
}
