//! What each happening makes of the world: both machines, their actions taken apart
//! into single steps, and the promises.

use std::collections::VecDeque;

use stateright::{Model, Property};
use sterna_migrate::arrival::{self, Aftermath, ArrivalRecord, ArrivalState};
use sterna_migrate::commit::{
    self, Answer, CommitRecord, CommitState, Format, InitProcess, Recovery,
};
use sterna_migrate::{destination, source};

use crate::world::{
    DestinationStep, Engine, Happening, Session, SourceStep, Tasks, ToDestination, ToSource, World,
};

pub(crate) const TWO_COPIES: &str = "never two copies run";
pub(crate) const BACK_IN_TIME: &str = "what ran there does not run here again";
pub(crate) const SURVIVAL: &str = "a copy survives, or it was let go there";
pub(crate) const ON_RECORD: &str = "what runs there is on record";
pub(crate) const HONEST: &str = "honest peers keep the protocol";

/// Mistakes that the model must catch.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Mistake {
    /// The source thaws when it loses the session after the commit.
    ThawOnLoss,
    /// The source lets the container go before it takes the record back.
    ThawBeforeRevoking,
    /// The source sends `Commit` before the record is durable.
    SendBeforeRecording,
    /// The source kills its copy when it has waited long enough.
    KillOnTimeout,
    /// The destination restores when it has waited long enough for a commit.
    RestoreOnTimeout,
    /// The destination lets the tasks go before it writes that down.
    RunBeforeRecording,
    /// A copy whose engine died is handed back although it had run.
    FenceWhatRan,
    /// The destination forgets a prepared container when it loses the session.
    ForgetOnLoss,
}

pub(crate) struct Migration {
    pub(crate) breaks: u8,
    pub(crate) crashes: u8,
    pub(crate) mistake: Option<Mistake>,
}

impl Migration {
    pub(crate) fn sound(breaks: u8, crashes: u8) -> Self {
        Self {
            breaks,
            crashes,
            mistake: None,
        }
    }

    fn errs(&self, mistake: Mistake) -> bool {
        self.mistake == Some(mistake)
    }

    fn source_step(
        &self,
        state: source::State,
        event: source::Event,
    ) -> Option<(source::State, source::Action)> {
        use source::{Action as A, Event as E, State as S};
        match (state, event) {
            (S::Committed, E::PeerLost) if self.errs(Mistake::ThawOnLoss) => {
                Some((S::Stayed, A::ThawAndDisarm))
            }
            (S::Committed, E::PhaseTimedOut) if self.errs(Mistake::KillOnTimeout) => {
                Some((S::Released, A::KillSource))
            }
            _ => source::step(state, event).ok(),
        }
    }

    fn source_steps(&self, action: source::Action) -> Vec<SourceStep> {
        use SourceStep::*;
        use source::Action as A;
        match action {
            A::Nothing | A::StartLaps | A::Decide | A::SendFinal | A::RefuseCancel => vec![],
            A::SendPrepareSwitch => vec![Send(ToDestination::PrepareSwitch)],
            A::Freeze => vec![Freeze],
            A::RecordCommit if self.errs(Mistake::SendBeforeRecording) => {
                vec![Send(ToDestination::Commit), Record(CommitState::Committing)]
            }
            A::RecordCommit => vec![Record(CommitState::Committing)],
            A::SendCommit if self.errs(Mistake::SendBeforeRecording) => vec![],
            A::SendCommit => vec![Send(ToDestination::Commit)],
            A::AskAgain => vec![Ask],
            A::KillSource => vec![Record(CommitState::Released), Kill],
            A::Finish => vec![RemoveRecord],
            A::Leave | A::Disarm => vec![Send(ToDestination::Abort)],
            A::ThawAndDisarm => vec![Thaw, Send(ToDestination::Abort)],
            A::RevokeAndThaw if self.errs(Mistake::ThawBeforeRevoking) => {
                vec![Thaw, RemoveRecord, Send(ToDestination::Abort)]
            }
            A::RevokeAndThaw => vec![RemoveRecord, Thaw, Send(ToDestination::Abort)],
            A::ThawAfterHandBack => vec![Record(CommitState::HandedBack), Thaw, RemoveRecord],
        }
    }

    fn destination_step(
        &self,
        state: destination::State,
        event: destination::Event,
    ) -> Option<(destination::State, destination::Action)> {
        use destination::{Action as A, Event as E, State as S};
        match (state, event) {
            (S::Prepared, E::PhaseTimedOut) if self.errs(Mistake::RestoreOnTimeout) => {
                Some((S::Restoring, A::Restore))
            }
            (S::Prepared, E::PeerLost) if self.errs(Mistake::ForgetOnLoss) => {
                Some((S::Failed, A::Nothing))
            }
            _ => destination::step(state, event).ok(),
        }
    }

