//! The files of a recorded migration: messages of its streams, in order, each with
//! its length and a checksum.
//!
//! ```text
//! prepare      PrepareSwitch          pages-N      PageBatch of page stream N
//! final        Final                  tree-N       FileItem of tree N
//! ```
//!
//! A disk may lie for days about what was written to it: a message that is not what
//! it was ends the delivery before anything runs.

use std::fs::{self, DirBuilder, File, OpenOptions};
use std::io::{self, BufReader, BufWriter, Read, Write};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use prost::Message;
use twox_hash::XxHash3_64;

use crate::link::MESSAGE_BYTES;

/// How much is written between two times that the disk is made to have it: what is
/// left for the freeze is at most this, for each stream.
const SYNC_BYTES: u64 = 32 << 20;

const BUFFER_BYTES: usize = 1 << 20;

/// Length and checksum before each message.
const HEADER_BYTES: usize = 12;

/// The directory of one recorded migration.
#[derive(Debug, Clone)]
pub struct Files {
    directory: PathBuf,
}

impl Files {
    /// A directory that is there, or is about to be.
    #[must_use]
    pub fn at(directory: impl Into<PathBuf>) -> Self {
        Self {
            directory: directory.into(),
        }
    }

    /// Makes the directory, for root alone; it must not be there.
    pub(super) fn make(&self) -> io::Result<()> {
        DirBuilder::new().mode(0o700).create(&self.directory)
    }

    pub(super) fn pages(&self, stream: u32) -> PathBuf {
        self.directory.join(format!("pages-{stream}"))
    }

    pub(super) fn tree(&self, tree: u32) -> PathBuf {
        self.directory.join(format!("tree-{tree}"))
    }

    /// Streams and trees that were recorded, by number.
    pub(super) fn recorded(&self) -> io::Result<(Vec<u32>, Vec<u32>)> {
        let (mut streams, mut trees) = (Vec::new(), Vec::new());
        for entry in fs::read_dir(&self.directory)? {
            let name = entry?.file_name();
            let name = name.to_string_lossy();
            if let Some(number) = name.strip_prefix("pages-") {
                streams.extend(number.parse::<u32>());
            } else if let Some(number) = name.strip_prefix("tree-") {
                trees.extend(number.parse::<u32>());
            }
        }
        streams.sort_unstable();
        trees.sort_unstable();
        Ok((streams, trees))
    }

    pub(super) fn write_one(&self, name: &str, message: &impl Message) -> io::Result<()> {
        let mut frames = FrameWriter::create(&self.directory.join(name), Arc::default(), u64::MAX)?;
        frames.put(message)?;
        frames.finish()
    }

    pub(super) fn read_one<M: Message + Default>(&self, name: &str) -> io::Result<M> {
        let mut frames = FrameReader::open(&self.directory.join(name))?;
        frames.next()?.ok_or_else(|| damaged("it is empty"))
    }

    /// Makes the disk have the directory itself.
    pub(super) fn sync(&self) -> io::Result<()> {
        File::open(&self.directory)?.sync_all()
    }
}

/// Writes the messages of one stream.
#[derive(Debug)]
pub(super) struct FrameWriter {
    file: BufWriter<File>,
    unsynced: u64,
    /// Of all streams of this migration, in bytes.
    written: Arc<AtomicU64>,
    limit: u64,
}

impl FrameWriter {
    pub(super) fn create(path: &Path, written: Arc<AtomicU64>, limit: u64) -> io::Result<Self> {
        let file = OpenOptions::new()
            .write(true)
            .create_new(true)
            .mode(0o600)
            .open(path)?;
        Ok(Self {
            file: BufWriter::with_capacity(BUFFER_BYTES, file),
            unsynced: 0,
            written,
            limit,
        })
    }

    pub(super) fn put(&mut self, message: &impl Message) -> io::Result<()> {
        let body = message.encode_to_vec();
        let length = u32::try_from(body.len()).map_err(|_| io::ErrorKind::InvalidInput)?;
        let bytes = u64::from(length) + HEADER_BYTES as u64;
        if self.written.fetch_add(bytes, Ordering::Relaxed) + bytes > self.limit {
            return Err(io::Error::new(
                io::ErrorKind::QuotaExceeded,
                format!("the state is larger than {} MiB", self.limit >> 20),
            ));
        }
        self.file.write_all(&length.to_le_bytes())?;
        self.file
            .write_all(&XxHash3_64::oneshot(&body).to_le_bytes())?;
        self.file.write_all(&body)?;
        self.unsynced += bytes;
        if self.unsynced >= SYNC_BYTES {
            self.sync()?;
        }
        Ok(())
    }

