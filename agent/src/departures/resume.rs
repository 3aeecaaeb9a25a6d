//! A migration that an earlier sternad began.

use nodeapi::{ContainerRecord, RunState};
use proto::agent as pb;
use proto::agent::migrate_event::Event;
use proto::engine::{self as epb, progress};
use tokio::sync::mpsc;

use super::note::Note;
use super::run::conclude;
use super::watch::Watch;
use super::{CancelOrder, Departure};
use crate::node::Node;
use crate::peer::Peer;

/// Watches the engine, if it still runs, and finishes what is left to do.
pub(super) async fn resume(
    node: &Node,
    departure: &Departure,
    note: &Note,
    mut orders: mpsc::Receiver<CancelOrder>,
) {
    tracing::info!("takes a migration up again");
    let peer = Peer::connect(node, &departure.order.destination).await;
    if let Err(failure) = &peer {
        tracing::warn!(
            side = failure.side.name(),
            reason = failure.reason,
            "without the destination"
        );
    }
    let peer = peer.ok();
    let mut watch = Watch::new(node, departure, &mut orders);
    watch.peer.clone_from(&peer);
    if let Some(peer) = &peer {
        let request = pb::HoldRequest {
            migration_id: note.migration_id.clone(),
        };
        // It may have forgotten, or be new itself.
        watch.hold = peer
            .client()
            .hold(request)
            .await
            .ok()
            .map(tonic::Response::into_inner);
    }
    let finished = match watch.next_engine().await {
        Some((engine, events)) => watch.follow(engine, events).await,
        None if never_began(node, note) => epb::Finished {
            outcome: "failed".into(),
            reason: "sternad was restarted before it began".into(),
            ..Default::default()
        },
        None => watch.without_a_word("there is no engine").await,
    };
    let finished = conclude(node, departure, note, peer, finished).await;
    tracing::info!(
        outcome = finished.outcome,
        phase = finished.phase,
        side = finished.side,
        reason = finished.reason,
        "ends"
    );
    let progress = epb::Progress {
        at_ms: 0,
        event: Some(progress::Event::Finished(finished)),
    };
    departure.events.push(Event::Progress(progress));
}

/// The container runs here as before: whatever was begun came to nothing.
fn never_began(node: &Node, note: &Note) -> bool {
    let record = ContainerRecord::read(&node.run_dir, &note.record.namespace, &note.record.id);
    matches!(record, Ok(Some(record)) if record.state == RunState::Running && record.pid == note.record.pid)
}
