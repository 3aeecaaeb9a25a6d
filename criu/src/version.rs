//! Which CRIU is installed, and whether it will do.

use std::ffi::{OsStr, OsString};
use std::fmt;
use std::io;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

/// Where distributions put criu, and the programs that criu starts itself
/// (iptables, ip, tar). Services often run with a shorter `PATH`.
const SYSTEM_DIRECTORIES: &str = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";

/// The oldest CRIU that works.
///
/// 4.1.1 enters the mount namespace to change propagation, which kernels since
/// 6.16 (and every stable series, by back-port of 12f147ddd6de) demand: with an
/// older one every restore of a container fails there.
pub const MINIMUM: Version = Version {
    major: 4,
    minor: 1,
    patch: 1,
};

/// A released version of CRIU.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Version {
    /// First number.
    pub major: u32,
    /// Second number.
    pub minor: u32,
    /// Third number; 0 where there is none.
    pub patch: u32,
}

impl fmt::Display for Version {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}.{}", self.major, self.minor)?;
        match self.patch {
            0 => Ok(()),
            patch => write!(f, ".{patch}"),
        }
    }
}

impl Version {
    /// Reads what `criu --version` prints: a line "Version: 4.2.1", perhaps
    /// followed by the commit it was built from.
    fn from_output(output: &str) -> Option<Self> {
        let text = output
            .lines()
            .find_map(|line| line.strip_prefix("Version:"))?;
        let mut numbers = text.trim().splitn(3, '.');
        let leading = |part: &str| {
            let end = part
                .find(|c: char| !c.is_ascii_digit())
                .unwrap_or(part.len());
            part[..end].parse().ok()
        };
        Some(Self {
            major: leading(numbers.next()?)?,
            minor: leading(numbers.next()?)?,
            patch: match numbers.next() {
                Some(part) => leading(part)?,
                None => 0,
            },
        })
    }
}

/// Why this node cannot dump. Its containers still run.
#[derive(Debug, thiserror::Error)]
pub enum Missing {
    /// There is no program `criu`.
    #[error("criu is not installed: there is no such program in {searched}")]
    Program {
        /// The directories, as in `PATH`.
        searched: String,
    },
    /// It cannot be executed.
    #[error("cannot run {} --version", program.display())]
    Run {
        /// The program.
        program: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// It does not say which version it is.
    #[error("{} --version does not say which version it is: {output:?}", program.display())]
    Output {
        /// The program.
        program: PathBuf,
        /// The beginning of what it says.
        output: String,
    },
    /// It is too old.
    #[error(
        "criu {found} is too old: {MINIMUM} or newer is needed{}, because older \
         ones cannot restore mounts on kernels since 6.16 and stable ones of the same time (12f147ddd6de)",
        kernel.as_ref().map(|release| format!(" on kernel {release}")).unwrap_or_default()
    )]
    TooOld {
        /// What is installed.
        found: Version,
        /// The running kernel's release, where it is known.
        kernel: Option<String>,
    },
    /// libcriu is not there, or too old.
    #[error("libcriu cannot be used")]
    Library(#[from] criu_sys::LoadError),
}

/// An installed CRIU that will do.
#[derive(Debug, Clone)]
pub struct Tools {
    /// The program.
    pub criu: PathBuf,
    /// Its version. Images of one version restore on the same or a newer one.
    pub version: Version,
    /// `PATH` for it.
    pub search_path: OsString,
}

impl Tools {
    /// Looks for criu in `PATH` and the system's directories, asks it for its
    /// version and loads libcriu. Takes some 20 ms: it runs criu.
    ///
    /// # Errors
    ///
    /// Says what is missing or too old.
    pub fn find() -> Result<Self, Missing> {
        let own = std::env::var_os("PATH").unwrap_or_default();
        Self::find_in(with_system_directories(&own))
    }

    fn find_in(search_path: OsString) -> Result<Self, Missing> {
        let criu = std::env::split_paths(&search_path)
            .map(|directory| directory.join("criu"))
            .find(|program| is_executable(program))
            .ok_or_else(|| Missing::Program {
                searched: search_path.to_string_lossy().into_owned(),
            })?;
        let version = version_of(&criu)?;
        if version < MINIMUM {
            let kernel = nix::sys::utsname::uname().ok();
            return Err(Missing::TooOld {
                found: version,
                kernel: kernel.map(|name| name.release().to_string_lossy().into_owned()),
            });
        }
        criu_sys::Libcriu::load()?;
        Ok(Self {
            criu,
            version,
            search_path,
        })
    }
}

