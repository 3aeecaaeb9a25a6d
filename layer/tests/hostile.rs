//! A peer that sends what no scanner sends gets nowhere.

#![allow(clippy::unwrap_used, reason = "a test may panic")]

mod support;

use std::fs;
use std::os::unix::fs::symlink;
use std::path::PathBuf;

use bytes::Bytes;
use sterna_layer::{CHUNK_BYTES, Entry, Item, Kind, LayerError, Limits, Placer, Scanner, Stopped};
use support::{apply_all, is_root, skipped};
use tempfile::TempDir;

struct Target {
    outer: TempDir,
    placer: Placer,
}

impl Target {
    fn new(limits: Limits) -> Self {
        let outer = tempfile::tempdir().unwrap();
        fs::create_dir(outer.path().join("root")).unwrap();
        fs::create_dir(outer.path().join("outside")).unwrap();
        fs::write(outer.path().join("outside/secret"), b"untouched").unwrap();
        let placer = Placer::new(&outer.path().join("root"), limits).unwrap();
        Self { outer, placer }
    }

    fn refuses(mut self, items: Vec<Item>) -> LayerError {
        let error = apply_all(&mut self.placer, items).unwrap_err();
        assert_eq!(
            fs::read(self.outer.path().join("outside/secret")).unwrap(),
            b"untouched"
        );
        assert_eq!(
            fs::read_dir(self.outer.path().join("outside"))
                .unwrap()
                .count(),
            1
        );
        assert_eq!(fs::read_dir(self.outer.path()).unwrap().count(), 2);
        let again = self.placer.apply(Item::Remove("x".into())).unwrap_err();
        assert!(matches!(again, LayerError::Broken));
        error
    }
}

fn refuses(items: Vec<Item>) -> LayerError {
    Target::new(Limits::default()).refuses(items)
}

fn own() -> Entry {
    let (uid, gid) = (
        rustix::process::geteuid().as_raw(),
        rustix::process::getegid().as_raw(),
    );
    Entry {
        mode: 0o755,
        uid,
        gid,
        ..Entry::default()
    }
}

fn file(path: &str, size: u64) -> Item {
    Item::Entry(Entry {
        path: path.into(),
        size,
        ..own()
    })
}

fn directory(path: &str) -> Item {
    Item::Entry(Entry {
        path: path.into(),
        kind: Kind::Directory,
        ..own()
    })
}

fn link(kind: Kind, path: &str, link: &str) -> Item {
    Item::Entry(Entry {
        path: path.into(),
        kind,
        link: link.into(),
        ..own()
    })
}

fn data(offset: u64, content: &'static [u8]) -> Item {
    Item::Data {
        offset,
        content: Bytes::from_static(content),
    }
}

#[test]
fn paths_out_of_the_tree_are_refused() {
    for path in [
        "../outside/new",
        "a/../../outside/new",
        "/tmp/sterna-hostile",
        "..",
        "",
    ] {
        assert!(
            matches!(refuses(vec![file(path, 0)]), LayerError::Invalid { .. }),
            "{path}"
        );
        assert!(matches!(
            refuses(vec![Item::Remove(path.into())]),
            LayerError::Invalid { .. }
        ));
        let hard = link(Kind::Hardlink, "a", path);
        assert!(
            matches!(refuses(vec![hard]), LayerError::Invalid { .. }),
            "{path}"
        );
    }
    assert!(!PathBuf::from("/tmp/sterna-hostile").exists());
}

#[test]
fn a_symbolic_link_on_the_way_is_not_followed() {
    for target in ["../outside", "/", "d"] {
        let through = |item| {
            refuses(vec![
                directory("d"),
                link(Kind::Symlink, "way", target),
                item,
            ])
        };
        assert!(matches!(
            through(file("way/secret", 0)),
            LayerError::Io { .. }
        ));
        assert!(matches!(
            through(directory("way/new")),
            LayerError::Io { .. }
        ));
        assert!(matches!(
            through(Item::Remove("way/secret".into())),
            LayerError::Io { .. }
        ));
        assert!(matches!(
            through(link(Kind::Hardlink, "mine", "way/secret")),
            LayerError::Io { .. }
        ));
    }
}

