//! Freeze: what is left is sent while the container stands still.

use std::sync::Arc;
use std::sync::mpsc::{self, RecvTimeoutError};
use std::time::{Duration, Instant};

use criu::Action;
use migrate::source::Event;
use pages::Claims;
use proto::migration as pb;
use proto::migration::destination_message::Message as FromDestination;
use proto::migration::source_message::Message as ToDestination;

use super::Sender;
use crate::container::Container;
use crate::files::{Tree, TreeSender};
use crate::link::Dialer;
use crate::send_error::SendError;
use crate::session::Session;

impl Sender {
    /// Stops the container and sends what is left: last pages and files while
    /// CRIU dumps everything else, then CRIU's images, then the account.
    pub(super) async fn freeze(
        &mut self,
        dialer: &Dialer,
        container: &Container,
    ) -> Result<(), SendError> {
        let images_client = dialer.connect().await?;
        let images = TreeSender::open(images_client, Tree::Images, &self.work).await?;
        self.advance(Event::SwitchDecided)?;
        let begun = Instant::now();
        self.figures.frozen_at = Some(begun);
        self.frozen = Some(container.freeze()?);
        self.advance(Event::Frozen)?;
        self.session()?
            .say(ToDestination::Freezing(pb::Freezing {}))
            .await?;

        let claims = self.copier()?.claim(container.processes()?).await?;
        self.read_filters().await?;
        self.figures.claim = begun.elapsed();
        let images = self.dump_and_copy(container, &claims, images).await?;
        self.figures.image_bytes = images.bytes();
        self.figures.sent_bytes = self.copier()?.sent_bytes().await?;
        let account = self
            .copier()?
            .account(images.total(), spaces(&claims))
            .await?;
        self.session()?.say(ToDestination::Final(account)).await?;
        self.figures.images = begun
            .elapsed()
            .saturating_sub(self.figures.claim + self.figures.dump);
        self.advance(Event::FinalSent)?;
        match self.session()?.hear().await? {
            FromDestination::Prepared(prepared) => {
                let pages = prepared.staged_pages;
                tracing::info!(pages, "the destination has everything");
            }
            _ => return Err(SendError::OutOfTurn("something before prepared")),
        }
        self.advance(Event::Prepared)
    }

    /// Side by side: CRIU dumps everything but memory, its images, the last pages
    /// and files go out, and the container's place on the network changes hands.
    async fn dump_and_copy(
        &mut self,
        container: &Container,
        claims: &Arc<Claims>,
        images: TreeSender,
    ) -> Result<TreeSender, SendError> {
        let begun = Instant::now();
        let (Some(dump), Some(copier), Some(session)) =
            (&mut self.dump, &self.copier, &mut self.session)
        else {
            return Err(SendError::Worker);
        };
        dump.claim(Arc::clone(claims), self.seccomp.clone());
        dump.answer(true)?;
        let processes = container.processes()?;
        let (finished, dumped) = mpsc::channel();
        let sending = send_images(images, dumped);
        let dumping = async {
            dump.until(Action::PostDump).await?;
            // Whoever is gone has failed, which is heard elsewhere.
            finished.send(()).ok();
            Ok::<_, SendError>(begun.elapsed())
        };
        let copying = async {
            let report = copier.final_lap(Arc::clone(claims)).await?;
            // CRIU may be making links for files that are open but have no name,
            // so that nothing may be missing only later.
            let layer_bytes = copier.files_pass(processes.clone(), false).await?;
            Ok((report, layer_bytes))
        };
        let handing_over = hand_over(session, self.job.network.as_ref());
        let (dumped, (report, layer_bytes), (), images) =
            tokio::try_join!(dumping, copying, handing_over, sending)?;
        self.figures.dump = dumped;
        self.figures.final_lap = report.duration;
        self.figures.final_pages = report.pages;
        self.figures.layer_bytes = layer_bytes;
        if self.work.join(LINK_REMAPS).exists() {
            self.figures.layer_bytes = copier.files_pass(processes, true).await?;
        }
        Ok(images)
    }
}

/// How long between two looks at CRIU's images while it makes them.
const IMAGES_EVERY: Duration = Duration::from_millis(10);

/// CRIU's image of the links that it made for files without a name.
const LINK_REMAPS: &str = "remap-fpath.img";

/// Lets the destination take the container's place on the network before CRIU
/// locks it here: what clients send from now on is kept there.
async fn hand_over(
    session: &mut Session,
    network: Option<&network::Attachment>,
) -> Result<(), SendError> {
    match session.hear().await? {
        FromDestination::Holding(_) => {}
        _ => return Err(SendError::OutOfTurn("something before holding")),
    }
    if let Some(network) = network {
        network::detach(network).await.map_err(SendError::Network)?;
        session
            .say(ToDestination::Detached(pb::Detached {}))
            .await?;
    }
    Ok(())
}

/// Sends CRIU's images while they are made, and what is left when it has
/// `finished`.
async fn send_images(
    mut images: TreeSender,
    finished: mpsc::Receiver<()>,
) -> Result<TreeSender, SendError> {
    tokio::task::spawn_blocking(move || {
        loop {
            match finished.recv_timeout(IMAGES_EVERY) {
                Ok(()) => break,
                Err(RecvTimeoutError::Timeout) => drop(images.pass(false)?),
                // The freeze is being undone.
                Err(RecvTimeoutError::Disconnected) => return Err(SendError::Worker),
            }
        }
        images.pass(true)?;
        images.flush_later()?;
        Ok(images)
    })
    .await
    .unwrap_or(Err(SendError::Worker))
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
