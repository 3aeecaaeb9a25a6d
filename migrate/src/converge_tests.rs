//! Convergence against simulated containers: a program with a hot set that it
//! writes at some rate, on a link of some speed.

use super::*;

const MIB: u64 = 1 << 20;
const GIB: u64 = 1 << 30;
const GBIT: f64 = 1e9 / 8.0;
/// Finding mappings, waiting for the last acknowledgement: what no lap goes below.
const LAP_OVERHEAD: Duration = Duration::from_millis(4);
const COSTS: fn() -> Costs = Costs::default;

/// A program that writes `pages_per_second` pages, picked at random from `hot` bytes.
#[derive(Debug, Clone, Copy)]
struct Writer {
    memory: u64,
    hot: u64,
    pages_per_second: f64,
}

impl Writer {
    fn idle(memory: u64) -> Self {
        Self::at(memory, 0.0)
    }

    /// Writes everywhere, so many bytes of distinct pages per second.
    fn at(memory: u64, bytes_per_second: f64) -> Self {
        Self {
            memory,
            hot: memory,
            pages_per_second: bytes_per_second / 4096.0,
        }
    }

    /// As fast as faults let it: about a microsecond for each first write.
    fn all_it_can(memory: u64, hot: u64) -> Self {
        Self {
            memory,
            hot,
            pages_per_second: 1e6,
        }
    }

    /// Bytes of distinct pages written in a time.
    fn written(&self, time: Duration) -> f64 {
        let writes = self.pages_per_second * time.as_secs_f64() * 4096.0;
        let hot = self.hot as f64;
        hot * (1.0 - (-writes / hot).exp())
    }

    /// The blackout of a switch-over right after a lap of that duration.
    fn blackout(&self, lap: Duration, link: f64) -> Duration {
        let costs = COSTS();
        costs.freeze
            + costs.scan_per_gib.mul_f64(self.memory as f64 / GIB as f64)
            + Duration::from_secs_f64(self.written(lap) / link)
            + costs.dump
            + costs.prepare
            + costs.restore
    }
}

#[derive(Debug)]
struct End {
    decision: Decision,
    laps: u32,
    elapsed: Duration,
    /// What a switch-over at the end costs.
    blackout: Duration,
}

fn run(writer: Writer, link: f64, budget: Budget) -> End {
    let mut convergence = Convergence::new(budget, COSTS());
    let mut elapsed = Duration::ZERO;
    let mut written = writer.memory as f64;
    let mut duration = Duration::ZERO;
    loop {
        match convergence.decide(elapsed) {
            Decision::Lap => {}
            decision => {
                return End {
                    decision,
                    laps: convergence.laps(),
                    elapsed,
                    blackout: writer.blackout(duration, link),
                };
            }
        }
        assert!(convergence.laps() < 10_000, "no decision: {convergence:?}");
        let scan = COSTS()
            .scan_per_gib
            .mul_f64(writer.memory as f64 / GIB as f64);
        duration = LAP_OVERHEAD + scan + Duration::from_secs_f64(written / link);
        elapsed += duration;
        convergence.observe(LapSample {
            written_bytes: written as u64,
            sent_bytes: written as u64,
            scanned_bytes: writer.memory,
            duration,
            link_bytes_per_second: None,
        });
        written = writer.written(duration);
    }
}

fn budget(max_blackout_ms: u64) -> Budget {
    Budget {
        max_blackout: Duration::from_millis(max_blackout_ms),
        deadline: None,
    }
}

fn until(max_blackout_ms: u64, deadline: Duration) -> Budget {
    Budget {
        deadline: Some(deadline),
        ..budget(max_blackout_ms)
    }
}

#[test]
fn an_idle_container_of_any_size_switches_after_a_few_laps() {
    for memory in [64 * MIB, GIB, 8 * GIB] {
        for link in [1.0, 10.0, 25.0] {
            let end = run(Writer::idle(memory), link * GBIT, budget(300));
            assert_eq!(end.decision, Decision::Switch, "{memory} {link}: {end:?}");
            assert!(end.laps <= 4, "{memory} {link}: {end:?}");
            assert!(end.blackout < Duration::from_millis(150), "{end:?}");
        }
    }
}

#[test]
fn fifty_megabytes_a_second_converge_on_every_link_and_blackout_is_flat_in_size() {
    for link in [1.0, 10.0, 25.0] {
        let blackouts = [64 * MIB, GIB, 8 * GIB].map(|memory| {
            let end = run(Writer::at(memory, 50e6), link * GBIT, budget(300));
            assert_eq!(end.decision, Decision::Switch, "{memory} {link}: {end:?}");
            assert!(end.laps <= 12, "{memory} {link}: {end:?}");
            end.blackout.as_millis()
        });
        let spread = blackouts.iter().max().unwrap() - blackouts.iter().min().unwrap();
        assert!(spread <= 20, "{link}: {blackouts:?}");
    }
}

