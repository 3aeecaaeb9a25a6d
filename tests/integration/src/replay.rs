//! A client that uses a ticket which was given to somebody else.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::Duration;

use hyper_util::rt::TokioIo;
use identity::NodeIdentity;
use nodeapi::{Incoming, Ticket};
use proto::migration as pb;
use proto::migration::destination_message::Message as Answer;
use proto::migration::migration_client::MigrationClient;
use rustls_pki_types::ServerName;
use tokio::net::TcpStream;
use tokio_rustls::TlsConnector;
use tonic::Request;
use tonic::transport::Endpoint;

use crate::node::Node;
use crate::wait::eventually;

/// Until the other end has answered in one way or another.
const PATIENCE: Duration = Duration::from_secs(20);

/// Looks for the permission of the next container that comes to a node.
#[derive(Debug)]
pub struct TicketThief {
    thread: JoinHandle<Option<Incoming>>,
    stop: Arc<AtomicBool>,
    node: Node,
}

impl TicketThief {
    /// Looks from now on: the permission is there for moments only.
    pub fn lurk(node: &Node, container: &str) -> Self {
        let path = node
            .root()
            .join(format!("run/sterna/incoming/default/{container}.json"));
        let stop = Arc::new(AtomicBool::new(false));
        let seen = Arc::clone(&stop);
        let thread = std::thread::spawn(move || {
            while !seen.load(Ordering::Relaxed) {
                let found = std::fs::read(&path).ok();
                if let Some(incoming) = found.and_then(|text| serde_json::from_slice(&text).ok()) {
                    return Some(incoming);
                }
                std::thread::sleep(Duration::from_micros(200));
            }
            None
        });
        Self {
            thread,
            stop,
            node: node.clone(),
        }
    }

    /// What was found, once the container is on its way.
    #[track_caller]
    pub fn catch(self) -> StolenTicket {
        eventually("the ticket is found", || {
            self.thread.is_finished().then_some(())
        });
        self.stop.store(true, Ordering::Relaxed);
        let incoming = self.thread.join().ok().flatten().expect("a ticket");
        StolenTicket {
            migration_id: incoming.migration_id,
            ticket: incoming.ticket,
            source: incoming.source_node,
            node: self.node,
        }
    }
}

/// A ticket with its secret.
#[derive(Debug)]
pub struct StolenTicket {
    migration_id: String,
    ticket: Ticket,
    source: String,
    node: Node,
}

impl StolenTicket {
    /// The same with another secret.
    #[must_use]
    pub fn with_wrong_secret(&self) -> Self {
        let mut ticket = self.ticket.clone();
        ticket.secret = ticket.secret.chars().rev().collect();
        Self {
            migration_id: self.migration_id.clone(),
            ticket,
            source: self.source.clone(),
            node: self.node.clone(),
        }
    }

    /// Tries to begin a migration with it, with the certificate in `identity` as
    /// a directory of the node `of`; the error is what was said to that.
    #[track_caller]
    pub fn present(&self, of: &Node, identity: &str) -> Result<(), String> {
        let identity = of.root().join(identity.trim_start_matches('/'));
        tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .expect("a runtime")
            .block_on(async {
                tokio::time::timeout(PATIENCE, self.hello(&identity))
                    .await
                    .unwrap_or_else(|_| Err("no answer".into()))
            })
    }

    async fn hello(&self, identity: &Path) -> Result<(), String> {
        let said = |error: &dyn std::error::Error| chain(error);
        let channel = self.connect(identity.into()).await?;
        let hello = pb::Hello {
            protocol_versions: vec![1],
            migration_id: self.migration_id.clone(),
            ticket_id: self.ticket.id.clone(),
            source_node: self.source.clone(),
            page_streams: 1,
            precopy: true,
        };
        let message = pb::SourceMessage {
            message: Some(pb::source_message::Message::Hello(hello)),
        };
        let mut request = Request::new(tokio_stream::once(message));
        let secret = self.ticket.secret.parse().expect("hexadecimal");
        request.metadata_mut().insert("sterna-ticket", secret);
        let mut answers = MigrationClient::new(channel)
            .session(request)
            .await
            .map_err(|status| said(&status))?
            .into_inner();
        match answers.message().await {
            Ok(Some(answer)) => match answer.message {
                Some(Answer::Welcome(_)) => Ok(()),
                // What a source that lost its session may ask for at any time.
                Some(Answer::Running(_)) => Err("it runs here".into()),
                other => Err(format!("an answer to no question: {other:?}")),
            },
            Ok(None) => Err("ended without an answer".into()),
            Err(status) => Err(said(&status)),
        }
    }

    async fn connect(&self, identity: PathBuf) -> Result<tonic::transport::Channel, String> {
        let identity = NodeIdentity::load(&identity).map_err(|error| chain(&error))?;
        let config = identity
            .client_config(self.node.name())
            .map_err(|error| chain(&error))?;
        let tls = TlsConnector::from(config);
        let name = ServerName::try_from(identity::ticket_server_name(&self.ticket.id))
            .map_err(|error| chain(&error))?;
        let address = format!("{}:7443", self.node.address());
        let connector = tower::service_fn(move |_| {
            let (address, name, tls) = (address.clone(), name.clone(), tls.clone());
            async move {
                let tcp = TcpStream::connect(&address).await?;
                Ok::<_, std::io::Error>(TokioIo::new(tls.connect(name, tcp).await?))
            }
        });
        Endpoint::from_static("http://destination")
            .connect_with_connector(connector)
            .await
            .map_err(|error| chain(&error))
    }
}

fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(error) = source {
        text = format!("{text}: {error}");
        source = error.source();
    }
    text
}
