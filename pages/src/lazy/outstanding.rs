//! What an address space still misses: which page of which window belongs where.
//!
//! A window is staged for one place, but the process may move its mappings while they are being filled, by any number
//! of pages. So the set is made of *pieces*: a window, the address its first page has now, and the pages of it that
//! are still to be placed there. Moving a part of a window splits the piece; a fork copies the pieces and shares the
//! windows.

use std::collections::BTreeMap;
use std::ops::Range;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};

use crate::PAGE_BYTES;
use crate::bits::{PageBits, WINDOW_PAGES};
use crate::staging::window::{WINDOW_BYTES, Window};
use crate::sync::lock;

/// Pages of one window that are to be placed at one distance from where they lie in it.
#[derive(Debug)]
pub(super) struct Piece {
    /// The address of the window's first page, which can be below zero when only later ones are in the piece.
    base: i64,
    hot: PageBits,
    claimed: AtomicBool,
    state: Mutex<State>,
}

/// Every page is in one of the two sets until it is placed, so that there is no moment at which a page with content
/// could be taken for one without; and only one thread at a time tries to place it, so that a page that is there
/// already was not placed by us.
#[derive(Debug)]
struct State {
    /// Pages nobody has begun to place.
    todo: PageBits,
    /// Pages that somebody is placing.
    flying: PageBits,
    /// The content; gone with the last page.
    window: Option<Arc<Window>>,
}

/// What a thread that wants a certain page has to do.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Begun {
    /// Place these.
    Run(Range<usize>),
    /// Nothing but to look again later: another thread is placing it.
    Flying,
}

impl Piece {
    fn new(base: i64, todo: PageBits, hot: PageBits, window: Arc<Window>) -> Self {
        let state = State {
            todo,
            flying: PageBits::default(),
            window: (!todo.is_empty()).then_some(window),
        };
        Self {
            base,
            hot: hot.intersection(&todo),
            claimed: AtomicBool::new(false),
            state: Mutex::new(state),
        }
    }

    /// Where a page of the window belongs.
    pub(super) fn addr(&self, page: usize) -> u64 {
        (self.base + (page * PAGE_BYTES) as i64) as u64
    }

    /// The order of pieces.
    pub(super) fn base(&self) -> i64 {
        self.base
    }

    /// The content, while there is anything to be placed.
    pub(super) fn window(&self) -> Option<Arc<Window>> {
        lock(&self.state).window.clone()
    }

    /// Whether hot pages are still to be placed.
    pub(super) fn has_hot(&self) -> bool {
        let state = lock(&self.state);
        !self.hot.intersection(&state.todo).is_empty()
    }

    /// Begins to place the first run of pages at or behind page `from`.
    pub(super) fn begin(
        &self,
        from: usize,
        longest: usize,
        hot_only: bool,
    ) -> Option<Range<usize>> {
        let mut state = lock(&self.state);
        let wanted = match hot_only {
            true => self.hot.intersection(&state.todo),
            false => state.todo,
        };
        let run = wanted.next_run(from, longest)?;
        state.lift(run.clone());
        Some(run)
    }

    /// Begins to place a page that [`Outstanding::find`] found, with its neighbours in `within`.
    pub(super) fn begin_around(&self, page: usize, within: &Range<usize>) -> Begun {
        let mut state = lock(&self.state);
        if !state.todo.contains(page) {
            return Begun::Flying;
        }
        let run = state.todo.run_around(page, within);
        state.lift(run.clone());
        Begun::Run(run)
    }

    /// Strikes pages off that are being placed.
    pub(super) fn land(&self, pages: Range<usize>) {
        let mut state = lock(&self.state);
        debug_assert_eq!(state.flying.count(&pages), pages.len(), "were begun");
        state.flying.remove(pages);
        state.drop_if_done();
    }

    /// Gives back pages that could not be placed now.
    pub(super) fn put_back(&self, pages: Range<usize>) {
        let mut state = lock(&self.state);
        state.flying.remove(pages.clone());
        state.todo.insert(pages);
    }

    /// Claims the piece for one thread.
    pub(super) fn claim(&self) -> bool {
        !self.claimed.swap(true, Ordering::Relaxed)
    }

    /// Gives a claimed piece back.
    pub(super) fn unclaim(&self) {
        self.claimed.store(false, Ordering::Relaxed);
    }

