//! From page ranges to batches: reading, telling zero pages, packing.

use std::ops::Range;
use std::sync::{Arc, Mutex, PoisonError};

use bytes::Bytes;
use nix::libc;

use super::held::HeldPages;
use crate::ranges::pieces;
use crate::{
    BATCH_BYTES, Batch, BatchSink, EXTENT_BYTES, MAX_RECORDS, PAGE_BYTES, Record, RecordKind,
    SpaceId, TrackError,
};

const PAGE: u64 = PAGE_BYTES as u64;

/// Zero records collected before a batch is made. Each page read adds at most one record more.
const MAX_ZERO_RUNS: usize = MAX_RECORDS - BATCH_BYTES / PAGE_BYTES;

/// Unreadable pages passed over in one range of a running process before the rest of the range is left for later.
///
/// A few are normal where a kernel does not tell guard pages apart; many mean that the mapping is gone, and trying every
/// page of a large one would take a second.
const MAX_SKIPPED_PAGES: usize = 16;

/// What was sent.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct Totals {
    pub(crate) data_pages: u64,
    pub(crate) zero_pages: u64,
    pub(crate) scanned_bytes: u64,
}

/// Buffers that batches travel in. A megabyte of fresh memory costs as much in page faults as reading into it.
#[derive(Debug, Clone, Default)]
pub(crate) struct BufferPool(Arc<Mutex<Vec<Vec<u8>>>>);

/// A buffer that goes back to its pool.
struct Buffer {
    bytes: Vec<u8>,
    pool: BufferPool,
}

impl BufferPool {
    /// Buffers kept for reuse: as many as are usually on their way at once. More are made when needed.
    const KEPT: usize = 16;

    fn take(&self) -> Buffer {
        let kept = self.0.lock().unwrap_or_else(PoisonError::into_inner).pop();
        let bytes = kept.unwrap_or_else(|| Vec::with_capacity(BATCH_BYTES));
        Buffer {
            bytes,
            pool: self.clone(),
        }
    }
}

impl Buffer {
    /// The content as a payload. A small one is copied, so that a queue of batches does not hold a megabyte for each.
    fn into_payload(self) -> Bytes {
        if self.bytes.len() < BATCH_BYTES / 4 {
            Bytes::copy_from_slice(&self.bytes)
        } else {
            Bytes::from_owner(self)
        }
    }
}

impl AsRef<[u8]> for Buffer {
    fn as_ref(&self) -> &[u8] {
        &self.bytes
    }
}

impl Drop for Buffer {
    fn drop(&mut self) {
        let mut bytes = std::mem::take(&mut self.bytes);
        bytes.clear();
        let mut kept = self.pool.0.lock().unwrap_or_else(PoisonError::into_inner);
        if kept.len() < BufferPool::KEPT {
            kept.push(bytes);
        }
    }
}

enum Item {
    /// Pages to be read.
    Read(Range<u64>),
    /// Pages that are empty and held by the destination.
    Zero(Range<u64>),
}

impl Item {
    fn range(&self) -> &Range<u64> {
        match self {
            Self::Read(range) | Self::Zero(range) => range,
        }
    }
}

/// Collects ranges of one address space, in any order, and sends what is in them.
///
/// Dropped before [`Emitter::finish`] it leaves unsent what it has collected, and nothing else is changed.
///
/// A page that reads as zeros is sent only if the destination holds something else for it.
pub(crate) struct Emitter<'a> {
    pid: i32,
    space: SpaceId,
    held: &'a mut HeldPages,
    sink: &'a mut dyn BatchSink,
    pool: &'a BufferPool,
    totals: &'a mut Totals,
    /// Ascending, in one extent.
    items: Vec<Item>,
    read_ranges: usize,
    read_bytes: usize,
    zero_runs: usize,
    lost: Vec<Range<u64>>,
    skip_limit: usize,
}

impl<'a> Emitter<'a> {
    pub(crate) fn new(
        pid: i32,
        space: SpaceId,
        held: &'a mut HeldPages,
        sink: &'a mut dyn BatchSink,
        pool: &'a BufferPool,
        totals: &'a mut Totals,
    ) -> Self {
        Self {
            pid,
            space,
            held,
            sink,
            pool,
            totals,
            items: Vec::new(),
            read_ranges: 0,
            read_bytes: 0,
            zero_runs: 0,
            lost: Vec::new(),
            skip_limit: MAX_SKIPPED_PAGES,
        }
    }

    /// Never gives a range up: what is reported lost in the end are single pages that cannot be read.
    pub(crate) fn patient(mut self) -> Self {
        self.skip_limit = usize::MAX;
        self
    }

    /// The places in a range, each covered by one page table, of which the destination holds anything. Ascending.
    pub(crate) fn held_tables(&self, range: &Range<u64>) -> Vec<Range<u64>> {
        self.held.tables_in(range)
    }

