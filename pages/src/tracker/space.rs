//! One address space on the source: what is tracked of it, and what the destination holds.

use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use nix::libc;
use sys::inject::InjectError;
use sys::pagemap::Pagemap;
use sys::uffd::Userfaultfd;

use super::emit::{BufferPool, Emitter, Totals};
use super::held::HeldPages;
use super::scan::{Ended, Room, Scanner, Sweep};
use crate::claims::{self, ProcessClaim};
use crate::maps::{self, Mapping};
use crate::process::{is_gone, read_unless_gone, stack_pages};
use crate::ranges::{RangeSet, pieces};
use crate::smaps::{LockedMemory, Smaps};
use crate::{BatchSink, EXTENT_BYTES, Process, SpaceId, TrackError};

/// How often a process is asked for a userfaultfd, in as many laps, before it is left untracked.
const MAX_INJECTIONS_FAILED: u32 = 3;

/// What a pass over memory needs besides the address space.
pub(crate) struct Pass<'a> {
    pub(crate) sink: &'a mut dyn BatchSink,
    pub(crate) pool: &'a BufferPool,
    pub(crate) totals: &'a mut Totals,
    pub(crate) room: &'a mut Room,
    pub(crate) cancelled: &'a AtomicBool,
}

/// An address space that is followed.
#[derive(Debug)]
pub(crate) struct Space {
    process: Process,
    tracking: Tracking,
    held: HeldPages,
    prepared: Option<Prepared>,
}

/// What the kernel tracks for us. All of it may be out of date: the kernel is asked (`EPERM`) at every scan.
#[derive(Debug, Default)]
struct Tracking {
    userfaultfd: Option<Userfaultfd>,
    injections_failed: u32,
    /// What the userfaultfd was told to track.
    registered: RangeSet,
    /// What was protected since, and all of whose content then has been sent.
    armed: RangeSet,
    /// Whether anything has been armed: from then on memory can arrive by mremap with old protection on it.
    begun: bool,
}

/// `smaps` and what has to be the same for it to be valid.
#[derive(Debug, Clone)]
struct Prepared {
    smaps: Arc<Smaps>,
    locked: LockedMemory,
}

/// A process as it is now.
struct View {
    text: Vec<u8>,
    mappings: Vec<Mapping>,
    locked: LockedMemory,
    pagemap: Pagemap,
}

/// What became of a sweep.
enum Swept {
    /// All of it was looked at; these ranges could not be read.
    Lost(Vec<Range<u64>>),
    /// Not all of it is tracked, and nothing is known about any of it.
    NotTracked,
}

impl Space {
    pub(crate) fn new(process: Process) -> Self {
        Self {
            process,
            tracking: Tracking::default(),
            held: HeldPages::default(),
            prepared: None,
        }
    }

    pub(crate) fn id(&self) -> SpaceId {
        self.process.space
    }

    /// The process that is called so now. What the destination holds under the name stays, whoever it is.
    pub(crate) fn rebind(&mut self, process: Process) {
        debug_assert_eq!(self.process.space, process.space, "the space is the name");
        if self.process.pid != process.pid {
            *self = Self {
                held: std::mem::take(&mut self.held),
                ..Self::new(process)
            };
        }
    }

    /// One pass while the process runs. Returns how many bytes the engine would own and does not track.
    pub(crate) fn lap(&mut self, pass: &mut Pass<'_>) -> Result<u64, TrackError> {
        let Some(view) = View::of(self.process.pid)? else {
            return Ok(0);
        };
        let mut untracked = 0;
        for range in self.ownable(&view)? {
            self.track(&range);
            for chunk in pieces(range, EXTENT_BYTES) {
                if pass.cancelled.load(Ordering::Relaxed) {
                    return Err(TrackError::Cancelled);
                }
                self.lap_over(&view, &chunk, pass)?;
                untracked += self
                    .tracking
                    .armed
                    .gaps(chunk)
                    .into_iter()
                    .map(|gap| gap.end - gap.start)
                    .sum::<u64>();
            }
        }
        Ok(untracked)
    }