    fn is_free(&self) -> bool {
        !self.claimed.load(Ordering::Relaxed) && !lock(&self.state).todo.is_empty()
    }

    fn contains(&self, page: usize) -> bool {
        let state = lock(&self.state);
        state.todo.contains(page) || state.flying.contains(page)
    }

    /// Pages that are not placed yet.
    fn len(&self) -> usize {
        let state = lock(&self.state);
        state.todo.len() + state.flying.len()
    }

    /// Takes pages out. Only while nothing is being placed.
    fn take(&self, pages: Range<usize>) -> PageBits {
        let mut state = lock(&self.state);
        debug_assert!(
            state.flying.is_empty(),
            "events have the set for themselves"
        );
        let mut taken = PageBits::default();
        taken.insert(pages.clone());
        let taken = taken.intersection(&state.todo);
        state.todo.remove(pages);
        state.drop_if_done();
        taken
    }

    /// The part of the window that lies in a range of addresses.
    fn pages_in(&self, range: &Range<u64>) -> Range<usize> {
        let offset = |addr: u64| (addr as i64 - self.base).clamp(0, WINDOW_BYTES as i64) as usize;
        offset(range.start) / PAGE_BYTES..offset(range.end).div_ceil(PAGE_BYTES)
    }
}

impl State {
    fn lift(&mut self, pages: Range<usize>) {
        self.todo.remove(pages.clone());
        self.flying.insert(pages);
    }

    fn drop_if_done(&mut self) {
        if self.todo.is_empty() && self.flying.is_empty() {
            self.window = None;
        }
    }
}

/// The pieces of an address space. Two can have the same base, when parts of different windows were moved together.
#[derive(Debug, Default)]
pub(super) struct Outstanding {
    pieces: BTreeMap<(i64, u64), Arc<Piece>>,
    made: u64,
}

impl Outstanding {
    /// Everything in the given windows, each at its address.
    pub(super) fn new(windows: Vec<(u64, Arc<Window>)>) -> Self {
        let mut set = Self::default();
        for (addr, window) in windows {
            let (present, hot) = (window.present(), window.hot());
            set.insert(Piece::new(addr as i64, present, hot, window));
        }
        set
    }

    /// Pages that are still to be placed.
    pub(super) fn pages(&self) -> u64 {
        self.pieces.values().map(|piece| piece.len() as u64).sum()
    }

    /// The pieces, ascending.
    pub(super) fn pieces(&self) -> impl Iterator<Item = &Arc<Piece>> {
        self.pieces.values()
    }

    /// The piece that has content for an address, and which page of its window that is.
    pub(super) fn find(&self, addr: u64) -> Option<(&Arc<Piece>, usize)> {
        self.near(&(addr..addr + 1))
            .map(|piece| (piece, (addr as i64 - piece.base) as usize / PAGE_BYTES))
            .find(|(piece, page)| piece.contains(*page))
    }

    /// Claims the first free piece whose window ends behind `from`, in address order.
    pub(super) fn claim_from(&self, from: i64) -> Option<&Arc<Piece>> {
        let start = from.saturating_sub(WINDOW_BYTES as i64 - 1);
        let mut pieces = self.pieces.range((start, 0)..).map(|(_, piece)| piece);
        pieces.find(|piece| piece.is_free() && piece.claim())
    }

    /// Forgets a range; returns how many pages of it were still to be placed.
    pub(super) fn remove(&mut self, range: &Range<u64>) -> u64 {
        let dropped = self
            .near(range)
            .map(|piece| piece.take(piece.pages_in(range)).len() as u64)
            .sum();
        self.forget_done(range);
        dropped
    }

    /// Moves what is to be placed in `len` bytes at `from` to `to`; returns how many pages `to` had to give up.
    pub(super) fn shift(&mut self, from: u64, to: u64, len: u64) -> u64 {
        // What was mapped at the target is gone, whether we have been told so already or not.
        let dropped = self.remove(&(to..to.saturating_add(len)));
        let range = from..from.saturating_add(len);
        let distance = (to as i64).wrapping_sub(from as i64);
        let mut moved = Vec::new();
        for piece in self.near(&range) {
            let Some(window) = piece.window() else {
                continue;
            };
            let todo = piece.take(piece.pages_in(&range));
            if !todo.is_empty() {
                let base = piece.base.wrapping_add(distance);
                moved.push(Piece::new(base, todo, piece.hot, window));
            }
        }
        self.forget_done(&range);
        for piece in moved {
            self.insert(piece);
        }
        dropped
    }