    /// These pages have, or may have, content.
    pub(crate) fn read(&mut self, range: Range<u64>) -> Result<(), TrackError> {
        for piece in pieces(range, EXTENT_BYTES) {
            let mut rest = piece;
            while !rest.is_empty() {
                if self.read_bytes == BATCH_BYTES || self.read_ranges == sys::memory::MAX_RANGES {
                    self.flush()?;
                }
                let room = (BATCH_BYTES - self.read_bytes) as u64;
                let part = rest.start..rest.end.min(rest.start + room);
                rest.start = part.end;
                self.make_room_for(&part)?;
                self.read_bytes += (part.end - part.start) as usize;
                match self.items.last_mut() {
                    Some(Item::Read(last)) if last.end == part.start => last.end = part.end,
                    _ => {
                        self.read_ranges += 1;
                        self.items.push(Item::Read(part));
                    }
                }
            }
        }
        Ok(())
    }

    /// These pages are empty.
    pub(crate) fn void(&mut self, range: Range<u64>) -> Result<(), TrackError> {
        // They count as voided only when that is sent: an emitter may be dropped.
        for run in self.held.runs(range) {
            for piece in pieces(run, EXTENT_BYTES) {
                if self.zero_runs == MAX_ZERO_RUNS {
                    self.flush()?;
                }
                self.make_room_for(&piece)?;
                self.zero_runs += 1;
                self.items.push(Item::Zero(piece));
            }
        }
        Ok(())
    }

    /// Sends everything collected; returns the ranges among all that were to be read that could not be.
    pub(crate) fn finish(mut self) -> Result<Vec<Range<u64>>, TrackError> {
        self.flush()?;
        Ok(self.lost)
    }

    /// A batch ascends and stays in one extent.
    fn make_room_for(&mut self, piece: &Range<u64>) -> Result<(), TrackError> {
        let fits = self.items.last().is_none_or(|last| {
            last.range().end <= piece.start
                && last.range().start / EXTENT_BYTES == piece.start / EXTENT_BYTES
        });
        if fits { Ok(()) } else { self.flush() }
    }

    fn flush(&mut self) -> Result<(), TrackError> {
        let items = std::mem::take(&mut self.items);
        (self.read_ranges, self.read_bytes, self.zero_runs) = (0, 0, 0);
        if items.is_empty() {
            return Ok(());
        }
        let mut buffer = self.pool.take();
        let mut read = self
            .read_pages(&items, &mut buffer.bytes)?
            .into_iter()
            .peekable();
        let mut packing = Packing::new(&mut buffer.bytes, self.held);
        for item in &items {
            match item {
                Item::Zero(range) => packing.void(range.clone()),
                Item::Read(range) => {
                    while let Some(run) = read.next_if(|run| run.start < range.end) {
                        packing.pack(run);
                    }
                }
            }
        }
        let records = packing.finish();
        if records.is_empty() {
            return Ok(());
        }
        for record in &records {
            match record.kind {
                RecordKind::Data => self.totals.data_pages += u64::from(record.pages),
                RecordKind::Zero => self.totals.zero_pages += u64::from(record.pages),
            }
        }
        let batch = Batch {
            space: self.space,
            records,
            payload: buffer.into_payload(),
        };
        debug_assert_eq!(batch.validate(), Ok(()), "a batch of our own making");
        Ok(self.sink.send(batch)?)
    }

    /// Reads what the items ask for into `buffer`; returns what is in there, ascending.
    fn read_pages(
        &mut self,
        items: &[Item],
        buffer: &mut Vec<u8>,
    ) -> Result<Vec<Range<u64>>, TrackError> {
        let mut wanted: Vec<Range<u64>> = items
            .iter()
            .filter_map(|item| match item {
                Item::Read(range) => Some(range.clone()),
                Item::Zero(_) => None,
            })
            .collect();
        let mut got = Vec::with_capacity(wanted.len());
        let mut first = 0;
        let mut skipped = 0;
        while first < wanted.len() {
            let before = buffer.len();
            match sys::memory::read_appending(self.pid, &wanted[first..], buffer) {
                Ok(bytes) => {
                    let whole = bytes - bytes % PAGE_BYTES;
                    buffer.truncate(before + whole);
                    let mut left = whole as u64;
                    while left > 0 {
                        let range = &mut wanted[first];
                        let end = range.end.min(range.start + left);
                        left -= end - range.start;
                        got.push(range.start..end);
                        range.start = end;
                        if range.is_empty() {
                            first += 1;
                            skipped = 0;
                        }
                    }
                    if whole > 0 {
                        continue;
                    }
                }
                Err(error) if error.raw_os_error() == Some(libc::EFAULT) => {}
                Err(error) if error.raw_os_error() == Some(libc::ESRCH) => {
                    self.lost.extend(wanted.drain(first..));
                    break;
                }
                Err(source) => {
                    let addr = wanted[first].start;
                    return Err(TrackError::Read {
                        pid: self.pid,
                        addr,
                        source,
                    });
                }
            }
            // The very first page is not there or not readable.
            let range = &mut wanted[first];
            skipped += 1;
            let end = if skipped < self.skip_limit {
                range.start + PAGE
            } else {
                range.end
            };
            self.lost.push(range.start..end);
            range.start = end;
            if range.is_empty() {
                first += 1;
                skipped = 0;
            }
        }
        Ok(got)
    }
}

