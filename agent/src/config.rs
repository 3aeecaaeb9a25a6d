//! sternad's configuration file.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};

use anyhow::{Context as _, ensure};
use identity::NodeName;
use serde::Deserialize;

/// Where sternad listens, and where it expects others that `peers` does not name.
pub(crate) const DEFAULT_PORT: u16 = 7443;

/// What `/etc/sterna/sternad.toml` may say; every line has a default.
#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub(crate) struct Config {
    /// This node's name. Default: the one in its certificate.
    pub(crate) node: Option<String>,
    /// Address and port for other nodes.
    pub(crate) listen: SocketAddr,
    /// containerd's socket.
    pub(crate) containerd: PathBuf,
    /// Certificate, key and authority.
    pub(crate) identity_dir: PathBuf,
    /// Sockets and records; the shims have the same path built in.
    pub(crate) run_dir: PathBuf,
    /// Output of containers that arrived and had pipes for it.
    pub(crate) log_dir: PathBuf,
    /// Other nodes whose name is not their address: name to host:port.
    pub(crate) peers: BTreeMap<String, String>,
    pub(crate) network: NetworkConfig,
    pub(crate) migration: MigrationConfig,
    pub(crate) limits: Limits,
    pub(crate) parked: ParkedConfig,
    /// None: the node is in no Kubernetes cluster.
    pub(crate) kubernetes: Option<KubernetesConfig>,
}

/// How sternad takes part in a cluster.
#[derive(Debug, Clone, PartialEq, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub(crate) struct KubernetesConfig {
    /// How to reach the API server. None: as a pod does.
    pub(crate) kubeconfig: Option<PathBuf>,
    /// The node's name there. Default: its own.
    pub(crate) node: Option<String>,
}

#[derive(Debug, Clone, PartialEq, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub(crate) struct NetworkConfig {
    /// The bridge that incoming containers are attached to. None: containers
    /// with an address of their own are not taken.
    pub(crate) bridge: Option<String>,
}

#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub(crate) struct MigrationConfig {
    /// Used where `sterna migrate` does not say; in milliseconds.
    pub(crate) max_blackout_ms: u64,
}

/// States of pods that ended before there was another to take them.
#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub(crate) struct ParkedConfig {
    /// Where they lie; on a disk, as they are as large as the pods' memory.
    pub(crate) dir: PathBuf,
    /// How long one waits, in seconds; then it is removed.
    pub(crate) keep_seconds: u64,
    /// Most that one container's may be, in bytes.
    pub(crate) limit_bytes: u64,
}

#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub(crate) struct Limits {
    /// Containers on their way to this node at the same time.
    pub(crate) incoming: usize,
    /// Containers on their way to other nodes at the same time.
    pub(crate) outgoing: usize,
    /// Open connections on the port.
    pub(crate) connections: usize,
    /// Most memory that one incoming container may bring, in bytes. None: what
    /// it needs, if the node has it free.
    pub(crate) memory_bytes: Option<u64>,
}

impl Default for Config {
    fn default() -> Self {
        Self {
            node: None,
            listen: SocketAddr::from(([0, 0, 0, 0], DEFAULT_PORT)),
            containerd: "/run/containerd/containerd.sock".into(),
            identity_dir: "/etc/sterna/pki".into(),
            run_dir: "/run/sterna".into(),
            log_dir: "/var/lib/sterna/logs".into(),
            peers: BTreeMap::new(),
            network: NetworkConfig::default(),
            migration: MigrationConfig::default(),
            limits: Limits::default(),
            parked: ParkedConfig::default(),
            kubernetes: None,
        }
    }
}

impl Default for MigrationConfig {
    fn default() -> Self {
        Self {
            max_blackout_ms: 300,
        }
    }
}

impl Default for ParkedConfig {
    fn default() -> Self {
        Self {
            dir: "/var/lib/sterna/parked".into(),
            keep_seconds: 24 * 3600,
            limit_bytes: 64 << 30,
        }
    }
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            incoming: 4,
            outgoing: 4,
            connections: 256,
            memory_bytes: None,
        }
    }
}

impl Config {
    /// Reads `path`. That there is no such file is an error unless `optional`.
    pub(crate) fn load(path: &Path, optional: bool) -> anyhow::Result<Self> {
        let text = match std::fs::read_to_string(path) {
            Ok(text) => text,
            Err(error) if optional && error.kind() == std::io::ErrorKind::NotFound => {
                return Ok(Self::default());
            }
            Err(error) => return Err(error).context(format!("cannot read {}", path.display())),
        };
        Self::parse(&text).with_context(|| format!("cannot use {}", path.display()))
    }

    fn parse(text: &str) -> anyhow::Result<Self> {
        let config: Self = toml::from_str(text)?;
        for (name, address) in &config.peers {
            name.parse::<NodeName>()?;
            let (host, port) = address
                .rsplit_once(':')
                .with_context(|| format!("peer {name}: {address:?} is not host:port"))?;
            ensure!(
                !host.is_empty() && port.parse::<u16>().is_ok_and(|port| port != 0),
                "peer {name}: {address:?} is not host:port"
            );
        }
        ensure!(
            config.migration.max_blackout_ms > 0,
            "migration.max_blackout_ms is 0: no pause is that short"
        );
        for (name, limit) in [
            ("incoming", config.limits.incoming),
            ("outgoing", config.limits.outgoing),
            ("connections", config.limits.connections),
        ] {
            ensure!(limit > 0, "limits.{name} is 0: at least 1 is needed");
        }
        ensure!(
            config.parked.keep_seconds > 0,
            "parked.keep_seconds is 0: nothing would ever wait"
        );
        Ok(config)
    }

    /// host:port of a node's sternad, if the file says it.
    pub(crate) fn peer_address(&self, node: &NodeName) -> Option<String> {
        self.peers.get(node.as_str()).cloned()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_empty_file_gives_the_defaults_and_the_example_is_valid() {
        assert_eq!(Config::parse("").unwrap(), Config::default());
        let example = include_str!("../../install/sternad.toml");
        assert_eq!(Config::parse(example).unwrap(), Config::default());
        // Every commented setting of the example is one that exists.
        let all: String = example
            .lines()
            .map(|line| line.strip_prefix("#: ").unwrap_or(line))
            .map(|line| format!("{line}\n"))
            .collect();
        let config = Config::parse(&all).unwrap();
        assert!(config.network.bridge.is_some() && !config.peers.is_empty());
    }

    #[test]
    fn mistakes_are_named() {
        for (text, expected) in [
            ("lisen = \"x\"", "lisen"),
            ("[peers]\nb = \"10.0.0.2\"", "host:port"),
            ("[peers]\nb = \"10.0.0.2:0\"", "host:port"),
            ("[peers]\n\"../b\" = \"x:1\"", "not a node name"),
            ("[limits]\nincoming = 0", "limits.incoming"),
            ("[migration]\nmax_blackout_ms = \"fast\"", "max_blackout_ms"),
        ] {
            let error = format!("{:#}", Config::parse(text).unwrap_err());
            assert!(error.contains(expected), "{text}: {error}");
        }
    }

    #[test]
    fn a_missing_file_is_an_error_only_where_it_was_asked_for() {
        let path = Path::new("/nonexistent/sternad.toml");
        assert!(Config::load(path, true).is_ok());
        let error = Config::load(path, false).unwrap_err();
        assert!(error.to_string().contains("sternad.toml"), "{error}");
    }
}
