//! Staging: pages that arrived, by address, until a process takes them over.
//!
//! ```text
//!  Staging -- space -- extent (64 MiB, one lock) -- window (2 MiB, one piece of memory) -- page
//! ```
//!
//! Whoever routes batches keeps two versions of one page in order, which routing by extent does; then the newest one
//! is what is staged. Different extents are written side by side.
//!
//! A space is sealed when its process is being restored: its windows are then shared with whoever copies them, and
//! stay here as well until [`Staging::release`], so that a restore that fails can be tried again.

pub(crate) mod window;

use std::collections::{BTreeMap, HashMap};
use std::io;
use std::ops::Range;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, RwLock};

use sys::mapping::Mapping;

use self::window::{WINDOW_BYTES, Window};
use crate::bits::{PageBits, WINDOW_PAGES};
use crate::sync::{lock, read, write};
use crate::{Batch, BatchError, EXTENT_BYTES, PAGE_BYTES, RecordKind, SpaceId};

const EXTENT_WINDOWS: usize = EXTENT_BYTES as usize / WINDOW_BYTES;

/// Why pages could not be staged.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum StagingError {
    /// The batch is none; nothing of it was applied.
    #[error("cannot stage a batch for space {space}")]
    Batch {
        /// The space it was for.
        space: SpaceId,
        /// What is wrong with it.
        #[source]
        source: BatchError,
    },
    /// The batch does not fit; a part of it may have been applied.
    #[error("staged memory would exceed the limit of {limit_bytes} bytes")]
    Full {
        /// The limit given to [`Staging::new`].
        limit_bytes: u64,
    },
    /// The process is being restored already; nothing was applied.
    #[error("space {0} is being restored and takes no more pages")]
    Sealed(SpaceId),
    /// The kernel has no memory, or no address space, for us.
    #[error("cannot map memory to stage space {space}")]
    Memory {
        /// The space it was for.
        space: SpaceId,
        /// What mmap(2) said.
        #[source]
        source: io::Error,
    },
}

/// What staging holds.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct StagingUsage {
    /// Pages with content.
    pub pages: u64,
    /// Bytes of memory taken, which is more: huge pages, and pages that became zero.
    pub bytes: u64,
    /// Address spaces with at least one page.
    pub spaces: usize,
}

/// Pages by address space and address. See the module's documentation.
#[derive(Debug)]
pub struct Staging {
    limit_bytes: u64,
    spaces: RwLock<HashMap<SpaceId, Arc<Space>>>,
    bytes: AtomicU64,
    pages: AtomicU64,
    hot: AtomicBool,
}

#[derive(Debug, Default)]
struct Space {
    extents: RwLock<Extents>,
}

#[derive(Debug, Default)]
struct Extents {
    by_number: BTreeMap<u64, Arc<Mutex<Extent>>>,
    sealed: bool,
}

/// Windows are shared with others only while the extent is sealed.
#[derive(Debug)]
struct Extent {
    windows: [Option<Arc<Window>>; EXTENT_WINDOWS],
    /// Memory of windows that never held anything; mapped in one piece to stay far from the limit on mappings.
    unused: Vec<Option<Mapping>>,
    sealed: bool,
}

impl Staging {
    /// Staging that takes up to `limit_bytes` of memory.
    pub fn new(limit_bytes: u64) -> Self {
        Self {
            limit_bytes,
            spaces: RwLock::default(),
            bytes: AtomicU64::new(0),
            pages: AtomicU64::new(0),
            hot: AtomicBool::new(false),
        }
    }

    /// Takes a batch in: content replaces what was there, zero pages remove it. Others that look at the extent see
    /// all of the batch or nothing.
    ///
    /// # Errors
    ///
    /// See [`StagingError`]. After one, what is staged is of no use: pages are missing.
    pub fn apply(&self, batch: &Batch) -> Result<(), StagingError> {
        let space = batch.space;
        batch
            .validate()
            .map_err(|source| StagingError::Batch { space, source })?;
        let extent = self.extent(space, batch.extent())?;
        let mut extent = lock(&extent);
        if extent.sealed {
            return Err(StagingError::Sealed(space));
        }
        let hot = self.hot.load(Ordering::Relaxed);
        for (record, content) in batch.contents() {
            let mut page = (record.addr % EXTENT_BYTES) as usize / PAGE_BYTES;
            let end = page + record.pages as usize;
            let mut content = content.as_deref().unwrap_or_default();
            while page < end {
                let index = page / WINDOW_PAGES;
                let first = page % WINDOW_PAGES;
                let count = (end - page).min(WINDOW_PAGES - first);
                let pages = first..first + count;
                match record.kind {
                    RecordKind::Zero => self.forget(&mut extent, index, pages),
                    RecordKind::Data => {
                        let (front, rest) = content.split_at(count * PAGE_BYTES);
                        self.write(&mut extent, index, pages, front, hot)
                            .map_err(|failure| failure.in_space(space))?;
                        content = rest;
                    }
                }
                page += count;
            }
        }
        Ok(())
    }

