//! How fast laps are. Run with `cargo test --release --test tracker -- --ignored --nocapture bench`; the memory in GiB
//! comes from `STERNA_BENCH_GIB`.

use std::time::{Duration, Instant};

use sterna_pages::{Batch, BatchSink, LapReport, SinkClosed, Tracker};

use crate::model::PAGE;
use crate::obedient::Obedient;
use crate::{NEVER, can_track};

const HERE: u64 = 0x1234_0000_0000 / PAGE;

/// Takes batches and lets them go.
struct Discarded;

impl BatchSink for Discarded {
    fn send(&mut self, _: Batch) -> Result<(), SinkClosed> {
        Ok(())
    }
}

#[test]
#[ignore = "a measurement, not a test"]
fn bench_laps() {
    if !can_track() {
        return;
    }
    let gib: u64 = std::env::var("STERNA_BENCH_GIB").map_or(1, |gib| gib.parse().unwrap());
    let pages = gib << 18;
    let mut process = Obedient::start();
    process.tell(&format!("map {HERE} {pages}"));
    process.tell(&format!("write {HERE} 0 {pages} 7"));
    let processes = [process.process()];
    let mut tracker = Tracker::new();
    let mut lap = |what: &str| {
        let report = tracker.lap(&processes, &mut Discarded, &NEVER).unwrap();
        print(what, &report);
    };
    lap("first");
    lap("nothing written");
    for (percent, stride) in [(1, 100), (10, 10)] {
        process.tell(&format!("scatter {HERE} {pages} {stride}"));
        lap(&format!("{percent} % written"));
    }
    process.tell(&format!("write {HERE} 0 {pages} 8"));
    lap("all written");
    process.tell(&format!("discard {HERE} 0 {}", pages / 4));
    lap("a quarter dropped");
    process.tell(&format!("write {HERE} 0 {pages} 8"));
    lap("all written");
    let begin = Instant::now();
    tracker.prepare_smaps();
    println!("prepare_smaps {:?}", begin.elapsed());
    for change in [
        "read 0 0".to_owned(),
        format!("scatter {HERE} {pages} 1000"),
        format!("discard {HERE} 0 {}", pages / 4),
    ] {
        if !change.starts_with("read") {
            process.tell(&change);
        }
        process.freeze();
        let begin = Instant::now();
        let claims = tracker.claim(&processes).unwrap();
        let claimed = begin.elapsed();
        let smaps = claims.smaps(process.pid()).is_some();
        let answered = begin.elapsed() - claimed;
        println!("claim {claimed:?}, smaps {smaps} {answered:?}");
        let report = tracker.final_lap(&claims, &mut Discarded).unwrap();
        print(&format!("final after {change}"), &report);
        process.thaw();
    }
    let begin = Instant::now();
    tracker.disarm();
    println!("disarm {:?}", begin.elapsed());
}

#[test]
#[ignore = "a measurement, not a test"]
fn bench_injection() {
    let process = Obedient::start();
    let mut stops: Vec<Duration> = (0..200)
        .filter_map(|_| Some(sys::inject::userfaultfd_of(process.pid()).ok()?.stopped))
        .collect();
    stops.sort_unstable();
    if let (Some(median), Some(longest)) = (stops.get(stops.len() / 2), stops.last()) {
        println!(
            "stopped for {median:?} (median), {longest:?} (longest of {})",
            stops.len()
        );
    }
}

fn print(what: &str, report: &LapReport) {
    let seconds = report.duration.as_secs_f64();
    println!(
        "{what}: {:?}, {} pages, {} zero pages, {:.2} GB/s",
        report.duration,
        report.pages,
        report.zero_pages,
        report.bytes as f64 / seconds / 1e9
    );
}
