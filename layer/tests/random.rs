//! Whatever happens to a tree between passes, the copy follows.

#![allow(clippy::unwrap_used, reason = "a test may panic")]

mod support;

use std::fs::{self, OpenOptions, Permissions};
use std::os::unix::fs::{FileExt, PermissionsExt, symlink};
use std::path::PathBuf;

use support::{Pair, set_xattr};

/// Numbers that are the same in every run (SplitMix64).
struct Random(u64);

impl Random {
    fn below(&mut self, limit: u64) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut mixed = self.0;
        mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        (mixed ^ (mixed >> 31)) % limit
    }

    /// One of few names, so that everything happens to the same files.
    fn path(&mut self, pair: &Pair) -> PathBuf {
        let mut path = pair.source.path().to_owned();
        for _ in 0..=self.below(3) {
            path.push(["a", "b", "c", "d"][self.below(4) as usize]);
        }
        path
    }
}

/// One change, if it is possible: half of them are not, and that is fine.
fn change(random: &mut Random, pair: &Pair) {
    let (path, other) = (random.path(pair), random.path(pair));
    let content = vec![random.below(256) as u8; random.below(700_000) as usize];
    match random.below(12) {
        0 | 1 => fs::write(&path, &content).ok(),
        2 => OpenOptions::new()
            .write(true)
            .open(&path)
            .and_then(|file| file.write_all_at(&content, random.below(1_000_000)))
            .ok(),
        3 => OpenOptions::new()
            .write(true)
            .open(&path)
            .and_then(|file| file.set_len(random.below(1_500_000)))
            .ok(),
        4 => fs::rename(&path, &other).ok(),
        5 | 6 => fs::hard_link(&path, &other).ok(),
        7 => fs::remove_file(&path).ok(),
        8 => fs::create_dir(&path).ok(),
        9 => fs::remove_dir_all(&path).ok(),
        10 => symlink("a/b", &path).ok(),
        _ => {
            if !path.is_symlink() && path.exists() {
                set_xattr(&path, "user.x", &content[..content.len() % 8]);
                let mode = 0o700 | random.below(0o100) as u32;
                fs::set_permissions(&path, Permissions::from_mode(mode)).unwrap();
            }
            None
        }
    };
}

#[test]
fn any_sequence_of_changes_arrives() {
    for seed in 0..60 {
        let mut random = Random(seed);
        let mut pair = Pair::new();
        for _ in 0..8 {
            for _ in 0..random.below(20) {
                change(&mut random, &pair);
            }
            pair.pass(random.below(2) == 0);
            eprintln!("seed {seed}");
            pair.assert_equal();
        }
    }
}
