//! Both machines, their records and a network between them, checked in every order
//! in which things can happen.
//!
//! The network neither loses nor duplicates a message within a session, but the
//! session can break at any moment, each side notices on its own time, and only
//! the source opens another one. Either engine can die at any moment, also between
//! the single steps of an action; what is on disk then decides. Timeouts,
//! cancellations and local failures can come at any moment.
//!
//! What holds:
//!
//! * Never can both copies run, and once the copy on the destination was let go
//!   the one on the source never runs again.
//! * The source's copy is killed only if the destination's was let go. So after any
//!   crash there is a copy that runs or can be recovered, with one exception: the
//!   destination's engine dies after `Ran` was recorded and before all memory is in
//!   place. That container is lost as in any crash of its shim.
//! * From everywhere, without further faults, it comes to an end: both sides done,
//!   no record of a commit left, one copy running, or none by the exception above.
//!
//! To show that the model sees such things, it is also run with machines that are
//! wrong in known ways: each must be caught.

mod migration;
mod world;

use std::collections::{HashMap, HashSet};

use stateright::{Checker, Model};
use sterna_migrate::source;

use migration::{BACK_IN_TIME, Migration, Mistake, ON_RECORD, SURVIVAL, TWO_COPIES};
use world::{Engine, Tasks, World};

/// All states, and those from which no sequence of happenings without faults leads
/// to an end.
fn explore(model: &Migration) -> (usize, Vec<World>) {
    let mut numbers: HashMap<World, usize> = HashMap::new();
    let mut worlds: Vec<World> = model.init_states();
    let mut before: Vec<Vec<usize>> = vec![Vec::new()];
    numbers.insert(worlds[0].clone(), 0);
    let mut next = 0;
    while next < worlds.len() {
        let world = worlds[next].clone();
        let mut happenings = Vec::new();
        model.actions(&world, &mut happenings);
        for happening in happenings {
            let Some(after) = model.next_state(&world, happening) else {
                continue;
            };
            let number = *numbers.entry(after).or_insert_with_key(|after| {
                worlds.push(after.clone());
                before.push(Vec::new());
                worlds.len() - 1
            });
            if !happening.is_fault() {
                before[number].push(next);
            }
        }
        next += 1;
    }

    let mut ends: HashSet<usize> = HashSet::new();
    let mut open: Vec<usize> = (0..worlds.len())
        .filter(|&number| worlds[number].is_settled())
        .collect();
    while let Some(number) = open.pop() {
        if ends.insert(number) {
            open.extend(&before[number]);
        }
    }
    let stuck = (0..worlds.len())
        .filter(|number| !ends.contains(number))
        .map(|number| worlds[number].clone())
        .collect();
    (worlds.len(), stuck)
}

#[test]
fn with_a_broken_session_and_a_crash_there_is_one_copy_and_it_is_never_lost() {
    Migration::sound(1, 1)
        .checker()
        .spawn_bfs()
        .join()
        .assert_properties();
}

#[test]
fn two_crashes_and_two_broken_sessions_change_nothing_about_that() {
    Migration::sound(2, 2)
        .checker()
        .spawn_bfs()
        .join()
        .assert_properties();
}

#[test]
fn from_every_reachable_state_a_migration_comes_to_an_end() {
    let (states, stuck) = explore(&Migration::sound(2, 2));
    assert!(states > 10_000, "the model has only {states} states");
    assert!(
        stuck.is_empty(),
        "{} stuck, first {:#?}",
        stuck.len(),
        stuck[0]
    );
}

#[test]
fn known_mistakes_break_the_promise_that_they_should() {
    for (mistake, promise) in [
        (Mistake::ThawOnLoss, TWO_COPIES),
        (Mistake::ThawBeforeRevoking, TWO_COPIES),
        (Mistake::SendBeforeRecording, TWO_COPIES),
        (Mistake::KillOnTimeout, SURVIVAL),
        (Mistake::RestoreOnTimeout, TWO_COPIES),
        (Mistake::RunBeforeRecording, ON_RECORD),
        (Mistake::FenceWhatRan, BACK_IN_TIME),
    ] {
        let model = Migration {
            mistake: Some(mistake),
            ..Migration::sound(1, 1)
        };
        let found = model.checker().spawn_bfs().join().discoveries();
        let found: Vec<&str> = found.into_keys().collect();
        assert!(
            found.contains(&promise),
            "{mistake:?} breaks only {found:?}"
        );
    }
}

#[test]
fn a_destination_that_forgets_what_it_prepared_leaves_the_source_frozen_for_ever() {
    let (_, stuck) = explore(&Migration {
        mistake: Some(Mistake::ForgetOnLoss),
        ..Migration::sound(1, 0)
    });
    assert!(stuck.iter().any(|world| {
        world.source == Engine::Up(source::State::Undecided) && world.source_tasks == Tasks::Still
    }));
}
