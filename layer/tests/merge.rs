//! A tree that comes into a directory which others use leaves alone what is theirs,
//! and nothing at all if it does not come in the end.

#![allow(clippy::unwrap_used, reason = "a test may panic")]

mod support;

use std::fs;
use std::os::unix::fs::{MetadataExt, symlink};
use std::path::Path;
use std::time::{Duration, SystemTime};

use sterna_layer::{Entry, Item, Kind, Limits, Merge, Scanner, Wins};
use support::{apply_all, assert_equal, is_root, set_xattr, walk};
use tempfile::TempDir;

const HIDDEN: &str = ".arriving";

/// What comes, what is there, and the way between.
struct Volume {
    source: TempDir,
    there: TempDir,
    merge: Merge,
    scanner: Scanner,
}

impl Volume {
    fn new() -> Self {
        let (source, there) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        Self {
            merge: Merge::prepare(there.path(), HIDDEN).unwrap(),
            scanner: Scanner::new(source.path()).unwrap(),
            source,
            there,
        }
    }

    fn comes(&self, path: &str, content: &str) {
        write(&self.source.path().join(path), content);
    }

    fn is_there(&self, path: &str, content: &str) {
        write(&self.there.path().join(path), content);
    }

    fn read(&self, path: &str) -> String {
        fs::read_to_string(self.there.path().join(path)).unwrap()
    }

    /// Carries everything over, in two passes, with `change` between them.
    fn carry(&mut self, change: impl FnOnce(&Path)) {
        let mut placer = self.merge.placer(Limits::default()).unwrap();
        let mut pass = |scanner: &mut Scanner| {
            let placed = scanner.pass(false, &mut |item| {
                placer.apply(item).unwrap();
                Ok(())
            });
            placed.unwrap();
            placer.finish().unwrap();
        };
        pass(&mut self.scanner);
        change(self.source.path());
        pass(&mut self.scanner);
    }

    fn lists(&self) -> Vec<String> {
        let names = fs::read_dir(self.there.path()).unwrap();
        let mut names: Vec<_> = names
            .map(|entry| entry.unwrap().file_name().into_string().unwrap())
            .collect();
        names.sort();
        names
    }
}

fn write(path: &Path, content: &str) {
    fs::create_dir_all(path.parent().unwrap()).unwrap();
    fs::write(path, content).unwrap();
}

/// Modified that long ago.
fn aged(path: &Path, age: Duration) {
    let file = fs::File::options().write(true).open(path).unwrap();
    file.set_modified(SystemTime::now() - age).unwrap();
}

#[test]
fn into_an_empty_directory_comes_everything_as_it_was_with_the_roots_own_attributes() {
    let mut volume = Volume::new();
    volume.comes("a/b/file", "content");
    volume.comes("gone/file", "content");
    volume.comes("log", "1\n");
    fs::hard_link(
        volume.source.path().join("log"),
        volume.source.path().join("a/log"),
    )
    .unwrap();
    symlink("a/b", volume.source.path().join("link")).unwrap();
    if is_root() {
        set_xattr(volume.source.path(), "trusted.x", b"y");
        std::os::unix::fs::chown(volume.source.path(), Some(7), Some(8)).unwrap();
        // Not a mark of removal here: this is no overlay.
        let null = rustix::fs::makedev(0, 0);
        let (path, kind) = (
            volume.source.path().join("null"),
            rustix::fs::FileType::CharacterDevice,
        );
        rustix::fs::mknodat(rustix::fs::CWD, &path, kind, 0o600.into(), null).unwrap();
    }
    volume.carry(|source| {
        fs::remove_dir_all(source.join("gone")).unwrap();
        fs::write(source.join("log"), "1\n2\n").unwrap();
    });
    assert_eq!(
        volume.lists(),
        [HIDDEN],
        "nothing shows before all of it is there"
    );
    volume.merge.put_in_place(Wins::Arriving).unwrap();
    assert_equal(volume.source.path(), volume.there.path());
    let names = volume.there.path();
    let inode = |path: &str| fs::metadata(names.join(path)).unwrap().ino();
    assert_eq!(inode("log"), inode("a/log"));
}

#[test]
fn what_comes_wins_and_what_else_is_there_stays() {
    let mut volume = Volume::new();
    volume.is_there("d/theirs", "theirs");
    volume.is_there("d/both", "theirs");
    volume.is_there("file/below", "theirs");
    volume.comes("d/both", "comes");
    volume.comes("d/new", "comes");
    volume.comes("file", "comes");
    volume.carry(|_| ());
    volume.merge.put_in_place(Wins::Arriving).unwrap();
    assert_eq!(volume.read("d/theirs"), "theirs");
    assert_eq!(volume.read("d/both"), "comes");
    assert_eq!(volume.read("d/new"), "comes");
    assert_eq!(volume.read("file"), "comes");
    volume.merge.remove().unwrap();
    assert_eq!(volume.lists(), ["d", "file"]);
}

