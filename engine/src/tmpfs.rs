//! What CRIU takes for `tar`.
//!
//! CRIU dumps and restores what is in a container's tmpfs mounts (`/dev`,
//! `/dev/shm`, `/run`, masked directories) with `tar --gzip`, one after the other,
//! in the blackout: three processes and 4 ms for each, even if it is empty, and
//! compression at 30 MB/s if it is not. In a migration this program stands in the
//! place of tar (criu/filesystems.c: `tmpfs_dump`, `tmpfs_restore`), and writes
//! what a file stream has on the wire: after eight bytes that tell the format apart
//! from gzip's, messages with their lengths, and a length of zero.
//!
//! Whatever else it is asked for, and archives that tar wrote, are tar's.

use std::env;
use std::ffi::{OsStr, OsString};
use std::fs::{self, File};
use std::io::{self, BufReader, BufWriter, Read, Write};
use std::os::fd::AsFd;
use std::os::unix::fs::FileExt;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};

use anyhow::{Context, bail};
use layer::{Item, Kind, Limits, Placer, Scanner, Stopped};
use prost::Message;
use proto::migration as pb;

use crate::wire;

/// The name by which CRIU starts it.
pub const NAME: &str = "tar";

/// What an archive begins with. The last byte is the format's number.
const MAGIC: &[u8; 8] = b"sterna\0\x01";

/// Largest message: one chunk of a file, or an entry with its attributes.
const MESSAGE_BYTES: usize = 4 << 20;

/// Does what tar would.
pub fn main() -> ExitCode {
    let arguments: Vec<OsString> = env::args_os().skip(1).collect();
    match run(&arguments) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            // CRIU lets it through to its own standard error.
            eprintln!("{NAME}: {error:#}");
            ExitCode::from(2)
        }
    }
}

fn run(arguments: &[OsString]) -> anyhow::Result<()> {
    let has = |option: &str| arguments.iter().any(|argument| argument == option);
    let directory = arguments
        .iter()
        .position(|argument| argument == "--directory")
        .and_then(|position| arguments.get(position + 1))
        .map(Path::new);
    match directory {
        Some(directory) if has("--create") => {
            let out = io::stdout().as_fd().try_clone_to_owned()?;
            write(directory, File::from(out))
        }
        Some(directory) if has("--extract") => {
            let archive = File::from(io::stdin().as_fd().try_clone_to_owned()?);
            let mut magic = [0; MAGIC.len()];
            match archive.read_exact_at(&mut magic, 0) {
                Ok(()) if magic == *MAGIC => read(directory, archive),
                _ => real(arguments),
            }
        }
        _ => real(arguments),
    }
}

/// Becomes the program whose place this one has taken.
fn real(arguments: &[OsString]) -> anyhow::Result<()> {
    let own = fs::read_link("/proc/self/exe").context("cannot find myself")?;
    let path = env::var_os("PATH").unwrap_or_default();
    let program = env::split_paths(&path)
        .map(|directory| directory.join(NAME))
        .find(|program| fs::canonicalize(program).is_ok_and(|program| program != own))
        .context("there is no other tar in PATH")?;
    let error = Command::new(&program).arg0(NAME).args(arguments).exec();
    Err(error).with_context(|| format!("cannot execute {}", program.display()))
}

/// Writes the tree below `directory`.
fn write(directory: &Path, out: File) -> anyhow::Result<()> {
    let mut out = BufWriter::new(out);
    out.write_all(MAGIC)?;
    let mut written = Ok(());
    let mut scanner = Scanner::new(directory)?;
    let scanned = scanner.pass(true, &mut |item| {
        // A socket's name comes with the socket.
        if matches!(&item, Item::Entry(entry) if entry.kind == Kind::Socket) {
            return Ok(());
        }
        let message = pb::FileItem {
            item: Some(wire::item_to_wire(item)),
            ..Default::default()
        };
        written = put(&mut out, &message.encode_to_vec());
        if written.is_ok() {
            Ok(())
        } else {
            Err(Stopped)
        }
    });
    written.context("cannot write the archive")?;
    scanned.context("cannot read the tree")?;
    put(&mut out, &[])?;
    out.flush()?;
    Ok(())
}

