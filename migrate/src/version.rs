//! Versions of the tools on a node.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

use crate::error::VersionError;

/// Version texts come from other programs and other nodes; real ones are shorter.
const LONGEST: usize = 64;

/// The version of CRIU, runc or containerd: three numbers, what a distribution
/// appends is ignored.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Version {
    /// Changes when everything does.
    pub major: u32,
    /// Changes with features.
    pub minor: u32,
    /// Changes with repairs.
    pub patch: u32,
}

impl Version {
    /// `major.minor.patch`.
    pub const fn new(major: u32, minor: u32, patch: u32) -> Self {
        Self {
            major,
            minor,
            patch,
        }
    }
}

impl fmt::Display for Version {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}.{}.{}", self.major, self.minor, self.patch)
    }
}

impl FromStr for Version {
    type Err = VersionError;

    /// Reads `4.2.1`, `4.2`, `v1.3.6`, `1.3.6+ds1-2` and `1.0.0~rc93`.
    fn from_str(text: &str) -> Result<Self, VersionError> {
        let error = || VersionError {
            text: text.chars().take(LONGEST).collect(),
        };
        if text.len() > LONGEST {
            return Err(error());
        }
        let bare = text.strip_prefix('v').unwrap_or(text);
        let end = bare
            .find(|c: char| !c.is_ascii_digit() && c != '.')
            .unwrap_or(bare.len());
        let mut parts = bare[..end].split('.');
        let mut number = |missing: Option<u32>| match parts.next() {
            // A dot right before what a distribution appends: `1.2.dev`.
            None | Some("") => missing.ok_or_else(error),
            Some(digits) => digits.parse().map_err(|_| error()),
        };
        Ok(Self::new(number(None)?, number(Some(0))?, number(Some(0))?))
    }
}

impl TryFrom<String> for Version {
    type Error = VersionError;

    fn try_from(text: String) -> Result<Self, VersionError> {
        text.parse()
    }
}

impl From<Version> for String {
    fn from(version: Version) -> Self {
        version.to_string()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_distributions_append_to_a_version_is_ignored() {
        for (text, version) in [
            ("4.2.1", Version::new(4, 2, 1)),
            ("4.2", Version::new(4, 2, 0)),
            ("v1.3.6", Version::new(1, 3, 6)),
            ("1.3.6+ds1-2", Version::new(1, 3, 6)),
            ("1.0.0~rc93", Version::new(1, 0, 0)),
            ("1.2.dev", Version::new(1, 2, 0)),
        ] {
            assert_eq!(text.parse(), Ok(version), "{text}");
        }
    }

    #[test]
    fn a_text_without_a_leading_number_is_no_version() {
        for text in ["", "v", "runc", ".1", "99999999999.1", &"1".repeat(65)] {
            assert!(text.parse::<Version>().is_err(), "{text}");
        }
    }

    #[test]
    fn versions_compare_by_number_not_by_text() {
        assert!(Version::new(1, 10, 0) > Version::new(1, 9, 9));
    }

    #[test]
    fn a_version_travels_as_its_text() {
        let json = serde_json::to_string(&Version::new(4, 2, 1)).unwrap();
        assert_eq!(json, r#""4.2.1""#);
        assert_eq!(
            serde_json::from_str::<Version>(&json).unwrap(),
            Version::new(4, 2, 1)
        );
        assert!(serde_json::from_str::<Version>(r#""new""#).is_err());
    }
}
