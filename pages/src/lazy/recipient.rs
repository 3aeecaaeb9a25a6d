//! A recipient: an address space that is being filled.
//!
//! # Why no page comes back that was given up
//!
//! The process runs while its memory is filled, and may unmap, discard or move memory whose content is still with us.
//! Placing a page it has just given up would bring back old bytes where it must read zeros. Two rules exclude that:
//!
//! 1. The kernel announces each such change as an event, and counts it from before it takes effect (under the lock
//!    that placing pages takes as well) until the event was read *and* the thread that caused it has gone on. While
//!    the count is not zero it places nothing: [`Obstacle::Changing`].
//! 2. Choosing a page and placing it happen under the read lock of `outstanding`; reading events and acting upon them
//!    under its write lock, by one thread only. So an event is either acted upon before a page is chosen, and then the
//!    page is not chosen; or it is not read until the page is placed, and then the kernel refuses the page by rule 1,
//!    or the change comes after the page and takes it away like any other.
//!
//! A fault that is read together with events is served after them, with the set as they left it: it was reported
//! before them or after, but it is answered now, and what is right is what belongs to the address now.
//!
//! The write lock is wanted for every fault, so pages are placed in pieces that are short against what a fault costs
//! anyway ([`CHUNK_PAGES`]).

use std::io;
use std::ops::Range;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::atomic::{AtomicI64, AtomicU64, Ordering};
use std::sync::{Arc, RwLock};

use sys::uffd::{Event, Obstacle, Userfaultfd};

use super::outstanding::{Begun, Outstanding, Piece};
use super::report::{Tally, add};
use super::signal::Signal;
use crate::staging::window::{WINDOW_BYTES, Window};
use crate::sync::{read, write};
use crate::{PAGE_BYTES, SpaceId};

/// Pages placed under one lock. `UFFDIO_COPY` is as fast with 256 KiB as with 2 MiB (two threads: 6.5 to 7.5 GB/s), and
/// 60 microseconds is what a fault may then have to wait for besides its own 10 to 60.
const CHUNK_PAGES: usize = 64;

/// Pages around a fault that are placed with it, where they are staged: 16 pages in 61 microseconds instead of one in
/// 44.
const AROUND_PAGES: usize = 16;

/// Where the address space comes from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Origin {
    /// Restored by CRIU. All that is staged for it has to find its place.
    Restored,
    /// Forked by a process that was still being filled. It may lack mappings its parent has (`MADV_DONTFORK`).
    Forked,
}

/// Why filling an address space cannot go on.
#[derive(Debug, thiserror::Error)]
#[error("userfaultfd request at {addr:#x} failed")]
pub(super) struct RequestError {
    pub(super) addr: u64,
    #[source]
    pub(super) source: io::Error,
}

/// How far placing some pages came.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Placed {
    /// All pages that were wanted and are still to be placed are.
    All,
    /// Not now: an event has to be read first, or another thread is placing the page.
    Changing,
    /// Not now: no memory.
    NoMemory,
    /// There is no registered mapping for a page.
    Homeless(u64),
    /// A page is there that we did not place.
    Occupied(u64),
    /// The address space is gone.
    Gone,
}

#[derive(Debug)]
pub(super) struct Recipient {
    pub(super) id: SpaceId,
    pub(super) origin: Origin,
    uffd: Userfaultfd,
    outstanding: RwLock<Outstanding>,
    /// Pages in `outstanding`.
    remaining: AtomicU64,
    /// Address from which the next piece is taken.
    cursor: AtomicI64,
    tally: Arc<Tally>,
    /// Raised when the last page was dealt with.
    filled: Arc<Signal>,
}

impl Recipient {
    pub(super) fn new(
        id: SpaceId,
        origin: Origin,
        uffd: Userfaultfd,
        outstanding: Outstanding,
        tally: Arc<Tally>,
        filled: Arc<Signal>,
    ) -> Self {
        Self {
            id,
            origin,
            uffd,
            remaining: AtomicU64::new(outstanding.pages()),
            outstanding: RwLock::new(outstanding),
            cursor: AtomicI64::new(0),
            tally,
            filled,
        }
    }

