//! A window: what is staged of 2 MiB of an address space.

use std::io;
use std::ops::Range;

use sys::mapping::{Advice, Mapping};

use crate::PAGE_BYTES;
use crate::bits::{PageBits, WINDOW_PAGES};

/// Bytes of a window: what one huge page covers on machines with pages of [`PAGE_BYTES`].
pub(crate) const WINDOW_BYTES: usize = WINDOW_PAGES * PAGE_BYTES;

/// From this many pages on a window is backed by one huge page. That is written at 11.7 GB/s instead of 1.9 and given
/// back in 3 ms per GiB instead of 100, but takes 2 MiB at once, so at most twice what the window holds. It is also what
/// one full batch brings, so that dense memory starts with it; collapsing small pages later takes 390 microseconds.
const HUGE_FROM_PAGES: usize = 256;

/// The content of some pages of a window, each at its own place, so that neighbours can be copied in one piece.
#[derive(Debug)]
pub(crate) struct Window {
    memory: Mapping,
    present: PageBits,
    hot: PageBits,
    /// Pages that were written at some time; those that are no longer present still take memory.
    touched: PageBits,
    huge: bool,
}

impl Window {
    /// An empty window in `memory`, [`WINDOW_BYTES`] aligned to themselves, never written.
    pub(crate) fn new(memory: Mapping) -> Self {
        debug_assert_eq!(memory.len(), WINDOW_BYTES, "a window's worth of memory");
        Self {
            memory,
            present: PageBits::default(),
            hot: PageBits::default(),
            touched: PageBits::default(),
            huge: false,
        }
    }

    /// Memory for `count` windows. Small pages until a window says otherwise, or else one page could cost 2 MiB.
    pub(crate) fn memory(count: usize) -> io::Result<Vec<Mapping>> {
        let whole = Mapping::new(count * WINDOW_BYTES, WINDOW_BYTES)?;
        match whole.advise(Advice::SmallPages) {
            // A kernel without huge pages.
            Err(error) if error.kind() == io::ErrorKind::InvalidInput => {}
            other => other?,
        }
        Ok(whole.split(WINDOW_BYTES))
    }

    /// Bytes of memory the window takes once `pages` are written too.
    pub(crate) fn cost_with(&self, pages: &Range<usize>) -> usize {
        let touched = self.touched.len() + pages.len() - self.touched.count(pages);
        if self.huge || touched >= HUGE_FROM_PAGES {
            WINDOW_BYTES
        } else {
            touched * PAGE_BYTES
        }
    }

    /// Bytes of memory the window takes.
    pub(crate) fn cost(&self) -> usize {
        self.cost_with(&(0..0))
    }

    /// Pages it holds.
    pub(crate) fn present(&self) -> PageBits {
        self.present
    }

    /// Those among them that were written since staging was told to mark them.
    pub(crate) fn hot(&self) -> PageBits {
        self.hot.intersection(&self.present)
    }

    /// Writes pages from `first` on; `content` is whole pages and ends inside of the window.
    pub(crate) fn write(&mut self, first: usize, content: &[u8], hot: bool) {
        let pages = first..first + content.len() / PAGE_BYTES;
        if !self.huge && self.cost_with(&pages) == WINDOW_BYTES {
            self.huge = true;
            // Advice: where the kernel cannot follow it the window is made of small pages, slower but as good.
            let huge = self.memory.advise(Advice::HugePages).is_ok();
            if huge && !self.touched.is_empty() {
                self.memory.advise(Advice::Collapse).ok();
            }
        }
        self.memory[first * PAGE_BYTES..][..content.len()].copy_from_slice(content);
        self.present.insert(pages.clone());
        self.touched.insert(pages.clone());
        if hot {
            self.hot.insert(pages);
        }
    }

    /// Forgets pages.
    pub(crate) fn remove(&mut self, pages: Range<usize>) {
        self.present.remove(pages.clone());
        self.hot.remove(pages);
    }

    /// The bytes of `pages`. Those not present read as anything.
    pub(crate) fn content(&self, pages: Range<usize>) -> &[u8] {
        &self.memory[pages.start * PAGE_BYTES..pages.end * PAGE_BYTES]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn window() -> Window {
        Window::new(Window::memory(1).unwrap().remove(0))
    }

    #[test]
    fn a_sparse_window_costs_what_it_holds_and_a_dense_one_all() {
        let mut window = window();
        assert_eq!(window.cost(), 0);
        window.write(500, &[1; PAGE_BYTES], false);
        assert_eq!(window.cost(), PAGE_BYTES);
        window.write(500, &[2; PAGE_BYTES], false);
        assert_eq!(window.cost(), PAGE_BYTES);
        let many = vec![3; HUGE_FROM_PAGES * PAGE_BYTES];
        assert_eq!(window.cost_with(&(0..HUGE_FROM_PAGES - 1)), WINDOW_BYTES);
        window.write(0, &many, false);
        assert_eq!(window.cost(), WINDOW_BYTES);
        assert_eq!(window.content(500..501), [2; PAGE_BYTES]);
        assert_eq!(window.content(0..HUGE_FROM_PAGES), many);
    }

    #[test]
    fn pages_that_are_removed_are_neither_present_nor_hot_until_written_again() {
        let mut window = window();
        window.write(1, &[1; 3 * PAGE_BYTES], true);
        window.remove(2..3);
        assert_eq!(window.present().len(), 2);
        assert_eq!(window.hot(), window.present());
        window.write(2, &[2; PAGE_BYTES], false);
        assert!(window.present().contains(2) && !window.hot().contains(2));
    }
}
