//! A tree with everything in it arrives, and so does everything that happens to
//! it afterwards.

#![allow(clippy::unwrap_used, reason = "a test may panic")]

mod support;

use std::fs::{self, File, Permissions};
use std::io::{BufRead, BufReader, Write};
use std::os::unix::fs::{FileExt, MetadataExt, PermissionsExt, symlink};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, UNIX_EPOCH};

use rustix::fs::{CWD, FileType, Mode, makedev, mknodat};
use sterna_layer::shared_writable;
use support::{Pair, is_root, name, set_xattr, skipped, told, walk, xattrs};

const MIB: u64 = 1 << 20;

fn noise(length: usize, seed: u64) -> Vec<u8> {
    let mut state = seed | 1;
    let mut next = || {
        state = state
            .wrapping_mul(6364136223846793005)
            .wrapping_add(1442695040888963407);
        (state >> 56) as u8
    };
    (0..length).map(|_| next()).collect()
}

fn set_mode(path: &Path, mode: u32) {
    fs::set_permissions(path, Permissions::from_mode(mode)).unwrap();
}

fn set_time(path: &Path, seconds: u64, nanos: u32) {
    let time = UNIX_EPOCH + Duration::new(seconds, nanos);
    File::open(path).unwrap().set_modified(time).unwrap();
}

/// Lets changes get old, so that a pass does not take them for unfinished.
fn settle() {
    std::thread::sleep(Duration::from_millis(50));
}

#[test]
fn files_directories_and_links_arrive() {
    let mut pair = Pair::new();
    fs::create_dir_all(pair.at("data/deep/deeper")).unwrap();
    fs::write(pair.at("data/small"), b"hello").unwrap();
    fs::write(pair.at("data/empty"), b"").unwrap();
    fs::write(pair.at("data/deep/large"), noise(3 * MIB as usize + 17, 1)).unwrap();
    fs::write(pair.at(name(b"odd \n\xff name")), b"x").unwrap();
    symlink("/etc/passwd", pair.at("absolute")).unwrap();
    symlink("../nowhere/at all", pair.at("data/dangling")).unwrap();
    fs::hard_link(pair.at("data/deep/large"), pair.at("data/another name")).unwrap();
    fs::hard_link(pair.at("data/deep/large"), pair.at("zzz")).unwrap();
    mknodat(CWD, pair.at("pipe"), FileType::Fifo, Mode::from(0o640), 0).unwrap();
    mknodat(
        CWD,
        pair.at("socket"),
        FileType::Socket,
        Mode::from(0o755),
        0,
    )
    .unwrap();
    set_mode(&pair.at("data/small"), 0o4751);
    set_mode(&pair.at("data/deep"), 0o3777);
    set_xattr(&pair.at("data/small"), "user.note", b"a\0b");
    set_xattr(&pair.at("data/deep"), "user.empty", b"");
    set_time(&pair.at("data/small"), 1, 123_456_789);
    set_time(&pair.at("data/deep"), 1_000_000_000, 1);
    settle();
    let (report, _) = pair.pass(false);
    pair.assert_equal();
    // The root, three directories, five files, two symbolic and two hard links, pipe and socket.
    assert_eq!((report.files, report.removed), (14, 0));
    assert_eq!(report.bytes, 3 * MIB + 17 + 5 + 1);
    assert!(
        told(&pair.pass(true).1).iter().all(|told| told == "+."),
        "nothing changed"
    );
}