    /// One extent's part of one mapping.
    fn lap_over(
        &mut self,
        view: &View,
        chunk: &Range<u64>,
        pass: &mut Pass<'_>,
    ) -> Result<(), TrackError> {
        let tracking = &mut self.tracking;
        let armed = tracking.armed.intersection(chunk.clone());
        let mut fresh = Vec::new();
        for gap in tracking.armed.gaps(chunk.clone()) {
            fresh.extend(tracking.registered.intersection(gap));
        }
        // A scan takes the written bits away, so from here until what it found has been sent nothing is known. An
        // error in between leaves it at that.
        tracking.armed.remove(chunk.clone());
        for part in armed {
            match self.sweep(view, &part, Sweep::Changes, pass)? {
                Swept::Lost(lost) => self.arm(part, &lost),
                Swept::NotTracked => {
                    self.tracking.registered.remove(part.clone());
                    self.track(&part);
                    fresh.extend(self.tracking.registered.intersection(part));
                }
            }
        }
        for part in fresh {
            match self.sweep(view, &part, Sweep::Everything, pass)? {
                Swept::Lost(lost) => self.arm(part, &lost),
                Swept::NotTracked => self.tracking.registered.remove(part),
            }
        }
        Ok(())
    }

    fn arm(&mut self, part: Range<u64>, lost: &[Range<u64>]) {
        self.tracking.begun = true;
        self.tracking.armed.insert(part);
        for range in lost {
            // Its written bits are gone and its content was not sent: next time all of it counts.
            self.tracking.armed.remove(range.clone());
        }
    }

    /// The last pass, over a frozen process.
    ///
    /// Tracking stays as it is, so that laps can go on if the process is let go after all.
    pub(crate) fn final_lap(
        &mut self,
        claim: &ProcessClaim,
        pass: &mut Pass<'_>,
    ) -> Result<(), TrackError> {
        let view = View::of(claim.pid)?.ok_or(TrackError::Ended { pid: claim.pid })?;
        for range in &claim.owned {
            for chunk in pieces(range.clone(), EXTENT_BYTES) {
                let mut unknown = self.tracking.armed.gaps(chunk.clone());
                for part in self.tracking.armed.intersection(chunk) {
                    match self.sweep(&view, &part, Sweep::FinalChanges, pass)? {
                        Swept::Lost(lost) => self.explain(&view, lost, pass)?,
                        Swept::NotTracked => unknown.push(part),
                    }
                }
                for part in unknown {
                    match self.sweep(&view, &part, Sweep::FinalEverything, pass)? {
                        Swept::Lost(lost) => self.explain(&view, lost, pass)?,
                        Swept::NotTracked => unreachable!("a mere look needs no tracking"),
                    }
                }
            }
        }
        Ok(())
    }

    /// Pages of a frozen process that cannot be read must be guard pages, which have no content.
    fn explain(
        &mut self,
        view: &View,
        lost: Vec<Range<u64>>,
        pass: &mut Pass<'_>,
    ) -> Result<(), TrackError> {
        let pid = self.process.pid;
        for page in lost {
            let mut scanner = Scanner {
                pid,
                pagemap: &view.pagemap,
                room: pass.room,
            };
            if !scanner.is_guard(&page) {
                return Err(TrackError::Unreadable {
                    pid,
                    addr: page.start,
                });
            }
            let mut emitter = self.emitter(pass.sink, pass.pool, pass.totals);
            emitter.void(page)?;
            emitter.finish()?;
        }
        Ok(())
    }

    fn sweep(
        &mut self,
        view: &View,
        part: &Range<u64>,
        sweep: Sweep,
        pass: &mut Pass<'_>,
    ) -> Result<Swept, TrackError> {
        let pid = self.process.pid;
        pass.totals.scanned_bytes += part.end - part.start;
        let mut emitter = self.emitter(pass.sink, pass.pool, pass.totals);
        if sweep.is_final() {
            emitter = emitter.patient();
        }
        let mut scanner = Scanner {
            pid,
            pagemap: &view.pagemap,
            room: pass.room,
        };
        match scanner.sweep(part, sweep, &mut emitter) {
            Ok(()) => Ok(Swept::Lost(emitter.finish()?)),
            // What was collected is dropped: all of the part will be sent.
            Err(Ended::NotTracked) => Ok(Swept::NotTracked),
            Err(Ended::Failed(error)) => Err(error),
        }
    }

