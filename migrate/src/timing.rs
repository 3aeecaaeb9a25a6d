//! Phase durations, freeze and blackout, out of time stamps.

use std::time::Duration;

use crate::phase::Phase;

/// A moment of a migration as the source sees it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Moment {
    /// A phase begins; [`Phase::Freeze`] begins when the freezer is asked.
    Begun(Phase),
    /// All tasks stand still.
    Frozen,
    /// The final pages are read and handed to the streams.
    FinalLapDone,
    /// CRIU's images are complete.
    DumpDone,
    /// `Prepared` came.
    Prepared,
    /// `Running` came.
    Running,
    /// The container runs here again.
    Thawed,
    /// The end, whatever it was.
    Ended,
}

/// What happened when, since the start of the migration.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Timeline {
    marks: Vec<(Moment, Duration)>,
}

impl Timeline {
    /// Nothing has happened.
    pub fn new() -> Self {
        Self::default()
    }

    /// Notes that `moment` was `at` after the start. The first time counts: a phase
    /// that is entered again goes on.
    pub fn mark(&mut self, moment: Moment, at: Duration) {
        if self.at(moment).is_none() {
            self.marks.push((moment, at));
        }
    }

    /// When it was.
    pub fn at(&self, moment: Moment) -> Option<Duration> {
        self.marks
            .iter()
            .find(|(marked, _)| *marked == moment)
            .map(|&(_, at)| at)
    }

    /// How long a phase took: until the next one began, or the end; none where it
    /// did not begin or has not ended.
    pub fn phase(&self, phase: Phase) -> Option<Duration> {
        let begun = self.at(Moment::Begun(phase))?;
        let end = Phase::ALL
            .into_iter()
            .filter(|later| *later > phase)
            .find_map(|later| self.at(Moment::Begun(later)))
            .or(self.at(Moment::Ended))?;
        Some(end.saturating_sub(begun))
    }

    /// The source's part of the blackout: from asking the freezer until the
    /// destination had everything (`Prepared`), or until the thaw.
    pub fn freeze(&self) -> Option<Duration> {
        self.since_freeze(Moment::Prepared)
            .or(self.since_freeze(Moment::Thawed))
    }

    /// From asking the freezer until `Running` came or the container was thawed: an
    /// upper bound of the time in which it ran nowhere, by one clock.
    pub fn blackout(&self) -> Option<Duration> {
        self.since_freeze(Moment::Running)
            .or(self.since_freeze(Moment::Thawed))
    }

    /// From the start to the end.
    pub fn total(&self) -> Option<Duration> {
        self.at(Moment::Ended)
    }

    /// From asking the freezer to `moment`.
    pub fn since_freeze(&self, moment: Moment) -> Option<Duration> {
        let begun = self.at(Moment::Begun(Phase::Freeze))?;
        Some(self.at(moment)?.saturating_sub(begun))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MS: fn(u64) -> Duration = Duration::from_millis;

    fn until_frozen() -> Timeline {
        let mut timeline = Timeline::new();
        timeline.mark(Moment::Begun(Phase::Negotiate), MS(0));
        timeline.mark(Moment::Begun(Phase::Prepare), MS(10));
        timeline.mark(Moment::Begun(Phase::PreCopy), MS(40));
        timeline.mark(Moment::Begun(Phase::Freeze), MS(1000));
        timeline.mark(Moment::Frozen, MS(1005));
        timeline
    }

    #[test]
    fn a_migration_that_arrived_has_all_its_durations() {
        let mut timeline = until_frozen();
        timeline.mark(Moment::FinalLapDone, MS(1020));
        timeline.mark(Moment::DumpDone, MS(1050));
        timeline.mark(Moment::Prepared, MS(1060));
        timeline.mark(Moment::Begun(Phase::Commit), MS(1060));
        timeline.mark(Moment::Begun(Phase::Resume), MS(1061));
        timeline.mark(Moment::Running, MS(1140));
        timeline.mark(Moment::Ended, MS(1200));

        let took: Vec<_> = Phase::ALL.map(|phase| timeline.phase(phase)).into();
        assert_eq!(took, [10, 30, 960, 60, 1, 139].map(|ms| Some(MS(ms))));
        assert_eq!(timeline.freeze(), Some(MS(60)));
        assert_eq!(timeline.blackout(), Some(MS(140)));
        assert_eq!(timeline.since_freeze(Moment::DumpDone), Some(MS(50)));
        assert_eq!(timeline.total(), Some(MS(1200)));
    }

    #[test]
    fn a_migration_that_failed_in_the_freeze_counts_until_the_thaw() {
        let mut timeline = until_frozen();
        timeline.mark(Moment::Thawed, MS(1030));
        timeline.mark(Moment::Ended, MS(1031));
        assert_eq!(timeline.freeze(), Some(MS(30)));
        assert_eq!(timeline.blackout(), Some(MS(30)));
        assert_eq!(timeline.phase(Phase::Freeze), Some(MS(31)));
        assert_eq!(timeline.phase(Phase::Commit), None);
    }

    #[test]
    fn a_migration_that_never_froze_has_no_blackout() {
        let mut timeline = Timeline::new();
        timeline.mark(Moment::Begun(Phase::Negotiate), MS(0));
        assert_eq!(timeline.phase(Phase::Negotiate), None);
        timeline.mark(Moment::Ended, MS(7));
        assert_eq!(timeline.phase(Phase::Negotiate), Some(MS(7)));
        assert_eq!((timeline.freeze(), timeline.blackout()), (None, None));
    }

    #[test]
    fn a_moment_is_marked_once() {
        let mut timeline = until_frozen();
        timeline.mark(Moment::Frozen, MS(9999));
        assert_eq!(timeline.at(Moment::Frozen), Some(MS(1005)));
    }
}
