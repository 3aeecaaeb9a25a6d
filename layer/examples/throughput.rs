//! How fast a tree is read, placed, and looked through again.
//!
//! ```text
//! cargo run --release -p sterna-layer --example throughput [DIRECTORY [MIB [FILES]]]
//! ```
//!
//! Makes one file of MIB MiB (default 1024) and FILES small ones (default 20000)
//! below DIRECTORY (default: the directory for temporary files), which it removes
//! again.

#![allow(clippy::unwrap_used, reason = "a benchmark may panic")]

use std::fs::{self, File, OpenOptions};
use std::io::Write;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use sterna_layer::{Item, Limits, PassReport, Placer, Scanner};

fn main() {
    let mut arguments = std::env::args().skip(1);
    let base = arguments
        .next()
        .map_or_else(std::env::temp_dir, PathBuf::from);
    let mib: u64 = arguments.next().map_or(1024, |text| text.parse().unwrap());
    let files: u64 = arguments
        .next()
        .map_or(20_000, |text| text.parse().unwrap());
    let source = tempfile::tempdir_in(&base).unwrap();
    let copy = tempfile::tempdir_in(&base).unwrap();
    fill(source.path(), mib, files);

    let mut reader = Scanner::new(source.path()).unwrap();
    show("read", reader.pass(false, &mut |_| Ok(())).unwrap());

    let mut scanner = Scanner::new(source.path()).unwrap();
    let mut placer = Placer::new(copy.path(), Limits::default()).unwrap();
    let mut pass = |strict| {
        let mut place = |item: Item| {
            placer.apply(item).unwrap();
            Ok(())
        };
        let report = scanner.pass(strict, &mut place).unwrap();
        placer.finish().unwrap();
        report
    };
    show("read and placed", pass(false));
    std::thread::sleep(Duration::from_millis(50));
    show("again", pass(false));
    show("unchanged", pass(true));
    let large = OpenOptions::new()
        .append(true)
        .open(source.path().join("large"))
        .unwrap();
    (&large).write_all(&[1; 1 << 20]).unwrap();
    show("large file grown by 1 MiB", pass(true));
}

fn fill(root: &Path, mib: u64, files: u64) {
    let large = File::create(root.join("large")).unwrap();
    let mut block: Vec<u8> = (0..1 << 20)
        .map(|n: u32| (n.wrapping_mul(2_654_435_761) >> 13) as u8)
        .collect();
    for number in 0..mib {
        block[..8].copy_from_slice(&number.to_ne_bytes());
        large.write_all_at(&block, number << 20).unwrap();
    }
    for number in 0..files {
        let dir = root.join(format!("d{}", number / 100));
        if number % 100 == 0 {
            fs::create_dir(&dir).unwrap();
        }
        fs::write(dir.join(number.to_string()), &block[..4096]).unwrap();
    }
}

#[allow(clippy::print_stdout, reason = "that is what it is for")]
fn show(what: &str, report: PassReport) {
    let seconds = report.duration.as_secs_f64();
    let rate = report.bytes as f64 / seconds / 1e6;
    println!(
        "{what:<26} {:7.1} ms  {:6} files  {:8.1} MB  {rate:7.0} MB/s",
        seconds * 1e3,
        report.files,
        report.bytes as f64 / 1e6,
    );
}
