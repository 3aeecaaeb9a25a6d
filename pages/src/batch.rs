//! The batch: pages on their way from one address space to its copy.
//!
//! A batch is the unit of everything between the two halves of the engine: it is what the tracker emits, what the wire
//! carries, what is checksummed, and what staging applies under one lock. It stays inside one extent, so that whoever
//! routes batches over several connections by extent keeps the order of two versions of the same page.

use std::fmt;

use bytes::Bytes;
use twox_hash::XxHash3_64;

/// Bytes of a page. Both ends agree on it before anything is sent; kernels with other page sizes are refused.
pub const PAGE_BYTES: usize = 4096;

/// Bytes of an extent, the aligned piece of an address space that a batch never leaves.
///
/// Large enough that routing by extent spreads a big mapping over connections in few pieces, small enough that arming
/// one extent (16-20 ms per GiB of 4 KiB pages) holds the address space's lock for little more than a millisecond.
pub const EXTENT_BYTES: u64 = 64 << 20;

/// The most payload a batch carries, in bytes.
///
/// `process_vm_readv` reaches nearly its full rate with 1 MiB per call, and the destination's `UFFDIO_COPY` its best.
pub const BATCH_BYTES: usize = 1 << 20;

/// The most records a batch carries.
///
/// Sixteen times what single pages fill a payload with; what remains is for runs of zero pages, which carry none.
pub const MAX_RECORDS: usize = 4096;

/// An address space, by the same name on both sides: the pid of its process in the innermost pid namespace.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct SpaceId(pub u32);

impl fmt::Display for SpaceId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// What a record says about its pages.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RecordKind {
    /// The content is in the payload.
    Data,
    /// The pages read as zeros; whatever was sent for them before is void.
    Zero,
}

/// A run of pages of one kind.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Record {
    /// Address of the first page, page aligned.
    pub addr: u64,
    /// Number of pages, at least one.
    pub pages: u32,
    /// What is said about them.
    pub kind: RecordKind,
}

impl Record {
    /// Bytes of address space covered.
    pub fn len_bytes(&self) -> u64 {
        u64::from(self.pages) * PAGE_BYTES as u64
    }

    /// The first address behind the record. Only meaningful in a valid batch, where it does not overflow.
    pub fn end(&self) -> u64 {
        self.addr.saturating_add(self.len_bytes())
    }
}

/// Pages of one address space, all in one extent.
///
/// Valid batches (see [`Batch::validate`]) hold at least one record; records ascend and do not overlap.
#[derive(Clone, PartialEq, Eq)]
pub struct Batch {
    /// Whose pages.
    pub space: SpaceId,
    /// Runs of pages, ascending, not overlapping.
    pub records: Vec<Record>,
    /// The pages of the [`RecordKind::Data`] records, back to back in the order of the records.
    pub payload: Bytes,
}

/// Shows counts only: guest memory does not belong in logs.
impl fmt::Debug for Batch {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Batch")
            .field("space", &self.space.0)
            .field("first", &self.records.first())
            .field("records", &self.records.len())
            .field("payload_bytes", &self.payload.len())
            .finish()
    }
}

/// Why a batch is not one.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum BatchError {
    /// Nothing in it.
    #[error("batch without records")]
    Empty,
    /// More than [`MAX_RECORDS`].
    #[error("batch of {0} records, the limit is {MAX_RECORDS}")]
    TooManyRecords(usize),
    /// More than [`BATCH_BYTES`].
    #[error("batch of {0} payload bytes, the limit is {BATCH_BYTES}")]
    TooMuchPayload(usize),
    /// A record that covers nothing.
    #[error("record at {addr:#x} covers no page")]
    NoPages {
        /// Where the record starts.
        addr: u64,
    },
    /// A record that does not start on a page.
    #[error("record at {addr:#x} is not page aligned")]
    Unaligned {
        /// Where the record starts.
        addr: u64,
    },
    /// A record that starts before the one in front of it ends.
    #[error("record at {addr:#x} starts before the one in front of it ends")]
    OutOfOrder {
        /// Where the record starts.
        addr: u64,
    },
    /// A record beyond the extent of the first one, or beyond the address space.
    #[error("record at {addr:#x} leaves the extent of the batch")]
    LeavesExtent {
        /// Where the record starts.
        addr: u64,
    },
    /// The payload is not as long as the records say.
    #[error("payload of {actual} bytes where the records need {expected}")]
    PayloadLength {
        /// What the records add up to.
        expected: u64,
        /// What is there.
        actual: usize,
    },
}

