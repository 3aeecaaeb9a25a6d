//! The tracker against processes that change their memory in every way there is: what the destination would hold in the
//! end must be what the processes hold.

#![allow(clippy::unwrap_used, reason = "a test")]

mod bench;
mod helper;
mod model;
mod obedient;
mod steps;

use std::sync::atomic::AtomicBool;
use std::time::Duration;

use helper::{Helper, ROLE};
use model::Model;
use sterna_pages::{LapReport, Tracker, self_test};
use sys::churn::Churn;

static NEVER: AtomicBool = AtomicBool::new(false);

/// Not a test: what this program does when a test has started it again.
#[test]
fn another_role() {
    let Ok(role) = std::env::var(ROLE) else {
        return;
    };
    let mut words = role.split(' ');
    match words.next() {
        Some("churn") => {
            let mut word = || words.next().unwrap();
            let churn = Churn {
                seed: word().parse().unwrap(),
                forks: word().parse().unwrap(),
                guards: word().parse().unwrap(),
                threads: word().parse().unwrap(),
                pause: Duration::from_micros(word().parse().unwrap()),
            };
            churn.run().unwrap();
        }
        Some("obey") => obedient::run(),
        _ => panic!("unknown role {role}"),
    }
}

/// Whether memory can be tracked here; prints a line if not.
fn can_track() -> bool {
    match self_test() {
        Ok(()) => true,
        Err(error) => {
            println!("skipped: {error}: {error:?}");
            false
        }
    }
}

/// How often the processes are stopped and compared.
fn rounds() -> u32 {
    std::env::var("STERNA_CHURN_ROUNDS").map_or(4, |rounds| rounds.parse().unwrap())
}

/// For long runs: other sequences of changes.
fn seed_offset() -> u64 {
    std::env::var("STERNA_CHURN_SEED").map_or(0, |seed| seed.parse().unwrap())
}

/// Laps while the processes run, a freeze, a comparison, and on with the same tracker.
fn migrate_again_and_again(mut churn: Churn, mut tracker: Tracker) {
    churn.seed += seed_offset();
    let mut helper = Helper::churn(churn);
    let mut model = Model::default();
    let mut total = LapReport::default();
    for round in 0..rounds() {
        for lap in 0..3 {
            std::thread::sleep(Duration::from_millis(u64::from(
                5 + 20 * ((round + lap) % 3),
            )));
            let report = tracker
                .lap(&helper.processes(), &mut model, &NEVER)
                .unwrap();
            total.pages += report.pages;
            total.zero_pages += report.zero_pages;
        }
        tracker.prepare_smaps();
        let frozen = helper.freeze();
        let claims = tracker.claim(&frozen).unwrap();
        let report = tracker.final_lap(&claims, &mut model).unwrap();
        total.pages += report.pages;
        total.zero_pages += report.zero_pages;
        let mut claimed = 0;
        for (process, (space, ranges)) in frozen.iter().zip(claims.spaces()) {
            assert_eq!(process.space, space);
            for range in ranges {
                claimed += range.end - range.start;
                if let Err(difference) = model.verify(process.pid, space.0, range) {
                    panic!(
                        "round {round} of {churn:?}, process {}: {difference}",
                        process.pid
                    );
                }
            }
            // Threads have their stacks in ordinary memory.
            let on_owned_stacks = claims.stack_pages(process.pid).len();
            assert!(on_owned_stacks >= churn.threads as usize || process.pid != helper.pid());
            let smaps = claims.smaps(process.pid).map(|text| headers(&text));
            let real = std::fs::read(format!("/proc/{}/smaps", process.pid)).unwrap();
            assert!(smaps.is_none_or(|smaps| smaps == headers(&real)));
        }
        println!(
            "round {round}: {} processes, {claimed} bytes claimed, {} pages held, last {report:?}",
            frozen.len(),
            model.pages()
        );
        // Another migration, to another destination.
        if round % 2 == 1 {
            model = Model::default();
            tracker = fresh(tracker);
        }
        helper.thaw(&frozen);
    }
    assert!(!helper.has_ended(), "the process did not survive");
    println!("{total:?}");
    tracker.disarm();
}

/// Ends one migration and begins the next.
fn fresh(tracker: Tracker) -> Tracker {
    tracker.disarm();
    Tracker::new()
}

fn headers(smaps: &[u8]) -> Vec<Vec<u8>> {
    smaps
        .split(|byte| *byte == b'\n')
        .filter(|line| line.first().is_some_and(|byte| !byte.is_ascii_uppercase()))
        .map(<[u8]>::to_vec)
        .collect()
}

const PLAIN: Churn = Churn {
    seed: 1,
    forks: false,
    guards: false,
    threads: 0,
    pause: Duration::from_micros(300),
};

#[test]
fn what_a_process_writes_and_drops_arrives() {
    if can_track() {
        for (seed, pause_us) in [(1, 0), (2, 100), (3, 500), (4, 2000)] {
            let pause = Duration::from_micros(pause_us);
            migrate_again_and_again(
                Churn {
                    seed,
                    pause,
                    ..PLAIN
                },
                Tracker::new(),
            );
        }
    }
}

#[test]
fn several_threads_and_guard_pages_are_followed() {
    if can_track() {
        let churn = Churn {
            seed: 11,
            guards: true,
            threads: 2,
            ..PLAIN
        };
        migrate_again_and_again(churn, Tracker::new());
    }
}

#[test]
fn forked_children_are_followed() {
    if can_track() {
        migrate_again_and_again(
            Churn {
                seed: 21,
                forks: true,
                ..PLAIN
            },
            Tracker::new(),
        );
    }
}
