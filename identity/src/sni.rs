//! What a connection is for, read from its first bytes without consuming them.
//!
//! A node has one port. The server name in the TLS client hello says whether a
//! connection belongs to a migration's engine, which gets the socket and ends TLS
//! itself, or to sternad. The hello is not authenticated: it only routes.

use std::io;
use std::time::Duration;

use rustls::server::Acceptor;
use tokio::net::TcpStream;
use tokio::time::{Instant, sleep, timeout_at};

use crate::node::is_label;

const TICKET_SUFFIX: &str = ".ticket.sterna";

/// Most bytes that are looked at: one TLS record (RFC 8446 5.1), which a client
/// hello of ours fills to a tenth.
const HELLO_LIMIT_BYTES: usize = 16 << 10;

/// Time to say hello. A hello is one or two packets; a slow link needs a second.
const HELLO_TIMEOUT: Duration = Duration::from_secs(5);

/// Pause between looks at an unfinished hello: peeked bytes keep the socket
/// readable, so readiness cannot be waited for.
const LOOK_AGAIN: Duration = Duration::from_millis(10);

/// A connection that did not begin with a TLS client hello.
#[derive(Debug, thiserror::Error)]
pub enum SniError {
    /// It did not finish its hello in time.
    #[error("no complete client hello within {} s", HELLO_TIMEOUT.as_secs())]
    Timeout,
    /// It closed before its hello was complete.
    #[error("the connection was closed before its client hello was complete")]
    Closed,
    /// The hello is longer than any that we send.
    #[error("the client hello is longer than {HELLO_LIMIT_BYTES} bytes")]
    TooLong,
    /// It is not TLS.
    #[error("the connection does not begin with a client hello")]
    NotTls(#[source] rustls::Error),
    /// The socket failed.
    #[error("cannot read from the connection")]
    Io(#[source] io::Error),
}

/// The server name that the client asks for, if it names one.
///
/// Nothing is taken from the socket: whoever gets it next reads the hello again.
/// Returns within 5 s.
pub async fn peek(stream: &TcpStream) -> Result<Option<String>, SniError> {
    let deadline = Instant::now() + HELLO_TIMEOUT;
    timeout_at(deadline, stream.readable())
        .await
        .map_err(|_| SniError::Timeout)?
        .map_err(SniError::Io)?;
    let mut buffer = vec![0; HELLO_LIMIT_BYTES];
    let mut seen = 0;
    loop {
        let length = timeout_at(deadline, stream.peek(&mut buffer))
            .await
            .map_err(|_| SniError::Timeout)?
            .map_err(SniError::Io)?;
        if length == 0 {
            return Err(SniError::Closed);
        }
        if length > seen {
            seen = length;
            match parse(&buffer[..length])? {
                Hello::Complete(name) => return Ok(name),
                Hello::Unfinished if length == buffer.len() => return Err(SniError::TooLong),
                Hello::Unfinished => {}
            }
        }
        if Instant::now() + LOOK_AGAIN > deadline {
            return Err(SniError::Timeout);
        }
        sleep(LOOK_AGAIN).await;
    }
}

enum Hello {
    Complete(Option<String>),
    Unfinished,
}

fn parse(mut bytes: &[u8]) -> Result<Hello, SniError> {
    let mut acceptor = Acceptor::default();
    while !bytes.is_empty() {
        // Reading from memory: fails only if rustls takes no more.
        acceptor.read_tls(&mut bytes).map_err(SniError::Io)?;
        match acceptor.accept() {
            Ok(Some(accepted)) => {
                let name = accepted.client_hello().server_name().map(str::to_owned);
                return Ok(Hello::Complete(name));
            }
            Ok(None) => {}
            Err((error, _alert)) => return Err(SniError::NotTls(error)),
        }
    }
    Ok(Hello::Unfinished)
}

/// The server name of connections that belong to a ticket.
pub fn ticket_server_name(ticket_id: &str) -> String {
    format!("{ticket_id}{TICKET_SUFFIX}")
}

/// The ticket that a server name belongs to. What is returned is safe in a file
/// name: lower-case letters, digits, dashes, at most 63 of them.
pub fn parse_ticket_name(server_name: &str) -> Option<&str> {
    server_name
        .strip_suffix(TICKET_SUFFIX)
        .filter(|id| is_label(id))
}

#[cfg(test)]
mod tests {
    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    use tokio::net::TcpListener;

    use super::*;

    async fn connection() -> (TcpStream, TcpStream) {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let client = TcpStream::connect(listener.local_addr().unwrap())
            .await
            .unwrap();
        (client, listener.accept().await.unwrap().0)
    }

    /// The bytes that a client of ours sends first.
    fn hello(name: &str) -> Vec<u8> {
        let config = rustls::ClientConfig::builder_with_provider(
            rustls::crypto::ring::default_provider().into(),
        )
        .with_protocol_versions(&[&rustls::version::TLS13])
        .unwrap()
        .with_root_certificates(rustls::RootCertStore::empty())
        .with_no_client_auth();
        let name = name.to_owned().try_into().unwrap();
        let mut client = rustls::ClientConnection::new(config.into(), name).unwrap();
        let mut bytes = Vec::new();
        client.write_tls(&mut bytes).unwrap();
        bytes
    }

    #[test]
    fn ticket_names_come_back_and_others_do_not() {
        assert_eq!(
            parse_ticket_name(&ticket_server_name("00ff-x")),
            Some("00ff-x")
        );
        for other in [
            "b",
            "ticket.sterna",
            ".ticket.sterna",
            "../x.ticket.sterna",
            "a.b.ticket.sterna",
            "X.ticket.sterna",
        ] {
            assert_eq!(parse_ticket_name(other), None, "{other}");
        }
    }

    #[tokio::test]
    async fn the_name_is_read_and_no_byte_is_consumed() {
        let (mut client, mut server) = connection().await;
        let sent = hello("t1.ticket.sterna");
        client.write_all(&sent).await.unwrap();
        let name = peek(&server).await.unwrap();
        assert_eq!(name.as_deref(), Some("t1.ticket.sterna"));
        let mut received = vec![0; sent.len()];
        server.read_exact(&mut received).await.unwrap();
        assert_eq!(received, sent);
    }

    #[tokio::test]
    async fn a_hello_in_pieces_is_waited_for() {
        let (mut client, server) = connection().await;
        let sent = hello("b");
        let (first, rest) = sent.split_at(40);
        client.write_all(first).await.unwrap();
        let rest = rest.to_vec();
        let writer = tokio::spawn(async move {
            sleep(Duration::from_millis(50)).await;
            client.write_all(&rest).await.unwrap();
            client
        });
        assert_eq!(peek(&server).await.unwrap().as_deref(), Some("b"));
        drop(writer.await.unwrap());
    }

    #[tokio::test]
    async fn a_client_that_names_nothing_has_no_name() {
        let (mut client, server) = connection().await;
        client.write_all(&hello("127.0.0.1")).await.unwrap();
        assert_eq!(peek(&server).await.unwrap(), None);
    }

    #[tokio::test]
    async fn garbage_and_silence_are_errors() {
        let (mut client, server) = connection().await;
        client.write_all(b"GET / HTTP/1.1\r\n\r\n").await.unwrap();
        assert!(matches!(
            peek(&server).await.unwrap_err(),
            SniError::NotTls(_)
        ));

        let (client, server) = connection().await;
        drop(client);
        assert!(matches!(peek(&server).await.unwrap_err(), SniError::Closed));

        // A record header that promises more than ever comes, then nothing.
        let (mut client, server) = connection().await;
        client.write_all(&[22, 3, 1, 0x3f, 0xff]).await.unwrap();

        assert!(matches!(
            peek(&server).await.unwrap_err(),
            SniError::Timeout
        ));
    }

    #[tokio::test]
    async fn an_endless_hello_is_cut_off() {
        let (mut client, server) = connection().await;
        // A handshake message of 1 MiB in records of 16 KiB.
        let mut flood = vec![22, 3, 1, 0x3f, 0xfc, 1, 0x10, 0, 0];
        flood.resize(64 << 10, 0);
        client.write_all(&flood).await.unwrap();
        assert!(peek(&server).await.is_err());
    }

    #[test]
    fn no_prefix_and_no_flipped_byte_of_a_hello_panics() {
        let sent = hello("b");
        for length in 0..sent.len() {
            assert!(matches!(parse(&sent[..length]), Ok(Hello::Unfinished)));
        }
        for index in 0..sent.len() {
            let mut bent = sent.clone();
            bent[index] ^= 0xff;
            drop(parse(&bent));
        }
    }
}