#[test]
fn a_symbolic_link_at_the_end_is_replaced_and_not_written_through() {
    let mut target = Target::new(Limits::default());
    let items = vec![
        link(Kind::Symlink, "f", "../outside/secret"),
        file("f", 3),
        data(0, b"new"),
    ];
    apply_all(&mut target.placer, items).unwrap();
    assert_eq!(
        fs::read(target.outer.path().join("outside/secret")).unwrap(),
        b"untouched"
    );
    assert_eq!(
        fs::read(target.outer.path().join("root/f")).unwrap(),
        b"new"
    );
    // A hard link to a symbolic link is one more symbolic link.
    let items = vec![
        link(Kind::Symlink, "s", "../outside/secret"),
        link(Kind::Hardlink, "h", "s"),
    ];
    apply_all(&mut target.placer, items).unwrap();
    assert!(target.outer.path().join("root/h").is_symlink());
}

#[test]
fn a_symbolic_link_that_was_there_before_is_not_followed() {
    let mut target = Target::new(Limits::default());
    symlink("../outside", target.outer.path().join("root/way")).unwrap();
    let error = target.placer.apply(file("way/new", 0)).unwrap_err();
    assert!(matches!(error, LayerError::Io { .. }));
    assert_eq!(
        fs::read_dir(target.outer.path().join("outside"))
            .unwrap()
            .count(),
        1
    );
}

#[test]
fn sizes_and_amounts_are_limited() {
    assert!(matches!(
        refuses(vec![file("f", u64::MAX)]),
        LayerError::Invalid { .. }
    ));
    assert!(matches!(
        refuses(vec![file("f", i64::MAX as u64)]),
        LayerError::Io { .. }
    ));
    assert!(matches!(
        refuses(vec![file("f", 2), data(1, b"xx")]),
        LayerError::Invalid { .. }
    ));
    assert!(matches!(
        refuses(vec![file("f", 2), data(u64::MAX, b"xx")]),
        LayerError::Invalid { .. }
    ));
    let much = Item::Data {
        offset: 0,
        content: vec![1; CHUNK_BYTES + 1].into(),
    };
    assert!(matches!(
        refuses(vec![file("f", 1 << 20), much]),
        LayerError::Limit { .. }
    ));
    let small = Limits {
        bytes: 5,
        entries: 2,
        ..Limits::default()
    };
    let bytes = vec![file("f", 6), data(0, b"123"), data(3, b"456")];
    assert!(matches!(
        Target::new(small).refuses(bytes),
        LayerError::Limit { limit: 5, .. }
    ));
    let files = vec![file("a", 0), file("b", 0), file("c", 0)];
    assert!(matches!(
        Target::new(small).refuses(files),
        LayerError::Limit { limit: 2, .. }
    ));
    let deep = file(&vec!["d"; 300].join("/"), 0);
    assert!(matches!(refuses(vec![deep]), LayerError::Limit { .. }));
}

#[test]
fn items_out_of_order_are_refused() {
    assert!(matches!(
        refuses(vec![data(0, b"x")]),
        LayerError::Invalid { .. }
    ));
    assert!(matches!(
        refuses(vec![file("f", 1), directory("d"), data(0, b"x")]),
        LayerError::Invalid { .. }
    ));
    assert!(matches!(
        refuses(vec![file("no/such/directory", 0)]),
        LayerError::Io { .. }
    ));
    assert!(matches!(
        refuses(vec![link(Kind::Hardlink, "a", "b")]),
        LayerError::Invalid { .. }
    ));
    assert!(matches!(
        refuses(vec![directory("d"), link(Kind::Hardlink, "a", "d")]),
        LayerError::Invalid { .. }
    ));
    let kept = Item::Entry(Entry {
        path: "f".into(),
        keep: true,
        ..own()
    });
    assert!(matches!(refuses(vec![kept]), LayerError::Invalid { .. }));
}

