//! The other side: a process that does what CRIU's restorer does, and then lives on the memory it is given.

use std::collections::BTreeMap;
use std::io::Write;
use std::ops::Range;
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::exit;
use std::time::Duration;

use nix::sys::wait::{WaitStatus, waitpid};
use sys::fdpass::send_with_fds;
use sys::testing::{Region, fork, not_permitted};
use sys::uffd::{FEATURE_EVENT_FORK, FEATURE_EVENT_UNMAP, FEATURE_EVENTS, Userfaultfd};

use crate::fixture::{HOT, PAGE, PAGES, SKIPPED, SPACE, START, hears_forks, is_staged, word};

/// What a page has to read as.
#[derive(Debug, Clone, Copy, PartialEq)]
enum Expected {
    /// What the page of this number held on the source.
    Origin(u64),
    /// Zeros.
    Zero,
    /// Zeros but for the first word.
    Written(u64),
}

/// The memory of the process and what is expected of every page.
struct Memory {
    regions: BTreeMap<u64, Region>,
    pages: BTreeMap<u64, Expected>,
    random: u64,
    hears_forks: bool,
}

pub(crate) fn run(role: &str, work_dir: &Path) {
    if role == "is deaf" {
        drop(Restorer::connect(
            work_dir,
            FEATURE_EVENTS & !FEATURE_EVENT_UNMAP,
        ));
        return;
    }
    let mut restorer = Restorer::connect(work_dir, FEATURE_EVENTS);
    match role {
        "reads" => restorer.finish().check_all(),
        "reads early" => {
            let memory = restorer.register();
            for page in [0, 100, PAGES - 1, 2000] {
                memory.check(START + page * PAGE);
            }
            restorer.finish().check_all();
        }
        "waits for hot pages" => {
            std::thread::sleep(Duration::from_millis(30));
            let memory = restorer.register();
            HOT.into_iter().for_each(|hot| memory.wait_for(hot));
            if memory.is_resident(0) || memory.is_resident(PAGES / 2) {
                eprintln!("a page is there that was not to be placed yet");
                exit(1);
            }
            restorer.finish().check_all();
        }
        "waits for all" => {
            restorer.register().wait_for(0..PAGES);
            restorer.finish().check_all();
        }
        "has a page already" => {
            restorer.premapped.as_ref().unwrap().write(5000 * PAGE, 1);
            drop(restorer.finish());
            std::thread::sleep(Duration::from_millis(500));
        }
        "dies before it is restored" => restorer.register().check(START),
        "maps in two" => restorer.finish_in_two().check_all(),
        "exits at once" => drop(restorer.finish()),
        "discards" => churn(restorer.finish(), 2000, |memory, _| memory.discard()),
        "discards at the front" => {
            let mut memory = restorer.finish();
            memory.discard_at_the_front();
            churn(memory, 0, |_, _| {});
        }
        "unmaps" => churn(restorer.finish(), 300, |memory, _| memory.unmap()),
        "moves" => churn(restorer.finish(), 300, |memory, _| memory.relocate()),
        "forks" => churn(restorer.finish(), 6, |memory, turn| memory.fork(turn)),
        "does everything" => churn(restorer.finish(), 600, |memory, turn| match turn % 40 {
            0 => memory.fork(turn),
            1..15 => memory.relocate(),
            15..25 => memory.unmap(),
            _ => memory.discard(),
        }),
        "touches slowly" => {
            // The server is killed meanwhile: nothing must ever read as zero.
            let memory = restorer.finish();
            for page in (0..PAGES).rev() {
                memory.check(START + page * PAGE);
                std::thread::sleep(Duration::from_micros(100));
            }
        }
        other => panic!("no such role: {other}"),
    }
}

/// Changes memory many times while it is filled, checking what is left now and then; and once more when the filling
/// must have ended, to see what came late.
fn churn(mut memory: Memory, turns: u64, change: impl Fn(&mut Memory, u64)) {
    for turn in 0..turns {
        change(&mut memory, turn);
        let page = memory.some_page();
        memory.check(page);
    }
    memory.check_all();
    std::thread::sleep(Duration::from_millis(50));
    memory.check_all();
}

struct Restorer {
    connection: UnixStream,
    uffd: Userfaultfd,
    premapped: Option<Region>,
    memory: Option<Memory>,
}

