//! One change at a time: what a lap finds, and what the destination holds in the end.

use std::sync::atomic::AtomicBool;

use sterna_pages::{Batch, BatchSink, Claims, LapReport, Process, SinkClosed, TrackError, Tracker};

use crate::model::{Model, PAGE};
use crate::obedient::Obedient;
use crate::{NEVER, can_track};

/// Page numbers of places that nothing else uses, aligned to page tables and to extents.
const HERE: u64 = 0x1234_0000_0000 / PAGE;
const THERE: u64 = 0x2345_0000_0000 / PAGE;
/// Pages of a page table.
const TABLE: u64 = 512;

/// What the program writes at most while it reads a command and answers.
const IDLE_PAGES: u64 = 30;

/// A process that is followed, with what the destination holds of it.
struct Followed {
    process: Obedient,
    tracker: Tracker,
    model: Model,
}

impl Followed {
    /// `None`, with a line about it, where memory cannot be tracked.
    fn start() -> Option<Self> {
        can_track().then(|| Self {
            process: Obedient::start(),
            tracker: Tracker::new(),
            model: Model::default(),
        })
    }

    fn lap(&mut self) -> LapReport {
        let processes = [self.process.process()];
        self.tracker
            .lap(&processes, &mut self.model, &NEVER)
            .unwrap()
    }

    /// Laps until nothing is left to be sent: the program goes on for a moment after it has answered.
    fn settle(&mut self) {
        for _ in 0..50 {
            let report = self.lap();
            assert_eq!(report.untracked_bytes, 0, "{report:?}");
            if report.pages == 0 {
                return;
            }
            std::thread::sleep(std::time::Duration::from_millis(5));
        }
        panic!("an idle process writes");
    }

    /// Freezes, sends the rest, compares, and lets go.
    fn finish(&mut self) -> LapReport {
        self.finish_with(&[])
    }

    fn finish_with(&mut self, others: &[Process]) -> LapReport {
        let mut processes = vec![self.process.process()];
        processes.extend(others);
        self.process.freeze();
        let claims = self.tracker.claim(&processes).unwrap();
        let report = self.tracker.final_lap(&claims, &mut self.model).unwrap();
        verify(&self.model, &claims, &processes);
        self.process.thaw();
        report
    }
}

fn verify(model: &Model, claims: &Claims, processes: &[Process]) {
    for ((space, ranges), process) in claims.spaces().zip(processes) {
        assert_eq!(space, process.space);
        for range in ranges {
            if let Err(difference) = model.verify(process.pid, space.0, range) {
                panic!("{difference}");
            }
        }
    }
}

#[test]
fn only_what_was_written_is_sent_again() {
    let Some(mut followed) = Followed::start() else {
        return;
    };
    followed.process.tell(&format!("map {HERE} 4096"));
    followed.process.tell(&format!("write {HERE} 0 3000 7"));
    let first = followed.lap();
    assert!(first.pages >= 3000, "{first:?}");
    followed.settle();
    followed.process.tell(&format!("read {HERE} 0 4096"));
    // The program itself writes a few pages when it obeys.
    let report = followed.lap();
    assert!(
        report.pages < IDLE_PAGES,
        "reading is not writing: {report:?}"
    );
    followed.process.tell(&format!("write {HERE} 100 10 8"));
    followed.process.tell(&format!("write {HERE} 3500 1 8"));
    let report = followed.lap();
    assert!((11..11 + IDLE_PAGES).contains(&report.pages), "{report:?}");
    followed.process.tell(&format!("write {HERE} 200 5 9"));
    let last = followed.finish();
    assert!((5..5 + IDLE_PAGES).contains(&last.pages), "{last:?}");
}

