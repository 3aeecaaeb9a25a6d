//! One node's identity.

use std::fmt;
use std::path::{Path, PathBuf};
use std::str::FromStr;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use rustls_pki_types::{CertificateDer, PrivateKeyDer};
use x509_parser::prelude::{FromDer, X509Certificate};

use crate::error::{IdentityError, InvalidNodeName};
use crate::files::{self, CA_CERTIFICATE, NODE_CERTIFICATE, NODE_KEY};
use crate::tls;

/// The name of a node: a DNS name in lower case.
///
/// ```
/// use sterna_identity::NodeName;
/// assert!("worker-3.example".parse::<NodeName>().is_ok());
/// assert!("../worker".parse::<NodeName>().is_err());
/// ```
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct NodeName(String);

impl NodeName {
    /// The name as text.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl FromStr for NodeName {
    type Err = InvalidNodeName;

    fn from_str(name: &str) -> Result<Self, InvalidNodeName> {
        // RFC 1035 2.3.4: 63 octets for a label, 253 characters for a name.
        let valid = (1..=253).contains(&name.len())
            && name.split('.').all(is_label)
            // Of an address TLS sends no server name, and a certificate's DNS name is none.
            && name.parse::<std::net::Ipv4Addr>().is_err();
        if valid {
            Ok(Self(name.to_owned()))
        } else {
            Err(InvalidNodeName {
                name: name.to_owned(),
            })
        }
    }
}

impl fmt::Display for NodeName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// One part of a DNS name: 1 to 63 lower-case letters, digits, dashes inside.
pub(crate) fn is_label(label: &str) -> bool {
    (1..=63).contains(&label.len())
        && !label.starts_with('-')
        && !label.ends_with('-')
        && label
            .bytes()
            .all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'-')
}

/// What a certificate says, for people.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Certificate {
    /// Where it lies.
    pub path: PathBuf,
    /// From when it is good.
    pub not_before: SystemTime,
    /// Until when it is good.
    pub not_after: SystemTime,
}

impl Certificate {
    fn read(path: &Path, der: &CertificateDer<'_>) -> Result<Self, IdentityError> {
        let unreadable = |reason: String| IdentityError::Certificate {
            path: path.to_owned(),
            reason,
        };
        let (_, parsed) =
            X509Certificate::from_der(der).map_err(|error| unreadable(error.to_string()))?;
        let time = |seconds: i64| {
            u64::try_from(seconds)
                .map(|seconds| SystemTime::UNIX_EPOCH + Duration::from_secs(seconds))
                .map_err(|_| unreadable("a date before 1970".to_owned()))
        };
        let validity = parsed.validity();
        Ok(Self {
            path: path.to_owned(),
            not_before: time(validity.not_before.timestamp())?,
            not_after: time(validity.not_after.timestamp())?,
        })
    }

    /// Time until it expires; `None` once it has.
    pub fn remaining(&self, now: SystemTime) -> Option<Duration> {
        self.not_after.duration_since(now).ok()
    }
}

/// A node's certificate and key, and the authority that it trusts.
pub struct NodeIdentity {
    directory: PathBuf,
    name: NodeName,
    certificate: Certificate,
    authority: Certificate,
    server: Arc<rustls::ServerConfig>,
    chain: Vec<CertificateDer<'static>>,
    key: PrivateKeyDer<'static>,
    roots: Arc<rustls::RootCertStore>,
}

impl fmt::Debug for NodeIdentity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("NodeIdentity")
            .field("directory", &self.directory)
            .field("name", &self.name)
            .finish_non_exhaustive()
    }
}

impl NodeIdentity {
    /// Reads the identity that [`crate::Authority::enroll`] left in `directory`.
    ///
    /// An expired certificate is no error here: the peer refuses it, and whoever
    /// asks why finds the date in [`Self::certificate`].
    pub fn load(directory: &Path) -> Result<Self, IdentityError> {
        let certificate_path = directory.join(NODE_CERTIFICATE);
        let authority_path = directory.join(CA_CERTIFICATE);
        let chain = files::certificates(&certificate_path)?;
        let key = files::private_key(&directory.join(NODE_KEY))?;
        let authorities = files::certificates(&authority_path)?;

        let name = tls::peer_node(&chain)
            .and_then(|name| name.parse().map_err(crate::PeerNameError::NotANode))
            .map_err(|source| IdentityError::Nameless {
                path: certificate_path.clone(),
                source,
            })?;
        let certificate = Certificate::read(&certificate_path, &chain[0])?;
        let authority = Certificate::read(&authority_path, &authorities[0])?;

        let mut roots = rustls::RootCertStore::empty();
        for der in authorities {
            roots.add(der).map_err(|error| IdentityError::Certificate {
                path: authority_path.clone(),
                reason: error.to_string(),
            })?;
        }
        let roots = Arc::new(roots);
        let server = tls::server_config(directory, &roots, &chain, &key)?;
        // Found out now and not at the first connection.
        tls::client_config(directory, &roots, &chain, &key, &name)?;
        Ok(Self {
            directory: directory.to_owned(),
            name,
            certificate,
            authority,
            server,
            chain,
            key,
            roots,
        })
    }

    /// The node's name, from its certificate.
    pub fn name(&self) -> &NodeName {
        &self.name
    }

    /// The node's own certificate.
    pub fn certificate(&self) -> &Certificate {
        &self.certificate
    }

    /// The certificate of the authority.
    pub fn authority(&self) -> &Certificate {
        &self.authority
    }

    /// For accepting connections: the client must show a certificate of the same
    /// authority. Which node it is says [`crate::peer_node`].
    pub fn server_config(&self) -> Arc<rustls::ServerConfig> {
        Arc::clone(&self.server)
    }

    /// For connecting to `expected_node`: the server's certificate must carry that
    /// name, whatever server name the connection asks for.
    pub fn client_config(
        &self,
        expected_node: &str,
    ) -> Result<Arc<rustls::ClientConfig>, IdentityError> {
        let node = expected_node.parse()?;
        tls::client_config(&self.directory, &self.roots, &self.chain, &self.key, &node)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_that_are_not_dns_names_are_refused() {
        for bad in [
            "", ".", "a.", "-a", "a-", "A", "a b", "../a", "a_b", "10.0.0.1", "a..b",
        ] {
            assert!(bad.parse::<NodeName>().is_err(), "{bad}");
        }
        assert!("x".repeat(64).parse::<NodeName>().is_err());
        for good in ["a", "node-1", "node-1.rack.example", "1a"] {
            assert!(good.parse::<NodeName>().is_ok(), "{good}");
        }
    }

    #[test]
    fn a_directory_without_an_identity_is_an_error_that_names_the_file() {
        let temp = tempfile::tempdir().unwrap();
        let error = NodeIdentity::load(temp.path()).unwrap_err();
        assert!(error.to_string().contains("node.crt"), "{error}");
        std::fs::write(temp.path().join(NODE_CERTIFICATE), "garbage").unwrap();
        let error = NodeIdentity::load(temp.path()).unwrap_err();
        assert!(error.to_string().contains("no certificate"), "{error}");
    }
}
