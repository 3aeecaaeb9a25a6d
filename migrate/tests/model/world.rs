//! Everything that there is in a migration, and everything that can happen to it.

use std::collections::VecDeque;

use sterna_migrate::arrival::ArrivalState;
use sterna_migrate::commit::CommitState;
use sterna_migrate::{destination, source};

#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) enum ToDestination {
    Hello,
    PrepareSwitch,
    Final,
    Commit,
    Abort,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) enum ToSource {
    Welcome,
    Refused,
    SwitchReady,
    Prepared,
    Running,
    HandedBack,
    Failed,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) enum Tasks {
    /// Nothing of it exists.
    None,
    /// Processes exist and do not run: frozen, or being restored.
    Still,
    /// They run.
    Run,
}

/// One step of an action; an engine can die between any two.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) enum SourceStep {
    Send(ToDestination),
    Ask,
    Freeze,
    Thaw,
    Kill,
    Record(CommitState),
    RemoveRecord,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) enum DestinationStep {
    Send(ToSource),
    Build,
    Run,
    Kill,
    Record(ArrivalState),
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) enum Engine<S> {
    Up(S),
    /// It died, and nobody has acted on it.
    Dead,
    /// It ended, or what it left behind has been dealt with.
    Gone,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, Default)]
pub(crate) struct Session {
    pub(crate) to_destination: VecDeque<ToDestination>,
    pub(crate) to_source: VecDeque<ToSource>,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub(crate) struct World {
    pub(crate) source: Engine<source::State>,
    pub(crate) source_steps: VecDeque<SourceStep>,
    pub(crate) source_tasks: Tasks,
    pub(crate) commit: Option<CommitState>,

    pub(crate) destination: Engine<destination::State>,
    pub(crate) destination_steps: VecDeque<DestinationStep>,
    pub(crate) destination_tasks: Tasks,
    pub(crate) arrival: ArrivalState,
    /// The copy on the destination ran at some time.
    pub(crate) has_run: bool,

    pub(crate) session: Option<Session>,
    /// A session broke and this side has not noticed.
    pub(crate) source_unaware: bool,
    pub(crate) destination_unaware: bool,

    /// An honest message met a state that does not take it.
    pub(crate) protocol_broken: bool,
    pub(crate) breaks_left: u8,
    pub(crate) crashes_left: u8,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) enum Happening {
    SourceGoesOn,
    DestinationGoesOn,
    SourceHears,
    DestinationHears,
    SourceNotices,
    DestinationNotices,
    Source(source::Event),
    Destination(destination::Event),
    SessionBreaks,
    SourceDies,
    DestinationDies,
    SourceRecovers,
    DestinationRecovers,
    DestinationEnds,
}

impl Happening {
    /// Things that need not happen for a migration to end.
    pub(crate) fn is_fault(self) -> bool {
        matches!(
            self,
            Self::SessionBreaks
                | Self::SourceDies
                | Self::DestinationDies
                | Self::Source(source::Event::CancelRequested | source::Event::LocalFailure)
                | Self::Destination(
                    destination::Event::CancelRequested | destination::Event::LocalFailure
                )
        )
    }
}

impl World {
    pub(crate) fn start(breaks: u8, crashes: u8) -> Self {
        Self {
            source: Engine::Up(source::State::START),
            source_steps: VecDeque::new(),
            source_tasks: Tasks::Run,
            commit: None,
            destination: Engine::Up(destination::State::START),
            destination_steps: VecDeque::new(),
            destination_tasks: Tasks::None,
            arrival: ArrivalState::Open,
            has_run: false,
            session: Some(Session {
                to_destination: [ToDestination::Hello].into(),
                to_source: VecDeque::new(),
            }),
            source_unaware: false,
            destination_unaware: false,
            protocol_broken: false,
            breaks_left: breaks,
            crashes_left: crashes,
        }
    }

    pub(crate) fn source_is_over(&self) -> bool {
        match self.source {
            Engine::Up(state) => state.is_terminal() && self.source_steps.is_empty(),
            Engine::Dead => false,
            Engine::Gone => true,
        }
    }

    pub(crate) fn destination_is_over(&self) -> bool {
        match self.destination {
            Engine::Up(state) => state.is_terminal() && self.destination_steps.is_empty(),
            Engine::Dead => false,
            Engine::Gone => true,
        }
    }

    /// The end of every migration.
    pub(crate) fn is_settled(&self) -> bool {
        let here = self.source_tasks == Tasks::Run;
        let there = self.destination_tasks == Tasks::Run;
        let lost = self.arrival == ArrivalState::Ran;
        self.source_is_over()
            && self.destination_is_over()
            && self.commit.is_none()
            && self.source_tasks != Tasks::Still
            && (here != there || lost)
    }

    pub(crate) fn break_session(&mut self) {
        if self.session.take().is_some() {
            self.source_unaware = true;
            self.destination_unaware = true;
        }
    }

    /// The engine takes an event only when it has carried out the last action, unless
    /// that is one that takes long and ends with an event of its own.
    pub(crate) fn source_listens(&self) -> bool {
        use source::State as S;
        let begun = matches!(
            self.source,
            Engine::Up(S::Freezing | S::Committing | S::Undecided | S::Released)
        );
        begun || self.source_steps.is_empty()
    }

    pub(crate) fn destination_listens(&self) -> bool {
        use destination::State as S;
        let begun = matches!(self.destination, Engine::Up(S::Restoring | S::Undoing));
        begun || self.destination_steps.is_empty()
    }

    /// The events that can come of themselves where the machine is.
    pub(crate) fn own_source_events(&self) -> Vec<source::Event> {
        use source::{Event as E, State as S};
        let Engine::Up(state) = self.source else {
            return Vec::new();
        };
        let mut events = vec![E::PhaseTimedOut, E::CancelRequested, E::LocalFailure];
        let idle = self.source_steps.is_empty();
        events.extend(match state {
            S::PreCopying => vec![E::SwitchDecided, E::GaveUp],
            S::Freezing if idle => vec![E::Frozen],
            S::Dumping => vec![E::FinalSent],
            S::Committing if idle => vec![E::CommitRecorded],
            S::Released if idle => vec![E::SourceEnded],
            _ => vec![],
        });
        events
    }

    pub(crate) fn own_destination_events(&self) -> Vec<destination::Event> {
        use destination::{Event as E, State as S};
        let Engine::Up(state) = self.destination else {
            return Vec::new();
        };
        let mut events = vec![E::PhaseTimedOut, E::CancelRequested, E::LocalFailure];
        let tasks = self.destination_tasks;
        events.extend(match state {
            S::Preparing => vec![E::Ready],
            S::Checking => vec![E::Checked],
            S::Restoring if tasks == Tasks::Still => vec![E::LetGo, E::RestoreFailed],
            S::Undoing if tasks == Tasks::Still => vec![E::LetGo],
            S::Undoing => vec![E::RestoreFailed],
            S::Resuming | S::Placed | S::Running if tasks == Tasks::Run => {
                vec![E::Restored, E::Filled]
            }
            _ => vec![],
        });
        events
    }

    pub(crate) fn source_is_up(&self) -> bool {
        matches!(self.source, Engine::Up(state) if !state.is_terminal())
    }

    /// It is over or about to close: messages that cross its last word are dropped.
    pub(crate) fn destination_is_closing(&self) -> bool {
        match self.destination {
            Engine::Up(state) => state.is_terminal(),
            Engine::Dead | Engine::Gone => true,
        }
    }
}