#[test]
fn what_only_root_can_make_arrives() {
    if !is_root() {
        return skipped("devices, owners and trusted attributes need root");
    }
    let mut pair = Pair::new();
    let node = |path: &str, kind, device| {
        mknodat(CWD, pair.at(path), kind, Mode::from(0o660), device).unwrap();
    };
    node("whiteout", FileType::CharacterDevice, makedev(0, 0));
    node("null", FileType::CharacterDevice, makedev(1, 3));
    node("disk", FileType::BlockDevice, makedev(259, 65537));
    fs::create_dir(pair.at("opaque")).unwrap();
    set_xattr(&pair.at("opaque"), "trusted.overlay.opaque", b"y");
    set_xattr(
        &pair.at("opaque"),
        "trusted.overlay.origin",
        b"a handle of this file system",
    );
    set_xattr(&pair.at("null"), "trusted.on-a-device", b"1");
    symlink("target", pair.at("link")).unwrap();
    set_xattr(&pair.at("link"), "trusted.on-a-link", b"1");
    std::os::unix::fs::lchown(pair.at("link"), Some(33), Some(44)).unwrap();
    fs::write(pair.at("capable"), b"program").unwrap();
    std::os::unix::fs::chown(pair.at("capable"), Some(1000), Some(4_000_000_000)).unwrap();
    set_mode(&pair.at("capable"), 0o6755);
    let capability = [1, 0, 0, 2, 0, 4, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0];
    set_xattr(&pair.at("capable"), "security.capability", &capability);
    // An ACL: owner rw, user 33 r, group r, mask r, others none.
    let acl: Vec<u8> = [
        (1, 6, u32::MAX),
        (2, 4, 33),
        (4, 4, u32::MAX),
        (16, 4, u32::MAX),
        (32, 0, u32::MAX),
    ]
    .iter()
    .fold(vec![2, 0, 0, 0], |mut acl, (tag, bits, id)| {
        acl.extend_from_slice(&[*tag, 0, *bits, 0]);
        acl.extend_from_slice(&id.to_le_bytes());
        acl
    });
    set_xattr(&pair.at("opaque"), "system.posix_acl_default", &acl);
    fs::write(pair.at("opaque/inherits"), b"").unwrap();
    fs::write(pair.at("opaque/inherits not"), b"").unwrap();
    rustix::fs::lremovexattr(pair.at("opaque/inherits not"), "system.posix_acl_access").unwrap();
    set_mode(pair.source.path(), 0o1711);

    settle();
    pair.pass(false);
    assert_eq!(
        xattrs(&pair.copy.path().join("opaque"))[&b"trusted.overlay.opaque"[..]],
        b"y"
    );
    assert!(!xattrs(&pair.copy.path().join("opaque")).contains_key(&b"trusted.overlay.origin"[..]));
    rustix::fs::lremovexattr(pair.at("opaque"), "trusted.overlay.origin").unwrap();
    pair.assert_equal();
}

#[test]
fn files_are_as_sparse_as_they_were() {
    let mut pair = Pair::new();
    let size = (16 << 30) + 5;
    let file = File::create(pair.at("sparse")).unwrap();
    file.set_len(size).unwrap();
    file.write_all_at(b"head", 0).unwrap();
    file.write_all_at(&noise(10_000, 3), 5 * MIB + 100).unwrap();
    file.write_all_at(b"tail", size - 4).unwrap();
    settle();
    let (report, _) = pair.pass(false);
    pair.assert_equal();
    assert!(report.bytes < 64 << 10, "{} bytes sent", report.bytes);
    let blocks = fs::metadata(pair.copy.path().join("sparse"))
        .unwrap()
        .blocks();
    assert!(blocks * 512 < 128 << 10, "{blocks} blocks");

    // The middle becomes a hole, and the file shorter.
    file.set_len(MIB).unwrap();
    file.set_len(8 * MIB).unwrap();
    settle();
    let (report, _) = pair.pass(true);
    pair.assert_equal();
    assert!(report.bytes <= 256 << 10);
}

#[test]
fn only_what_changed_is_sent_again() {
    let mut pair = Pair::new();
    fs::create_dir(pair.at("d")).unwrap();
    for file in ["d/same", "d/grows", "d/touched", "gone"] {
        fs::write(pair.at(file), noise(2 * MIB as usize, 9)).unwrap();
    }
    settle();
    pair.pass(false);
    let mut content = fs::read(pair.at("d/grows")).unwrap();
    content.extend_from_slice(b"and more");
    content[MIB as usize] ^= 1;
    fs::write(pair.at("d/grows"), &content).unwrap();
    set_mode(&pair.at("d/touched"), 0o600);
    fs::remove_file(pair.at("gone")).unwrap();
    settle();
    let (report, items) = pair.pass(false);
    assert_eq!(told(&items), ["+.", "-gone", "~d/grows", "~d/touched"]);
    assert_eq!(
        report.bytes,
        256 * 1024 + 8,
        "the chunk that changed and the new tail"
    );
    pair.assert_equal();
    assert_eq!(told(&pair.pass(true).1), Vec::<String>::new());
}

