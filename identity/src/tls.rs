//! TLS configurations: version 1.3, HTTP/2, both ends authenticated.

use std::path::Path;
use std::sync::Arc;

use rustls::client::WebPkiServerVerifier;
use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::crypto::CryptoProvider;
use rustls::server::WebPkiClientVerifier;
use rustls::{DigitallySignedStruct, SignatureScheme};
use rustls_pki_types::{CertificateDer, PrivateKeyDer, ServerName, UnixTime};
use x509_parser::extensions::GeneralName;
use x509_parser::prelude::{FromDer, X509Certificate};

use crate::error::{IdentityError, PeerNameError};
use crate::node::NodeName;

/// What both ends speak inside TLS.
pub const ALPN: &[u8] = b"h2";

/// Given to every configuration: a process-wide default would be whatever some
/// dependency installed first.
fn provider() -> Arc<CryptoProvider> {
    Arc::new(rustls::crypto::ring::default_provider())
}

pub(crate) fn server_config(
    directory: &Path,
    roots: &Arc<rustls::RootCertStore>,
    chain: &[CertificateDer<'static>],
    key: &PrivateKeyDer<'static>,
) -> Result<Arc<rustls::ServerConfig>, IdentityError> {
    let tls = |source| IdentityError::Tls {
        directory: directory.to_owned(),
        source,
    };
    let clients = WebPkiClientVerifier::builder_with_provider(Arc::clone(roots), provider())
        .build()
        .map_err(|error| IdentityError::Verifier {
            directory: directory.to_owned(),
            reason: error.to_string(),
        })?;
    let mut config = rustls::ServerConfig::builder_with_provider(provider())
        .with_protocol_versions(&[&rustls::version::TLS13])
        .map_err(tls)?
        .with_client_cert_verifier(clients)
        .with_single_cert(chain.to_vec(), key.clone_key())
        .map_err(tls)?;
    config.alpn_protocols = vec![ALPN.to_vec()];
    Ok(Arc::new(config))
}

pub(crate) fn client_config(
    directory: &Path,
    roots: &Arc<rustls::RootCertStore>,
    chain: &[CertificateDer<'static>],
    key: &PrivateKeyDer<'static>,
    node: &NodeName,
) -> Result<Arc<rustls::ClientConfig>, IdentityError> {
    let tls = |source| IdentityError::Tls {
        directory: directory.to_owned(),
        source,
    };
    let by_authority = WebPkiServerVerifier::builder_with_provider(Arc::clone(roots), provider())
        .build()
        .map_err(|error| IdentityError::Verifier {
            directory: directory.to_owned(),
            reason: error.to_string(),
        })?;
    // A node name is a DNS name: checked by `NodeName`.
    let expected =
        ServerName::try_from(node.as_str().to_owned()).map_err(|_| crate::InvalidNodeName {
            name: node.to_string(),
        })?;
    let mut config = rustls::ClientConfig::builder_with_provider(provider())
        .with_protocol_versions(&[&rustls::version::TLS13])
        .map_err(tls)?
        .dangerous()
        .with_custom_certificate_verifier(Arc::new(ExpectNode {
            expected,
            by_authority,
        }))
        .with_client_auth_cert(chain.to_vec(), key.clone_key())
        .map_err(tls)?;
    config.alpn_protocols = vec![ALPN.to_vec()];
    Ok(Arc::new(config))
}

/// Checks a server by chain, date, purpose and node name. The server name that
/// was sent takes no part: it may be a ticket's.
#[derive(Debug)]
struct ExpectNode {
    expected: ServerName<'static>,
    by_authority: Arc<WebPkiServerVerifier>,
}

impl ServerCertVerifier for ExpectNode {
    fn verify_server_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        _server_name: &ServerName<'_>,
        ocsp_response: &[u8],
        now: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        self.by_authority.verify_server_cert(
            end_entity,
            intermediates,
            &self.expected,
            ocsp_response,
            now,
        )
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        self.by_authority.verify_tls12_signature(message, cert, dss)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        self.by_authority.verify_tls13_signature(message, cert, dss)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.by_authority.supported_verify_schemes()
    }
}

/// The node that a peer's certificates, end entity first, name. The certificates
/// must have been verified: this only reads.
pub fn peer_node(certificates: &[CertificateDer<'_>]) -> Result<String, PeerNameError> {
    let der = certificates.first().ok_or(PeerNameError::NoCertificate)?;
    let (_, parsed) = X509Certificate::from_der(der).map_err(|_| PeerNameError::Unreadable)?;
    let names = parsed
        .subject_alternative_name()
        .map_err(|_| PeerNameError::Unreadable)?
        .map(|extension| {
            extension
                .value
                .general_names
                .iter()
                .filter_map(|name| match name {
                    GeneralName::DNSName(name) => Some(*name),
                    _ => None,
                })
                .collect::<Vec<_>>()
        })
        .unwrap_or_default();
    match names[..] {
        [name] => name
            .parse::<NodeName>()
            .map(|name| name.as_str().to_owned())
            .map_err(PeerNameError::NotANode),
        _ => Err(PeerNameError::NotOneName { count: names.len() }),
    }
}

#[cfg(test)]
mod tests {
    use std::time::{Duration, SystemTime};

    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    use tokio_rustls::{TlsAcceptor, TlsConnector};

    use super::*;
    use crate::{Authority, NodeIdentity};

    fn enrolled(authority: &Authority, name: &str) -> NodeIdentity {
        let temp = tempfile::tempdir().unwrap();
        authority
            .enroll(&name.parse().unwrap(), temp.path())
            .unwrap();
        NodeIdentity::load(temp.path()).unwrap()
    }

    fn authority() -> Authority {
        Authority::init(tempfile::tempdir().unwrap().path()).unwrap()
    }

    /// One connection over a pipe: what the client says, and what the server says,
    /// once both tried to exchange a byte.
    async fn meet(
        client: &NodeIdentity,
        expected: &str,
        server_name: &str,
        server: &NodeIdentity,
    ) -> (Result<(), String>, Result<String, String>) {
        let (near, far) = tokio::io::duplex(64 << 10);
        let acceptor = TlsAcceptor::from(server.server_config());
        let connector = TlsConnector::from(client.client_config(expected).unwrap());
        let serve = async {
            let mut stream = acceptor.accept(far).await.map_err(|e| e.to_string())?;
            stream.write_all(b"x").await.map_err(|e| e.to_string())?;
            let certificates = stream.get_ref().1.peer_certificates().unwrap_or(&[]);
            peer_node(certificates).map_err(|e| e.to_string())
        };
        let name = ServerName::try_from(server_name.to_owned()).unwrap();
        let connect = async {
            let mut stream = connector
                .connect(name, near)
                .await
                .map_err(|e| e.to_string())?;
            assert_eq!(stream.get_ref().1.alpn_protocol(), Some(ALPN));
            let mut byte = [0];
            stream
                .read_exact(&mut byte)
                .await
                .map_err(|e| e.to_string())?;
            Ok(())
        };
        tokio::join!(connect, serve)
    }

    #[tokio::test]
    async fn nodes_of_one_authority_meet_and_know_each_other() {
        let authority = authority();
        let (a, b) = (enrolled(&authority, "a"), enrolled(&authority, "b"));
        let (client, server) = meet(&a, "b", "b", &b).await;
        client.unwrap();
        assert_eq!(server.unwrap(), "a");
    }

    #[tokio::test]
    async fn the_nodes_name_is_checked_whatever_server_name_is_sent() {
        let authority = authority();
        let (a, b) = (enrolled(&authority, "a"), enrolled(&authority, "b"));
        let ticket = crate::ticket_server_name("0123");
        meet(&a, "b", &ticket, &b).await.0.unwrap();
        let error = meet(&a, "c", &ticket, &b).await.0.unwrap_err();
        assert!(error.contains("certificate"), "{error}");
        // Even if the server name itself is in the certificate.
        meet(&a, "c", "b", &b).await.0.unwrap_err();
    }

    #[tokio::test]
    async fn another_authoritys_nodes_are_refused_by_both_ends() {
        let (ours, theirs) = (authority(), authority());
        let (a, b) = (enrolled(&ours, "a"), enrolled(&theirs, "b"));
        let (client, server) = meet(&a, "b", "b", &b).await;
        client.unwrap_err();
        server.unwrap_err();
    }

    #[tokio::test]
    async fn a_server_refuses_a_client_of_another_authority_that_trusts_the_server() {
        let (ours, theirs) = (authority(), authority());
        let b = enrolled(&ours, "b");
        // The intruder knows our authority's certificate, which is no secret.
        let temp = tempfile::tempdir().unwrap();
        theirs.enroll(&"a".parse().unwrap(), temp.path()).unwrap();
        let other = tempfile::tempdir().unwrap();
        ours.enroll(&"x".parse().unwrap(), other.path()).unwrap();
        std::fs::copy(other.path().join("ca.crt"), temp.path().join("ca.crt")).unwrap();
        let intruder = NodeIdentity::load(temp.path()).unwrap();
        let (client, server) = meet(&intruder, "b", "b", &b).await;
        client.unwrap_err();
        server.unwrap_err();
    }

    #[tokio::test]
    async fn expired_certificates_are_refused_and_their_date_can_be_read() {
        let authority = authority();
        let temp = tempfile::tempdir().unwrap();
        let now = SystemTime::now();
        let hour = Duration::from_secs(3600);
        authority
            .enroll_between(
                &"b".parse().unwrap(),
                temp.path(),
                now - hour * 2,
                now - hour,
            )
            .unwrap();
        let expired = NodeIdentity::load(temp.path()).unwrap();
        assert_eq!(expired.certificate().remaining(now), None);
        let a = enrolled(&authority, "a");
        let error = meet(&a, "b", "b", &expired).await.0.unwrap_err();
        assert!(error.to_lowercase().contains("expired"), "{error}");
        meet(&expired, "a", "a", &a).await.1.unwrap_err();
    }

    #[test]
    fn certificates_that_name_no_node_are_errors() {
        assert_eq!(peer_node(&[]), Err(PeerNameError::NoCertificate));
        let garbage = CertificateDer::from(vec![0x30, 0x82, 0xff]);
        assert_eq!(peer_node(&[garbage]), Err(PeerNameError::Unreadable));
    }
}