    fn destination_steps(&self, action: destination::Action) -> Vec<DestinationStep> {
        use DestinationStep::*;
        use destination::Action as A;
        match action {
            A::Nothing
            | A::GetReady
            | A::Check
            | A::AwaitSource
            | A::Finish
            | A::KeepServing
            | A::RefuseCancel => vec![],
            A::SendWelcome => vec![Send(ToSource::Welcome)],
            A::SendRefused => vec![Record(ArrivalState::Fenced), Send(ToSource::Refused)],
            A::SendSwitchReady => vec![Send(ToSource::SwitchReady)],
            A::SendPrepared => vec![Send(ToSource::Prepared)],
            A::Restore => vec![Build],
            A::RecordRan if self.errs(Mistake::RunBeforeRecording) => {
                vec![Run, Record(ArrivalState::Ran)]
            }
            A::RecordRan => vec![Record(ArrivalState::Ran), Run],
            A::SendRunning => vec![Send(ToSource::Running)],
            A::KillCopy => vec![Kill],
            A::Discard => vec![Record(ArrivalState::Fenced), Send(ToSource::Failed)],
            A::FenceAndHandBack => {
                vec![Record(ArrivalState::Fenced), Send(ToSource::HandedBack)]
            }
            A::SendHandedBack => vec![Send(ToSource::HandedBack)],
        }
    }

    /// Feeds the source's machine; false: it does not take the event.
    fn feed_source(&self, world: &mut World, event: source::Event) -> bool {
        let Engine::Up(state) = world.source else {
            return false;
        };
        let Some((next, action)) = self.source_step(state, event) else {
            return false;
        };
        world.source = Engine::Up(next);
        let steps = self.source_steps(action);
        // An action that does something takes the place of what is left of the last.
        if !steps.is_empty() {
            world.source_steps = steps.into();
        }
        true
    }

    fn feed_destination(&self, world: &mut World, event: destination::Event) -> bool {
        let Engine::Up(state) = world.destination else {
            return false;
        };
        let Some((next, action)) = self.destination_step(state, event) else {
            return false;
        };
        world.destination = Engine::Up(next);
        let steps = self.destination_steps(action);
        if !steps.is_empty() {
            world.destination_steps = steps.into();
        }
        true
    }
}

fn commit_record(state: CommitState) -> CommitRecord {
    CommitRecord {
        format: Format::CURRENT,
        migration_id: "m".into(),
        namespace: "n".into(),
        container_id: "c".into(),
        destination_node: "b".into(),
        destination_address: "b:1".into(),
        ticket_id: "t".into(),
        init: InitProcess {
            pid: 2,
            start_ticks: 1,
        },
        state,
    }
}

fn arrival_record(state: ArrivalState) -> ArrivalRecord {
    ArrivalRecord {
        format: Format::CURRENT,
        migration_id: "m".into(),
        ticket_id: "t".into(),
        source_node: "a".into(),
        namespace: "n".into(),
        container_id: "c".into(),
        state,
    }
}

fn source_hears(message: ToSource) -> source::Event {
    use source::Event as E;
    match message {
        ToSource::Welcome => E::Welcomed,
        ToSource::Refused => E::Refused,
        ToSource::SwitchReady => E::DestinationReady,
        ToSource::Prepared => E::Prepared,
        ToSource::Running => E::Running,
        ToSource::HandedBack => E::HandedBack,
        ToSource::Failed => E::DestinationFailed,
    }
}

fn destination_hears(message: ToDestination) -> destination::Event {
    use destination::Event as E;
    match message {
        ToDestination::Hello => E::Hello,
        ToDestination::PrepareSwitch => E::PrepareSwitch,
        ToDestination::Final => E::Final,
        ToDestination::Commit => E::Commit,
        ToDestination::Abort => E::Abort,
    }
}

