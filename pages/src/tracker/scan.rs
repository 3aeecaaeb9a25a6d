//! Finding the pages that have to be sent.

use std::ops::Range;

use nix::libc;
use sys::pagemap::{Effect, Pagemap, Region, Selection};

use super::emit::Emitter;
use super::held::TABLE_BYTES;
use crate::ranges::pieces;
use crate::{PAGE_BYTES, TrackError};

const PAGE: u64 = PAGE_BYTES as u64;

/// From this many pages on a run of pages reported as written is looked at more closely before it is read, in the final
/// lap. Looking costs as much as reading one to three pages that may all turn out to be empty.
const CLOSER_LOOK_BYTES: u64 = 16 * PAGE;

/// Regions taken from one scan: 1.5 MiB of them. A scan that finds more is continued.
const REGIONS: usize = 1 << 16;

/// Room for what scans find, to be used again and again.
#[derive(Debug)]
pub(crate) struct Room {
    regions: Vec<Region>,
    closer: Vec<Region>,
}

impl Default for Room {
    fn default() -> Self {
        // The second is filled from one extent at most, which in the worst case takes a few scans more.
        Self { regions: Vec::with_capacity(REGIONS), closer: Vec::with_capacity(REGIONS / 16) }
    }
}

/// What is looked for, and what happens to it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Sweep {
    /// All content, which is protected: memory new to us.
    Everything,
    /// What was written since it was protected, which is protected again.
    Changes,
    /// All content of a process that is frozen.
    FinalEverything,
    /// What was written since it was protected, of a process that is frozen.
    FinalChanges,
}

impl Sweep {
    fn effect(self) -> Effect {
        match self {
            Self::Everything | Self::Changes => Effect::Protect,
            Self::FinalEverything => Effect::Look,
            Self::FinalChanges => Effect::LookTracked,
        }
    }

    fn wants_changes_only(self) -> bool {
        matches!(self, Self::Changes | Self::FinalChanges)
    }

    /// Whether the process is frozen.
    pub(crate) fn is_final(self) -> bool {
        matches!(self, Self::FinalEverything | Self::FinalChanges)
    }
}

/// Scans one address space.
#[derive(Debug)]
pub(crate) struct Scanner<'a> {
    pub(crate) pid: i32,
    pub(crate) pagemap: &'a Pagemap,
    pub(crate) room: &'a mut Room,
}

/// A mapping in the range is not tracked. Nothing is known about any of the range then.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct NotTracked;

impl Scanner<'_> {
    /// Has everything in a range read that is looked for, and voids what is not there.
    pub(crate) fn sweep(
        &mut self,
        range: &Range<u64>,
        sweep: Sweep,
        emitter: &mut Emitter<'_>,
    ) -> Result<Result<(), NotTracked>, TrackError> {
        if !sweep.wants_changes_only() {
            return self.content(range.clone(), sweep, emitter);
        }
        let mut run: Option<(Range<u64>, bool)> = None;
        for table in pieces(range.clone(), TABLE_BYTES) {
            let present = self.has_table(&table)?;
            match &mut run {
                Some((run, same)) if *same == present => run.end = table.end,
                _ => {
                    if let Some((run, present)) = run.replace((table, present))
                        && let Err(not_tracked) = self.changes(run, present, sweep, emitter)?
                    {
                        return Ok(Err(not_tracked));
                    }
                }
            }
        }
        match run {
            Some((run, present)) => self.changes(run, present, sweep, emitter),
            None => Ok(Ok(())),
        }
    }

    /// Whether there is certainly a page table for a place, or a huge page instead. If not, it is missing or has room.
    fn has_table(&self, table: &Range<u64>) -> Result<bool, TrackError> {
        // The last page: the kernel walks on from the page asked for to the end of the table.
        let addr = table.end - PAGE;
        self.pagemap.has_entry(addr, PAGE).map_err(|source| self.error(addr, source))
    }

    fn changes(
        &mut self,
        range: Range<u64>,
        has_tables: bool,
        sweep: Sweep,
        emitter: &mut Emitter<'_>,
    ) -> Result<Result<(), NotTracked>, TrackError> {
        if has_tables {
            self.written(range, sweep, emitter)
        } else {
            self.content(range, sweep, emitter)
        }
    }

    /// The fast way, for places with page tables: whatever is not protected is read.
    fn written(
        &mut self,
        range: Range<u64>,
        sweep: Sweep,
        emitter: &mut Emitter<'_>,
    ) -> Result<Result<(), NotTracked>, TrackError> {
        let mut from = range.start;
        while from < range.end {
            let Some(stopped) = self.scan(from..range.end, Selection::WRITTEN, sweep)? else {
                return Ok(Err(NotTracked));
            };
            for index in 0..self.room.regions.len() {
                let region = self.room.regions[index].range();
                // A process that runs has just had its empty entries marked, and they look like swap.
                if sweep.is_final() && region.end - region.start >= CLOSER_LOOK_BYTES {
                    self.look_closer(region, emitter)?;
                } else {
                    emitter.read(region)?;
                }
            }
            from = stopped;
        }
        Ok(Ok(()))
    }

    /// The thorough way, which touches neither empty entries nor places without a page table: what has content is read
    /// if it is looked for, everything else is voided.
    fn content(
        &mut self,
        range: Range<u64>,
        sweep: Sweep,
        emitter: &mut Emitter<'_>,
    ) -> Result<Result<(), NotTracked>, TrackError> {
        let mut from = range.start;
        while from < range.end {
            let Some(stopped) = self.scan(from..range.end, Selection::POPULATED, sweep)? else {
                return Ok(Err(NotTracked));
            };
            for region in &self.room.regions {
                emitter.void(from..region.start)?;
                if region.is_written() || !sweep.wants_changes_only() {
                    emitter.read(region.range())?;
                }
                from = region.end;
            }
            emitter.void(from..stopped)?;
            from = stopped;
        }
        Ok(Ok(()))
    }

    /// Tells which pages of a large written region of a frozen process are there at all.
    fn look_closer(
        &mut self,
        region: Range<u64>,
        emitter: &mut Emitter<'_>,
    ) -> Result<(), TrackError> {
        std::mem::swap(&mut self.room.regions, &mut self.room.closer);
        let looked = self.content(region, Sweep::FinalEverything, emitter);
        std::mem::swap(&mut self.room.regions, &mut self.room.closer);
        // A look needs no tracking.
        looked.map(|_tracked| ())
    }

    /// One scan into the room; where it stopped, or `None` where a mapping is not tracked.
    fn scan(
        &mut self,
        range: Range<u64>,
        selection: Selection,
        sweep: Sweep,
    ) -> Result<Option<u64>, TrackError> {
        let start = range.start;
        let effect = sweep.effect();
        match self.pagemap.scan(range, selection, effect, &mut self.room.regions) {
            Ok(stopped) => Ok(Some(stopped)),
            Err(error) if effect != Effect::Look && error.raw_os_error() == Some(libc::EPERM) => {
                Ok(None)
            }
            Err(source) => Err(self.error(start, source)),
        }
    }

    /// Whether a page is a guard page, which has no content and cannot be read.
    pub(crate) fn is_guard(&mut self, page: &Range<u64>) -> bool {
        // Kernels that do not tell refuse the question.
        let regions = &mut self.room.regions;
        self.pagemap
            .scan(page.clone(), Selection::GUARD, Effect::Look, regions)
            .is_ok_and(|_| regions.first().is_some_and(|region| region.range() == *page))
    }

    fn error(&self, addr: u64, source: std::io::Error) -> TrackError {
        TrackError::Scan { pid: self.pid, addr, source }
    }
}
