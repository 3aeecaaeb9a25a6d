//! Following the memory of running processes until the destination holds a copy.
//!
//! # What is guaranteed
//!
//! After [`Tracker::final_lap`] has returned, and all batches have been applied in order per extent, every page of every
//! claimed range either has the content that the destination holds for it, or is empty and the destination holds
//! nothing for it. Here is why.
//!
//! **What we know.** For each address space we keep the set of *held* pages: those whose last record sent was data. And
//! we keep the set of *armed* addresses: those of which we claim that every page written since its content was sent
//! will be reported by a scan. Everything outside the armed set is sent in full by whatever pass comes next.
//!
//! **A page enters the armed set** by a scan that protects: in one step per page the kernel says that the page counts
//! (is written, or for memory new to us: is there) and protects it. Only then it is read. A write before the read is
//! either in what was read or reported next time; both may be true. The scan takes its findings away from the next one,
//! so the addresses leave the armed set before the scan and return only after the last batch was handed over, without
//! the pages that could not be read. (A page that is unreadable during a lap may have been made so with `mprotect` and
//! be back in the next, with the content that was never sent and no trace of being written.)
//!
//! **What the kernel no longer tracks** it says: a scan of a mapping that is not registered fails with `EPERM`. A mapping
//! that was unmapped and mapped anew, or moved by `mremap`, or that belongs to another program after `execve`, or to a
//! forked child, is of that kind, whatever we believe. Such a scan may have taken findings away before it failed, so
//! the whole range is treated as new, not only the mapping that failed.
//!
//! **What a scan for written pages reports** is every entry of an existing page table that is not protected. That
//! includes empty entries without a marker: a page dropped by `MADV_DONTNEED` is reported (protection is not kept for
//! private anonymous memory), read as zeros, and voided if held.
//!
//! **A page table that vanished leaves nothing to be reported.** A table goes when everything in it is dropped:
//! `MADV_DONTNEED` over 2 MiB (since `CONFIG_PT_RECLAIM`), over a huge page (which has no table at all), or `munmap` and
//! `mmap` of the same place. What scans say about such a place differs between kernels (see
//! [`sys::pagemap::Selection::WRITTEN`]), and the destination may hold what was sent of it before. So the scan for
//! written pages is used only on places of which something is held and whose last page-table entry is not empty: then
//! there is a table, and what is in it is reported. (If it vanishes in a lap after that look, or comes back with all
//! entries unprotected, the next pass sees it.) Everywhere else a scan for content is used, and whatever is held and not
//! found is voided. In the final lap nothing changes between the look and the scan.
//!
//! **New memory over old.** Memory that is sent in full, because it is new or no longer tracked, goes through the scan
//! for content as well: whatever is held and not there is voided in the same pass. What belongs to no claimed range any
//! more, the destination drops: it is told the claimed ranges.
//!
//! # What is not covered
//!
//! Writes that go around page tables are seen by no tracking: a device that writes into pinned pages (RDMA, or an
//! `O_DIRECT` read that was submitted before a scan and completes after the page was read). The freeze waits for
//! synchronous reads, but a page that was protected in between looks clean. Programs that keep such reads in flight
//! have to be moved with [`Tracker::untracked`].

mod emit;
mod held;
mod scan;
mod space;

use std::collections::BTreeMap;
use std::sync::atomic::AtomicBool;
use std::time::{Duration, Instant};

use crate::claims::Claims;
use crate::{BatchSink, PAGE_BYTES, Process, SpaceId, TrackError};
use emit::{BufferPool, Totals};
use scan::Room;
use space::{Pass, Space};

/// Follows processes and sends their memory, pass by pass.
///
/// Made for one migration to one destination: it remembers what that destination holds.
#[derive(Debug)]
pub struct Tracker {
    tracks: bool,
    spaces: BTreeMap<SpaceId, Space>,
    pool: BufferPool,
    room: Room,
    laps: u32,
}

/// What a lap did.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct LapReport {
    /// Which lap this was; the first is 1. The final lap counts on.
    pub number: u32,
    /// Pages sent with their content.
    pub pages: u64,
    /// Pages sent as being empty.
    pub zero_pages: u64,
    /// Bytes of content sent.
    pub bytes: u64,
    /// How long it took, waiting for the sink included.
    pub duration: Duration,
    /// Bytes of address space looked at.
    pub scanned_bytes: u64,
    /// Bytes of address space, populated or not, that could not be tracked and will be sent in full by the final lap.
    pub untracked_bytes: u64,
}

impl Tracker {
    /// Tracks writes with userfaultfd (Linux 6.7; see [`crate::self_test`]).
    pub fn new() -> Self {
        Self::with_tracking(true)
    }

    /// For kernels that cannot track: the final lap sends everything, laps send nothing.
    pub fn untracked() -> Self {
        Self::with_tracking(false)
    }

    fn with_tracking(tracks: bool) -> Self {
        Self {
            tracks,
            spaces: BTreeMap::new(),
            pool: BufferPool::default(),
            room: Room::default(),
            laps: 0,
        }
    }