#[test]
fn a_page_table_that_vanished_is_noticed() {
    let Some(mut followed) = Followed::start() else {
        return;
    };
    followed.process.tell(&format!("map {HERE} {}", 6 * TABLE));
    followed
        .process
        .tell(&format!("write {HERE} 0 {} 7", 6 * TABLE));
    followed.settle();
    // Whole tables, and a part of one.
    followed
        .process
        .tell(&format!("discard {HERE} {TABLE} {}", 2 * TABLE));
    followed
        .process
        .tell(&format!("discard {HERE} {} 100", 4 * TABLE));
    let last = followed.finish();
    assert_eq!(last.zero_pages, 2 * TABLE + 100);
    // And again, with a lap in between, a page back in one of them.
    followed
        .process
        .tell(&format!("write {HERE} {} 1 3", TABLE + 9));
    followed.process.tell(&format!("discard {HERE} 0 10"));
    assert_eq!(followed.lap().zero_pages, 10);
    assert_eq!(followed.finish().zero_pages, 0);
}

#[test]
fn memory_mapped_anew_in_the_same_place_is_not_mistaken_for_the_old() {
    let Some(mut followed) = Followed::start() else {
        return;
    };
    for laps_between in [0, 1, 2] {
        followed.process.tell(&format!("map {HERE} {}", 4 * TABLE));
        followed
            .process
            .tell(&format!("write {HERE} 0 {} 7", 4 * TABLE));
        followed.settle();
        followed.process.tell(&format!("unmap {HERE}"));
        followed.process.tell(&format!("map {HERE} {}", 4 * TABLE));
        followed.process.tell(&format!("write {HERE} 5 1 9"));
        let mut voided = 0;
        for _ in 0..laps_between {
            voided += followed.lap().zero_pages;
        }
        voided += followed.finish().zero_pages;
        assert_eq!(voided, 4 * TABLE - 1);
        followed.process.tell(&format!("unmap {HERE}"));
    }
}

#[test]
fn memory_that_moved_is_followed() {
    let Some(mut followed) = Followed::start() else {
        return;
    };
    followed.process.tell(&format!("map {HERE} {}", 3 * TABLE));
    followed
        .process
        .tell(&format!("write {HERE} 0 {} 7", 3 * TABLE));
    followed.settle();
    followed.process.tell(&format!("move {HERE} {THERE}"));
    followed.finish();
    assert!(followed.lap().pages >= 3 * TABLE, "all of it is new there");
    // A page that was protected when it moved must not look clean for ever.
    followed
        .process
        .tell(&format!("write {THERE} 0 {} 8", 3 * TABLE));
    followed.settle();
    followed
        .process
        .tell(&format!("write {THERE} 0 {} 9", 3 * TABLE));
    followed.process.tell(&format!("move {THERE} {HERE}"));
    followed.lap();
    followed.finish();
}

#[test]
fn a_mapping_that_hardly_anything_was_written_to_costs_hardly_anything() {
    let Some(mut followed) = Followed::start() else {
        return;
    };
    // 64 GiB; markers everywhere would take 128 MiB of page tables.
    followed.process.tell(&format!("map {HERE} {}", 1 << 24));
    for page in [0, 511, 5000, 1 << 20, (1 << 24) - 1] {
        followed.process.tell(&format!("write {HERE} {page} 1 7"));
    }
    followed.settle();
    let begin = std::time::Instant::now();
    assert!(followed.lap().pages < IDLE_PAGES);
    let lap = begin.elapsed();
    let tables = followed.process.status_kib("VmPTE:");
    assert!(tables < 1024, "{tables} KiB of page tables");
    println!("a lap over 64 GiB with five pages took {lap:?}");
    // Having been full makes no difference.
    followed.process.tell(&format!("write {HERE} 0 100000 7"));
    followed.settle();
    followed.process.tell(&format!("discard {HERE} 0 100000"));
    let last = followed.finish();
    assert!(
        last.zero_pages > 99_000 && last.pages < IDLE_PAGES,
        "{last:?}"
    );
}

