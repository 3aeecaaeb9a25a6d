//! The name of a UTS namespace that a container joins.

use std::fs::{self, File};
use std::io;
use std::path::Path;

use nix::sched::{CloneFlags, setns};

use crate::error::{Error, Result};

/// Reads it, on a thread that ends with that namespace.
pub(crate) fn of_namespace(path: &Path) -> Result<String> {
    let name = std::thread::scope(|scope| {
        let reader = scope.spawn(|| -> io::Result<String> {
            setns(File::open(path)?, CloneFlags::CLONE_NEWUTS)?;
            fs::read_to_string("/proc/sys/kernel/hostname")
        });
        reader
            .join()
            .unwrap_or_else(|_| Err(io::ErrorKind::Other.into()))
    });
    let name = name.map_err(Error::io("read the host name of", path))?;
    Ok(name.trim_end().to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_namespace_that_is_not_there_is_named() {
        let error = of_namespace(Path::new("/proc/0/ns/uts")).unwrap_err();
        assert!(error.chain().contains("/proc/0/ns/uts"));
    }
}
