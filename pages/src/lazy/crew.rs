//! What the threads that fill memory share: the address spaces, the phase, and a way to tell the server.

use std::collections::{BTreeMap, VecDeque};
use std::io;
use std::ops::Bound;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, OnceLock, PoisonError, RwLock};
use std::time::{Duration, Instant};

use nix::sys::epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollFlags};
use sys::uffd::Userfaultfd;

use super::outstanding::{Outstanding, Piece};
use super::recipient::{Origin, Recipient, RequestError};
use super::report::Tally;
use super::signal::Signal;
use super::{FillOptions, LazyError, Prefill};
use crate::SpaceId;
use crate::sync::{lock, read, write};

/// What epoll reports when the crew is to stop; address spaces have lower keys.
pub(super) const STOP_KEY: u64 = u64::MAX;

/// How long nothing may be placed for lack of memory before that is an error. The control group may be at its limit
/// for a moment while the kernel reclaims.
const NO_MEMORY_PATIENCE: Duration = Duration::from_secs(5);

/// To the server.
#[derive(Debug)]
pub(super) enum Message {
    /// A process was forked.
    Forked {
        parent: SpaceId,
        uffd: Userfaultfd,
        outstanding: Outstanding,
    },
    /// Filling cannot go on.
    Failed(LazyError),
}

#[derive(Debug)]
pub(super) struct Crew {
    spaces: RwLock<BTreeMap<u64, Arc<Recipient>>>,
    made: AtomicU64,
    /// Pieces with hot pages, of all spaces.
    hot: Mutex<VecDeque<(Arc<Recipient>, Arc<Piece>)>>,
    prefill: Prefill,
    resumed: OnceLock<Instant>,
    patience: Duration,
    hurry: Arc<AtomicBool>,
    stopped: AtomicBool,
    starved_since: Mutex<Option<Instant>>,
    inbox: Mutex<Vec<Message>>,
    pub(super) tally: Arc<Tally>,
    /// Raised when there is something for the server to look at.
    pub(super) news: Arc<Signal>,
    pub(super) epoll: Epoll,
    stop: Signal,
    idle: Mutex<()>,
    work: Condvar,
}