    /// Makes the disk have everything so far.
    pub(super) fn sync(&mut self) -> io::Result<()> {
        self.file.flush()?;
        self.unsynced = 0;
        self.file.get_ref().sync_data()
    }

    pub(super) fn finish(mut self) -> io::Result<()> {
        self.file.flush()?;
        self.file.get_ref().sync_all()
    }
}

/// Reads them.
#[derive(Debug)]
pub(super) struct FrameReader {
    file: BufReader<File>,
}

impl FrameReader {
    pub(super) fn open(path: &Path) -> io::Result<Self> {
        let file = File::open(path)?;
        Ok(Self {
            file: BufReader::with_capacity(BUFFER_BYTES, file),
        })
    }

    /// The next message; none at the end.
    pub(super) fn next<M: Message + Default>(&mut self) -> io::Result<Option<M>> {
        let mut header = [0; HEADER_BYTES];
        let mut got = 0;
        while got < HEADER_BYTES {
            match self.file.read(&mut header[got..])? {
                0 if got == 0 => return Ok(None),
                0 => return Err(damaged("it ends in the middle of a message")),
                more => got += more,
            }
        }
        let [a, b, c, d, checksum @ ..] = header;
        let length = u32::from_le_bytes([a, b, c, d]) as usize;
        if length > MESSAGE_BYTES {
            return Err(damaged("a message is too long"));
        }
        let mut body = vec![0; length];
        self.file.read_exact(&mut body)?;
        if XxHash3_64::oneshot(&body) != u64::from_le_bytes(checksum) {
            return Err(damaged("a message is not what was written"));
        }
        M::decode(bytes::Bytes::from(body))
            .map(Some)
            .map_err(|_| damaged("a message cannot be understood"))
    }
}

fn damaged(what: &str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, what.to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;
    use proto::migration as pb;

    fn ack(sequence: u64) -> pb::PageAck {
        pb::PageAck { sequence }
    }

    fn recorded(limit: u64) -> (tempfile::TempDir, PathBuf, io::Result<()>) {
        let temp = tempfile::tempdir().unwrap();
        let path = temp.path().join("pages-0");
        let mut frames = FrameWriter::create(&path, Arc::default(), limit).unwrap();
        let put = (1..=3).try_for_each(|number| frames.put(&ack(number)));
        let put = put.and_then(|()| frames.finish());
        (temp, path, put)
    }

    #[test]
    fn messages_come_back_in_order() {
        let (_temp, path, put) = recorded(u64::MAX);
        put.unwrap();
        let mut frames = FrameReader::open(&path).unwrap();
        for number in 1..=3 {
            assert_eq!(frames.next().unwrap(), Some(ack(number)));
        }
        assert_eq!(frames.next::<pb::PageAck>().unwrap(), None);
    }

    #[test]
    fn damage_is_found_wherever_it_is() {
        let (_temp, path, put) = recorded(u64::MAX);
        put.unwrap();
        let whole = fs::read(&path).unwrap();
        for at in 0..whole.len() {
            let mut bytes = whole.clone();
            bytes[at] ^= 1;
            fs::write(&path, &bytes).unwrap();
            let mut frames = FrameReader::open(&path).unwrap();
            let read = (0..4).try_for_each(|_| frames.next::<pb::PageAck>().map(drop));
            assert!(read.is_err(), "byte {at}");
        }
        fs::write(&path, &whole[..whole.len() - 1]).unwrap();
        let mut frames = FrameReader::open(&path).unwrap();
        let read = (0..4).try_for_each(|_| frames.next::<pb::PageAck>().map(drop));
        assert!(read.is_err(), "cut off");
    }

    #[test]
    fn more_than_the_limit_is_not_written() {
        let (_temp, _, put) = recorded(30);
        assert_eq!(put.unwrap_err().kind(), io::ErrorKind::QuotaExceeded);
    }

    #[test]
    fn what_was_recorded_is_found_by_name() {
        let temp = tempfile::tempdir().unwrap();
        for name in ["pages-1", "pages-0", "tree-2", "record.json", "prepare"] {
            fs::write(temp.path().join(name), "").unwrap();
        }
        let (streams, trees) = Files::at(temp.path()).recorded().unwrap();
        assert_eq!((streams, trees), (vec![0, 1], vec![2]));
    }
}
