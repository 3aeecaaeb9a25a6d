//! What happened in a migration, for everyone who asks, whenever they ask.

use std::sync::{Arc, Mutex, PoisonError};

use proto::agent as pb;
use proto::agent::migrate_event::Event;
use proto::engine::progress;
use tokio::sync::watch;

/// Byte counts come several times a second: beyond this many events of a
/// migration only the others are kept. An hour's migration has a third of it.
const BYTES_LIMIT: usize = 50_000;

/// All events of one migration, in order.
#[derive(Debug)]
pub(crate) struct EventLog {
    events: Mutex<Vec<Arc<pb::MigrateEvent>>>,
    /// How many there are, and whether more can come.
    state: watch::Sender<(usize, bool)>,
}

impl EventLog {
    pub(crate) fn new() -> Self {
        Self {
            events: Mutex::default(),
            state: watch::Sender::new((0, false)),
        }
    }

    pub(crate) fn push(&self, event: Event) {
        let bytes_alone = matches!(
            &event,
            Event::Progress(progress) if matches!(progress.event, Some(progress::Event::Bytes(_)))
        );
        let mut events = self.events.lock().unwrap_or_else(PoisonError::into_inner);
        if bytes_alone && events.len() >= BYTES_LIMIT {
            return;
        }
        events.push(Arc::new(pb::MigrateEvent { event: Some(event) }));
        self.state.send_modify(|state| state.0 = events.len());
    }

    /// No more events come.
    pub(crate) fn close(&self) {
        self.state.send_modify(|state| state.1 = true);
    }

    /// The event of that number, waited for; none once all have been seen.
    pub(crate) async fn get(&self, number: usize) -> Option<pb::MigrateEvent> {
        let mut state = self.state.subscribe();
        loop {
            let (length, closed) = *state.borrow_and_update();
            if number < length {
                let events = self.events.lock().unwrap_or_else(PoisonError::into_inner);
                return events
                    .get(number)
                    .map(|event| pb::MigrateEvent::clone(event));
            }
            if closed {
                return None;
            }
            // The sender is in `self`.
            drop(state.changed().await);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn notice(text: &str) -> Event {
        Event::Notice(text.into())
    }

    #[tokio::test]
    async fn a_late_reader_sees_everything_and_an_early_one_waits() {
        let log = Arc::new(EventLog::new());
        log.push(notice("1"));
        let early = tokio::spawn({
            let log = Arc::clone(&log);
            async move { (log.get(0).await, log.get(1).await, log.get(2).await) }
        });
        tokio::task::yield_now().await;
        log.push(notice("2"));
        log.close();
        let (first, second, none) = early.await.unwrap();
        assert_eq!(first.unwrap().event, Some(notice("1")));
        assert_eq!(second.unwrap().event, Some(notice("2")));
        assert_eq!(none, None);
        assert_eq!(log.get(0).await.unwrap().event, Some(notice("1")));
    }

    #[test]
    fn byte_counts_without_end_do_not_fill_the_memory() {
        let log = EventLog::new();
        let bytes = || {
            Event::Progress(proto::engine::Progress {
                at_ms: 0,
                event: Some(progress::Event::Bytes(proto::engine::Bytes::default())),
            })
        };
        for _ in 0..BYTES_LIMIT + 10 {
            log.push(bytes());
        }
        log.push(notice("last"));
        assert_eq!(log.events.lock().unwrap().len(), BYTES_LIMIT + 1);
    }
}