    /// Marks pages that arrive from now on as hot: they were written when the process was about to stop, and are
    /// likely to be wanted first when it goes on.
    pub fn mark_hot_from_now(&self) {
        self.hot.store(true, Ordering::Relaxed);
    }

    /// Drops what lies outside of `ranges`, which are page aligned. Called at the end, when it is known which mappings
    /// there are: staged pages that belong to none could not be placed.
    ///
    /// # Errors
    ///
    /// [`StagingError::Sealed`].
    pub fn retain(&self, space: SpaceId, ranges: &[Range<u64>]) -> Result<(), StagingError> {
        let Some(staged) = read(&self.spaces).get(&space).cloned() else {
            return Ok(());
        };
        let mut ranges = ranges.to_vec();
        ranges.retain(|range| range.start < range.end);
        ranges.sort_by_key(|range| range.start);
        for (number, extent) in &read(&staged.extents).by_number {
            let mut extent = lock(extent);
            if extent.sealed {
                return Err(StagingError::Sealed(space));
            }
            for index in 0..EXTENT_WINDOWS {
                let start = number * EXTENT_BYTES + (index * WINDOW_BYTES) as u64;
                for gap in gaps(start, &ranges) {
                    self.forget(&mut extent, index, gap);
                }
            }
        }
        Ok(())
    }

    /// Drops what lies in `ranges`, which are page aligned: pages that are restored by somebody else.
    ///
    /// # Errors
    ///
    /// [`StagingError::Sealed`].
    pub fn remove(&self, space: SpaceId, ranges: &[Range<u64>]) -> Result<(), StagingError> {
        let Some(staged) = read(&self.spaces).get(&space).cloned() else {
            return Ok(());
        };
        let extents = read(&staged.extents);
        for range in ranges.iter().filter(|range| range.start < range.end) {
            let numbers = range.start / EXTENT_BYTES..=(range.end - 1) / EXTENT_BYTES;
            for (number, extent) in extents.by_number.range(numbers) {
                let mut extent = lock(extent);
                if extent.sealed {
                    return Err(StagingError::Sealed(space));
                }
                for index in 0..EXTENT_WINDOWS {
                    let start = number * EXTENT_BYTES + (index * WINDOW_BYTES) as u64;
                    let end = start + WINDOW_BYTES as u64;
                    let from = (range.start.clamp(start, end) - start) as usize;
                    let to = (range.end.clamp(start, end) - start) as usize;
                    let pages = from / PAGE_BYTES..to.div_ceil(PAGE_BYTES);
                    if !pages.is_empty() {
                        self.forget(&mut extent, index, pages);
                    }
                }
            }
        }
        Ok(())
    }

    /// Drops all spaces but `spaces`: those of processes that ended before the rest stopped.
    pub fn retain_spaces(&self, spaces: &[SpaceId]) {
        let staged: Vec<SpaceId> = read(&self.spaces).keys().copied().collect();
        for space in staged {
            if !spaces.contains(&space) {
                self.release(space);
            }
        }
    }

    /// How much there is.
    pub fn usage(&self) -> StagingUsage {
        StagingUsage {
            pages: self.pages.load(Ordering::Relaxed),
            bytes: self.bytes.load(Ordering::Relaxed),
            spaces: self.spaces().len(),
        }
    }