    /// Whether nothing is left to be placed.
    pub(super) fn is_filled(&self) -> bool {
        self.remaining.load(Ordering::Acquire) == 0
    }

    pub(super) fn guard(&self) -> io::Result<OwnedFd> {
        self.uffd.try_clone()
    }

    /// Pieces with hot pages, ascending.
    pub(super) fn hot_pieces(&self) -> Vec<Arc<Piece>> {
        let set = read(&self.outstanding);
        set.pieces()
            .filter(|piece| piece.has_hot())
            .cloned()
            .collect()
    }

    /// Claims the next piece: from the last fault or the last piece on, then from the start.
    pub(super) fn claim_next(&self) -> Option<Arc<Piece>> {
        if self.is_filled() {
            return None;
        }
        let set = read(&self.outstanding);
        let cursor = self.cursor.load(Ordering::Relaxed);
        let piece = set.claim_from(cursor).or_else(|| set.claim_from(0))?;
        let behind = piece.base().saturating_add(WINDOW_BYTES as i64);
        self.cursor.store(behind, Ordering::Relaxed);
        Some(Arc::clone(piece))
    }

    /// Has the next piece taken from an address on.
    pub(super) fn look_at(&self, addr: i64) {
        self.cursor.store(addr, Ordering::Relaxed);
    }

    /// Places the next [`CHUNK_PAGES`] pages of a piece at or behind page `from`, in as many runs as it takes; returns
    /// how far it came and where to go on, nowhere if there are no more.
    pub(super) fn place_next(
        &self,
        piece: &Piece,
        window: &Window,
        mut from: usize,
        hot_only: bool,
    ) -> Result<(Placed, Option<usize>), RequestError> {
        let set = read(&self.outstanding);
        let mut left = CHUNK_PAGES;
        let mut outcome = (Placed::All, None);
        while left > 0
            && let Some(run) = piece.begin(from, left, hot_only)
        {
            left -= run.len();
            from = run.end;
            outcome = (self.place(piece, window, run)?, Some(from));
            if outcome.0 != Placed::All {
                break;
            }
        }
        drop(set);
        Ok(outcome)
    }

    /// Places pages of a piece that were begun; those that cannot be placed are put back. Only under a lock of
    /// `outstanding`.
    fn place(
        &self,
        piece: &Piece,
        window: &Window,
        mut pages: Range<usize>,
    ) -> Result<Placed, RequestError> {
        // A run can lie in two mappings that touch, and a request may not: after a refusal it is halved until it fits.
        let mut longest = pages.len();
        while !pages.is_empty() {
            let run = pages.start..pages.end.min(pages.start + longest);
            let addr = piece.addr(run.start);
            let obstacle = match self.uffd.copy(addr, window.content(run.clone())) {
                Ok(bytes) => {
                    let behind = run.start + bytes / PAGE_BYTES;
                    self.land(piece, run.start..behind, &self.tally.copied);
                    pages.start = behind;
                    longest = pages.len();
                    continue;
                }
                Err(Obstacle::Unregistered) if run.len() > 1 => {
                    longest = run.len() / 2;
                    continue;
                }
                // A child has what its parent had.
                Err(Obstacle::Present) if self.origin == Origin::Forked => {
                    pages.start += 1;
                    self.land(piece, run.start..pages.start, &self.tally.present);
                    self.wake(addr)?;
                    continue;
                }
                Err(obstacle) => obstacle,
            };
            piece.put_back(pages);
            return Ok(match obstacle {
                Obstacle::Present => Placed::Occupied(addr),
                Obstacle::Unregistered => Placed::Homeless(addr),
                Obstacle::Changing => Placed::Changing,
                Obstacle::NoMemory => Placed::NoMemory,
                Obstacle::Gone => Placed::Gone,
                Obstacle::Refused(errno) => {
                    let source = errno.into();
                    return Err(RequestError { addr, source });
                }
            });
        }
        Ok(Placed::All)
    }