impl Restorer {
    /// Connects, sends the userfaultfd and only then maps what it is for, as CRIU does.
    fn connect(work_dir: &Path, features: u64) -> Self {
        let mut connection = UnixStream::connect(work_dir.join("lazy-pages.socket")).unwrap();
        let uffd = userfaultfd(features);
        connection
            .write_all(&i32::try_from(SPACE.0).unwrap().to_ne_bytes())
            .unwrap();
        send_with_fds(&connection, &[0], &[uffd.as_fd()]).unwrap();
        let premapped = Region::map(None, PAGES * PAGE).unwrap();
        Self {
            connection,
            uffd,
            premapped: Some(premapped),
            memory: None,
        }
    }

    fn register(&mut self) -> &mut Memory {
        if let Some(premapped) = self.premapped.take() {
            let region = premapped.move_to(START).unwrap();
            region.register(&self.uffd).unwrap();
            self.memory = Some(Memory::new(vec![region]));
        }
        self.memory.as_mut().unwrap()
    }

    fn finish(mut self) -> Memory {
        self.register();
        self.resume()
    }

    /// Two mappings that touch, in the middle of a window.
    fn finish_in_two(mut self) -> Memory {
        let region = self.premapped.take().unwrap().move_to(START).unwrap();
        let (front, back) = region.split_at(1003 * PAGE);
        back.set_apart().unwrap();
        front.register(&self.uffd).unwrap();
        back.register(&self.uffd).unwrap();
        self.memory = Some(Memory::new(vec![front, back]));
        self.resume()
    }

    fn resume(mut self) -> Memory {
        self.connection
            .write_all(&0x5253_5446_u32.to_ne_bytes())
            .unwrap();
        self.memory.take().unwrap()
    }
}

/// As CRIU makes it, with the events the kernel lets us have.
fn userfaultfd(features: u64) -> Userfaultfd {
    for user_mode_only in [false, true] {
        for features in [features, features & !FEATURE_EVENT_FORK] {
            let made = Userfaultfd::create(user_mode_only);
            match made.and_then(|uffd| uffd.handshake(features).map(|_| uffd)) {
                Ok(uffd) => return uffd,
                Err(error) if not_permitted(&error) => {}
                Err(error) => panic!("{error}"),
            }
        }
    }
    exit(SKIPPED);
}

impl Memory {
    fn new(regions: Vec<Region>) -> Self {
        let expected = |page| match is_staged(page) {
            true => Expected::Origin(page),
            false => Expected::Zero,
        };
        Self {
            regions: regions
                .into_iter()
                .map(|region| (region.range().start, region))
                .collect(),
            pages: (0..PAGES)
                .map(|page| (START + page * PAGE, expected(page)))
                .collect(),
            random: 88172645463325252,
            hears_forks: hears_forks(),
        }
    }

    fn region_of(&self, addr: u64) -> &Region {
        self.regions.range(..=addr).next_back().unwrap().1
    }

    fn check(&self, addr: u64) {
        let region = self.region_of(addr);
        let offset = addr - region.range().start;
        let expected = self.pages[&addr];
        for index in 0..PAGE / 8 {
            let found = region.read(offset + 8 * index);
            let right = match expected {
                Expected::Origin(page) => word(page, index),
                Expected::Written(value) if index == 0 => value,
                Expected::Written(_) | Expected::Zero => 0,
            };
            if found != right {
                let kind = match found {
                    0 => "zero",
                    _ => "something else",
                };
                eprintln!("{addr:#x} word {index} is {kind} where {expected:?} was expected");
                exit(1);
            }
        }
    }

    fn is_resident(&self, page: u64) -> bool {
        let addr = START + page * PAGE;
        let region = self.region_of(addr);
        region.is_resident(addr - region.range().start).unwrap()
    }

    /// Waits until pages are there without touching them.
    fn wait_for(&self, pages: Range<u64>) {
        for page in pages.filter(|page| is_staged(*page)) {
            while !self.is_resident(page) {
                std::thread::sleep(Duration::from_millis(1));
            }
        }
    }

    /// From both ends, so that not all of it is there already.
    fn check_all(&self) {
        let addrs: Vec<u64> = self.pages.keys().copied().collect();
        let half = addrs.len() / 2;
        for index in 0..=half {
            for addr in [addrs.get(index), addrs.get(addrs.len() - 1 - index)] {
                addr.into_iter().for_each(|addr| self.check(*addr));
            }
        }
    }

    fn random(&mut self, below: u64) -> u64 {
        self.random ^= self.random << 13;
        self.random ^= self.random >> 7;
        self.random ^= self.random << 17;
        self.random % below
    }

