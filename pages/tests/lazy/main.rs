//! The lazy server against a process that does what CRIU's restorer does and what applications do to their memory.

#![allow(clippy::unwrap_used, reason = "everything here is part of a test")]

mod fixture;
mod orphan;
mod restored;

use std::path::PathBuf;
use std::time::Duration;

use fixture::{
    HOT, PAGE, PAGES, ROLE, SPACE, START, WORK_DIR, is_staged, options, restore, stage, staged,
};
use sterna_pages::{
    Batch, FillOptions, FillReport, LazyError, Prefill, Record, RecordKind, SpaceId, Staging,
    StagingUsage,
};

/// Not a test: what this program does when a test has started it again.
#[test]
fn another_role() {
    if let Ok(role) = std::env::var(ROLE) {
        let work_dir = std::env::var_os(WORK_DIR).map(PathBuf::from).unwrap();
        match role.as_str() {
            orphan::SERVER => orphan::serve_and_die(&work_dir),
            role => restored::run(role, &work_dir),
        }
    }
}

fn one_thread() -> FillOptions {
    FillOptions {
        threads: 1,
        ..options()
    }
}

fn staged_pages() -> u64 {
    (0..PAGES).filter(|page| is_staged(*page)).count() as u64
}

/// Everything staged has to be accounted for.
fn assert_complete(report: &FillReport) {
    let dealt_with = report.pages_copied + report.present_pages + report.dropped_pages;
    assert_eq!(dealt_with, staged_pages(), "{report:?}");
}

#[test]
fn a_restored_process_reads_what_was_staged_and_zeros_elsewhere() {
    let staging = staged();
    let outcome = restore(&staging, "reads", options());
    assert!(outcome.is_skipped() || outcome.events == ["handed", "restored", "filled"]);
    let Some(report) = outcome.expect_filled() else {
        return;
    };
    assert_complete(&report);
    assert_eq!(report.dropped_pages, 0);
    assert!(report.zero_faults > 0 && report.faults > report.zero_faults);
    assert!(report.fault_latency_max >= report.fault_latency_mean);
    assert_eq!(staging.usage(), StagingUsage::default());
}

#[test]
fn faults_are_served_before_the_restore_has_finished() {
    let options = FillOptions {
        prefill: Prefill::Off,
        ..options()
    };
    let Some(report) = restore(&staged(), "reads early", options).expect_filled() else {
        return;
    };
    assert_complete(&report);
    assert!(report.prefilled_pages >= 3);
}

#[test]
fn hot_pages_are_placed_as_soon_as_their_mappings_are_there() {
    let staging = staged();
    staging.mark_hot_from_now();
    for hot in HOT {
        stage(&staging, SPACE, hot);
    }
    let hot = HOT.into_iter().flatten().filter(|page| is_staged(*page));
    let outcome = restore(&staging, "waits for hot pages", options());
    let Some(report) = outcome.expect_filled() else {
        return;
    };
    assert_complete(&report);
    assert!(report.prefilled_pages >= hot.count() as u64);
}

#[test]
fn until_the_tasks_are_said_to_run_pages_come_when_they_are_touched() {
    let options = FillOptions {
        patience: Duration::from_secs(3600),
        ..options()
    };
    let Some(report) = restore(&staged(), "reads", options).expect_filled() else {
        return;
    };
    // Faults alone have placed them, each some around it.
    assert_complete(&report);
}

#[test]
fn everything_can_be_placed_ahead() {
    let options = FillOptions {
        prefill: Prefill::All,
        ..options()
    };
    let Some(report) = restore(&staged(), "waits for all", options).expect_filled() else {
        return;
    };
    assert_eq!(report.prefilled_pages, staged_pages());
}

#[test]
fn a_run_of_pages_may_lie_in_two_mappings() {
    let outcome = restore(&staged(), "maps in two", options());
    if let Some(report) = outcome.expect_filled() {
        assert_complete(&report);
    }
}

#[test]
fn discarded_memory_reads_as_zeros_for_ever() {
    if let Some(report) = restore(&staged(), "discards", one_thread()).expect_filled() {
        assert_complete(&report);
        assert!(report.dropped_pages > 0);
    }
}

#[test]
fn pages_that_are_discarded_while_they_are_placed_do_not_come_back() {
    for _ in 0..3 {
        let outcome = restore(&staged(), "discards at the front", one_thread());
        if let Some(report) = outcome.expect_filled() {
            assert_complete(&report);
            assert!(report.dropped_pages > 0);
        }
    }
}

#[test]
fn what_is_mapped_anew_is_empty() {
    if let Some(report) = restore(&staged(), "unmaps", one_thread()).expect_filled() {
        assert_complete(&report);
        assert!(report.dropped_pages > 0);
    }
}

