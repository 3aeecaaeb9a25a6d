//! What the destination holds of an address space.

use std::collections::BTreeMap;
use std::ops::Range;

use crate::PAGE_BYTES;
use crate::bits::{PageBits, WINDOW_PAGES};

const PAGE: u64 = PAGE_BYTES as u64;
/// Bytes that one page table covers.
pub(crate) const TABLE_BYTES: u64 = WINDOW_PAGES as u64 * PAGE;

/// The pages for which the last record sent is data: exactly those that must be voided if they turn out to be empty.
///
/// 64 bytes for each 2 MiB that hold anything: 256 KiB for 8 GiB.
#[derive(Debug, Default)]
pub(crate) struct HeldPages {
    tables: BTreeMap<u64, PageBits>,
}

impl HeldPages {
    /// The data of these pages has been sent.
    pub(crate) fn hold(&mut self, range: Range<u64>) {
        for (table, pages) in tables(range) {
            self.tables.entry(table).or_default().insert(pages);
        }
    }

    /// The runs of a range that the destination holds, ascending.
    pub(crate) fn runs(&self, range: Range<u64>) -> Vec<Range<u64>> {
        let mut runs: Vec<Range<u64>> = Vec::new();
        if range.is_empty() {
            return runs;
        }
        let last = (range.end - 1) / TABLE_BYTES;
        for (table, bits) in self.tables.range(range.start / TABLE_BYTES..=last) {
            let start = table * TABLE_BYTES;
            let page = |addr: u64| ((addr - start) / PAGE) as usize;
            let mut from = page(range.start.max(start));
            let end = page(range.end.min(start + TABLE_BYTES));
            while let Some(run) = bits
                .next_run(from, WINDOW_PAGES)
                .filter(|run| run.start < end)
            {
                from = run.end.min(end);
                let run = start + run.start as u64 * PAGE..start + from as u64 * PAGE;
                match runs.last_mut() {
                    Some(last) if last.end == run.start => last.end = run.end,
                    _ => runs.push(run),
                }
            }
        }
        runs
    }

    /// These pages are said to be empty: returns the runs that the destination holds until it hears of it.
    pub(crate) fn void(&mut self, range: Range<u64>) -> Vec<Range<u64>> {
        let runs = self.runs(range);
        for run in &runs {
            for (table, pages) in tables(run.clone()) {
                if let Some(bits) = self.tables.get_mut(&table) {
                    bits.remove(pages);
                    if bits.is_empty() {
                        self.tables.remove(&table);
                    }
                }
            }
        }
        runs
    }

    /// The parts of `range` covered by one page table each of which the destination holds anything, ascending.
    pub(crate) fn tables_in(&self, range: &Range<u64>) -> Vec<Range<u64>> {
        if range.is_empty() {
            return Vec::new();
        }
        let last = (range.end - 1) / TABLE_BYTES;
        self.tables
            .range(range.start / TABLE_BYTES..=last)
            .map(|(table, _)| {
                let start = table * TABLE_BYTES;
                start.max(range.start)..(start + TABLE_BYTES).min(range.end)
            })
            .collect()
    }
}

/// The tables that a range of whole pages touches, each with the pages in it.
fn tables(range: Range<u64>) -> impl Iterator<Item = (u64, Range<usize>)> {
    crate::ranges::pieces(range, TABLE_BYTES).map(|piece| {
        let table = piece.start / TABLE_BYTES;
        let page = |addr: u64| ((addr - table * TABLE_BYTES) / PAGE) as usize;
        (table, page(piece.start)..page(piece.end))
    })
}

#[cfg(test)]
#[allow(
    clippy::single_range_in_vec_init,
    reason = "lists of ranges, some of one"
)]
mod tests {
    use super::*;

    const BASE: u64 = 0x7f00_0000_0000;

    fn at(page: u64) -> u64 {
        BASE + page * PAGE
    }

    #[test]
    fn only_what_is_held_is_voided_and_only_once() {
        let mut held = HeldPages::default();
        held.hold(at(500)..at(520));
        held.hold(at(600)..at(601));
        assert_eq!(held.void(at(0)..at(500)), Vec::<Range<u64>>::new());
        assert_eq!(held.runs(at(510)..at(515)), vec![at(510)..at(515)]);
        assert_eq!(held.void(at(510)..at(515)), vec![at(510)..at(515)]);
        assert_eq!(held.runs(at(510)..at(515)), Vec::<Range<u64>>::new());
        assert_eq!(
            held.void(at(0)..at(2000)),
            [at(500)..at(510), at(515)..at(520), at(600)..at(601)]
        );
        assert_eq!(held.void(at(0)..at(2000)), Vec::<Range<u64>>::new());
        assert!(held.tables.is_empty());
    }

    #[test]
    fn a_run_over_a_table_border_is_one_run() {
        let mut held = HeldPages::default();
        held.hold(at(100)..at(1500));
        assert_eq!(held.void(at(200)..at(1400)), vec![at(200)..at(1400)]);
        assert_eq!(
            held.void(at(0)..at(2048)),
            [at(100)..at(200), at(1400)..at(1500)]
        );
    }

    #[test]
    fn tables_are_cut_to_the_range() {
        let mut held = HeldPages::default();
        held.hold(at(3)..at(4));
        held.hold(at(1024)..at(1025));
        assert_eq!(
            held.tables_in(&(at(1)..at(1030))),
            [at(1)..at(512), at(1024)..at(1030)]
        );
        assert_eq!(
            held.tables_in(&(at(512)..at(1024))),
            Vec::<Range<u64>>::new()
        );
    }
}