#[test]
fn a_forked_child_is_followed_on_its_own() {
    let Some(mut followed) = Followed::start() else {
        return;
    };
    followed.process.tell(&format!("map {HERE} {TABLE}"));
    followed.process.tell(&format!("write {HERE} 0 {TABLE} 7"));
    followed.settle();
    let child = followed.process.fork();
    followed.process.tell(&format!("write {HERE} 0 10 8"));
    // Seen only at the end, and then in a lap before.
    let last = followed.finish_with(&[child]);
    assert!(last.pages >= TABLE, "{last:?}");
    let processes = [followed.process.process(), child];
    followed
        .tracker
        .lap(&processes, &mut followed.model, &NEVER)
        .unwrap();
    let report = followed
        .tracker
        .lap(&processes, &mut followed.model, &NEVER)
        .unwrap();
    assert_eq!(report.untracked_bytes, 0);
    assert!(report.pages < IDLE_PAGES, "{report:?}");
    followed.finish_with(&[child]);
}

#[test]
fn another_program_in_the_same_process_has_other_memory() {
    let Some(mut followed) = Followed::start() else {
        return;
    };
    followed.process.tell(&format!("map {HERE} {TABLE}"));
    followed.process.tell(&format!("write {HERE} 0 {TABLE} 7"));
    followed.settle();
    followed.process.tell("exec");
    followed.process.tell(&format!("map {HERE} {}", 2 * TABLE));
    followed.process.tell(&format!("write {HERE} 20 1 9"));
    let report = followed.lap();
    assert_eq!(report.untracked_bytes, 0, "{report:?}");
    followed.settle();
    followed.process.tell(&format!("write {HERE} 21 1 9"));
    followed.finish();
}

#[test]
fn what_somebody_else_tracks_is_sent_whole_in_the_end() {
    let Some(mut first) = Followed::start() else {
        return;
    };
    first.process.tell(&format!("map {HERE} 2000"));
    first.process.tell(&format!("write {HERE} 0 2000 7"));
    first.settle();
    let mut second = Tracker::new();
    let mut model = Model::default();
    let processes = [first.process.process()];
    let report = second.lap(&processes, &mut model, &NEVER).unwrap();
    assert!(report.untracked_bytes >= 2000 * PAGE, "{report:?}");
    first.process.freeze();
    let claims = second.claim(&processes).unwrap();
    let report = second.final_lap(&claims, &mut model).unwrap();
    assert!(report.pages >= 2000);
    verify(&model, &claims, &processes);
    first.process.thaw();
    // And the first did not lose sight of anything.
    first.process.tell(&format!("write {HERE} 3 1 8"));
    first.finish();
}

#[test]
fn without_tracking_everything_is_sent_in_the_end() {
    let mut process = Obedient::start();
    process.tell(&format!("map {HERE} 2000"));
    process.tell(&format!("write {HERE} 0 1000 7"));
    let mut tracker = Tracker::untracked();
    let mut model = Model::default();
    let processes = [process.process()];
    assert_eq!(
        tracker.lap(&processes, &mut model, &NEVER).unwrap().pages,
        0
    );
    process.freeze();
    let claims = tracker.claim(&processes).unwrap();
    match tracker.final_lap(&claims, &mut model) {
        Ok(report) => assert!(report.pages >= 1000 && report.zero_pages == 0, "{report:?}"),
        // PAGEMAP_SCAN is as old as the tracking itself.
        Err(TrackError::Scan { source, .. }) => println!("skipped: {source}"),
        Err(error) => panic!("{error:?}"),
    }
    verify(&model, &claims, &processes);
}