    /// One pass over running processes: finds new processes and mappings, arms them, and sends what was written since
    /// the last pass, or for what is new, all there is.
    ///
    /// # Errors
    ///
    /// [`TrackError::Cancelled`] soon after `cancelled` is set; [`TrackError::Sink`]; others where the kernel or a
    /// process is not what we know. After an error the next lap sends what this one did not.
    pub fn lap(
        &mut self,
        processes: &[Process],
        sink: &mut dyn BatchSink,
        cancelled: &AtomicBool,
    ) -> Result<LapReport, TrackError> {
        let begin = Instant::now();
        self.follow(processes)?;
        let mut totals = Totals::default();
        let mut untracked_bytes = 0;
        if self.tracks {
            let mut pass = Pass {
                sink,
                pool: &self.pool,
                totals: &mut totals,
                room: &mut self.room,
                cancelled,
            };
            for process in processes {
                if let Some(space) = self.spaces.get_mut(&process.space) {
                    untracked_bytes += space.lap(&mut pass)?;
                }
            }
        }
        Ok(self.report(begin, totals, untracked_bytes))
    }

    /// Reads `smaps` of every process of the last lap, for [`Claims::smaps`].
    ///
    /// Takes 10-20 ms per GiB of 4 KiB pages and holds up nothing but changes of mappings. Where it fails CRIU will
    /// read the real one.
    pub fn prepare_smaps(&mut self) {
        for space in self.spaces.values_mut() {
            space.prepare_smaps();
        }
    }

    /// Decides what the engine owns of processes that are all frozen, without looking at a page.
    ///
    /// Processes that no lap has seen are claimed as well. Those that ended are left out.
    ///
    /// # Errors
    ///
    /// Those of reading `/proc`, and [`TrackError::DuplicateSpace`].
    pub fn claim(&mut self, processes: &[Process]) -> Result<Claims, TrackError> {
        self.follow(processes)?;
        let mut claims = Vec::with_capacity(processes.len());
        for process in processes {
            if let Some(space) = self.spaces.get_mut(&process.space) {
                claims.extend(space.claim()?);
            }
        }
        Ok(Claims::new(claims))
    }

    /// The last pass, over frozen processes: sends what was written since the last lap, all of what was claimed and
    /// never seen, and which of the pages sent before are empty now.
    ///
    /// Leaves the tracking as it is: after an error or a change of mind the processes can be let go, and the next lap
    /// sends what they write from then on.
    ///
    /// # Errors
    ///
    /// As for [`Tracker::lap`]; and [`TrackError::Unreadable`] and [`TrackError::Ended`], for now everything must be
    /// there.
    pub fn final_lap(
        &mut self,
        claims: &Claims,
        sink: &mut dyn BatchSink,
    ) -> Result<LapReport, TrackError> {
        let begin = Instant::now();
        let mut totals = Totals::default();
        let never = AtomicBool::new(false);
        let mut pass = Pass {
            sink,
            pool: &self.pool,
            totals: &mut totals,
            room: &mut self.room,
            cancelled: &never,
        };
        for claim in claims.processes() {
            // Claims made by another tracker know nothing of what the destination holds.
            let Some(space) = self.spaces.get_mut(&claim.space) else {
                return Err(TrackError::Ended { pid: claim.pid });
            };
            space.final_lap(claim, &mut pass)?;
        }
        Ok(self.report(begin, totals, 0))
    }

    /// Ends the tracking gently: the address spaces are locked for a millisecond at a time.
    ///
    /// Dropping the tracker ends it too, at once.
    pub fn disarm(mut self) {
        for space in self.spaces.values_mut() {
            space.disarm();
        }
    }

    /// Makes the spaces those of the processes. The others are forgotten but for what the destination holds of them:
    /// a process may come to be called so again.
    fn follow(&mut self, processes: &[Process]) -> Result<(), TrackError> {
        let mut present = BTreeMap::new();
        for process in processes {
            if present.insert(process.space, *process).is_some() {
                return Err(TrackError::DuplicateSpace {
                    space: process.space,
                });
            }
        }
        for space in self.spaces.values_mut() {
            if !present.contains_key(&space.id()) {
                space.disarm();
            }
        }
        for (id, process) in present {
            self.spaces
                .entry(id)
                .or_insert_with(|| Space::new(process))
                .rebind(process);
        }
        Ok(())
    }

    fn report(&mut self, begin: Instant, totals: Totals, untracked_bytes: u64) -> LapReport {
        self.laps += 1;
        LapReport {
            number: self.laps,
            pages: totals.data_pages,
            zero_pages: totals.zero_pages,
            bytes: totals.data_pages * PAGE_BYTES as u64,
            duration: begin.elapsed(),
            scanned_bytes: totals.scanned_bytes,
            untracked_bytes,
        }
    }
}

impl Default for Tracker {
    fn default() -> Self {
        Self::new()
    }
}
