//! The authority that names nodes.

use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use rcgen::{
    BasicConstraints, CertificateParams, DnType, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair,
    KeyUsagePurpose, PKCS_ED25519,
};

use crate::error::IdentityError;
use crate::files::{self, CA_CERTIFICATE, CA_KEY, NODE_CERTIFICATE, NODE_KEY};
use crate::node::NodeName;

const DAY: Duration = Duration::from_secs(24 * 60 * 60);

/// How long the authority's own certificate lasts: replacing it means enrolling
/// every node again, so it outlives the machines.
const AUTHORITY_VALIDITY: Duration = DAY.saturating_mul(10 * 365);

/// How long a node's certificate lasts: a year and a month, so that a yearly
/// renewal is never late.
pub const NODE_VALIDITY: Duration = DAY.saturating_mul(397);

/// Certificates begin this long before they are made: clocks of nodes differ.
const CLOCK_SKEW: Duration = Duration::from_secs(60 * 60);

/// The key that names nodes. It stays where it was made.
#[derive(Debug)]
pub struct Authority {
    certificate_pem: String,
    issuer: Issuer<'static, KeyPair>,
}

impl Authority {
    /// Makes a new authority in `directory`.
    ///
    /// Refuses where there is one: see [`IdentityError::AuthorityExists`].
    pub fn init(directory: &Path) -> Result<Self, IdentityError> {
        files::make_directory(directory)?;
        for name in [CA_KEY, CA_CERTIFICATE] {
            let path = directory.join(name);
            if path.exists() {
                return Err(IdentityError::AuthorityExists { path });
            }
        }
        let key = new_key()?;
        let now = SystemTime::now();
        let mut params = CertificateParams::default();
        params
            .distinguished_name
            .push(DnType::CommonName, "Sterna authority");
        params.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
        params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
        params.not_before = (now - CLOCK_SKEW).into();
        params.not_after = (now + AUTHORITY_VALIDITY).into();
        let certificate = params
            .self_signed(&key)
            .map_err(sign("sign the authority's certificate"))?;
        let certificate_pem = certificate.pem();
        // The key first: a directory with a certificate has the key that made it.
        files::write(&directory.join(CA_KEY), &key.serialize_pem())?;
        files::write(&directory.join(CA_CERTIFICATE), &certificate_pem)?;
        Ok(Self {
            certificate_pem,
            issuer: Issuer::new(params, key),
        })
    }

    /// The authority that [`Self::init`] made in `directory`.
    pub fn load(directory: &Path) -> Result<Self, IdentityError> {
        let key_path = directory.join(CA_KEY);
        let key = KeyPair::from_pem(&files::read(&key_path)?)
            .map_err(sign("read the authority's key"))?;
        let certificate_pem = files::read(&directory.join(CA_CERTIFICATE))?;
        let issuer = Issuer::from_ca_cert_pem(&certificate_pem, key)
            .map_err(sign("read the authority's certificate"))?;
        Ok(Self {
            certificate_pem,
            issuer,
        })
    }

    /// Makes key and certificate for `node` and leaves them, with the authority's
    /// certificate, in `directory`. An older certificate there is replaced.
    ///
    /// Returns the files that were written.
    pub fn enroll(&self, node: &NodeName, directory: &Path) -> Result<Vec<PathBuf>, IdentityError> {
        let now = SystemTime::now();
        self.enroll_between(node, directory, now - CLOCK_SKEW, now + NODE_VALIDITY)
    }

    pub(crate) fn enroll_between(
        &self,
        node: &NodeName,
        directory: &Path,
        not_before: SystemTime,
        not_after: SystemTime,
    ) -> Result<Vec<PathBuf>, IdentityError> {
        let key = new_key()?;
        let mut params = CertificateParams::new(vec![node.as_str().to_owned()])
            .map_err(sign("name the node"))?;
        params
            .distinguished_name
            .push(DnType::CommonName, node.as_str());
        params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
        params.extended_key_usages = vec![
            ExtendedKeyUsagePurpose::ServerAuth,
            ExtendedKeyUsagePurpose::ClientAuth,
        ];
        params.use_authority_key_identifier_extension = true;
        params.not_before = not_before.into();
        params.not_after = not_after.into();
        let certificate = params
            .signed_by(&key, &self.issuer)
            .map_err(sign("sign the node's certificate"))?;

        files::make_directory(directory)?;
        let written = [
            (CA_CERTIFICATE, self.certificate_pem.clone()),
            (NODE_KEY, key.serialize_pem()),
            (NODE_CERTIFICATE, certificate.pem()),
        ];
        written
            .into_iter()
            .map(|(name, content)| {
                let path = directory.join(name);
                files::write(&path, &content)?;
                Ok(path)
            })
            .collect()
    }
}

fn new_key() -> Result<KeyPair, IdentityError> {
    KeyPair::generate_for(&PKCS_ED25519).map_err(sign("make a key"))
}

fn sign(action: &'static str) -> impl FnOnce(rcgen::Error) -> IdentityError {
    move |source| IdentityError::Sign { action, source }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;
    use crate::NodeIdentity;

    fn name(text: &str) -> NodeName {
        text.parse().unwrap()
    }

    #[test]
    fn an_authority_is_never_replaced() {
        let temp = tempfile::tempdir().unwrap();
        Authority::init(temp.path()).unwrap();
        let error = Authority::init(temp.path()).unwrap_err();
        assert!(error.to_string().contains("lock out"), "{error}");
    }

    #[test]
    fn all_files_are_readable_by_root_alone_and_a_node_never_gets_the_authoritys_key() {
        let temp = tempfile::tempdir().unwrap();
        let (ca, node) = (temp.path().join("ca"), temp.path().join("b"));
        Authority::init(&ca).unwrap();
        let written = Authority::load(&ca)
            .unwrap()
            .enroll(&name("b"), &node)
            .unwrap();
        assert_eq!(written.len(), 3);
        assert!(!node.join(CA_KEY).exists());
        for file in written.iter().chain([&ca.join(CA_KEY)]) {
            let mode = std::fs::metadata(file).unwrap().permissions().mode();
            assert_eq!(mode & 0o777, 0o600, "{file:?}");
        }
        assert_eq!(
            std::fs::metadata(&node).unwrap().permissions().mode() & 0o777,
            0o700
        );
    }

    #[test]
    fn a_certificate_lasts_a_year_and_names_its_node() {
        let temp = tempfile::tempdir().unwrap();
        Authority::init(temp.path())
            .unwrap()
            .enroll(&name("node-1.example"), temp.path())
            .unwrap();
        let identity = NodeIdentity::load(temp.path()).unwrap();
        assert_eq!(identity.name().as_str(), "node-1.example");
        let left = identity
            .certificate()
            .not_after
            .duration_since(SystemTime::now())
            .unwrap();
        assert!(left > DAY * 396 && left <= NODE_VALIDITY, "{left:?}");
    }
}