#[test]
fn what_is_in_the_way_is_replaced() {
    let mut target = Target::new(Limits::default());
    let items = vec![
        directory("a"),
        directory("a/b"),
        file("a/b/c", 1),
        data(0, b"x"),
        file("a", 2),
        data(0, b"yy"),
    ];
    apply_all(&mut target.placer, items).unwrap();
    assert_eq!(fs::read(target.outer.path().join("root/a")).unwrap(), b"yy");
    apply_all(&mut target.placer, vec![directory("a"), directory("a/b")]).unwrap();
    assert!(target.outer.path().join("root/a/b").is_dir());
    apply_all(&mut target.placer, vec![link(Kind::Symlink, "a", "x")]).unwrap();
    assert!(target.outer.path().join("root/a").is_symlink());
    apply_all(
        &mut target.placer,
        vec![Item::Remove("a".into()), Item::Remove("a/b".into())],
    )
    .unwrap();
    assert_eq!(
        fs::read_dir(target.outer.path().join("root"))
            .unwrap()
            .count(),
        0
    );
}

#[test]
fn a_file_that_is_written_again_keeps_its_other_names() {
    let mut target = Target::new(Limits::default());
    let items = vec![
        file("a", 3),
        data(0, b"old"),
        link(Kind::Hardlink, "b", "a"),
        file("a", 2),
        data(0, b"ne"),
    ];
    apply_all(&mut target.placer, items).unwrap();
    assert_eq!(fs::read(target.outer.path().join("root/b")).unwrap(), b"ne");
}

#[test]
fn a_plain_tree_takes_no_devices_and_no_links() {
    for kind in [
        Kind::Symlink,
        Kind::Hardlink,
        Kind::CharDevice,
        Kind::Fifo,
        Kind::Socket,
    ] {
        let error = Target::new(Limits::images()).refuses(vec![link(kind, "a", "b")]);
        assert!(matches!(error, LayerError::Invalid { .. }), "{kind:?}");
    }
    let mut target = Target::new(Limits::images());
    let labelled = Entry {
        path: "f".into(),
        xattrs: vec![(b"trusted.x".to_vec(), vec![1])],
        ..own()
    };
    apply_all(
        &mut target.placer,
        vec![directory("."), Item::Entry(labelled)],
    )
    .unwrap();
}

#[test]
fn a_pass_whose_receiver_is_gone_stops() {
    let source = tempfile::tempdir().unwrap();
    fs::write(source.path().join("f"), b"x").unwrap();
    let mut scanner = Scanner::new(source.path()).unwrap();
    assert!(matches!(
        scanner.pass(false, &mut |_| Err(Stopped)),
        Err(LayerError::Stopped(Stopped))
    ));
    assert!(matches!(
        scanner.pass(false, &mut |_| Ok(())),
        Err(LayerError::Broken)
    ));
}

#[test]
fn a_strict_pass_notices_what_moves() {
    let source = tempfile::tempdir().unwrap();
    fs::write(source.path().join("f"), vec![1; 3 * CHUNK_BYTES]).unwrap();
    let mut scanner = Scanner::new(source.path()).unwrap();
    let path = source.path().join("f");
    let error = scanner
        .pass(true, &mut |item| {
            if matches!(item, Item::Data { .. }) {
                fs::write(&path, b"shorter").unwrap();
            }
            Ok(())
        })
        .unwrap_err();
    assert!(matches!(error, LayerError::Changed { path } if path.ends_with("f")));
}

#[test]
fn a_container_that_swaps_a_file_for_a_device_does_not_get_it_opened() {
    if !is_root() {
        return skipped("making devices needs root");
    }
    let source = tempfile::tempdir().unwrap();
    fs::create_dir(source.path().join("d")).unwrap();
    fs::write(source.path().join("d/f"), b"x").unwrap();
    let mut scanner = Scanner::new(source.path()).unwrap();
    // Not a race, but the same end: what is there is never opened to be read.
    let path = source.path().join("d/f");
    let mut seen = Vec::new();
    scanner
        .pass(false, &mut |item| {
            if let Item::Entry(entry) = &item {
                if entry.path.ends_with("d") {
                    fs::remove_file(&path).unwrap();
                    let (mode, device) =
                        (rustix::fs::Mode::from(0o600), rustix::fs::makedev(0, 99));
                    rustix::fs::mknodat(
                        rustix::fs::CWD,
                        &path,
                        rustix::fs::FileType::CharacterDevice,
                        mode,
                        device,
                    )
                    .unwrap();
                }
                seen.push(entry.kind);
            }
            Ok(())
        })
        .unwrap();
    assert_eq!(seen, [Kind::Directory, Kind::Directory, Kind::CharDevice]);
}