    /// The spaces that have at least one page.
    pub fn spaces(&self) -> Vec<SpaceId> {
        // Not counted under the lock of the map: `release` takes the two the other way round.
        let staged: Vec<(SpaceId, Arc<Space>)> = read(&self.spaces)
            .iter()
            .map(|(space, staged)| (*space, Arc::clone(staged)))
            .collect();
        let mut spaces: Vec<_> = staged
            .into_iter()
            .filter(|(_, staged)| staged.pages() > 0)
            .map(|(space, _)| space)
            .collect();
        spaces.sort_unstable();
        spaces
    }

    /// The number of pages of one space.
    pub fn pages_of(&self, space: SpaceId) -> u64 {
        let staged = read(&self.spaces).get(&space).cloned();
        staged.map_or(0, |staged| staged.pages())
    }

    /// A copy of the page at `addr` (rounded down to its page), if it is staged; for checks.
    pub fn page(&self, space: SpaceId, addr: u64) -> Option<Vec<u8>> {
        let staged = read(&self.spaces).get(&space).cloned()?;
        let extent = read(&staged.extents)
            .by_number
            .get(&(addr / EXTENT_BYTES))
            .cloned()?;
        let extent = lock(&extent);
        let page = (addr % EXTENT_BYTES) as usize / PAGE_BYTES;
        let window = extent.windows[page / WINDOW_PAGES].as_ref()?;
        let page = page % WINDOW_PAGES;
        window
            .present()
            .contains(page)
            .then(|| window.content(page..page + 1).to_vec())
    }

    /// Seals a space and returns its windows with their addresses, ascending. They stay here too until they are
    /// [released](Self::release).
    pub(crate) fn seal(&self, space: SpaceId) -> Vec<(u64, Arc<Window>)> {
        let staged = read(&self.spaces).get(&space).cloned();
        let Some(staged) = staged else {
            return Vec::new();
        };
        let mut extents = write(&staged.extents);
        extents.sealed = true;
        let mut windows = Vec::new();
        for (number, extent) in &extents.by_number {
            let mut extent = lock(extent);
            extent.sealed = true;
            for (index, window) in extent.windows.iter().enumerate() {
                if let Some(window) = window {
                    let start = number * EXTENT_BYTES + (index * WINDOW_BYTES) as u64;
                    windows.push((start, Arc::clone(window)));
                }
            }
        }
        windows
    }

    /// Forgets the pages of a space; those that somebody copies just now are gone when that is done. A space whose
    /// process is being restored takes no pages after this either.
    pub fn release(&self, space: SpaceId) {
        let Some(staged) = read(&self.spaces).get(&space).cloned() else {
            return;
        };
        let mut extents = write(&staged.extents);
        if !extents.sealed {
            write(&self.spaces).remove(&space);
            // Whoever found it just before must not write to it in vain.
            extents.sealed = true;
        }
        for extent in std::mem::take(&mut extents.by_number).values() {
            let mut extent = lock(extent);
            extent.sealed = true;
            for window in extent.windows.iter_mut().filter_map(Option::take) {
                self.uncount(&window, window.present().len());
            }
        }
    }

    /// The extent of a space, made if there is none yet.
    fn extent(&self, space: SpaceId, number: u64) -> Result<Arc<Mutex<Extent>>, StagingError> {
        let staged = read(&self.spaces).get(&space).cloned();
        let staged =
            staged.unwrap_or_else(|| Arc::clone(write(&self.spaces).entry(space).or_default()));
        if let Some(extent) = read(&staged.extents).by_number.get(&number) {
            return Ok(Arc::clone(extent));
        }
        let mut extents = write(&staged.extents);
        if extents.sealed {
            return Err(StagingError::Sealed(space));
        }
        let extent = extents.by_number.entry(number).or_default();
        Ok(Arc::clone(extent))
    }

    fn write(
        &self,
        extent: &mut Extent,
        index: usize,
        pages: Range<usize>,
        content: &[u8],
        hot: bool,
    ) -> Result<(), WriteFailure> {
        let window = extent.window(index).map_err(WriteFailure::Memory)?;
        let before = window.cost();
        let more = (window.cost_with(&pages) - before) as u64;
        let fits = |bytes: u64| {
            bytes
                .checked_add(more)
                .filter(|sum| *sum <= self.limit_bytes)
        };
        self.bytes
            .fetch_update(Ordering::Relaxed, Ordering::Relaxed, fits)
            .map_err(|_| WriteFailure::Full(self.limit_bytes))?;
        let held = window.present().len();
        window.write(pages.start, content, hot);
        let gained = window.present().len() - held;
        self.pages.fetch_add(gained as u64, Ordering::Relaxed);
        Ok(())
    }