/// Moves the pages with content to the front of a buffer and describes them.
struct Packing<'a> {
    buffer: &'a mut Vec<u8>,
    held: &'a mut HeldPages,
    /// Where the next page to look at is.
    offset: usize,
    /// Where the next page to keep goes.
    kept: usize,
    records: Vec<Record>,
}

impl<'a> Packing<'a> {
    fn new(buffer: &'a mut Vec<u8>, held: &'a mut HeldPages) -> Self {
        Self {
            buffer,
            held,
            offset: 0,
            kept: 0,
            records: Vec::new(),
        }
    }

    /// The next pages in the buffer are these.
    fn pack(&mut self, run: Range<u64>) {
        let mut addr = run.start;
        while addr < run.end {
            let kind = self.kind_of(self.offset);
            let begin = self.offset;
            let mut end = addr;
            while end < run.end && (end == addr || self.kind_of(self.offset) == kind) {
                end += PAGE;
                self.offset += PAGE_BYTES;
            }
            match kind {
                RecordKind::Zero => self.void(addr..end),
                RecordKind::Data => {
                    if self.kept != begin {
                        self.buffer.copy_within(begin..self.offset, self.kept);
                    }
                    self.kept += self.offset - begin;
                    self.held.hold(addr..end);
                    self.push(&(addr..end), RecordKind::Data);
                }
            }
            addr = end;
        }
    }

    /// These pages are empty.
    fn void(&mut self, range: Range<u64>) {
        for voided in self.held.void(range) {
            self.push(&voided, RecordKind::Zero);
        }
    }

    /// Compares with a page of zeros: the comparison is vectorised and ends at the first difference, which in a page
    /// with content is nearly always in its first bytes.
    fn kind_of(&self, offset: usize) -> RecordKind {
        static ZEROS: [u8; PAGE_BYTES] = [0; PAGE_BYTES];
        if self.buffer[offset..offset + PAGE_BYTES] == ZEROS {
            RecordKind::Zero
        } else {
            RecordKind::Data
        }
    }

    fn push(&mut self, range: &Range<u64>, kind: RecordKind) {
        // Ranges lie in one extent: the number of pages fits.
        let pages = ((range.end - range.start) / PAGE) as u32;
        match self.records.last_mut() {
            Some(last) if last.kind == kind && last.end() == range.start => last.pages += pages,
            _ => self.records.push(Record {
                addr: range.start,
                pages,
                kind,
            }),
        }
    }

    fn finish(self) -> Vec<Record> {
        self.buffer.truncate(self.kept);
        self.records
    }
}

#[cfg(test)]
#[allow(
    clippy::single_range_in_vec_init,
    reason = "lists of ranges, some of one"
)]
mod tests {
    use super::*;
    use crate::SinkClosed;

    #[derive(Default)]
    struct Collected(Vec<Batch>);

    impl BatchSink for Collected {
        fn send(&mut self, batch: Batch) -> Result<(), SinkClosed> {
            self.0.push(batch);
            Ok(())
        }
    }

    /// Page-aligned memory of this process, its content page by page.
    struct Memory {
        mapping: sys::mapping::Mapping,
    }

    impl Memory {
        /// One page for each byte, filled with it.
        fn new(pages: &[u8]) -> Self {
            let mut mapping =
                sys::mapping::Mapping::new(pages.len() * PAGE_BYTES, PAGE_BYTES).unwrap();
            for (page, byte) in mapping.chunks_exact_mut(PAGE_BYTES).zip(pages) {
                page.fill(*byte);
            }
            Self { mapping }
        }

        fn page(&self, number: u64) -> u64 {
            self.mapping.as_ptr() as u64 + number * PAGE
        }
    }