fn put(out: &mut impl Write, message: &[u8]) -> io::Result<()> {
    let length = u32::try_from(message.len()).map_err(|_| io::ErrorKind::InvalidInput)?;
    out.write_all(&length.to_le_bytes())?;
    out.write_all(message)
}

/// Builds the tree below `directory`.
fn read(directory: &Path, archive: File) -> anyhow::Result<()> {
    let mut archive = BufReader::new(archive);
    let mut magic = [0; MAGIC.len()];
    archive.read_exact(&mut magic)?;
    let mut placer = Placer::new(directory, Limits::default())?;
    loop {
        let mut length = [0; 4];
        archive
            .read_exact(&mut length)
            .context("the archive ends early")?;
        let length = u32::from_le_bytes(length) as usize;
        if length == 0 {
            break;
        }
        if length > MESSAGE_BYTES {
            bail!("a message of {length} bytes");
        }
        let mut message = vec![0; length];
        archive
            .read_exact(&mut message)
            .context("the archive ends early")?;
        let message = pb::FileItem::decode(message.as_slice())?;
        if let Some(item) = message.item
            && let Some(item) = wire::item_from_wire(item)?
        {
            placer.apply(item)?;
        }
    }
    placer.finish()?;
    Ok(())
}

/// A directory that is to come first in CRIU's `PATH`: there this program has
/// tar's name. Removed when dropped.
#[derive(Debug)]
pub(crate) struct Programs(PathBuf);

impl Programs {
    /// Makes the directory. None where this program cannot be executed again, because
    /// its file was replaced: then tar it is.
    pub(crate) fn make(directory: PathBuf) -> io::Result<Option<Self>> {
        let program = fs::read_link("/proc/self/exe")?;
        if !program.exists() {
            return Ok(None);
        }
        fs::create_dir_all(&directory)?;
        std::os::unix::fs::symlink(program, directory.join(NAME))?;
        Ok(Some(Self(directory)))
    }

    /// The directory.
    pub(crate) fn directory(&self) -> &Path {
        &self.0
    }
}

impl Drop for Programs {
    fn drop(&mut self) {
        // Whoever removes what the migration leaves was here first.
        fs::remove_dir_all(&self.0).ok();
    }
}

/// A `PATH` with a directory in front.
pub(crate) fn before(directory: &Path, path: &OsStr) -> OsString {
    let mut all = directory.as_os_str().to_owned();
    all.push(":");
    all.push(path);
    all
}

#[cfg(test)]
mod tests {
    use std::io::Seek;
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    #[test]
    fn a_tree_comes_out_of_an_archive_as_it_went_in() {
        let (from, to) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        let below = |name: &str| from.path().join(name);
        fs::create_dir(below("shm")).unwrap();
        fs::set_permissions(below("shm"), fs::Permissions::from_mode(0o1777)).unwrap();
        fs::write(below("shm/segment"), vec![7; 3 << 20]).unwrap();
        std::os::unix::fs::symlink("/proc/self/fd", below("fd")).unwrap();
        let _socket = std::os::unix::net::UnixListener::bind(below("socket")).unwrap();

        let mut archive = tempfile::tempfile().unwrap();
        write(from.path(), archive.try_clone().unwrap()).unwrap();
        archive.rewind().unwrap();
        read(to.path(), archive).unwrap();

        let arrived = |name: &str| to.path().join(name);
        assert_eq!(fs::read(arrived("shm/segment")).unwrap(), vec![7; 3 << 20]);
        let mode = fs::metadata(arrived("shm")).unwrap().permissions().mode();
        assert_eq!(mode & 0o7777, 0o1777);
        assert_eq!(
            fs::read_link(arrived("fd")).unwrap(),
            Path::new("/proc/self/fd")
        );
        assert!(!arrived("socket").exists());
    }

    #[test]
    fn an_archive_that_ends_early_is_an_error() {
        let (from, to) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        fs::write(from.path().join("file"), "content").unwrap();
        let mut archive = tempfile::tempfile().unwrap();
        write(from.path(), archive.try_clone().unwrap()).unwrap();
        let length = archive.metadata().unwrap().len();
        archive.set_len(length - 5).unwrap();
        archive.rewind().unwrap();
        assert!(read(to.path(), archive).is_err());
    }
}