    /// Removes pages from an extent that is not sealed; a window without pages goes with its memory.
    fn forget(&self, extent: &mut Extent, index: usize, pages: Range<usize>) {
        let Some(window) = extent.windows[index].as_mut().and_then(Arc::get_mut) else {
            return;
        };
        let held = window.present().len();
        window.remove(pages);
        let left = window.present().len();
        if left > 0 {
            let lost = (held - left) as u64;
            self.pages.fetch_sub(lost, Ordering::Relaxed);
        } else if let Some(window) = extent.windows[index].take() {
            self.uncount(&window, held);
        }
    }

    /// Takes a window that is dropped, and held `pages`, out of the account.
    fn uncount(&self, window: &Window, pages: usize) {
        self.pages.fetch_sub(pages as u64, Ordering::Relaxed);
        let cost = window.cost() as u64;
        self.bytes.fetch_sub(cost, Ordering::Relaxed);
    }
}

/// Why a window was not written; the space is added where it is known.
enum WriteFailure {
    Full(u64),
    Memory(io::Error),
}

impl WriteFailure {
    fn in_space(self, space: SpaceId) -> StagingError {
        match self {
            Self::Full(limit_bytes) => StagingError::Full { limit_bytes },
            Self::Memory(source) => StagingError::Memory { space, source },
        }
    }
}

impl Space {
    fn pages(&self) -> u64 {
        read(&self.extents)
            .by_number
            .values()
            .map(|extent| {
                let extent = lock(extent);
                let windows = extent.windows.iter().flatten();
                windows
                    .map(|window| window.present().len() as u64)
                    .sum::<u64>()
            })
            .sum()
    }
}

impl Default for Extent {
    fn default() -> Self {
        Self {
            windows: [const { None }; EXTENT_WINDOWS],
            unused: Vec::new(),
            sealed: false,
        }
    }
}

impl Extent {
    /// A window of an extent that is not sealed, made if there is none yet.
    fn window(&mut self, index: usize) -> io::Result<&mut Window> {
        if self.windows[index].is_none() {
            if self.unused.is_empty() {
                let memory = Window::memory(EXTENT_WINDOWS)?;
                self.unused = memory.into_iter().map(Some).collect();
            }
            let memory = match self.unused[index].take() {
                Some(memory) => memory,
                // Its window was emptied before. Rare enough to map 2 MiB alone.
                None => Window::memory(1)?.remove(0),
            };
            self.windows[index] = Some(Arc::new(Window::new(memory)));
        }
        let window = self.windows[index].as_mut().and_then(Arc::get_mut);
        window.ok_or_else(|| io::ErrorKind::ResourceBusy.into())
    }
}

/// The pages of the window at `start` that are in none of `ranges`, which are sorted by their start.
fn gaps(start: u64, ranges: &[Range<u64>]) -> Vec<Range<usize>> {
    let end = start + WINDOW_BYTES as u64;
    let mut outside = PageBits::default();
    outside.insert(0..WINDOW_PAGES);
    // Ranges of mappings do not overlap, so that their ends ascend as well.
    let first = ranges.partition_point(|range| range.end <= start);
    for range in ranges[first..].iter().take_while(|range| range.start < end) {
        let from = range.start.max(start) - start;
        let to = range.end.min(end) - start;
        outside.remove(from as usize / PAGE_BYTES..(to as usize).div_ceil(PAGE_BYTES));
    }
    let mut gaps = Vec::new();
    let mut page = 0;
    while let Some(gap) = outside.next_run(page, WINDOW_PAGES) {
        page = gap.end;
        gaps.push(gap);
    }
    gaps
}

#[cfg(test)]
mod tests {
    use bytes::Bytes;

    use super::*;
    use crate::Record;

    const BASE: u64 = 0x7f00_0000_0000;
    const PAGE: u64 = PAGE_BYTES as u64;
    const A: SpaceId = SpaceId(1);

    fn data(space: SpaceId, addr: u64, pages: usize, fill: u8) -> Batch {
        Batch {
            space,
            records: vec![Record {
                addr,
                pages: u32::try_from(pages).unwrap(),
                kind: RecordKind::Data,
            }],
            payload: Bytes::from(vec![fill; pages * PAGE_BYTES]),
        }
    }