    /// The same set for a child that misses the same pages.
    pub(super) fn fork(&self) -> Self {
        let mut child = Self::default();
        for piece in self.pieces.values() {
            let state = lock(&piece.state);
            if let Some(window) = state.window.clone() {
                child.insert(Piece::new(piece.base, state.todo, piece.hot, window));
            }
        }
        child
    }

    /// Forgets everything; returns how many pages were still to be placed.
    pub(super) fn clear(&mut self) -> u64 {
        let pieces = std::mem::take(&mut self.pieces);
        pieces
            .values()
            .map(|piece| piece.take(0..WINDOW_PAGES).len() as u64)
            .sum()
    }

    fn insert(&mut self, piece: Piece) {
        self.made += 1;
        self.pieces.insert((piece.base, self.made), Arc::new(piece));
    }

    /// The pieces whose windows reach into a range.
    fn near(&self, range: &Range<u64>) -> impl Iterator<Item = &Arc<Piece>> {
        self.pieces.range(keys_near(range)).map(|(_, piece)| piece)
    }

    fn forget_done(&mut self, range: &Range<u64>) {
        let done: Vec<_> = self
            .pieces
            .range(keys_near(range))
            .filter(|(_, piece)| piece.len() == 0)
            .map(|(key, _)| *key)
            .collect();
        for key in done {
            self.pieces.remove(&key);
        }
    }
}

/// The keys of the pieces whose windows reach into a range.
fn keys_near(range: &Range<u64>) -> Range<(i64, u64)> {
    let first = (range.start as i64).saturating_sub(WINDOW_BYTES as i64 - 1);
    let last = (range.end as i64).max(first);
    (first, 0)..(last, 0)
}

#[cfg(test)]
mod tests {
    use super::*;

    const BASE: u64 = 0x7f00_0000_0000;
    const PAGE: u64 = PAGE_BYTES as u64;
    const WINDOW: u64 = WINDOW_BYTES as u64;

    /// Two full windows; the first byte of each page is its number.
    fn two_windows() -> Outstanding {
        let mut windows = Vec::new();
        for (number, memory) in Window::memory(2).unwrap().into_iter().enumerate() {
            let mut window = Window::new(memory);
            for page in 0..WINDOW_PAGES {
                window.write(page, &[(page % 251) as u8; PAGE_BYTES], number == 1);
            }
            windows.push((BASE + number as u64 * WINDOW, Arc::new(window)));
        }
        Outstanding::new(windows)
    }

    /// The page that would be placed at an address: window page and its content.
    fn at(set: &Outstanding, addr: u64) -> Option<(usize, u8)> {
        let (piece, page) = set.find(addr)?;
        assert_eq!(piece.addr(page), addr - addr % PAGE);
        let content = piece.window().unwrap().content(page..page + 1)[0];
        Some((page, content))
    }

    /// Places the first pages of a piece.
    fn place(piece: &Piece, pages: usize) {
        let begun = piece.begin(0, pages, false).unwrap();
        assert_eq!(begun, 0..pages);
        piece.land(begun);
    }

    #[test]
    fn every_page_is_found_at_its_address() {
        let set = two_windows();
        assert_eq!(set.pages(), 1024);
        assert_eq!(at(&set, BASE + 5 * PAGE + 123), Some((5, 5)));
        assert_eq!(at(&set, BASE + WINDOW + PAGE), Some((1, 1)));
        assert_eq!(at(&set, BASE - PAGE), None);
        assert_eq!(at(&set, BASE + 2 * WINDOW), None);
    }

    #[test]
    fn settled_and_removed_pages_are_not_found_again_and_the_window_goes_with_the_last() {
        let mut set = two_windows();
        let piece = Arc::clone(set.find(BASE).unwrap().0);
        place(&piece, 10);
        assert_eq!(at(&set, BASE + 9 * PAGE), None);
        let removed = set.remove(&(BASE + 10 * PAGE..BASE + WINDOW + 3 * PAGE));
        assert_eq!(removed, 502 + 3);
        assert!(piece.window().is_none());
        assert_eq!(set.pieces().count(), 1);
        assert_eq!(at(&set, BASE + WINDOW + 3 * PAGE), Some((3, 3)));
    }