#[test]
fn memory_that_moves_keeps_its_content() {
    if let Some(report) = restore(&staged(), "moves", one_thread()).expect_filled() {
        assert_complete(&report);
        assert_eq!(report.dropped_pages, 0);
    }
}

#[test]
fn children_have_all_the_memory_of_their_parent() {
    if let Some(report) = restore(&staged(), "forks", one_thread()).expect_filled() {
        // Without the capability to hear of forks there is nothing to see.
        if report.forks > 0 {
            let dealt_with = report.pages_copied + report.present_pages + report.dropped_pages;
            assert!(dealt_with > staged_pages());
        }
    }
}

#[test]
fn memory_survives_whatever_a_process_does_while_it_is_filled() {
    for threads in [1, 2, 4] {
        let options = FillOptions {
            threads,
            ..options()
        };
        restore(&staged(), "does everything", options).expect_filled();
    }
}

#[test]
fn a_process_that_ends_early_needs_no_more_memory() {
    let staging = staged();
    let outcome = restore(&staging, "exits at once", one_thread());
    let Some(report) = outcome.expect_filled() else {
        return;
    };
    assert_complete(&report);
    assert_eq!(staging.usage(), StagingUsage::default());
}

#[test]
fn a_restore_that_failed_can_be_repeated() {
    let staging = staged();
    let outcome = restore(&staging, "dies before it is restored", options());
    if outcome.is_skipped() {
        return;
    }
    assert!(matches!(outcome.result, Err(LazyError::RestoreFailed)));
    assert_eq!(staging.usage().pages, staged_pages());
    let again = restore(&staging, "reads", options());
    assert_complete(&again.expect_filled().unwrap());
}

#[test]
fn memory_of_a_process_that_was_not_restored_is_an_error() {
    let staging = staged();
    stage(&staging, SpaceId(18), 0..10);
    let outcome = restore(&staging, "exits at once", options());
    if outcome.is_skipped() {
        return;
    }
    assert!(matches!(
        outcome.result,
        Err(LazyError::NotRestored(SpaceId(18)))
    ));
}

#[test]
fn a_page_without_a_mapping_is_an_error() {
    let staging = staged();
    let addr = START + (PAGES + 1000) * PAGE;
    staging
        .apply(&Batch {
            space: SPACE,
            records: vec![Record {
                addr,
                pages: 1,
                kind: RecordKind::Data,
            }],
            payload: vec![1; PAGE as usize].into(),
        })
        .unwrap();
    // Not "exits at once": a process that is gone needs no page.
    let outcome = restore(&staging, "touches slowly", options());
    if outcome.is_skipped() {
        return;
    }
    assert!(matches!(
        outcome.result,
        Err(LazyError::Homeless { space: SPACE, addr: found }) if found == addr
    ));
}

#[test]
fn while_a_guard_is_open_a_process_waits_for_a_server_that_died() {
    if let Some(ended) = orphan::outlive_the_server(true) {
        assert!(ended.is_none(), "it must wait, not end as {ended:?}");
    }
}

#[test]
fn without_a_guard_the_process_of_a_server_that_died_reads_zeros() {
    // Not what anybody wants: the kernel's behaviour that makes guards necessary.
    if let Some(ended) = orphan::outlive_the_server(false) {
        assert_eq!(ended.unwrap().code(), Some(1));
    }
}

#[test]
fn a_process_that_changes_its_memory_unheard_is_refused() {
    let strict = FillOptions {
        require_forks: true,
        ..options()
    };
    let outcome = restore(&staged(), "is deaf", strict);
    if outcome.is_skipped() {
        return;
    }
    assert!(matches!(outcome.result, Err(LazyError::Deaf { .. })));
    assert!(outcome.events.is_empty());
}

#[test]
fn a_page_that_is_there_already_is_an_error() {
    let outcome = restore(&staged(), "has a page already", options());
    if outcome.is_skipped() {
        return;
    }
    let at = START + 5000 * PAGE;
    assert!(matches!(
        outcome.result,
        Err(LazyError::Occupied { space: SPACE, addr }) if addr == at
    ));
}

#[test]
fn a_page_that_was_taken_out_of_staging_may_be_there_already() {
    let staging = staged();
    let at = START + 5000 * PAGE;
    let page = at..at + PAGE;
    staging.remove(SPACE, &[page]).unwrap();
    restore(&staging, "has a page already", options()).expect_filled();
}

#[test]
fn a_server_that_nobody_connects_to_can_be_cancelled() {
    let dir = tempfile::tempdir().unwrap();
    let server = sterna_pages::LazyServer::bind(dir.path()).unwrap();
    let canceller = server.canceller();
    let result = std::thread::scope(|scope| {
        scope.spawn(move || {
            std::thread::sleep(Duration::from_millis(20));
            canceller.cancel();
        });
        server.run(&Staging::new(0), options(), &mut |_| {})
    });
    assert!(matches!(result, Err(LazyError::Cancelled)));
    assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 0);
}