/// Every directory once, in the order of the first mention.
fn with_system_directories(own: &OsStr) -> OsString {
    let mut directories: Vec<PathBuf> = Vec::new();
    let system = OsStr::new(SYSTEM_DIRECTORIES);
    for directory in std::env::split_paths(own).chain(std::env::split_paths(system)) {
        if directory.is_absolute() && !directories.contains(&directory) {
            directories.push(directory);
        }
    }
    // None of them holds the separator: they have just been split at it.
    std::env::join_paths(directories).unwrap_or_else(|_| system.to_owned())
}

fn is_executable(program: &Path) -> bool {
    program
        .metadata()
        .is_ok_and(|found| found.is_file() && found.permissions().mode() & 0o111 != 0)
}

fn version_of(program: &Path) -> Result<Version, Missing> {
    let output = Command::new(program)
        .arg("--version")
        .stdin(Stdio::null())
        .output()
        .map_err(|source| Missing::Run {
            program: program.to_owned(),
            source,
        })?;
    let text = String::from_utf8_lossy(&output.stdout);
    Version::from_output(&text).ok_or_else(|| Missing::Output {
        program: program.to_owned(),
        output: text.chars().take(200).collect(),
    })
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;

    fn version(major: u32, minor: u32, patch: u32) -> Version {
        Version {
            major,
            minor,
            patch,
        }
    }

    #[test]
    fn versions_are_read_from_what_released_and_built_programs_print() {
        let read = |text| Version::from_output(text).unwrap();
        assert_eq!(read("Version: 4.2.1\n"), version(4, 2, 1));
        assert_eq!(
            read("Version: 4.2\nGitID: v4.2-15-gabcdef\n"),
            version(4, 2, 0)
        );
        assert_eq!(read("Version: 3.17.1\n").to_string(), "3.17.1");
        assert_eq!(read("Version: 4.1.1-rc1\n"), version(4, 1, 1));
        assert_eq!(Version::from_output("criu: error\n"), None);
        assert_eq!(Version::from_output("Version: four\n"), None);
    }

    #[test]
    fn versions_compare_by_number_and_not_by_text() {
        assert!(version(4, 10, 0) > version(4, 2, 1));
        assert!(version(3, 19, 0) < MINIMUM && version(4, 1, 0) < MINIMUM);
    }

    #[test]
    fn the_search_path_has_the_systems_directories_and_each_once() {
        let path = with_system_directories(OsStr::new("/usr/bin:/opt/bin::relative"));
        let expected = "/usr/bin:/opt/bin:/usr/local/sbin:/usr/local/bin:/usr/sbin:/sbin:/bin";
        assert_eq!(path, expected);
    }

    fn directory_with(script: &str) -> tempfile::TempDir {
        let directory = tempfile::tempdir().unwrap();
        let program = directory.path().join("criu");
        fs::write(&program, script).unwrap();
        fs::set_permissions(&program, fs::Permissions::from_mode(0o755)).unwrap();
        directory
    }

    #[test]
    fn an_old_program_is_refused_with_both_versions() {
        let directory = directory_with("#!/bin/sh\necho 'Version: 3.17.1'\n");
        let error = Tools::find_in(directory.path().into())
            .unwrap_err()
            .to_string();
        assert!(
            error.starts_with("criu 3.17.1 is too old: 4.1.1 or newer"),
            "{error}"
        );
    }

    #[test]
    fn a_program_that_is_not_there_is_named_with_the_directories() {
        let directory = tempfile::tempdir().unwrap();
        let error = Tools::find_in(directory.path().into())
            .unwrap_err()
            .to_string();
        assert!(
            error.contains(directory.path().to_str().unwrap()),
            "{error}"
        );
        fs::write(directory.path().join("criu"), "not executable").unwrap();
        let error = Tools::find_in(directory.path().into()).unwrap_err();
        assert!(matches!(error, Missing::Program { .. }));
    }
}