#[test]
fn what_was_put_in_place_can_be_taken_back() {
    let mut volume = Volume::new();
    volume.is_there("d/theirs", "theirs");
    volume.is_there("d/both", "theirs");
    volume.is_there("file/below", "theirs");
    aged(&volume.there.path().join("d/both"), Duration::from_secs(60));
    let mut before = walk(volume.there.path());
    before.retain(|path, _| !path.starts_with(HIDDEN));
    volume.comes("d/both", "comes");
    volume.comes("d/deep/er/new", "comes");
    volume.comes("file", "comes");
    volume.carry(|_| ());
    let done = volume.merge.put_in_place(Wins::Arriving).unwrap();
    assert_eq!(volume.read("d/deep/er/new"), "comes");
    volume.merge.take_back(done).unwrap();
    volume.merge.remove().unwrap();
    assert_eq!(walk(volume.there.path()), before);
}

#[test]
fn of_two_files_that_both_went_on_the_newer_stays() {
    let mut volume = Volume::new();
    let (there, source) = (
        volume.there.path().to_owned(),
        volume.source.path().to_owned(),
    );
    for (path, there_is_newer) in [("here", true), ("came", false)] {
        volume.is_there(path, "theirs");
        volume.comes(path, "comes");
        let old = if there_is_newer { &source } else { &there };
        aged(&old.join(path), Duration::from_secs(60));
    }
    volume.comes("new", "comes");
    volume.carry(|_| ());
    let kept = fs::metadata(there.join("here")).unwrap().ino();
    volume.merge.put_in_place(Wins::Newer).unwrap();
    assert_eq!(volume.read("here"), "theirs");
    assert_eq!(fs::metadata(there.join("here")).unwrap().ino(), kept);
    assert_eq!(volume.read("came"), "comes");
    assert_eq!(volume.read("new"), "comes");
    volume.merge.remove().unwrap();
    assert_eq!(volume.lists(), ["came", "here", "new"]);
}

#[test]
fn a_symbolic_link_where_a_directory_comes_leads_nowhere() {
    let mut volume = Volume::new();
    let outside = tempfile::tempdir().unwrap();
    symlink(outside.path(), volume.there.path().join("d")).unwrap();
    volume.comes("d/file", "comes");
    volume.carry(|_| ());
    volume.merge.put_in_place(Wins::Arriving).unwrap();
    assert_eq!(fs::read_dir(outside.path()).unwrap().count(), 0);
    assert_eq!(volume.read("d/file"), "comes");
    assert!(!volume.there.path().join("d").is_symlink());
}

#[test]
fn whoever_replaces_the_hidden_place_by_a_link_ends_the_arrival() {
    let volume = Volume::new();
    let outside = tempfile::tempdir().unwrap();
    fs::create_dir(outside.path().join("tree")).unwrap();
    let hidden = volume.there.path().join(HIDDEN);
    fs::remove_dir_all(&hidden).unwrap();
    symlink(outside.path(), &hidden).unwrap();
    volume.merge.placer(Limits::default()).unwrap_err();
    volume.merge.put_in_place(Wins::Arriving).unwrap_err();
    volume.merge.remove().unwrap();
    assert!(!hidden.is_symlink());
    assert!(outside.path().join("tree").exists());
}

#[test]
fn a_source_cannot_reach_the_hidden_place_or_anything_outside() {
    let own = Entry {
        kind: Kind::Directory,
        mode: 0o755,
        uid: rustix::process::geteuid().as_raw(),
        gid: rustix::process::getegid().as_raw(),
        ..Entry::default()
    };
    let directory = |path: &str| {
        Item::Entry(Entry {
            path: path.into(),
            ..own.clone()
        })
    };
    let volume = Volume::new();
    for path in ["../x", "/x", "a/../../x"] {
        let mut placer = volume.merge.placer(Limits::default()).unwrap();
        apply_all(&mut placer, vec![directory(path)]).unwrap_err();
    }
    let mut placer = volume.merge.placer(Limits::default()).unwrap();
    apply_all(
        &mut placer,
        vec![directory("."), directory("a"), directory(HIDDEN)],
    )
    .unwrap();
    let error = volume.merge.put_in_place(Wins::Arriving).unwrap_err();
    assert!(error.to_string().contains(HIDDEN), "{error}");
    assert_eq!(volume.lists(), [HIDDEN]);
}

#[test]
fn what_an_arrival_left_is_gone_with_the_next() {
    let mut volume = Volume::new();
    volume.comes("old", "comes");
    volume.carry(|_| ());
    let again = Merge::prepare(volume.there.path(), HIDDEN).unwrap();
    again.put_in_place(Wins::Arriving).unwrap();
    assert_eq!(volume.lists(), [""; 0]);
}