impl Crew {
    /// `hurry`: somebody says that the tasks run.
    pub(super) fn new(options: FillOptions, hurry: Arc<AtomicBool>) -> io::Result<Self> {
        let epoll = Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC)?;
        let stop = Signal::new()?;
        epoll.add(&stop, EpollEvent::new(EpollFlags::EPOLLIN, STOP_KEY))?;
        Ok(Self {
            spaces: RwLock::default(),
            made: AtomicU64::new(0),
            hot: Mutex::default(),
            prefill: options.prefill,
            resumed: OnceLock::new(),
            patience: options.patience,
            hurry,
            stopped: AtomicBool::new(false),
            starved_since: Mutex::new(None),
            inbox: Mutex::default(),
            tally: Arc::default(),
            news: Arc::new(Signal::new()?),
            epoll,
            stop,
            idle: Mutex::default(),
            work: Condvar::new(),
        })
    }

    /// Has a space filled and its faults served.
    pub(super) fn add(&self, space: Recipient) -> io::Result<()> {
        let space = Arc::new(space);
        if space.origin == Origin::Restored {
            let hot = space.hot_pieces();
            lock(&self.hot).extend(hot.into_iter().map(|piece| (Arc::clone(&space), piece)));
        }
        let key = self.made.fetch_add(1, Ordering::Relaxed);
        write(&self.spaces).insert(key, Arc::clone(&space));
        self.epoll
            .add(&*space, EpollEvent::new(EpollFlags::EPOLLIN, key))?;
        self.work.notify_all();
        Ok(())
    }

    pub(super) fn space(&self, key: u64) -> Option<Arc<Recipient>> {
        read(&self.spaces).get(&key).cloned()
    }

    /// Claims a piece of the next space behind `last` that has one to be filled, around the circle.
    ///
    /// Children come last. Most run another program soon, or end, and then all that was done for them was in vain; and
    /// the sooner a parent is filled, the fewer children need it.
    pub(super) fn claim_next(
        &self,
        last: &mut Option<u64>,
    ) -> Option<(Arc<Recipient>, Arc<Piece>)> {
        let spaces = read(&self.spaces);
        let behind = last.map_or(Bound::Unbounded, Bound::Excluded);
        for origin in [Origin::Restored, Origin::Forked] {
            let circle = spaces.range((behind, Bound::Unbounded)).chain(&*spaces);
            for (key, space) in circle.filter(|(_, space)| space.origin == origin) {
                if let Some(piece) = space.claim_next() {
                    *last = Some(*key);
                    return Some((Arc::clone(space), piece));
                }
            }
        }
        None
    }

    /// Forgets a space whose process is gone. Its userfaultfd is closed when nobody looks at it any more.
    pub(super) fn forget(&self, gone: &Recipient) {
        gone.vanish();
        // Its guards keep it open, and what is still to be read from it must not wake us for ever. Fails when another
        // thread was here first.
        self.epoll.delete(gone).ok();
        write(&self.spaces).retain(|_, space| !std::ptr::eq(&raw const **space, gone));
        lock(&self.hot).retain(|(space, _)| !std::ptr::eq(&raw const **space, gone));
    }

    /// Whether all pages of all spaces are in place, and there is no message about more.
    pub(super) fn is_done(&self) -> bool {
        // In this order: a child is announced before its parent can be filled.
        let filled = read(&self.spaces).values().all(|space| space.is_filled());
        filled && lock(&self.inbox).is_empty()
    }

    /// The next piece with hot pages, if these may be placed now.
    pub(super) fn next_hot(&self) -> Option<(Arc<Recipient>, Arc<Piece>)> {
        if !self.has_resumed() && self.prefill == Prefill::Off {
            return None;
        }
        lock(&self.hot).pop_front()
    }

    /// Puts off a piece with hot pages.
    pub(super) fn hot_again(&self, space: Arc<Recipient>, piece: Arc<Piece>) {
        lock(&self.hot).push_back((space, piece));
    }

    /// Whether pages that are not hot may be placed now.
    pub(super) fn may_fill_all(&self) -> bool {
        let waited = |since: &Instant| {
            self.hurry.load(Ordering::Acquire) || since.elapsed() >= self.patience
        };
        self.prefill == Prefill::All || self.resumed.get().is_some_and(waited)
    }

    /// Tells the threads that the restore has finished.
    pub(super) fn resume(&self) {
        self.resumed.get_or_init(Instant::now);
        self.work.notify_all();
    }

    pub(super) fn has_resumed(&self) -> bool {
        self.resumed.get().is_some()
    }

    /// Tells the threads to end.
    pub(super) fn stop(&self) {
        self.stopped.store(true, Ordering::Release);
        self.stop.raise();
        self.work.notify_all();
    }

    pub(super) fn is_stopped(&self) -> bool {
        self.stopped.load(Ordering::Acquire)
    }

    /// Waits until there may be something to do.
    pub(super) fn wait(&self, at_most: Duration) {
        let idle = lock(&self.idle);
        if !self.is_stopped() {
            drop(
                self.work
                    .wait_timeout(idle, at_most)
                    .unwrap_or_else(PoisonError::into_inner),
            );
        }
    }

    /// Notes that a page was placed, or could not be for lack of memory.
    ///
    /// # Errors
    ///
    /// When that has been so for too long.
    pub(super) fn memory(&self, space: SpaceId, enough: bool) -> Result<(), LazyError> {
        let mut since = lock(&self.starved_since);
        if enough {
            *since = None;
            return Ok(());
        }
        let since = since.get_or_insert_with(Instant::now);
        if since.elapsed() > NO_MEMORY_PATIENCE {
            return Err(LazyError::NoMemory { space });
        }
        Ok(())
    }

    pub(super) fn send(&self, message: Message) {
        lock(&self.inbox).push(message);
        self.news.raise();
    }

    pub(super) fn messages(&self) -> Vec<Message> {
        std::mem::take(&mut *lock(&self.inbox))
    }
}

impl RequestError {
    pub(super) fn of(self, space: SpaceId) -> LazyError {
        LazyError::Place {
            space,
            addr: self.addr,
            source: self.source,
        }
    }
}