    /// Has the kernel track a range, as far as it does not already. What it refuses stays untracked.
    fn track(&mut self, range: &Range<u64>) {
        let mut renewed = false;
        'begin: loop {
            for gap in self.tracking.registered.gaps(range.clone()) {
                let Some(userfaultfd) = self.userfaultfd() else {
                    return;
                };
                match userfaultfd.track(gap.clone()) {
                    Ok(()) => self.registered(gap),
                    // After an execve the userfaultfd belongs to an address space that is gone, with all we know.
                    Err(error)
                        if matches!(error.raw_os_error(), Some(libc::ENOMEM | libc::ESRCH))
                            && !renewed =>
                    {
                        let injections_failed = self.tracking.injections_failed;
                        self.tracking = Tracking {
                            injections_failed,
                            ..Tracking::default()
                        };
                        renewed = true;
                        continue 'begin;
                    }
                    // Another userfaultfd's, or it has just changed: next time, or in the final lap.
                    Err(_) => {}
                }
            }
            return;
        }
    }

    fn registered(&mut self, range: Range<u64>) {
        let tracking = &mut self.tracking;
        tracking.armed.remove(range.clone());
        // Kernels before 6.13 left the protection on pages that mremap moved to here and dropped the tracking only; a
        // page that looks protected and is writable would never be reported again. What is lifted is protected anew.
        let lifted = !tracking.begun
            || tracking
                .userfaultfd
                .as_ref()
                .is_some_and(|userfaultfd| userfaultfd.lift_protection(range.clone()).is_ok());
        if lifted {
            tracking.registered.insert(range);
        }
    }

    fn userfaultfd(&mut self) -> Option<&Userfaultfd> {
        let tracking = &mut self.tracking;
        if tracking.userfaultfd.is_none() && tracking.injections_failed < MAX_INJECTIONS_FAILED {
            let pid = self.process.pid;
            match open_userfaultfd(pid) {
                Ok(userfaultfd) => tracking.userfaultfd = Some(userfaultfd),
                Err(ObtainError::Inject(InjectError::Gone { .. })) => {}
                Err(error) => {
                    tracking.injections_failed += 1;
                    tracing::warn!(
                        pid,
                        error = &error as &dyn std::error::Error,
                        "memory of a process is not tracked"
                    );
                }
            }
        }
        tracking.userfaultfd.as_ref()
    }

    /// What the engine would own, reading `smaps` if that depends on flags that are not known.
    fn ownable(&mut self, view: &View) -> Result<Vec<Range<u64>>, TrackError> {
        let known = self
            .prepared
            .as_ref()
            .filter(|prepared| prepared.locked == view.locked);
        let known = known.map(|prepared| &*prepared.smaps);
        if let Ok(owned) = claims::ownable(&view.mappings, view.locked, known) {
            return Ok(owned);
        }
        self.prepare_smaps();
        let known = self.prepared.as_ref().map(|prepared| &*prepared.smaps);
        // Still unknown: the mappings are changing, or the kernel does not tell. Nothing is owned then, this time.
        Ok(claims::ownable(&view.mappings, view.locked, known).unwrap_or_default())
    }

    /// Reads `smaps`; without it, which is no error, CRIU reads it later.
    pub(crate) fn prepare_smaps(&mut self) {
        let pid = self.process.pid;
        self.prepared = None;
        let Ok(Some(before)) = locked_memory(pid) else {
            return;
        };
        let Ok(text) = std::fs::read(format!("/proc/{pid}/smaps")) else {
            return;
        };
        if let Some(smaps) = Smaps::parse(text) {
            self.prepared = Some(Prepared {
                smaps: Arc::new(smaps),
                locked: before,
            });
        }
    }

    /// Decides what the engine owns of a frozen process. `None` if it is gone.
    pub(crate) fn claim(&mut self) -> Result<Option<ProcessClaim>, TrackError> {
        let Process { pid, space } = self.process;
        let Some(view) = View::of(pid)? else {
            return Ok(None);
        };
        let owned = self.ownable(&view)?;
        let mut foreign = Vec::with_capacity(view.mappings.len() - owned.len());
        let mut next = owned.iter().peekable();
        for mapping in &view.mappings {
            if next.next_if(|range| **range == mapping.range).is_none() {
                foreign.push(mapping.range.clone());
            }
        }
        debug_assert!(next.peek().is_none(), "owned ranges are mappings");
        let mut stack_pages = stack_pages(pid).map_err(|source| TrackError::Proc {
            pid,
            file: "task/*/syscall",
            source,
        })?;
        stack_pages.retain(|page| owned.iter().any(|range| range.contains(page)));
        let smaps = self
            .prepared
            .as_ref()
            .filter(|prepared| prepared.locked == view.locked)
            .map(|prepared| Arc::clone(&prepared.smaps));
        Ok(Some(ProcessClaim {
            pid,
            space,
            owned,
            foreign,
            stack_pages,
            maps: view.text,
            smaps,
        }))
    }

    /// Ends the tracking piece by piece. Closing the userfaultfd would do it in one, holding the address space's lock
    /// for 6-22 ms per GiB.
    pub(crate) fn disarm(&mut self) {
        let tracking = std::mem::take(&mut self.tracking);
        let Some(userfaultfd) = tracking.userfaultfd else {
            return;
        };
        for range in tracking.registered.intersection(0..u64::MAX) {
            for piece in pieces(range, EXTENT_BYTES) {
                // What has been unmapped since is not tracked any more either.
                let _unmapped_since = userfaultfd.unregister(piece);
            }
        }
    }

    fn emitter<'a>(
        &'a mut self,
        sink: &'a mut dyn BatchSink,
        pool: &'a BufferPool,
        totals: &'a mut Totals,
    ) -> Emitter<'a> {
        let Process { pid, space } = self.process;
        Emitter::new(pid, space, &mut self.held, sink, pool, totals)
    }
}

