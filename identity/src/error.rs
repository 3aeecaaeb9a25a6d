//! What can be wrong with a node's identity.

use std::io;
use std::path::PathBuf;

/// A name that cannot be a node's.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error(
    "{name:?} is not a node name: 1 to 253 lower-case letters, digits, dashes and dots, no empty part, none above 63, none that begins or ends with a dash"
)]
pub struct InvalidNodeName {
    /// What was given.
    pub name: String,
}

/// An identity that cannot be made, read or used.
#[derive(Debug, thiserror::Error)]
pub enum IdentityError {
    /// The name is not a node's.
    #[error(transparent)]
    Name(#[from] InvalidNodeName),
    /// A file could not be read or written.
    #[error("cannot {action} {path}")]
    File {
        /// read, write, create
        action: &'static str,
        /// The file.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// There is an authority already: overwriting it would lock all nodes out.
    #[error(
        "{path} exists: this directory has an authority, and replacing it would lock out every node that it enrolled"
    )]
    AuthorityExists {
        /// The file in the way.
        path: PathBuf,
    },
    /// A file does not hold the PEM that it should.
    #[error("{path} holds no {wanted} in PEM form")]
    Pem {
        /// The file.
        path: PathBuf,
        /// certificate, private key
        wanted: &'static str,
    },
    /// A certificate that cannot be parsed.
    #[error("cannot understand the certificate in {path}: {reason}")]
    Certificate {
        /// The file.
        path: PathBuf,
        /// What the parser says.
        reason: String,
    },
    /// The node's certificate names no node, or more than one.
    #[error("the certificate in {path} does not name one node")]
    Nameless {
        /// The file.
        path: PathBuf,
        /// What it names.
        #[source]
        source: PeerNameError,
    },
    /// Making or signing a certificate failed.
    #[error("cannot {action}")]
    Sign {
        /// What was tried.
        action: &'static str,
        /// Why.
        #[source]
        source: rcgen::Error,
    },
    /// Certificate, key and authority do not make a TLS configuration.
    #[error("cannot use the certificate and key in {directory} for TLS")]
    Tls {
        /// The identity's directory.
        directory: PathBuf,
        /// Why.
        #[source]
        source: rustls::Error,
    },
    /// The authority cannot be used to check certificates.
    #[error("cannot check certificates by the authority in {directory}: {reason}")]
    Verifier {
        /// The identity's directory.
        directory: PathBuf,
        /// What rustls says.
        reason: String,
    },
}

/// A peer's certificate that does not say which node it is.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum PeerNameError {
    /// The peer showed no certificate.
    #[error("no certificate was shown")]
    NoCertificate,
    /// It cannot be parsed.
    #[error("the certificate cannot be understood")]
    Unreadable,
    /// It has not exactly one DNS name.
    #[error("the certificate has {count} DNS names instead of one")]
    NotOneName {
        /// How many.
        count: usize,
    },
    /// Its DNS name is not a node name.
    #[error("the certificate names no node")]
    NotANode(#[source] InvalidNodeName),
}
