//! Measures the destination half of the page engine: how fast pages are staged, how fast a process is filled, and how
//! long the process waits for a page meanwhile.
//!
//! Run: `cargo run --release -p sterna-pages --example fill_rate -- MIB [THREADS] [PAGES_PER_RECORD] [SPACING]`.
//! With the two last arguments memory is staged in records of that many pages, every SPACING pages. With `IDLE` in the
//! environment the process leaves its memory alone for three seconds.

#![allow(
    clippy::unwrap_used,
    clippy::print_stdout,
    reason = "a measuring program, run by hand"
)]

use std::io::Write;
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use bytes::Bytes;
use sterna_pages::{
    BATCH_BYTES, Batch, EXTENT_BYTES, FillOptions, LazyEvent, LazyServer, PAGE_BYTES, Record,
    RecordKind, SpaceId, Staging,
};
use sys::fdpass::send_with_fds;
use sys::testing::Region;
use sys::uffd::{
    FEATURE_EVENT_FORK, FEATURE_EVENT_REMAP, FEATURE_EVENT_REMOVE, FEATURE_EVENT_UNMAP, Userfaultfd,
};

const PAGE: u64 = PAGE_BYTES as u64;
const START: u64 = 0x10_0000_0000;
const SPACE: SpaceId = SpaceId(1);

fn main() {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    if let [role, work_dir, pages] = &arguments[..]
        && role == "--restored"
    {
        return restored(Path::new(work_dir), pages.parse().unwrap());
    }
    let number = |index: usize, default: u64| {
        arguments
            .get(index)
            .map_or(default, |text| text.parse().unwrap())
    };
    let pages = number(0, 1024) * 256;
    let threads = number(1, 2) as usize;
    let run = number(2, 256);
    let spacing = number(3, run);

    let staging = Staging::new(u64::MAX);
    let started = Instant::now();
    stage(&staging, pages, run, spacing);
    let usage = staging.usage();
    rate("staged", usage.pages * PAGE, started.elapsed());
    println!(
        "memory taken: {:.3} of the content, resident {} MiB",
        usage.bytes as f64 / (usage.pages * PAGE) as f64,
        resident_mib()
    );
    let started = Instant::now();
    stage(&staging, pages, run, spacing);
    rate("staged again", usage.pages * PAGE, started.elapsed());

    let work_dir: PathBuf = std::env::temp_dir().join(format!("fill-rate-{}", std::process::id()));
    std::fs::create_dir(&work_dir).unwrap();
    let server = LazyServer::bind(&work_dir).unwrap();
    let mut process = Command::new(std::env::current_exe().unwrap())
        .arg("--restored")
        .arg(&work_dir)
        .arg(pages.to_string())
        .spawn()
        .unwrap();
    let options = FillOptions {
        threads,
        ..FillOptions::default()
    };
    let mut guards = Vec::new();
    let report = server
        .run(&staging, options, &mut |event| match event {
            LazyEvent::Handed { guard, .. } => guards.push(guard),
            LazyEvent::RestoreFinished => {}
            LazyEvent::Filled => guards.clear(),
        })
        .unwrap();
    rate("filled", report.bytes, report.duration);
    println!("{report:?}");
    println!("resident {} MiB", resident_mib());
    process.wait().unwrap();
    std::fs::remove_dir_all(&work_dir).unwrap();
}

fn rate(what: &str, bytes: u64, duration: Duration) {
    let rate = bytes as f64 / duration.as_secs_f64() / 1e9;
    println!("{what} {} MiB in {duration:?}: {rate:.2} GB/s", bytes >> 20);
}

fn stage(staging: &Staging, pages: u64, run: u64, spacing: u64) {
    let payload = Bytes::from(vec![7; BATCH_BYTES]);
    let mut records: Vec<Record> = Vec::new();
    let mut bytes = 0;
    let flush = |records: &mut Vec<Record>, bytes: &mut usize| {
        if !records.is_empty() {
            staging
                .apply(&Batch {
                    space: SPACE,
                    records: std::mem::take(records),
                    payload: payload.slice(..*bytes),
                })
                .unwrap();
        }
        *bytes = 0;
    };
    for page in (0..pages).step_by(spacing as usize) {
        let addr = START + page * PAGE;
        let left = (EXTENT_BYTES - addr % EXTENT_BYTES) / PAGE;
        let count = run.min(left).min(pages - page);
        let more = (count * PAGE) as usize;
        let leaves = records
            .first()
            .is_some_and(|first| first.addr / EXTENT_BYTES != addr / EXTENT_BYTES);
        if leaves || bytes + more > BATCH_BYTES || records.len() == 4096 {
            flush(&mut records, &mut bytes);
        }
        records.push(Record {
            addr,
            pages: count as u32,
            kind: RecordKind::Data,
        });
        bytes += more;
    }
    flush(&mut records, &mut bytes);
}

fn resident_mib() -> u64 {
    let statm = std::fs::read_to_string("/proc/self/statm").unwrap();
    statm.split(' ').nth(1).unwrap().parse::<u64>().unwrap() / 256
}

/// The restored process: reads pages here and there for as long as that takes long.
fn restored(work_dir: &Path, pages: u64) {
    let mut connection = UnixStream::connect(work_dir.join("lazy-pages.socket")).unwrap();
    let uffd = Userfaultfd::create(false).unwrap();
    uffd.handshake(
        FEATURE_EVENT_FORK | FEATURE_EVENT_REMAP | FEATURE_EVENT_REMOVE | FEATURE_EVENT_UNMAP,
    )
    .unwrap();
    connection.write_all(&1_i32.to_ne_bytes()).unwrap();
    send_with_fds(&connection, &[0], &[uffd.as_fd()]).unwrap();
    let region = Region::map(Some(START), pages * PAGE).unwrap();
    region.register(&uffd).unwrap();
    drop(uffd);
    connection
        .write_all(&0x5253_5446_u32.to_ne_bytes())
        .unwrap();
    drop(connection);

    if std::env::var_os("IDLE").is_some() {
        // Sees how fast it goes when nobody is in the way.
        std::thread::sleep(Duration::from_secs(3));
    }
    let mut waits = Vec::new();
    let mut random = 88_172_645_463_325_252_u64;
    let started = Instant::now();
    let mut quiet = 0;
    while quiet < 100_000 && started.elapsed() < Duration::from_secs(20) {
        random ^= random << 13;
        random ^= random >> 7;
        random ^= random << 17;
        let before = Instant::now();
        region.read(random % pages * PAGE);
        let wait = before.elapsed();
        if wait > Duration::from_micros(3) {
            waits.push(wait);
            quiet = 0;
        } else {
            quiet += 1;
        }
    }
    waits.sort_unstable();
    let at = |share: f64| waits[((waits.len() - 1) as f64 * share) as usize];
    if !waits.is_empty() {
        println!(
            "the process waited {} times, median {:?}, 99 % {:?}, most {:?}",
            waits.len(),
            at(0.5),
            at(0.99),
            at(1.0)
        );
    }
}