#[test]
fn removals_replacements_and_renames_arrive() {
    let mut pair = Pair::new();
    fs::create_dir_all(pair.at("tree/a/b")).unwrap();
    fs::write(pair.at("tree/a/b/c"), b"1").unwrap();
    fs::write(pair.at("file becomes dir"), b"1").unwrap();
    fs::create_dir(pair.at("dir becomes link")).unwrap();
    fs::write(pair.at("dir becomes link/inner"), b"1").unwrap();
    fs::write(pair.at("replaced"), b"old content").unwrap();
    fs::write(pair.at("old name"), b"renamed").unwrap();
    symlink("one", pair.at("link")).unwrap();
    settle();
    pair.pass(false);
    fs::remove_dir_all(pair.at("tree/a")).unwrap();
    fs::remove_file(pair.at("file becomes dir")).unwrap();
    fs::create_dir(pair.at("file becomes dir")).unwrap();
    fs::write(pair.at("file becomes dir/inner"), b"2").unwrap();
    fs::remove_dir_all(pair.at("dir becomes link")).unwrap();
    symlink("tree", pair.at("dir becomes link")).unwrap();
    fs::write(pair.at("temporary"), b"new").unwrap();
    fs::rename(pair.at("temporary"), pair.at("replaced")).unwrap();
    fs::rename(pair.at("old name"), pair.at("new name")).unwrap();
    fs::remove_file(pair.at("link")).unwrap();
    symlink("two", pair.at("link")).unwrap();
    settle();
    let (report, items) = pair.pass(true);
    pair.assert_equal();
    let told = told(&items);
    let place = |what: &str| {
        told.iter()
            .position(|told| told == what)
            .unwrap_or_else(|| panic!("{what}"))
    };
    assert!(place("-tree/a/b/c") < place("-tree/a/b"));
    assert!(place("-tree/a/b") < place("-tree/a"));
    assert!(place("-dir becomes link/inner") < place("-dir becomes link"));
    assert!(place("-dir becomes link") < place("+dir becomes link"));
    assert_eq!(report.removed, 9);
}

#[test]
fn sets_of_hard_links_change() {
    let mut pair = Pair::new();
    let both =
        |pair: &Pair, from: &str, to: &str| fs::hard_link(pair.at(from), pair.at(to)).unwrap();
    fs::write(pair.at("b"), b"one").unwrap();
    both(&pair, "b", "c");
    both(&pair, "b", "d");
    fs::write(pair.at("x"), b"two").unwrap();
    both(&pair, "x", "y");
    settle();
    pair.pass(false);
    pair.assert_equal();

    // The first name goes, and another comes before all.
    fs::remove_file(pair.at("b")).unwrap();
    both(&pair, "d", "a");
    // One name leaves its set for the other one, one becomes a file of its own.
    fs::remove_file(pair.at("c")).unwrap();
    both(&pair, "x", "c");
    fs::remove_file(pair.at("y")).unwrap();
    fs::write(pair.at("y"), b"alone").unwrap();
    settle();
    pair.pass(false);
    pair.assert_equal();

    // Content that is written through one name shows under all.
    fs::write(pair.at("d"), b"written through d").unwrap();
    settle();
    let (_, items) = pair.pass(false);
    assert_eq!(told(&items), ["~a"]);
    pair.assert_equal();

    // Names swap.
    fs::rename(pair.at("a"), pair.at("t")).unwrap();
    fs::rename(pair.at("c"), pair.at("a")).unwrap();
    fs::rename(pair.at("t"), pair.at("c")).unwrap();
    settle();
    pair.pass(true);
    pair.assert_equal();
}

#[test]
fn links_to_a_symbolic_link_survive_its_new_owner() {
    if !is_root() {
        return skipped("changing owners needs root");
    }
    let mut pair = Pair::new();
    symlink("target", pair.at("a")).unwrap();
    fs::hard_link(pair.at("a"), pair.at("b")).unwrap();
    settle();
    pair.pass(false);
    pair.assert_equal();
    std::os::unix::fs::lchown(pair.at("b"), Some(7), Some(7)).unwrap();
    settle();
    pair.pass(true);
    pair.assert_equal();
}

#[test]
fn a_change_within_one_tick_of_the_clock_is_not_missed() {
    let mut pair = Pair::new();
    for round in 0..200_u32 {
        fs::write(pair.at("file"), round.to_ne_bytes()).unwrap();
        pair.pass(round % 2 == 0);
        pair.assert_equal();
    }
}

#[test]
fn extended_attributes_follow() {
    let mut pair = Pair::new();
    fs::write(pair.at("file"), b"x").unwrap();
    set_xattr(&pair.at("file"), "user.old", b"1");
    set_xattr(&pair.at("file"), "user.kept", b"1");
    settle();
    pair.pass(false);
    settle();
    rustix::fs::lremovexattr(pair.at("file"), "user.old").unwrap();
    set_xattr(&pair.at("file"), "user.kept", b"2");
    set_xattr(&pair.at("file"), "user.new", &[7; 2000]);
    let (report, _) = pair.pass(true);
    assert_eq!((report.files, report.bytes), (1, 0));
    pair.assert_equal();
}

/// A program with a shared mapping of a file, which stores a byte when told to.
const MAPPER: &str = "
import mmap, sys
with open(sys.argv[1], 'r+b') as file:
    memory = mmap.mmap(file.fileno(), 0)
for line in sys.stdin:
    memory[int(line)] = 88
    print(flush=True)
