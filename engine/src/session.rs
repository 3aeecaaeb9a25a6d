//! The sender's end of the session.

use proto::migration as pb;
use proto::migration::destination_message::Message as FromDestination;
use proto::migration::source_message::Message as ToDestination;
use tokio::sync::{mpsc, watch};
use tokio_stream::wrappers::ReceiverStream;

use crate::link::Dialer;
use crate::send_error::SendError;

/// What the destination says, and whether it can still be heard.
#[derive(Debug)]
pub(crate) struct Session {
    to_destination: mpsc::Sender<pb::SourceMessage>,
    from_destination: mpsc::Receiver<FromDestination>,
    lost: watch::Receiver<Option<String>>,
}

impl Session {
    pub(crate) async fn open(dialer: &Dialer) -> Result<Self, SendError> {
        let mut client = dialer.connect().await?;
        let (to_destination, messages) = mpsc::channel(8);
        let mut answers = client
            .session(ReceiverStream::new(messages))
            .await
            .map_err(|status| SendError::Refused(status.message().to_owned()))?
            .into_inner();
        let (heard, from_destination) = mpsc::channel(8);
        let (loss, lost) = watch::channel(None);
        tokio::spawn(async move {
            let reason = loop {
                match answers.message().await {
                    Ok(Some(pb::DestinationMessage {
                        message: Some(message),
                    })) => {
                        if heard.send(message).await.is_err() {
                            return;
                        }
                    }
                    Ok(Some(_)) => break "it sent an empty message".to_owned(),
                    Ok(None) => break "it closed the session".to_owned(),
                    Err(status) => break status.message().to_owned(),
                }
            };
            // Nobody listens any more: then nobody needs to know.
            drop(loss.send(Some(reason)));
            // Keep `heard` open so that `lost`, not an end of messages, is the news.
            heard.closed().await;
        });
        Ok(Self {
            to_destination,
            from_destination,
            lost,
        })
    }

    pub(crate) async fn say(&self, message: ToDestination) -> Result<(), SendError> {
        self.to_destination
            .send(pb::SourceMessage {
                message: Some(message),
            })
            .await
            .map_err(|_| SendError::DestinationLost("the session is closed".into()))
    }

    /// The next message; an end of the session is an error.
    pub(crate) async fn hear(&mut self) -> Result<FromDestination, SendError> {
        tokio::select! {
            biased;
            Some(message) = self.from_destination.recv() => match message {
                FromDestination::Failed(failed) => Err(SendError::DestinationFailed {
                    phase: failed.phase,
                    reason: failed.reason,
                }),
                FromDestination::Refused(refused) => {
                    Err(SendError::Refused(refused.reasons.join("; ")))
                }
                message => Ok(message),
            },
            reason = lost(self.lost.clone()) => Err(SendError::DestinationLost(reason)),
        }
    }
}

async fn lost(mut lost: watch::Receiver<Option<String>>) -> String {
    match lost.wait_for(Option::is_some).await {
        Ok(reason) => reason.clone().unwrap_or_default(),
        Err(_) => "its reader ended".to_owned(),
    }
}