    fn emit(
        held: &mut HeldPages,
        collect: impl FnOnce(&mut Emitter<'_>),
    ) -> (Vec<Batch>, Vec<Range<u64>>, Totals) {
        let mut sink = Collected::default();
        let mut totals = Totals::default();
        let pool = BufferPool::default();
        let pid = i32::try_from(std::process::id()).unwrap();
        let mut emitter = Emitter::new(pid, SpaceId(1), held, &mut sink, &pool, &mut totals);
        collect(&mut emitter);
        let lost = emitter.finish().unwrap();
        for batch in &sink.0 {
            batch.validate().unwrap();
        }
        (sink.0, lost, totals)
    }

    /// All records as (page relative to `memory`, pages, first byte if data).
    fn summary(batches: &[Batch], memory: &Memory) -> Vec<(u64, u32, Option<u8>)> {
        let describe = |(record, content): (Record, Option<Bytes>)| {
            let page = (record.addr - memory.page(0)) / PAGE;
            (page, record.pages, content.map(|bytes| bytes[0]))
        };
        batches
            .iter()
            .flat_map(|batch| batch.contents().map(describe).collect::<Vec<_>>())
            .collect()
    }

    #[test]
    fn zero_pages_are_sent_only_where_the_destination_holds_something() {
        let memory = Memory::new(&[1, 0, 0, 2, 0]);
        let mut held = HeldPages::default();
        held.hold(memory.page(2)..memory.page(3));
        let all = memory.page(0)..memory.page(5);
        let (batches, lost, totals) = emit(&mut held, |emitter| emitter.read(all.clone()).unwrap());
        assert_eq!(
            summary(&batches, &memory),
            [(0, 1, Some(1)), (2, 1, None), (3, 1, Some(2))]
        );
        assert!(lost.is_empty());
        assert_eq!((totals.data_pages, totals.zero_pages), (2, 1));
        // Now the destination knows, and needs to hear only about what changed.
        let (batches, ..) = emit(&mut held, |emitter| emitter.void(all).unwrap());
        assert_eq!(summary(&batches, &memory), [(0, 1, None), (3, 1, None)]);
    }

    #[test]
    fn ranges_in_any_order_make_valid_batches() {
        let memory = Memory::new(&[7; 600]);
        let mut held = HeldPages::default();
        let (batches, lost, totals) = emit(&mut held, |emitter| {
            emitter.read(memory.page(300)..memory.page(600)).unwrap();
            emitter.read(memory.page(0)..memory.page(300)).unwrap();
        });
        assert_eq!(totals.data_pages, 600);
        assert!(lost.is_empty());
        let pages: u32 = summary(&batches, &memory)
            .iter()
            .map(|(_, pages, _)| pages)
            .sum();
        assert_eq!(pages, 600);
    }

    #[test]
    fn many_scattered_pages_go_into_few_batches() {
        let memory = Memory::new(&[3; 1000]);
        let mut held = HeldPages::default();
        let (batches, _, totals) = emit(&mut held, |emitter| {
            for page in (0..1000).step_by(2) {
                emitter
                    .read(memory.page(page)..memory.page(page + 1))
                    .unwrap();
            }
        });
        assert_eq!(totals.data_pages, 500);
        // An extent border may lie in the middle.
        assert!(batches.len() <= 4, "{} batches", batches.len());
    }

    #[test]
    fn many_voided_runs_respect_the_limit_of_records() {
        let mut held = HeldPages::default();
        let base = EXTENT_BYTES * 1000;
        for page in (0..EXTENT_BYTES / PAGE).step_by(2) {
            held.hold(base + page * PAGE..base + (page + 1) * PAGE);
        }
        let (batches, _, totals) = emit(&mut held, |emitter| {
            emitter.void(base..base + EXTENT_BYTES).unwrap()
        });
        assert_eq!(totals.zero_pages, 8192);
        assert!(batches.len() >= 2);
    }

    #[test]
    fn pages_that_are_not_there_are_lost_and_the_others_are_not() {
        let memory = Memory::new(&[5; 8]);
        let mut pieces = memory.mapping.split(2 * PAGE_BYTES);
        let page = |number: u64| pieces[0].as_ptr() as u64 + number * PAGE;
        let (gone, all, base) = (page(2)..page(4), page(0)..page(8), page(0));
        drop(pieces.remove(1));
        let mut held = HeldPages::default();
        let (batches, lost, totals) = emit(&mut held, |emitter| emitter.read(all).unwrap());
        assert_eq!(
            lost,
            [gone.start..gone.start + PAGE, gone.start + PAGE..gone.end]
        );
        assert_eq!(totals.data_pages, 6);
        let addresses: Vec<u64> = batches[0]
            .records
            .iter()
            .map(|record| record.addr)
            .collect();
        assert_eq!(addresses, [base, gone.end]);
    }

    #[test]
    fn a_large_mapping_that_is_gone_is_given_up_quickly() {
        let mut held = HeldPages::default();
        // Nothing is ever mapped at the very bottom of the address space.
        let (_, lost, _) = emit(&mut held, |emitter| emitter.read(0..16 * PAGE).unwrap());
        assert_eq!(
            lost.iter()
                .map(|range| range.end - range.start)
                .sum::<u64>(),
            16 * PAGE
        );
    }
}