    /// Answers a fault: with the page and staged neighbours, or with a zero page if nothing is staged for it.
    pub(super) fn serve(&self, addr: u64) -> Result<Placed, RequestError> {
        let addr = addr - addr % PAGE_BYTES as u64;
        let set = read(&self.outstanding);
        let found = set
            .find(addr)
            .and_then(|(piece, page)| Some((piece, page, piece.window()?)));
        let Some((piece, page, window)) = found else {
            return self.zero(addr);
        };
        let block = page - page % AROUND_PAGES;
        let around = block..block + AROUND_PAGES;
        let Begun::Run(run) = piece.begin_around(page, &around) else {
            return Ok(Placed::Changing);
        };
        match self.place(piece, &window, run)? {
            // A neighbour beyond the end of the mapping must not keep the page from its reader.
            Placed::Homeless(other) if other != addr => {
                match piece.begin_around(page, &(page..page + 1)) {
                    Begun::Run(run) => self.place(piece, &window, run),
                    Begun::Flying => Ok(Placed::Changing),
                }
            }
            other => Ok(other),
        }
    }

    fn zero(&self, addr: u64) -> Result<Placed, RequestError> {
        match self.uffd.zeropage(addr..addr + PAGE_BYTES as u64) {
            Ok(_) => {
                add(&self.tally.zero_faults, 1);
                Ok(Placed::All)
            }
            // Placed by somebody else since; or no longer mapped or registered, and then to be tried without us.
            Err(Obstacle::Present | Obstacle::Unregistered) => {
                self.wake(addr)?;
                Ok(Placed::All)
            }
            Err(Obstacle::Changing) => Ok(Placed::Changing),
            Err(Obstacle::NoMemory) => Ok(Placed::NoMemory),
            Err(Obstacle::Gone) => Ok(Placed::Gone),
            Err(Obstacle::Refused(errno)) => Err(RequestError {
                addr,
                source: errno.into(),
            }),
        }
    }

    /// Has whoever waits for a page try again.
    pub(super) fn wake(&self, addr: u64) -> Result<(), RequestError> {
        self.uffd
            .wake(addr..addr + PAGE_BYTES as u64)
            .map_err(|source| RequestError { addr, source })
    }

    /// Reads what was reported and acts upon the events; returns the addresses somebody waits for. To be called by one
    /// thread only.
    ///
    /// Children are announced, with what they miss, before anybody can learn that this space is filled.
    pub(super) fn read_news(
        &self,
        mut announce: impl FnMut(Userfaultfd, Outstanding),
    ) -> Result<Vec<u64>, RequestError> {
        let mut events = Vec::new();
        let mut faults = Vec::new();
        let mut set = write(&self.outstanding);
        self.uffd
            .read_events(&mut events)
            .map_err(|source| RequestError { addr: 0, source })?;
        for event in events {
            match event {
                Event::PageFault { addr, .. } => faults.push(addr),
                Event::Fork(child) => announce(child, set.fork()),
                // N.B. a discarded range stays registered, and faults there are answered with zero pages. Unregistering
                // it would be faster but is not held back while mappings change: another thread may just now have
                // moved a mapping with pages of ours there, which would then read as zeros.
                Event::Unmap(range) | Event::Remove(range) => self.drop_pages(set.remove(&range)),
                Event::Remap { from, to, len } => self.drop_pages(set.shift(from, to, len)),
            }
        }
        Ok(faults)
    }

    /// The address space is gone: nothing is left to be placed.
    pub(super) fn vanish(&self) {
        let dropped = write(&self.outstanding).clear();
        self.drop_pages(dropped);
    }

    /// Gives up a page for which there is no mapping.
    pub(super) fn give_up(&self, addr: u64) {
        let mut set = write(&self.outstanding);
        let dropped = set.remove(&(addr..addr + PAGE_BYTES as u64));
        self.drop_pages(dropped);
    }

    fn land(&self, piece: &Piece, pages: Range<usize>, count: &AtomicU64) {
        let landed = pages.len() as u64;
        piece.land(pages);
        add(count, landed);
        self.deduct(landed);
    }

    fn drop_pages(&self, pages: u64) {
        add(&self.tally.dropped, pages);
        self.deduct(pages);
    }

    fn deduct(&self, pages: u64) {
        let before = self.remaining.fetch_sub(pages, Ordering::AcqRel);
        if pages > 0 && before == pages {
            self.filled.raise();
        }
    }
}

impl AsFd for Recipient {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.uffd.as_fd()
    }
}