impl Migration {
    fn source_goes_on(&self, world: &mut World) -> Option<()> {
        match world.source_steps.pop_front()? {
            SourceStep::Send(message) => {
                if let Some(session) = &mut world.session {
                    session.to_destination.push_back(message);
                }
            }
            SourceStep::Ask => {
                world.break_session();
                world.source_unaware = false;
                match world.destination {
                    Engine::Up(_) => {
                        world.session = Some(Session {
                            to_destination: [ToDestination::Commit].into(),
                            to_source: VecDeque::new(),
                        });
                    }
                    // sternad answers from the record.
                    Engine::Dead | Engine::Gone => {
                        let told = match arrival::answer(Some(&arrival_record(world.arrival))) {
                            Answer::Running => Some(ToSource::Running),
                            Answer::HandedBack => Some(ToSource::HandedBack),
                            Answer::NotYet | Answer::Unknown => None,
                        };
                        world.session = told.map(|told| Session {
                            to_destination: VecDeque::new(),
                            to_source: [told].into(),
                        });
                        world.source_unaware = told.is_none();
                    }
                }
            }
            SourceStep::Freeze => world.source_tasks = Tasks::Still,
            SourceStep::Thaw => {
                if world.source_tasks == Tasks::Still {
                    world.source_tasks = Tasks::Run;
                }
            }
            SourceStep::Kill => world.source_tasks = Tasks::None,
            SourceStep::Record(state) => world.commit = Some(state),
            SourceStep::RemoveRecord => world.commit = None,
        }
        Some(())
    }

    fn destination_goes_on(&self, world: &mut World) -> Option<()> {
        match world.destination_steps.pop_front()? {
            DestinationStep::Send(message) => {
                if let Some(session) = &mut world.session {
                    session.to_source.push_back(message);
                }
            }
            DestinationStep::Build => world.destination_tasks = Tasks::Still,
            DestinationStep::Run => {
                world.destination_tasks = Tasks::Run;
                world.has_run = true;
            }
            DestinationStep::Kill => world.destination_tasks = Tasks::None,
            DestinationStep::Record(state) => world.arrival = state,
        }
        if world.destination == Engine::Dead && world.destination_steps.is_empty() {
            world.destination = Engine::Gone;
        }
        Some(())
    }

    fn source_recovers(&self, world: &mut World) {
        let record = world.commit.map(commit_record);
        let (state, steps) = match commit::after_restart(record.as_ref(), None) {
            Recovery::Thaw => (
                source::State::Stayed,
                vec![SourceStep::Thaw, SourceStep::RemoveRecord],
            ),
            Recovery::Kill => (source::State::Released, vec![SourceStep::Kill]),
            Recovery::KeepFrozenAndAsk => (source::State::Undecided, vec![SourceStep::Ask]),
        };
        world.source = Engine::Up(state);
        world.source_steps = steps.into();
    }

    fn destination_recovers(&self, world: &mut World) {
        let remembered = match self.errs(Mistake::FenceWhatRan) {
            true => ArrivalState::Open,
            false => world.arrival,
        };
        world.destination_steps = match arrival::after_engine_death(remembered) {
            Aftermath::KillThenFence => [
                DestinationStep::Kill,
                DestinationStep::Record(ArrivalState::Fenced),
            ]
            .into(),
            Aftermath::Kill => [DestinationStep::Kill].into(),
        };
    }
}

impl Model for Migration {
    type State = World;
    type Action = Happening;

    fn init_states(&self) -> Vec<World> {
        vec![World::start(self.breaks, self.crashes)]
    }

    fn actions(&self, world: &World, happenings: &mut Vec<Happening>) {
        use Happening as H;
        if !world.source_steps.is_empty() {
            happenings.push(H::SourceGoesOn);
        }
        if !world.destination_steps.is_empty() {
            happenings.push(H::DestinationGoesOn);
        }
        let (source_listens, destination_listens) =
            (world.source_listens(), world.destination_listens());
        let (mut for_source, mut for_destination) = (false, false);
        if let Some(session) = &world.session {
            for_source = !session.to_source.is_empty();
            for_destination = !session.to_destination.is_empty();
        }
        if for_source && source_listens {
            happenings.push(H::SourceHears);
        }
        if for_destination && destination_listens {
            happenings.push(H::DestinationHears);
        }
        // A side that is over closes the session, after everything it sent.
        let closed = world.session.is_some();
        let loss = world.source_unaware || (closed && !for_source && world.destination_is_over());
        if loss && source_listens {
            happenings.push(H::SourceNotices);
        }
        let loss =
            world.destination_unaware || (closed && !for_destination && world.source_is_over());
        if loss && destination_listens {
            happenings.push(H::DestinationNotices);
        }
        if source_listens {
            happenings.extend(world.own_source_events().into_iter().map(H::Source));
        }
        if destination_listens {
            let events = world.own_destination_events();
            happenings.extend(events.into_iter().map(H::Destination));
        }
        if world.breaks_left > 0 && world.session.is_some() {
            happenings.push(H::SessionBreaks);
        }
        if world.crashes_left > 0 {
            if matches!(world.source, Engine::Up(_)) && !world.source_is_over() {
                happenings.push(H::SourceDies);
            }
            if matches!(world.destination, Engine::Up(_)) && !world.destination_is_over() {
                happenings.push(H::DestinationDies);
            }
        }
        if world.source == Engine::Dead {
            happenings.push(H::SourceRecovers);
        }
        if world.destination == Engine::Dead && world.destination_steps.is_empty() {
            happenings.push(H::DestinationRecovers);
        }
        if matches!(world.destination, Engine::Up(_)) && world.destination_is_over() {
            happenings.push(H::DestinationEnds);
        }
    }