    fn zero(space: SpaceId, addr: u64, pages: u32) -> Batch {
        Batch {
            space,
            records: vec![Record {
                addr,
                pages,
                kind: RecordKind::Zero,
            }],
            payload: Bytes::new(),
        }
    }

    fn first_byte(staging: &Staging, addr: u64) -> Option<u8> {
        staging.page(A, addr).map(|page| page[0])
    }

    #[test]
    fn the_newest_version_of_a_page_is_what_is_staged() {
        let staging = Staging::new(1 << 30);
        staging.apply(&data(A, BASE, 4, 1)).unwrap();
        staging.apply(&data(A, BASE + PAGE, 2, 2)).unwrap();
        let found: Vec<_> = (0..5)
            .map(|page| first_byte(&staging, BASE + page * PAGE))
            .collect();
        assert_eq!(found, [Some(1), Some(2), Some(2), Some(1), None]);
        assert_eq!(staging.usage().pages, 4);
    }

    #[test]
    fn zero_pages_remove_what_was_staged_and_give_memory_back() {
        let staging = Staging::new(1 << 30);
        staging.apply(&data(A, BASE, 200, 1)).unwrap();
        staging.apply(&zero(A, BASE + PAGE, 1)).unwrap();
        assert_eq!(first_byte(&staging, BASE + PAGE), None);
        assert_eq!(staging.usage().pages, 199);
        staging.apply(&zero(A, BASE, 16384)).unwrap();
        assert_eq!(staging.usage(), StagingUsage::default());
        staging.apply(&data(A, BASE, 1, 3)).unwrap();
        assert_eq!(first_byte(&staging, BASE), Some(3));
        assert_eq!(first_byte(&staging, BASE + PAGE), None);
    }

    #[test]
    fn a_record_may_cross_windows() {
        let staging = Staging::new(1 << 30);
        let addr = BASE + WINDOW_BYTES as u64 - 3 * PAGE;
        let mut batch = data(A, addr, 200, 0);
        let mut payload = Vec::new();
        for page in 0..200 {
            payload.resize(payload.len() + PAGE_BYTES, page as u8);
        }
        batch.payload = payload.into();
        staging.apply(&batch).unwrap();
        for page in 0..200 {
            let found = first_byte(&staging, addr + page * PAGE);
            assert_eq!(found, Some(page as u8));
        }
    }

    #[test]
    fn what_exceeds_the_limit_is_an_error() {
        let staging = Staging::new(8 * PAGE);
        staging.apply(&data(A, BASE, 8, 1)).unwrap();
        staging.apply(&data(A, BASE, 8, 2)).unwrap();
        let error = staging.apply(&data(A, BASE + EXTENT_BYTES, 1, 1));
        assert!(matches!(
            error,
            Err(StagingError::Full { limit_bytes }) if limit_bytes == 8 * PAGE
        ));
        assert_eq!(staging.usage().bytes, 8 * PAGE);
    }

    #[test]
    fn a_batch_that_is_none_changes_nothing() {
        let staging = Staging::new(1 << 30);
        let mut batch = data(A, BASE, 2, 1);
        batch.records[0].pages = 3;
        assert!(matches!(
            staging.apply(&batch),
            Err(StagingError::Batch { space: A, .. })
        ));
        assert_eq!(staging.usage(), StagingUsage::default());
    }

    #[test]
    fn retaining_drops_everything_outside_to_the_page() {
        let staging = Staging::new(1 << 30);
        for extent in 0..3 {
            let addr = BASE + extent * EXTENT_BYTES;
            staging.apply(&data(A, addr, 256, 1)).unwrap();
        }
        let kept = [
            BASE + EXTENT_BYTES + 250 * PAGE..BASE + 2 * EXTENT_BYTES + PAGE,
            BASE + 2 * PAGE..BASE + 4 * PAGE,
        ];
        staging.retain(A, &kept).unwrap();
        assert_eq!(staging.usage().pages, 2 + 6 + 1);
        assert_eq!(first_byte(&staging, BASE + PAGE), None);
        assert_eq!(first_byte(&staging, BASE + 3 * PAGE), Some(1));
        assert_eq!(first_byte(&staging, BASE + 2 * EXTENT_BYTES), Some(1));
        staging.retain(A, &[]).unwrap();
        assert_eq!(staging.usage(), StagingUsage::default());
    }