    #[test]
    fn a_page_that_is_being_placed_is_neither_begun_again_nor_taken_for_missing() {
        let set = two_windows();
        let piece = set.find(BASE).unwrap().0;
        assert_eq!(piece.begin(0, 64, false), Some(0..64));
        assert_eq!(piece.begin(0, 64, false), Some(64..128));
        assert_eq!(at(&set, BASE + 5 * PAGE), Some((5, 5)));
        assert_eq!(piece.begin_around(5, &(0..16)), Begun::Flying);
        assert_eq!(piece.begin_around(130, &(128..144)), Begun::Run(128..144));
        assert_eq!(set.pages(), 1024);
        piece.land(0..60);
        piece.put_back(60..64);
        assert_eq!(at(&set, BASE + 5 * PAGE), None);
        assert_eq!(piece.begin_around(61, &(48..64)), Begun::Run(60..64));
        assert_eq!(set.pages(), 1024 - 60);
    }

    #[test]
    fn a_move_takes_exactly_its_pages_along_whatever_the_distance() {
        let mut set = two_windows();
        // The last 10 pages of the first window and the first 20 of the second.
        let from = BASE + WINDOW - 10 * PAGE;
        let to = 0x1_0000 + 7 * PAGE;
        assert_eq!(set.shift(from, to, 30 * PAGE), 0);
        assert_eq!(set.pages(), 1024);
        assert_eq!(at(&set, from), None);
        assert_eq!(at(&set, from - PAGE), Some((501, 250)));
        assert_eq!(at(&set, to), Some((502, 0)));
        assert_eq!(at(&set, to + 10 * PAGE), Some((0, 0)));
        assert_eq!(at(&set, to + 29 * PAGE), Some((19, 19)));
        assert_eq!(at(&set, to + 30 * PAGE), None);
        // And back, over what is left.
        assert_eq!(set.shift(to, BASE, 30 * PAGE), 30);
        assert_eq!(set.pages(), 1024 - 30);
        assert_eq!(at(&set, BASE + 10 * PAGE), Some((0, 0)));
        assert_eq!(at(&set, BASE + 30 * PAGE), Some((30, 30)));
    }

    #[test]
    fn two_parts_at_the_same_distance_do_not_hide_each_other() {
        let mut set = two_windows();
        let to = BASE + 100 * WINDOW;
        set.shift(BASE + PAGE, to + PAGE, PAGE);
        set.shift(BASE + 3 * PAGE, to + 3 * PAGE, PAGE);
        set.shift(BASE + WINDOW + 2 * PAGE, to + 2 * PAGE, PAGE);
        for page in 1..4 {
            let found = at(&set, to + page * PAGE);
            assert_eq!(found, Some((page as usize, page as u8)));
        }
        assert_eq!(set.remove(&(to..to + WINDOW)), 3);
        assert_eq!(set.pages(), 1021);
    }

    #[test]
    fn a_child_misses_what_the_parent_missed_and_is_filled_on_its_own() {
        let mut set = two_windows();
        place(set.find(BASE).unwrap().0, WINDOW_PAGES);
        let child = set.fork();
        assert_eq!(child.pages(), 512);
        assert_eq!(set.clear(), 512);
        assert_eq!(at(&child, BASE), None);
        assert_eq!(at(&child, BASE + WINDOW), Some((0, 0)));
    }

    #[test]
    fn pieces_are_claimed_once_from_an_address_on() {
        let set = two_windows();
        let inside = (BASE + WINDOW + 5 * PAGE) as i64;
        let second = Arc::clone(set.claim_from(inside).unwrap());
        assert_eq!(second.base(), (BASE + WINDOW) as i64);
        assert!(set.claim_from(inside).is_none());
        assert_eq!(set.claim_from(0).unwrap().base(), BASE as i64);
        assert!(set.claim_from(0).is_none());
        second.unclaim();
        assert!(set.claim_from(0).is_some());
    }

    #[test]
    fn hot_pages_are_those_still_to_be_placed() {
        let set = two_windows();
        let hot = set.find(BASE + WINDOW).unwrap().0;
        place(hot, 500);
        assert!(hot.has_hot());
        assert_eq!(hot.begin(0, 100, true), Some(500..512));
        assert!(!hot.has_hot());
        let cold = set.find(BASE).unwrap().0;
        assert!(!cold.has_hot());
        assert_eq!(cold.begin(0, 100, true), None);
    }
}