#[test]
fn a_small_hot_set_that_is_written_all_the_time_switches_soon() {
    // 64 MiB at 10 Gbit/s are 54 ms: they never shrink, and they fit.
    let end = run(
        Writer::all_it_can(8 * GIB, 64 * MIB),
        10.0 * GBIT,
        budget(300),
    );
    assert_eq!(end.decision, Decision::Switch, "{end:?}");
    assert!(end.laps <= 5, "{end:?}");
    assert!(end.blackout < Duration::from_millis(300), "{end:?}");
}

#[test]
fn a_hot_set_that_does_not_fit_is_given_up_with_figures() {
    let end = run(
        Writer::all_it_can(8 * GIB, 4 * GIB),
        10.0 * GBIT,
        budget(300),
    );
    let Decision::GiveUp(reason @ Reason::NotConverging { laps, expected, .. }) = end.decision
    else {
        panic!("{end:?}");
    };
    assert_eq!(laps, MAX_LAPS);
    assert!(expected > Duration::from_secs(2), "{expected:?}");
    let text = reason.to_string();
    assert!(text.contains("300ms"), "{text}");
    assert!(text.contains("MB/s"), "{text}");
}

#[test]
fn the_same_hot_set_fits_a_larger_budget() {
    let end = run(
        Writer::all_it_can(8 * GIB, 4 * GIB),
        10.0 * GBIT,
        budget(5_000),
    );
    assert_eq!(end.decision, Decision::Switch, "{end:?}");
    assert!(end.laps <= 6, "{end:?}");
}

#[test]
fn a_deadline_ends_it_in_time_and_leaves_the_source_alone() {
    let deadline = Duration::from_secs(30);
    let end = run(
        Writer::all_it_can(8 * GIB, 4 * GIB),
        10.0 * GBIT,
        until(300, deadline),
    );
    assert!(
        matches!(end.decision, Decision::GiveUp(Reason::Deadline { .. })),
        "{end:?}"
    );
    assert!(end.elapsed <= deadline, "{end:?}");
}

#[test]
fn a_deadline_that_the_first_lap_cannot_meet_is_given_up_after_it() {
    // 8 GiB at 1 Gbit/s take 69 s.
    let end = run(
        Writer::at(8 * GIB, 50e6),
        1.0 * GBIT,
        until(300, Duration::from_secs(30)),
    );
    assert!(
        matches!(end.decision, Decision::GiveUp(Reason::Deadline { .. })),
        "{end:?}"
    );
    assert_eq!(end.laps, 1);
}

#[test]
fn at_the_deadline_what_fits_is_switched_even_if_it_still_improves() {
    let writer = Writer::at(8 * GIB, 100e6);
    let free = run(writer, 10.0 * GBIT, budget(2_000));
    let due = run(
        writer,
        10.0 * GBIT,
        until(2_000, Duration::from_millis(7_800)),
    );
    assert_eq!(free.decision, Decision::Switch);
    assert_eq!(due.decision, Decision::Switch, "{due:?}");
    assert!(due.laps < free.laps, "{due:?} {free:?}");
}

#[test]
fn with_a_deadline_a_quieter_moment_is_waited_for() {
    let noisy = Writer::all_it_can(GIB, GIB);
    let link = 10.0 * GBIT;
    let mut convergence = Convergence::new(until(300, Duration::from_secs(120)), COSTS());
    let (mut elapsed, mut written) = (Duration::ZERO, GIB as f64);
    // Twice the laps that are made without a deadline.
    for _ in 0..2 * MAX_LAPS {
        let duration = LAP_OVERHEAD + Duration::from_secs_f64(written / link);
        elapsed += duration;
        convergence.observe(lap(written as u64, GIB, duration));
        assert_eq!(convergence.decide(elapsed), Decision::Lap);
        written = noisy.written(duration);
    }
    convergence.observe(lap(MIB, GIB, LAP_OVERHEAD));
    assert_eq!(convergence.decide(elapsed), Decision::Lap, "it improved");
    convergence.observe(lap(0, GIB, LAP_OVERHEAD));
    assert_eq!(convergence.decide(elapsed), Decision::Switch);
}

#[test]
fn a_budget_below_the_fixed_costs_is_given_up_after_one_lap() {
    let end = run(Writer::idle(GIB), 10.0 * GBIT, budget(50));
    assert!(
        matches!(end.decision, Decision::GiveUp(Reason::OutOfReach { .. })),
        "{end:?}"
    );
    assert_eq!(end.laps, 1);
}