    fn next_state(&self, last: &World, happening: Happening) -> Option<World> {
        use Happening as H;
        let mut world = last.clone();
        match happening {
            H::SourceGoesOn => self.source_goes_on(&mut world)?,
            H::DestinationGoesOn => self.destination_goes_on(&mut world)?,
            H::SourceHears => {
                let message = world.session.as_mut()?.to_source.pop_front()?;
                if !self.feed_source(&mut world, source_hears(message)) {
                    world.protocol_broken |= !last.source_is_over() && last.source_is_up();
                    world.break_session();
                }
            }
            H::DestinationHears => {
                let message = world.session.as_mut()?.to_destination.pop_front()?;
                if !self.feed_destination(&mut world, destination_hears(message)) {
                    world.protocol_broken |= !last.destination_is_closing();
                    world.break_session();
                }
            }
            H::SourceNotices => {
                world.source_unaware = false;
                if world.session.take().is_some() {
                    world.destination_unaware = true;
                }
                self.feed_source(&mut world, source::Event::PeerLost);
            }
            H::DestinationNotices => {
                // The notice may be of an old session, while a new one is open.
                if !world.destination_unaware {
                    world.session = None;
                }
                world.destination_unaware = false;
                self.feed_destination(&mut world, destination::Event::PeerLost);
            }
            H::Source(event) => {
                // The account is the last thing sent before the event.
                if event == source::Event::FinalSent
                    && let Some(session) = &mut world.session
                {
                    session.to_destination.push_back(ToDestination::Final);
                }
                if !self.feed_source(&mut world, event) {
                    return None;
                }
            }
            H::Destination(event) => {
                // runc says so when nothing is left.
                if event == destination::Event::RestoreFailed {
                    world.destination_tasks = Tasks::None;
                }
                if !self.feed_destination(&mut world, event) {
                    return None;
                }
            }
            H::SessionBreaks => {
                world.breaks_left -= 1;
                world.break_session();
            }
            H::SourceDies => {
                world.crashes_left -= 1;
                world.source = Engine::Dead;
                world.source_steps.clear();
                world.break_session();
                world.source_unaware = false;
            }
            H::DestinationDies => {
                world.crashes_left -= 1;
                world.destination = Engine::Dead;
                world.destination_steps.clear();
                world.break_session();
                world.destination_unaware = false;
            }
            H::SourceRecovers => self.source_recovers(&mut world),
            H::DestinationRecovers => self.destination_recovers(&mut world),
            H::DestinationEnds => {
                world.destination = Engine::Gone;
                world.destination_unaware = false;
                if world.session.take().is_some() {
                    world.source_unaware = true;
                }
            }
        }
        Some(world)
    }

    fn properties(&self) -> Vec<Property<Self>> {
        vec![
            Property::always(TWO_COPIES, |_: &Self, world: &World| {
                world.source_tasks != Tasks::Run || world.destination_tasks != Tasks::Run
            }),
            Property::always(
                "what ran there does not run here again",
                |_, world: &World| !world.has_run || world.source_tasks != Tasks::Run,
            ),
            Property::always(
                "a copy survives, or it was let go there",
                |_, world: &World| {
                    world.source_tasks != Tasks::None || world.arrival == ArrivalState::Ran
                },
            ),
            Property::always(ON_RECORD, |_, world: &World| {
                !world.has_run || world.arrival == ArrivalState::Ran
            }),
            Property::always(HONEST, |_, world: &World| !world.protocol_broken),
            Property::sometimes("it migrates", |_, world: &World| {
                world.is_settled() && world.destination_tasks == Tasks::Run
            }),
            Property::sometimes("it is handed back", |_, world: &World| {
                world.commit == Some(CommitState::HandedBack)
            }),
            Property::sometimes("it stays", |_, world: &World| {
                world.is_settled() && world.source_tasks == Tasks::Run
            }),
        ]
    }
}
