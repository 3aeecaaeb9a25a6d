//! Sets of address ranges.

use std::collections::BTreeMap;
use std::ops::Range;

/// A set of addresses, kept as disjoint half-open ranges that do not touch.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct RangeSet {
    /// End by start.
    ranges: BTreeMap<u64, u64>,
}

impl RangeSet {
    /// Adds a range.
    pub(crate) fn insert(&mut self, range: Range<u64>) {
        if range.is_empty() {
            return;
        }
        let (mut start, mut end) = (range.start, range.end);
        // Whatever overlaps or touches becomes part of the new range.
        while let Some((&before, &before_end)) = self.ranges.range(..=end).next_back() {
            if before_end < start {
                break;
            }
            self.ranges.remove(&before);
            start = start.min(before);
            end = end.max(before_end);
        }
        self.ranges.insert(start, end);
    }

    /// Takes a range out.
    pub(crate) fn remove(&mut self, range: Range<u64>) {
        if range.is_empty() {
            return;
        }
        for piece in self.intersection(range) {
            if let Some((&start, &end)) = self.ranges.range(..=piece.start).next_back() {
                self.ranges.remove(&start);
                if start < piece.start {
                    self.ranges.insert(start, piece.start);
                }
                if piece.end < end {
                    self.ranges.insert(piece.end, end);
                }
            }
        }
    }

    /// The parts of a range that are in the set, ascending.
    pub(crate) fn intersection(&self, range: Range<u64>) -> Vec<Range<u64>> {
        let mut parts = Vec::new();
        if range.is_empty() {
            return parts;
        }
        let first = self
            .ranges
            .range(..=range.start)
            .next_back()
            .map_or(range.start, |(s, _)| *s);
        for (&start, &end) in self.ranges.range(first..range.end) {
            let part = start.max(range.start)..end.min(range.end);
            if !part.is_empty() {
                parts.push(part);
            }
        }
        parts
    }

    /// The parts of a range that are not in the set, ascending.
    pub(crate) fn gaps(&self, range: Range<u64>) -> Vec<Range<u64>> {
        let mut gaps = Vec::new();
        let mut behind = range.start;
        for part in self.intersection(range.clone()) {
            if behind < part.start {
                gaps.push(behind..part.start);
            }
            behind = part.end;
        }
        if behind < range.end {
            gaps.push(behind..range.end);
        }
        gaps
    }
}

/// Whether two ranges have an address in common.
pub(crate) fn overlap(one: &Range<u64>, other: &Range<u64>) -> bool {
    one.start < other.end && other.start < one.end
}

/// The pieces of a range between multiples of `step`.
pub(crate) fn pieces(range: Range<u64>, step: u64) -> impl Iterator<Item = Range<u64>> {
    let mut start = range.start;
    std::iter::from_fn(move || {
        if start >= range.end {
            return None;
        }
        let next = (start - start % step).saturating_add(step).min(range.end);
        let piece = start..next;
        start = next;
        Some(piece)
    })
}

#[cfg(test)]
#[allow(
    clippy::single_range_in_vec_init,
    reason = "lists of ranges, some of one"
)]
mod tests {
    use super::*;

    fn set(ranges: &[Range<u64>]) -> RangeSet {
        let mut set = RangeSet::default();
        for range in ranges {
            set.insert(range.clone());
        }
        set
    }

    #[test]
    fn ranges_that_touch_or_overlap_become_one() {
        let joined = set(&[10..20, 30..40, 20..30]);
        assert_eq!(joined.intersection(0..100), vec![10..40]);
        assert_eq!(joined, set(&[10..40]));
        assert_eq!(set(&[10..20, 5..50, 30..40]), set(&[5..50]));
        assert_eq!(set(&[10..10]), RangeSet::default());
    }

    #[test]
    fn parts_and_gaps_of_a_range_make_up_the_range() {
        let set = set(&[10..20, 30..40, 50..60]);
        assert_eq!(set.intersection(15..55), [15..20, 30..40, 50..55]);
        assert_eq!(set.gaps(15..55), [20..30, 40..50]);
        assert_eq!(set.gaps(0..10), vec![0..10]);
        assert_eq!(set.gaps(12..18), Vec::<Range<u64>>::new());
        assert_eq!(set.intersection(20..30), Vec::<Range<u64>>::new());
    }

    #[test]
    fn removing_splits_what_it_hits() {
        let mut ranges = set(&[10..20, 30..40]);
        ranges.remove(15..35);
        assert_eq!(ranges, set(&[10..15, 35..40]));
        ranges.remove(11..12);
        assert_eq!(ranges, set(&[10..11, 12..15, 35..40]));
        ranges.remove(0..100);
        assert_eq!(ranges, RangeSet::default());
    }

    #[test]
    fn a_set_of_ranges_behaves_like_a_set_of_numbers() {
        // All ways to insert and remove short ranges in a small universe, by a fixed pseudo-random walk.
        let mut state = 1_u64;
        let mut next = |limit: u64| {
            state = state
                .wrapping_mul(6_364_136_223_846_793_005)
                .wrapping_add(1_442_695_040_888_963_407);
            (state >> 33) % limit
        };
        let mut model = std::collections::BTreeSet::new();
        let mut ranges = RangeSet::default();
        for _ in 0..2000 {
            let start = next(60);
            let range = start..start + next(8);
            if next(2) == 0 {
                ranges.insert(range.clone());
                model.extend(range);
            } else {
                ranges.remove(range.clone());
                model.retain(|number| !range.contains(number));
            }
            let numbers: Vec<u64> = ranges.intersection(0..100).into_iter().flatten().collect();
            assert_eq!(numbers, model.iter().copied().collect::<Vec<_>>());
        }
    }

    #[test]
    fn pieces_end_at_multiples_of_the_step() {
        let of = |range| pieces(range, 10).collect::<Vec<_>>();
        assert_eq!(of(5..27), [5..10, 10..20, 20..27]);
        assert_eq!(of(10..20), vec![10..20]);
        assert_eq!(of(7..7), Vec::<Range<u64>>::new());
    }
}