";

#[test]
fn a_store_through_a_mapping_is_not_missed() {
    // As a container sees it, whose root is the tree.
    a_store_is_not_missed(|pair, _, mapped| {
        let inside = |path: PathBuf| {
            path.strip_prefix(pair.source.path())
                .map(|path| Path::new("/").join(path))
                .unwrap_or(path)
        };
        let inside: Vec<_> = mapped.into_iter().map(inside).collect();
        pair.scanner.suspect(inside);
        pair.scanner
            .suspect(["/not there".into(), "../../etc/passwd".into()]);
    });
}

#[test]
fn a_store_to_a_tree_somewhere_among_a_process_files_is_not_missed() {
    a_store_is_not_missed(|pair, process, mapped| {
        let root = PathBuf::from(format!("/proc/{process}/root"));
        let others = ["/not there".into(), "../../etc/passwd".into()];
        pair.scanner
            .suspect_seen_from(&root, mapped.into_iter().chain(others));
        pair.scanner
            .suspect_seen_from(Path::new("/proc/none/root"), ["/file".into()]);
    });
}

fn a_store_is_not_missed(suspect: impl FnOnce(&mut Pair, u32, Vec<PathBuf>)) {
    let mut pair = Pair::new();
    fs::write(pair.at("mapped"), noise(MIB as usize, 5)).unwrap();
    let mapper = Command::new("python3")
        .args(["-c", MAPPER])
        .arg(pair.at("mapped"))
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn();
    let Ok(mut mapper) = mapper else {
        return skipped("a shared mapping needs python3");
    };
    let mut answers = BufReader::new(mapper.stdout.take().unwrap()).lines();
    let mut store = |offset: u64| {
        writeln!(mapper.stdin.as_ref().unwrap(), "{offset}").unwrap();
        answers.next().unwrap().unwrap();
    };
    store(100); // the page becomes writable
    // Until it has been written back, which may happen between any two stores: then the
    // next one is noticed, and is to be made again.
    let unnoticed = (101..121).any(|offset| {
        settle();
        pair.pass(false);
        settle();
        let times = |pair: &Pair| {
            let meta = fs::metadata(pair.at("mapped")).unwrap();
            (meta.mtime_nsec(), meta.ctime_nsec())
        };
        let before = times(&pair);
        store(offset);
        times(&pair) == before
    });
    assert!(unnoticed, "every store shows in the file's times here");
    let mapped = shared_writable(mapper.id() as i32).unwrap();
    assert!(mapped.contains(&pair.at("mapped")), "{mapped:?}");
    suspect(&mut pair, mapper.id(), mapped);
    let (report, items) = pair.pass(true);
    assert_eq!(
        (told(&items), report.bytes),
        (vec!["~mapped".into()], 256 << 10)
    );
    pair.assert_equal();
    assert_eq!(
        told(&pair.pass(true).1),
        Vec::<String>::new(),
        "read again, and found equal"
    );
    drop(mapper.stdin.take());
    mapper.wait().unwrap();
}

#[test]
fn a_tree_that_changes_all_the_time_ends_up_right() {
    let mut pair = Pair::new();
    let root = pair.source.path().to_owned();
    let stop = std::sync::Arc::new(std::sync::atomic::AtomicBool::new(false));
    let writer = std::thread::spawn({
        let stop = std::sync::Arc::clone(&stop);
        move || {
            let mut round = 0_u64;
            while !stop.load(std::sync::atomic::Ordering::Relaxed) {
                round += 1;
                let at = |name: &str| root.join(format!("{name}{}", round % 7));
                fs::remove_dir_all(at("d")).ok();
                fs::remove_file(at("d")).ok();
                fs::create_dir(at("d")).unwrap();
                fs::write(
                    at("d").join("f"),
                    noise((round % 5) as usize * 100_000, round),
                )
                .unwrap();
                fs::remove_file(at("l")).ok();
                fs::hard_link(at("d").join("f"), at("l")).unwrap();
                if round.is_multiple_of(3) {
                    fs::remove_dir_all(at("d")).unwrap();
                    symlink("..", at("d")).unwrap();
                }
            }
            round
        }
    });
    let until = std::time::Instant::now() + Duration::from_millis(1500);
    let mut passes = 0;
    while std::time::Instant::now() < until {
        pair.pass(false);
        passes += 1;
    }
    stop.store(true, std::sync::atomic::Ordering::Relaxed);
    let rounds = writer.join().unwrap();
    assert!(
        rounds > 10 && passes > 3,
        "{rounds} rounds, {passes} passes"
    );
    pair.pass(true);
    pair.assert_equal();
    assert!(walk(pair.copy.path()).len() > 10);
}