    #[test]
    fn removing_drops_what_is_inside_to_the_page() {
        let staging = Staging::new(1 << 30);
        for extent in 0..3 {
            let addr = BASE + extent * EXTENT_BYTES;
            staging.apply(&data(A, addr, 256, 1)).unwrap();
        }
        let removed = [
            BASE + 255 * PAGE..BASE + EXTENT_BYTES + PAGE,
            BASE + 2 * PAGE..BASE + 4 * PAGE,
            BASE..BASE,
        ];
        staging.remove(A, &removed).unwrap();
        assert_eq!(staging.usage().pages, 3 * 256 - 4);
        assert_eq!(first_byte(&staging, BASE + PAGE), Some(1));
        assert_eq!(first_byte(&staging, BASE + 2 * PAGE), None);
        assert_eq!(first_byte(&staging, BASE + EXTENT_BYTES), None);
        let everything = 0..u64::MAX;
        staging.remove(A, &[everything]).unwrap();
        assert_eq!(staging.usage(), StagingUsage::default());
    }

    #[test]
    fn spaces_do_not_mix_and_can_be_dropped() {
        let staging = Staging::new(1 << 30);
        staging.apply(&data(A, BASE, 1, 1)).unwrap();
        staging.apply(&data(SpaceId(2), BASE, 1, 2)).unwrap();
        staging.apply(&zero(SpaceId(3), BASE, 1)).unwrap();
        assert_eq!(first_byte(&staging, BASE), Some(1));
        assert_eq!(staging.spaces(), [A, SpaceId(2)]);
        staging.retain_spaces(&[SpaceId(2)]);
        assert_eq!(staging.spaces(), [SpaceId(2)]);
        assert_eq!(staging.usage().pages, 1);
    }

    #[test]
    fn a_sealed_space_takes_nothing_and_keeps_its_pages_until_released() {
        let staging = Staging::new(1 << 30);
        staging.apply(&data(A, BASE, 1, 1)).unwrap();
        let windows = staging.seal(A);
        assert_eq!(windows.len(), 1);
        for batch in [data(A, BASE, 1, 2), data(A, BASE + EXTENT_BYTES, 1, 2)] {
            let outcome = staging.apply(&batch);
            assert!(matches!(outcome, Err(StagingError::Sealed(A))));
        }
        assert!(matches!(
            staging.retain(A, &[]),
            Err(StagingError::Sealed(A))
        ));
        drop(windows);
        assert_eq!(first_byte(&staging, BASE), Some(1));
        staging.release(A);
        assert_eq!(staging.usage(), StagingUsage::default());
        let late = staging.apply(&data(A, BASE, 1, 2));
        assert!(matches!(late, Err(StagingError::Sealed(A))));
    }

    #[test]
    fn pages_are_hot_from_when_they_are_marked() {
        let staging = Staging::new(1 << 30);
        staging.apply(&data(A, BASE, 4, 1)).unwrap();
        staging.mark_hot_from_now();
        staging.apply(&data(A, BASE + PAGE, 1, 2)).unwrap();
        let (_, window) = staging.seal(A).remove(0);
        assert_eq!(window.hot().next_run(0, 512), Some(1..2));
        assert_eq!(window.hot().len(), 1);
    }

    #[test]
    fn streams_apply_side_by_side() {
        let staging = Staging::new(1 << 30);
        std::thread::scope(|scope| {
            for stream in 0..4_u8 {
                let staging = &staging;
                scope.spawn(move || {
                    for round in 0..8 {
                        for step in 0..20_u64 {
                            let addr = BASE + u64::from(stream) * EXTENT_BYTES + step * 100 * PAGE;
                            let fill = stream * 8 + round;
                            staging.apply(&data(A, addr, 100, fill)).unwrap();
                        }
                    }
                });
            }
        });
        assert_eq!(staging.usage().pages, 4 * 2000);
        for stream in 0..4 {
            for page in 0..2000 {
                let addr = BASE + stream * EXTENT_BYTES + page * PAGE;
                let expected = stream as u8 * 8 + 7;
                assert_eq!(first_byte(&staging, addr), Some(expected));
            }
        }
    }
}
