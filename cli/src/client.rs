//! The connection to this node's sternad.

use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;

use hyper_util::rt::TokioIo;
use nodeapi::RunDir;
use proto::agent::agent_client::AgentClient;
use tokio::net::UnixStream;
use tonic::Status;
use tonic::transport::{Channel, Endpoint};

use crate::Failed;
use crate::arguments::Arguments;
use crate::exit::Exit;

/// On one machine: either it accepts or it is stuck.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);

pub(crate) type Client = AgentClient<Channel>;

/// Connects; the error says what to do.
pub(crate) async fn connect(arguments: &Arguments) -> Result<Client, Failed> {
    let socket = arguments
        .socket
        .clone()
        .unwrap_or_else(|| RunDir::default().agent_socket());
    // Tried by hand first: from inside the channel the reason comes out garbled.
    match tokio::time::timeout(CONNECT_TIMEOUT, UnixStream::connect(&socket)).await {
        Ok(Ok(stream)) => drop(stream),
        Ok(Err(error)) => return Err(no_agent(&socket, &error)),
        Err(_) => return Err(no_agent(&socket, &io::ErrorKind::TimedOut.into())),
    }
    let path: PathBuf = socket.clone();
    let connector = tower::service_fn(move |_| {
        let path = path.clone();
        async move { UnixStream::connect(path).await.map(TokioIo::new) }
    });
    // The URI is never resolved: the connector knows where to go.
    let channel = Endpoint::from_static("http://sternad")
        .connect_with_connector(connector)
        .await
        .map_err(|error| no_agent(&socket, &io::Error::other(error)))?;
    Ok(AgentClient::new(channel))
}

fn no_agent(socket: &Path, error: &io::Error) -> Failed {
    let hint = match error.kind() {
        io::ErrorKind::PermissionDenied => "run this as root",
        io::ErrorKind::NotFound | io::ErrorKind::ConnectionRefused => {
            "start it with: systemctl start sternad"
        }
        _ => "see its log: journalctl -u sternad",
    };
    Failed {
        exit: Exit::NoAgent,
        error: anyhow::anyhow!(
            "sternad does not run on this node: {}: {error}; {hint}",
            socket.display()
        ),
    }
}

/// An answer that is an error.
pub(crate) fn refused(status: Status) -> Failed {
    let lost = std::error::Error::source(&status).is_some();
    if lost {
        return Failed {
            exit: Exit::NoAgent,
            error: anyhow::anyhow!(
                "sternad ended the connection ({}): see its log: journalctl -u sternad",
                status.message()
            ),
        };
    }
    Failed {
        exit: Exit::of(&status),
        error: anyhow::anyhow!("{}", status.message()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn without_sternad_the_message_says_so_and_what_to_do() {
        let error = io::Error::from(io::ErrorKind::NotFound);
        let failed = no_agent(Path::new("/run/sterna/sternad.sock"), &error);
        assert_eq!(failed.exit, Exit::NoAgent);
        let text = failed.error.to_string();
        assert!(
            text.contains("sternad does not run") && text.contains("systemctl"),
            "{text}"
        );
    }

    #[test]
    fn refusals_and_failures_end_differently() {
        assert_eq!(refused(Status::not_found("x")).exit, Exit::Refused);
        assert_eq!(refused(Status::invalid_argument("x")).exit, Exit::Usage);
        assert_eq!(refused(Status::internal("x")).exit, Exit::Failed);
    }
}