#[test]
fn over_all_sizes_rates_and_links_a_switch_keeps_the_budget_and_giving_up_has_a_reason() {
    let max_blackout = Duration::from_millis(300);
    let (mut switched, mut given_up) = (0, 0);
    for memory in [64 * MIB, 256 * MIB, GIB, 4 * GIB, 8 * GIB] {
        for link in [1.0, 2.5, 10.0, 25.0].map(|gbit| gbit * GBIT) {
            let writers = [
                Writer::idle(memory),
                Writer::at(memory, 50e6),
                Writer::at(memory, 500e6),
                Writer::all_it_can(memory, memory / 16),
                Writer::all_it_can(memory, memory),
            ];
            for writer in writers {
                let end = run(writer, link, budget(300));
                match end.decision {
                    Decision::Switch => {
                        switched += 1;
                        assert!(end.blackout <= max_blackout, "{writer:?} {link}: {end:?}");
                    }
                    Decision::GiveUp(Reason::NotConverging { .. }) => {
                        given_up += 1;
                        // The shortest lap that this program and this link lead to
                        // still leaves more than fits, within the share of the link
                        // that is counted on.
                        let slack = max_blackout.mul_f64(LINK_SHARE) - LAP_OVERHEAD * 4;
                        assert!(end.blackout > slack, "{writer:?} {link}: {end:?}");
                    }
                    decision => panic!("{writer:?} {link}: {decision:?}"),
                }
            }
        }
    }
    assert!(switched > 50 && given_up > 10, "{switched} {given_up}");
}

#[test]
fn a_hot_set_does_not_look_cold_after_the_long_first_lap() {
    // 256 MiB rewritten all the time, seen first over the 7 s of the first lap: in
    // pages per second that is a trickle.
    let mut convergence = Convergence::new(budget(300), COSTS());
    convergence.observe(lap(8 * GIB, 8 * GIB, Duration::from_secs(7)));
    convergence.observe(lap(256 * MIB, 8 * GIB, Duration::from_millis(220)));
    assert!(convergence.expected_blackout() > Duration::from_millis(300));
    assert_eq!(convergence.decide(Duration::from_secs(8)), Decision::Lap);
}

#[test]
fn a_slow_lap_is_not_taken_for_a_slow_link() {
    let mut convergence = Convergence::new(budget(300), COSTS());
    convergence.observe(lap(GIB, GIB, Duration::from_secs(1)));
    let before = convergence.link();
    // Little to send and much to look at.
    convergence.observe(lap(MIB, GIB, Duration::from_millis(100)));
    assert_eq!(convergence.link(), before);
    // And a measurement beats a guess.
    convergence.observe(LapSample {
        link_bytes_per_second: Some(5_000_000_000),
        ..lap(MIB, GIB, Duration::from_millis(100))
    });
    assert_eq!(convergence.link(), 5e9);
}

#[test]
fn a_deadline_that_passes_in_a_lap_is_noticed_in_it() {
    let deadline = Duration::from_secs(30);
    let mut convergence = Convergence::new(until(300, deadline), COSTS());
    assert_eq!(convergence.decide(deadline / 2), Decision::Lap);
    assert_eq!(
        convergence.decide(deadline),
        Decision::GiveUp(Reason::FirstLap { deadline })
    );
    convergence.observe(lap(8 * GIB, 8 * GIB, Duration::from_secs(20)));
    assert_eq!(convergence.decide(deadline / 2), Decision::Lap);
    assert!(matches!(
        convergence.decide(deadline),
        Decision::GiveUp(Reason::Deadline { laps: 1, .. })
    ));
}

#[test]
fn what_is_known_before_the_first_lap_is_the_floor() {
    let convergence = Convergence::new(budget(300), COSTS());
    assert_eq!(convergence.expected_blackout(), COSTS().fixed());
    assert_eq!(convergence.decide(Duration::ZERO), Decision::Lap);
}

#[test]
fn a_container_without_memory_switches() {
    let mut convergence = Convergence::new(budget(300), COSTS());
    for _ in 0..MIN_LAPS {
        convergence.observe(lap(0, 0, Duration::ZERO));
    }
    assert_eq!(convergence.decide(Duration::ZERO), Decision::Switch);
}

fn lap(written: u64, scanned: u64, duration: Duration) -> LapSample {
    LapSample {
        written_bytes: written,
        sent_bytes: written,
        scanned_bytes: scanned,
        duration,
        link_bytes_per_second: None,
    }
}
