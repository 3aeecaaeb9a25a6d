//! Freeze: what is left is sent while the container stands still.

use std::sync::Arc;
use std::time::Instant;

use criu::Action;
use migrate::source::Event;
use pages::{Claims, LapReport};
use proto::migration as pb;
use proto::migration::destination_message::Message as FromDestination;
use proto::migration::source_message::Message as ToDestination;

use super::Sender;
use crate::container::Container;
use crate::files::TreeSender;
use crate::link::Dialer;
use crate::send_error::SendError;

impl Sender {
    /// Stops the container and sends what is left: last pages and files while
    /// CRIU dumps everything else, then CRIU's images, then the account.
    pub(super) async fn freeze(
        &mut self,
        dialer: &Dialer,
        container: &Container,
    ) -> Result<(), SendError> {
        let images_client = dialer.connect().await?;
        self.session()?
            .say(ToDestination::Freezing(pb::Freezing {}))
            .await?;
        self.advance(Event::SwitchDecided)?;
        self.figures.frozen_at = Some(Instant::now());
        self.frozen = Some(container.freeze().await?);
        self.advance(Event::Frozen)?;

        let processes = container.processes()?;
        let claims = self
            .with_tracker(move |tracker, _| {
                tracker
                    .claim(&processes)
                    .map(Arc::new)
                    .map_err(SendError::Track)
            })
            .await?;
        let mut dump = self.dump.take().ok_or(SendError::Worker)?;
        dump.claim(Arc::clone(&claims));
        let frozen_at = Instant::now();
        dump.answer(true)?;
        let dumping = async {
            let dumped = dump.until(Action::PostDump).await;
            (dump, dumped, frozen_at.elapsed())
        };
        let copying = async {
            let report = self.final_lap(Arc::clone(&claims)).await;
            let layer = self.layer_pass(container, true).await;
            report.and_then(|report| layer.map(|()| report))
        };
        let (dumped, copied) = tokio::join!(dumping, copying);
        let (dump, dumped, dump_time) = dumped;
        self.dump = Some(dump);
        self.figures.dump = dump_time;
        let report = copied?;
        dumped?;
        self.figures.final_lap = report.duration;
        self.figures.final_pages = report.pages;

        let mut images = TreeSender::open(images_client, pb::FileTree::Images, &self.work).await?;
        let (images, sent) = tokio::task::spawn_blocking(move || {
            let sent = images.pass(true);
            (images, sent)
        })
        .await
        .map_err(|_| SendError::Worker)?;
        sent?;
        // Links that CRIU made for files that were unlinked but open.
        if self.work.join("remap-fpath.img").exists() {
            self.layer_pass(container, true).await?;
        }
        let mut images = images;
        images.flush_later().await?;
        if let Some(layer) = &mut self.layer {
            layer.flush_later().await?;
        }
        self.figures.image_bytes = images.bytes();
        let streams = self.streams()?;
        let streams = streams.lock().await;
        self.figures.sent_bytes = streams.bytes();
        let account = pb::Final {
            streams: streams.totals(),
            trees: [Some(&images), self.layer.as_ref()]
                .into_iter()
                .flatten()
                .map(TreeSender::total)
                .collect(),
            spaces: spaces(&claims),
        };
        drop(streams);
        let session = self.session.as_mut().ok_or(SendError::Worker)?;
        session.say(ToDestination::Final(account)).await?;
        self.advance(Event::FinalSent)?;
        let session = self.session()?;
        match session.hear().await? {
            FromDestination::Prepared(prepared) => {
                tracing::info!(
                    pages = prepared.staged_pages,
                    "the destination has everything"
                );
            }
            _ => return Err(SendError::OutOfTurn("something before prepared")),
        }
        self.advance(Event::Prepared)?;
        Ok(())
    }

    pub(super) async fn final_lap(&mut self, claims: Arc<Claims>) -> Result<LapReport, SendError> {
        self.with_tracker(move |tracker, streams| {
            tracker
                .final_lap(&claims, streams)
                .map_err(SendError::Track)
        })
        .await
    }
}

fn spaces(claims: &Claims) -> Vec<pb::Space> {
    claims
        .spaces()
        .map(|(space, ranges)| pb::Space {
            space: space.0,
            ranges: ranges
                .iter()
                .map(|range| pb::Range {
                    start: range.start,
                    end: range.end,
                })
                .collect(),
        })
        .collect()
}