#[test]
fn a_lap_that_was_cancelled_or_failed_loses_nothing() {
    struct Failing(u32);
    impl BatchSink for Failing {
        fn send(&mut self, _: Batch) -> Result<(), SinkClosed> {
            self.0 = self.0.checked_sub(1).ok_or(SinkClosed)?;
            Ok(())
        }
    }
    let Some(mut followed) = Followed::start() else {
        return;
    };
    followed.process.tell(&format!("map {HERE} 40000"));
    followed.process.tell(&format!("write {HERE} 0 40000 7"));
    let processes = [followed.process.process()];
    let cancelled = AtomicBool::new(true);
    let lap = followed
        .tracker
        .lap(&processes, &mut followed.model, &cancelled);
    assert!(matches!(lap, Err(TrackError::Cancelled)), "{lap:?}");
    followed.settle();
    followed.process.tell(&format!("write {HERE} 0 40000 8"));
    followed.finish();
    // Nobody to send to ends the migration; a new one starts from nothing.
    let lap = followed.tracker.lap(&processes, &mut Failing(3), &NEVER);
    assert!(matches!(lap, Err(TrackError::Sink(_))), "{lap:?}");
}

#[test]
fn disarming_leaves_nothing_behind() {
    let Some(mut followed) = Followed::start() else {
        return;
    };
    followed.process.tell(&format!("map {HERE} 40000"));
    followed.process.tell(&format!("write {HERE} 0 40000 7"));
    followed.settle();
    let tracked = || {
        let smaps = std::fs::read_to_string(format!("/proc/{}/smaps", followed.process.pid()));
        smaps.unwrap().matches(" uw").count()
    };
    assert!(tracked() > 0);
    let tracker = std::mem::take(&mut followed.tracker);
    tracker.disarm();
    assert_eq!(tracked(), 0);
}

#[test]
fn smaps_prepared_before_are_right_after_the_heap_grew() {
    let Some(mut followed) = Followed::start() else {
        return;
    };
    followed.process.tell(&format!("map {HERE} 1000"));
    followed.settle();
    followed.tracker.prepare_smaps();
    // Memory for the program itself: its heap grows.
    followed.process.tell(&format!("write {HERE} 0 1000 7"));
    followed.process.freeze();
    let processes = [followed.process.process()];
    let claims = followed.tracker.claim(&processes).unwrap();
    let pid = followed.process.pid();
    let real = std::fs::read_to_string(format!("/proc/{pid}/smaps")).unwrap();
    let given = String::from_utf8(claims.smaps(pid).unwrap()).unwrap();
    assert_eq!(essence(&given), essence(&real));
    // Another mapping, and they are not right any more.
    followed.process.thaw();
    followed.process.tell(&format!("map {THERE} 1000"));
    followed.process.freeze();
    assert_eq!(claims.smaps(pid), None);
    let claims = followed.tracker.claim(&processes).unwrap();
    assert_eq!(claims.smaps(pid), None);
}

/// What CRIU reads in the text.
fn essence(smaps: &str) -> Vec<String> {
    smaps
        .lines()
        .filter(|line| {
            line.starts_with("VmFlags")
                || !line.starts_with(|first: char| first.is_ascii_uppercase())
        })
        .map(|line| line.replace(" uw", "").trim_end().to_owned())
        .collect()
}

#[test]
fn claims_cover_large_private_memory_and_nothing_else() {
    let mut process = Obedient::start();
    process.tell(&format!("map {HERE} 1000"));
    process.tell(&format!("map {THERE} 8"));
    process.freeze();
    let mut tracker = Tracker::untracked();
    let claims = tracker.claim(&[process.process()]).unwrap();
    let pid = process.pid();
    assert!(claims.owns(pid, HERE * PAGE..(HERE + 1000) * PAGE));
    assert!(
        !claims.owns(pid, THERE * PAGE..(THERE + 8) * PAGE),
        "small mappings are CRIU's"
    );
    let maps = std::fs::read_to_string(format!("/proc/{pid}/maps")).unwrap();
    for line in maps.lines() {
        let (range, rest) = line.split_once(' ').unwrap();
        let (start, end) = range.split_once('-').unwrap();
        let start = u64::from_str_radix(start, 16).unwrap();
        let end = u64::from_str_radix(end, 16).unwrap();
        if rest.contains('/') || rest.ends_with("[stack]") || rest.ends_with("[vdso]") {
            assert!(!claims.owns(pid, start..end), "{line}");
        }
    }
}