impl Batch {
    /// Checks everything that a receiver relies on.
    ///
    /// A batch that came from a peer must pass before it is applied.
    pub fn validate(&self) -> Result<(), BatchError> {
        if self.records.len() > MAX_RECORDS {
            return Err(BatchError::TooManyRecords(self.records.len()));
        }
        if self.payload.len() > BATCH_BYTES {
            return Err(BatchError::TooMuchPayload(self.payload.len()));
        }
        let first = self.records.first().ok_or(BatchError::Empty)?;
        let extent_start = first.addr - first.addr % EXTENT_BYTES;
        // The last extent of the 64-bit space has no end that fits in 64 bits, and no user memory either.
        let extent_end = extent_start
            .checked_add(EXTENT_BYTES)
            .ok_or(BatchError::LeavesExtent { addr: first.addr })?;
        let mut expected = 0;
        let mut behind = extent_start;
        for record in &self.records {
            let addr = record.addr;
            if record.pages == 0 {
                return Err(BatchError::NoPages { addr });
            }
            if !addr.is_multiple_of(PAGE_BYTES as u64) {
                return Err(BatchError::Unaligned { addr });
            }
            if addr < behind {
                return Err(BatchError::OutOfOrder { addr });
            }
            let end = addr
                .checked_add(record.len_bytes())
                .filter(|end| *end <= extent_end)
                .ok_or(BatchError::LeavesExtent { addr })?;
            behind = end;
            if matches!(record.kind, RecordKind::Data) {
                expected += record.len_bytes();
            }
        }
        if expected != self.payload.len() as u64 {
            return Err(BatchError::PayloadLength {
                expected,
                actual: self.payload.len(),
            });
        }
        Ok(())
    }

    /// Number of the extent the batch lies in: address divided by [`EXTENT_BYTES`]. Zero for a batch without records.
    pub fn extent(&self) -> u64 {
        self.records
            .first()
            .map_or(0, |record| record.addr / EXTENT_BYTES)
    }

    /// XXH3-64 of the payload (seed 0).
    pub fn checksum(&self) -> u64 {
        XxHash3_64::oneshot(&self.payload)
    }

    /// The records with their content; `None` for zero pages.
    ///
    /// Stops early where the payload is too short, which a valid batch's never is.
    pub fn contents(&self) -> impl Iterator<Item = (Record, Option<Bytes>)> + '_ {
        let mut offset = 0_usize;
        self.records
            .iter()
            .map_while(move |record| match record.kind {
                RecordKind::Zero => Some((*record, None)),
                RecordKind::Data => {
                    let end = offset.checked_add(usize::try_from(record.len_bytes()).ok()?)?;
                    if end > self.payload.len() {
                        return None;
                    }
                    let content = self.payload.slice(offset..end);
                    offset = end;
                    Some((*record, Some(content)))
                }
            })
    }
}

/// Where batches go.
pub trait BatchSink {
    /// Takes a batch, blocking while there is no room for it: that is the back-pressure.
    fn send(&mut self, batch: Batch) -> Result<(), SinkClosed>;
}

/// Nobody takes batches any more.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("the receiver of pages is gone")]
pub struct SinkClosed;

#[cfg(test)]
mod tests {
    use super::*;

    const BASE: u64 = 0x7f00_0000_0000;

    fn record(addr: u64, pages: u32, kind: RecordKind) -> Record {
        Record { addr, pages, kind }
    }

    fn batch(records: Vec<Record>, payload_pages: usize) -> Batch {
        Batch {
            space: SpaceId(1),
            records,
            payload: Bytes::from(vec![1; payload_pages * PAGE_BYTES]),
        }
    }

