//! What a destination would hold, in the simplest form that can be right.

use std::collections::HashMap;
use std::ops::Range;

use sterna_pages::{Batch, BatchSink, PAGE_BYTES, SinkClosed};
use sys::pagemap::{Effect, Pagemap, Selection};

pub(crate) const PAGE: u64 = PAGE_BYTES as u64;

/// The largest range of which every page is read, there or not.
const READ_WHOLLY_BYTES: u64 = 1 << 30;

/// Page contents by space and address.
#[derive(Default)]
pub(crate) struct Model {
    pages: HashMap<(u32, u64), Vec<u8>>,
}

impl BatchSink for Model {
    fn send(&mut self, batch: Batch) -> Result<(), SinkClosed> {
        batch.validate().unwrap();
        for (record, content) in batch.contents() {
            for page in 0..u64::from(record.pages) {
                let key = (batch.space.0, record.addr + page * PAGE);
                match &content {
                    Some(bytes) => {
                        let start = (page * PAGE) as usize;
                        let content = bytes[start..start + PAGE_BYTES].to_vec();
                        assert!(
                            content.iter().any(|byte| *byte != 0),
                            "zero page sent as data"
                        );
                        self.pages.insert(key, content);
                    }
                    None => {
                        assert!(
                            self.pages.remove(&key).is_some(),
                            "page voided that is not held"
                        );
                    }
                }
            }
        }
        Ok(())
    }
}

impl Model {
    pub(crate) fn pages(&self) -> usize {
        self.pages.len()
    }

    /// Compares a claimed range with the memory of the process, which must not run.
    pub(crate) fn verify(&self, pid: i32, space: u32, range: &Range<u64>) -> Result<(), String> {
        if range.end - range.start <= READ_WHOLLY_BYTES {
            return self.verify_pages(pid, space, range);
        }
        // Too large to be read: what is not there must not be held, what is there is compared.
        let pagemap = Pagemap::open(pid).unwrap();
        let mut regions = Vec::with_capacity(1 << 20);
        let stopped = pagemap.scan(
            range.clone(),
            Selection::POPULATED,
            Effect::Look,
            &mut regions,
        );
        assert_eq!(stopped.unwrap(), range.end);
        for (held_space, page) in self.pages.keys() {
            let there = || regions.iter().any(|region| region.range().contains(page));
            if *held_space == space && range.contains(page) && !there() {
                return Err(format!(
                    "page {page:#x} of {range:x?} is held and not there"
                ));
            }
        }
        regions
            .iter()
            .try_for_each(|region| self.verify_pages(pid, space, &region.range()))
    }

    fn verify_pages(&self, pid: i32, space: u32, range: &Range<u64>) -> Result<(), String> {
        let zeros = vec![0; PAGE_BYTES];
        for page in (range.start..range.end).step_by(PAGE_BYTES) {
            let held = self.pages.get(&(space, page));
            let mut real = Vec::with_capacity(PAGE_BYTES);
            let whole = page..page + PAGE;
            let read = sys::memory::read_appending(pid, std::slice::from_ref(&whole), &mut real);
            match (read, held) {
                (Ok(PAGE_BYTES), held) => {
                    let expected = held.unwrap_or(&zeros);
                    if *expected != real {
                        let first = real.iter().zip(expected).position(|(a, b)| a != b);
                        return Err(format!(
                            "page {page:#x} of {range:x?}: differs at {first:?}, {} on the destination",
                            if held.is_some() { "held" } else { "not held" }
                        ));
                    }
                }
                (_, Some(_)) => return Err(format!("guard page {page:#x} of {range:x?} is held")),
                (_, None) => {}
            }
        }
        Ok(())
    }
}