    fn some_page(&mut self) -> u64 {
        let index = self.random(self.pages.len() as u64) as usize;
        *self.pages.keys().nth(index).unwrap()
    }

    /// Up to 700 pages in one region.
    fn some_range(&mut self) -> Range<u64> {
        let start = self.some_page();
        let length = match self.random(4) {
            0 => 1 + self.random(700),
            _ => 1 + self.random(20),
        };
        let end = self.region_of(start).range().end;
        start..end.min(start + length * PAGE)
    }

    fn set(&mut self, range: Range<u64>, expected: Expected) {
        for (_, page) in self.pages.range_mut(range) {
            *page = expected;
        }
    }

    /// Takes a range out of the regions, as a region of its own.
    fn cut(&mut self, range: &Range<u64>) -> Region {
        let start = self.region_of(range.start).range().start;
        let mut region = self.regions.remove(&start).unwrap();
        if range.start > start {
            let (front, back) = region.split_at(range.start - start);
            self.regions.insert(start, front);
            region = back;
        }
        if range.end < region.range().end {
            let (front, back) = region.split_at(range.end - range.start);
            self.regions.insert(range.end, back);
            region = front;
        }
        region
    }

    fn discard(&mut self) {
        let range = self.some_range();
        let region = self.region_of(range.start);
        let offset = range.start - region.range().start;
        region.discard(offset, range.end - range.start).unwrap();
        self.set(range.clone(), Expected::Zero);
        self.check(range.start);
        if self.random(2) == 0 {
            let value = self.random(u64::MAX);
            let region = self.region_of(range.start);
            region.write(range.start - region.range().start, value);
            self.set(range.start..range.start + PAGE, Expected::Written(value));
        }
    }

    /// Discards pages that are about to be placed, again and again until all are there. Works where pages are placed
    /// in the order of their addresses.
    fn discard_at_the_front(&mut self) {
        let mut page = 0;
        while page < PAGES {
            let addr = START + page * PAGE;
            let region = self.region_of(addr);
            let offset = addr - region.range().start;
            if self.pages[&addr] == Expected::Zero || region.is_resident(offset).unwrap() {
                page += 1;
                continue;
            }
            let count = (1 + self.random(100)).min(PAGES - page);
            let region = self.region_of(addr);
            region.discard(offset, count * PAGE).unwrap();
            self.set(addr..addr + count * PAGE, Expected::Zero);
            // Some pages further, what was not discarded should be in the middle of its way now.
            page += count + self.random(20);
        }
    }

    /// Something new where something old was.
    fn unmap(&mut self) {
        let range = self.some_range();
        let region = self.cut(&range);
        region.unmap().unwrap();
        let new = Region::map(Some(range.start), range.end - range.start).unwrap();
        self.regions.insert(range.start, new);
        self.set(range.clone(), Expected::Zero);
        self.check(range.start);
    }

    /// To somewhere behind everything else; what was there is no longer mapped.
    fn relocate(&mut self) {
        let range = self.some_range();
        let length = range.end - range.start;
        let last = self.regions.last_key_value().unwrap().1.range().end;
        let to = last + PAGE * (1 + self.random(1000));
        let region = self.cut(&range);
        self.regions.insert(to, region.move_to(to).unwrap());
        for offset in (0..length).step_by(PAGE as usize) {
            let expected = self.pages.remove(&(range.start + offset)).unwrap();
            self.pages.insert(to + offset, expected);
        }
        self.check(to);
    }

    /// A child that looks at everything and gives up some; the parent goes on beside it and looks how it ended later.
    fn fork(&mut self, turn: u64) {
        if !self.hears_forks {
            return;
        }
        self.random ^= turn << 32;
        let child = fork(|| {
            for _ in 0..50 {
                self.discard();
            }
            if turn.is_multiple_of(3) {
                let grandchild = fork(|| {
                    self.check_all();
                    0
                });
                self.check_all();
                let ended = waitpid(grandchild.unwrap(), None).unwrap();
                return i32::from(!matches!(ended, WaitStatus::Exited(_, 0)));
            }
            if turn % 3 == 1 {
                self.check_all();
            }
            0
        });
        let child = child.unwrap();
        for _ in 0..20 {
            self.discard();
        }
        match waitpid(child, None).unwrap() {
            WaitStatus::Exited(_, 0) => {}
            other => panic!("a child ended as {other:?}"),
        }
    }
}