    #[test]
    fn a_batch_of_data_and_zero_runs_is_valid() {
        let batch = batch(
            vec![
                record(BASE, 2, RecordKind::Data),
                record(BASE + 0x2000, 7, RecordKind::Zero),
                record(BASE + 0x9000, 1, RecordKind::Data),
            ],
            3,
        );
        assert_eq!(batch.validate(), Ok(()));
        assert_eq!(batch.extent(), BASE / EXTENT_BYTES);
    }

    #[test]
    fn a_zero_run_may_cover_a_whole_extent() {
        let pages = u32::try_from(EXTENT_BYTES / PAGE_BYTES as u64).unwrap();
        assert_eq!(
            batch(vec![record(BASE, pages, RecordKind::Zero)], 0).validate(),
            Ok(())
        );
        assert_eq!(
            batch(vec![record(BASE, pages + 1, RecordKind::Zero)], 0).validate(),
            Err(BatchError::LeavesExtent { addr: BASE })
        );
    }

    #[test]
    fn records_that_a_receiver_could_not_place_are_refused() {
        let data = RecordKind::Data;
        assert_eq!(batch(vec![], 0).validate(), Err(BatchError::Empty));
        assert_eq!(
            batch(vec![record(BASE, 0, data)], 0).validate(),
            Err(BatchError::NoPages { addr: BASE })
        );
        assert_eq!(
            batch(vec![record(BASE + 8, 1, data)], 1).validate(),
            Err(BatchError::Unaligned { addr: BASE + 8 })
        );
        assert_eq!(
            batch(
                vec![record(BASE, 2, data), record(BASE + 0x1000, 1, data)],
                3
            )
            .validate(),
            Err(BatchError::OutOfOrder {
                addr: BASE + 0x1000
            })
        );
        let next_extent = BASE + EXTENT_BYTES;
        assert_eq!(
            batch(vec![record(BASE, 1, data), record(next_extent, 1, data)], 2).validate(),
            Err(BatchError::LeavesExtent { addr: next_extent })
        );
        let top = u64::MAX - 0xfff;
        assert_eq!(
            batch(vec![record(top, 1, data)], 1).validate(),
            Err(BatchError::LeavesExtent { addr: top })
        );
    }

    #[test]
    fn limits_are_enforced() {
        let many = (0..=MAX_RECORDS as u64)
            .map(|i| record(BASE + i * 0x1000, 1, RecordKind::Zero))
            .collect();
        assert_eq!(
            batch(many, 0).validate(),
            Err(BatchError::TooManyRecords(MAX_RECORDS + 1))
        );
        let big = batch(vec![record(BASE, 257, RecordKind::Data)], 257);
        assert_eq!(
            big.validate(),
            Err(BatchError::TooMuchPayload(257 * PAGE_BYTES))
        );
        let short = batch(vec![record(BASE, 2, RecordKind::Data)], 1);
        assert_eq!(
            short.validate(),
            Err(BatchError::PayloadLength {
                expected: 8192,
                actual: 4096
            })
        );
    }

    #[test]
    fn contents_pair_records_with_their_pages() {
        let mut payload = vec![1; PAGE_BYTES];
        payload.extend(vec![2; PAGE_BYTES]);
        let batch = Batch {
            space: SpaceId(1),
            records: vec![
                record(BASE, 1, RecordKind::Data),
                record(BASE + 0x1000, 1, RecordKind::Zero),
                record(BASE + 0x2000, 1, RecordKind::Data),
            ],
            payload: Bytes::from(payload),
        };
        let first_bytes: Vec<_> = batch
            .contents()
            .map(|(_, content)| content.map(|bytes| bytes[0]))
            .collect();
        assert_eq!(first_bytes, [Some(1), None, Some(2)]);
    }

    #[test]
    fn the_checksum_is_the_published_xxh3() {
        let empty = Batch {
            space: SpaceId(1),
            records: vec![],
            payload: Bytes::new(),
        };
        // The reference implementation's XXH3_64bits of no bytes.
        assert_eq!(empty.checksum(), 0x2d06_8005_38d3_94c2);
    }
}