impl View {
    /// `None` if the process is gone or a zombie.
    fn of(pid: i32) -> Result<Option<Self>, TrackError> {
        let proc = |file| move |source| TrackError::Proc { pid, file, source };
        let pagemap = match Pagemap::open(pid) {
            Err(error) if is_gone(&error) => return Ok(None),
            other => other.map_err(proc("pagemap"))?,
        };
        let text = match maps::read(pid) {
            Err(error) if is_gone(&error) => return Ok(None),
            other => other.map_err(proc("maps"))?,
        };
        let mappings = maps::parse(&text).map_err(|source| TrackError::Maps { pid, source })?;
        let Some(locked) = locked_memory(pid).map_err(proc("status"))? else {
            return Ok(None);
        };
        if mappings.is_empty() {
            return Ok(None);
        }
        Ok(Some(Self {
            text,
            mappings,
            locked,
            pagemap,
        }))
    }
}

/// `None` if the process is gone or a zombie.
fn locked_memory(pid: i32) -> std::io::Result<Option<LockedMemory>> {
    let status = read_unless_gone(&format!("/proc/{pid}/status"))?;
    Ok(status.and_then(|status| LockedMemory::parse(&status)))
}

#[derive(Debug, thiserror::Error)]
enum ObtainError {
    #[error("cannot obtain a userfaultfd")]
    Inject(#[from] InjectError),
    #[error("the kernel does not track writes")]
    Handshake(#[source] std::io::Error),
}

fn open_userfaultfd(pid: i32) -> Result<Userfaultfd, ObtainError> {
    let injected = sys::inject::userfaultfd_of(pid)?;
    tracing::debug!(pid, stopped = ?injected.stopped, "userfaultfd obtained");
    let userfaultfd = Userfaultfd::from_fd(injected.userfaultfd);
    userfaultfd
        .handshake_tracking()
        .map_err(ObtainError::Handshake)?;
    Ok(userfaultfd)
}
