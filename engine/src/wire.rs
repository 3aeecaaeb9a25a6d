//! Between the wire and the page engine's and the layer's own types.
//!
//! A peer's bytes become errors here or in the types' own validation, never
//! panics.

use std::ffi::OsString;
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::{Path, PathBuf};

use bytes::Bytes;
use layer::{Entry, Item, Kind};
use pages::{Batch, Record, RecordKind, SpaceId};
use proto::migration as pb;

/// What a peer sent that cannot be meant.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub(crate) enum WireError {
    #[error("{0} is missing or unknown")]
    Field(&'static str),
    #[error("a batch is out of order: number {got} where {expected} was due")]
    Sequence { expected: u64, got: u64 },
    #[error("a batch arrived damaged: its checksum differs")]
    Checksum,
}

pub(crate) fn batch_to_wire(batch: Batch, stream: u32, sequence: u64) -> pb::PageBatch {
    pb::PageBatch {
        stream,
        sequence,
        space: batch.space.0,
        checksum: batch.checksum(),
        records: batch
            .records
            .iter()
            .map(|record| pb::PageRecord {
                address: record.addr,
                pages: record.pages,
                kind: match record.kind {
                    RecordKind::Data => pb::RecordKind::Data,
                    RecordKind::Zero => pb::RecordKind::Zero,
                }
                .into(),
            })
            .collect(),
        payload: batch.payload,
        lz4_size: 0,
    }
}

pub(crate) fn batch_from_wire(wire: pb::PageBatch, expected: u64) -> Result<Batch, WireError> {
    if wire.sequence != expected {
        return Err(WireError::Sequence {
            expected,
            got: wire.sequence,
        });
    }
    if wire.lz4_size != 0 {
        return Err(WireError::Field("the codec of a batch"));
    }
    let records = wire
        .records
        .iter()
        .map(|record| {
            let kind = match record.kind() {
                pb::RecordKind::Data => RecordKind::Data,
                pb::RecordKind::Zero => RecordKind::Zero,
                pb::RecordKind::Unspecified => return Err(WireError::Field("a record's kind")),
            };
            Ok(Record {
                addr: record.address,
                pages: record.pages,
                kind,
            })
        })
        .collect::<Result<_, _>>()?;
    let batch = Batch {
        space: SpaceId(wire.space),
        records,
        payload: wire.payload,
    };
    if batch.checksum() != wire.checksum {
        return Err(WireError::Checksum);
    }
    Ok(batch)
}

pub(crate) fn item_to_wire(item: Item) -> pb::file_item::Item {
    match item {
        Item::Entry(entry) => pb::file_item::Item::Entry(entry_to_wire(entry)),
        Item::Data { offset, content } => {
            pb::file_item::Item::Data(pb::FileData { offset, content })
        }
        Item::Remove(path) => pb::file_item::Item::Remove(path_to_wire(&path)),
    }
}

/// `None` for a flush marker, which is no item of a tree.
pub(crate) fn item_from_wire(item: pb::file_item::Item) -> Result<Option<Item>, WireError> {
    Ok(Some(match item {
        pb::file_item::Item::Entry(entry) => Item::Entry(entry_from_wire(entry)?),
        pb::file_item::Item::Data(pb::FileData { offset, content }) => {
            Item::Data { offset, content }
        }
        pb::file_item::Item::Remove(path) => Item::Remove(path_from_wire(&path)),
        pb::file_item::Item::Flush(_) => return Ok(None),
    }))
}

fn entry_to_wire(entry: Entry) -> pb::FileEntry {
    pb::FileEntry {
        path: path_to_wire(&entry.path),
        kind: match entry.kind {
            Kind::Regular => pb::FileKind::Regular,
            Kind::Directory => pb::FileKind::Directory,
            Kind::Symlink => pb::FileKind::Symlink,
            Kind::Hardlink => pb::FileKind::Hardlink,
            Kind::CharDevice => pb::FileKind::CharDevice,
            Kind::BlockDevice => pb::FileKind::BlockDevice,
            Kind::Fifo => pb::FileKind::Fifo,
            Kind::Socket => pb::FileKind::Socket,
        }
        .into(),
        mode: entry.mode,
        uid: entry.uid,
        gid: entry.gid,
        mtime_s: entry.mtime.0,
        mtime_ns: entry.mtime.1,
        size: entry.size,
        device_major: entry.device.0,
        device_minor: entry.device.1,
        link: path_to_wire(&entry.link),
        keep: entry.keep,
        xattrs: entry
            .xattrs
            .into_iter()
            .map(|(name, value)| pb::Xattr {
                name: name.into(),
                value: value.into(),
            })
            .collect(),
    }
}

fn entry_from_wire(wire: pb::FileEntry) -> Result<Entry, WireError> {
    let kind = match wire.kind() {
        pb::FileKind::Regular => Kind::Regular,
        pb::FileKind::Directory => Kind::Directory,
        pb::FileKind::Symlink => Kind::Symlink,
        pb::FileKind::Hardlink => Kind::Hardlink,
        pb::FileKind::CharDevice => Kind::CharDevice,
        pb::FileKind::BlockDevice => Kind::BlockDevice,
        pb::FileKind::Fifo => Kind::Fifo,
        pb::FileKind::Socket => Kind::Socket,
        pb::FileKind::Unspecified => return Err(WireError::Field("a file's kind")),
    };
    Ok(Entry {
        path: path_from_wire(&wire.path),
        kind,
        mode: wire.mode,
        uid: wire.uid,
        gid: wire.gid,
        mtime: (wire.mtime_s, wire.mtime_ns),
        size: wire.size,
        device: (wire.device_major, wire.device_minor),
        link: path_from_wire(&wire.link),
        keep: wire.keep,
        xattrs: wire
            .xattrs
            .into_iter()
            .map(|xattr| (xattr.name.to_vec(), xattr.value.to_vec()))
            .collect(),
    })
}

fn path_to_wire(path: &Path) -> Bytes {
    Bytes::copy_from_slice(path.as_os_str().as_bytes())
}

fn path_from_wire(path: &[u8]) -> PathBuf {
    OsString::from_vec(path.to_vec()).into()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn batch() -> Batch {
        Batch {
            space: SpaceId(1),
            records: vec![
                Record {
                    addr: 0x10000,
                    pages: 1,
                    kind: RecordKind::Data,
                },
                Record {
                    addr: 0x20000,
                    pages: 3,
                    kind: RecordKind::Zero,
                },
            ],
            payload: Bytes::from(vec![7; 4096]),
        }
    }

    #[test]
    fn a_batch_comes_back_as_it_went() {
        let back = batch_from_wire(batch_to_wire(batch(), 0, 5), 5).unwrap();
        assert_eq!(back.records.len(), 2);
        assert_eq!(back.payload, batch().payload);
    }

    #[test]
    fn a_batch_with_a_gap_damage_or_unknown_parts_is_refused() {
        let refused = |change: fn(&mut pb::PageBatch)| {
            let mut wire = batch_to_wire(batch(), 0, 5);
            change(&mut wire);
            batch_from_wire(wire, 5).unwrap_err()
        };
        assert_eq!(
            refused(|w| w.sequence = 6),
            WireError::Sequence {
                expected: 5,
                got: 6
            }
        );
        assert_eq!(
            refused(|w| w.payload = Bytes::from(vec![8; 4096])),
            WireError::Checksum
        );
        assert!(matches!(
            refused(|w| w.records[0].kind = 9),
            WireError::Field(_)
        ));
        assert!(matches!(refused(|w| w.lz4_size = 9), WireError::Field(_)));
    }
}
