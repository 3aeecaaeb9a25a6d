//! What every part of sternad needs to know about its own node.

use std::collections::HashMap;
use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr};
use std::sync::{Arc, Mutex, PoisonError};

use anyhow::{Context as _, ensure};
use identity::{NodeIdentity, NodeName};
use nodeapi::RunDir;

use crate::config::{Config, DEFAULT_PORT};
use crate::containerd::Containerd;
use crate::parked::Parked;

/// This node.
#[derive(Debug)]
pub(crate) struct Node {
    pub(crate) name: NodeName,
    pub(crate) config: Config,
    pub(crate) identity: NodeIdentity,
    pub(crate) containerd: Containerd,
    pub(crate) run_dir: RunDir,
    pub(crate) parked: Arc<Parked>,
    /// host:port of other nodes, as an orchestrator says it.
    learned: Mutex<HashMap<NodeName, String>>,
}

impl Node {
    pub(crate) fn load(config: Config) -> anyhow::Result<Arc<Self>> {
        let identity = NodeIdentity::load(&config.identity_dir).with_context(|| {
            format!(
                "this node has no usable identity in {} (sternad init-ca and sternad enroll make one)",
                config.identity_dir.display()
            )
        })?;
        let name = identity.name().clone();
        if let Some(configured) = &config.node {
            ensure!(
                configured == name.as_str(),
                "the configuration calls this node {configured:?}, its certificate {name:?}"
            );
        }
        let run_dir = RunDir::at(&config.run_dir);
        let kept = &config.parked;
        Ok(Arc::new(Self {
            containerd: Containerd::new(&config.containerd),
            parked: Parked::new(&kept.dir, &run_dir, kept.limit_bytes),
            run_dir,
            name,
            identity,
            config,
            learned: Mutex::default(),
        }))
    }

    /// An orchestrator says where a node is.
    pub(crate) fn learn(&self, node: NodeName, host: &str) {
        let address = match host.contains(':') {
            true => format!("[{host}]:{DEFAULT_PORT}"),
            false => format!("{host}:{DEFAULT_PORT}"),
        };
        let mut learned = self.learned.lock().unwrap_or_else(PoisonError::into_inner);
        learned.insert(node, address);
    }

    /// host:port of this node's own port, for its own processes.
    pub(crate) fn own_address(&self) -> String {
        let mut listen = self.config.listen;
        if listen.ip().is_unspecified() {
            listen.set_ip(match listen {
                SocketAddr::V4(_) => Ipv4Addr::LOCALHOST.into(),
                SocketAddr::V6(_) => Ipv6Addr::LOCALHOST.into(),
            });
        }
        listen.to_string()
    }

    /// host:port of a node's sternad: as the file says, else as an orchestrator
    /// does, else its name is its host's.
    pub(crate) fn peer_address(&self, node: &NodeName) -> String {
        let learned = || {
            let learned = self.learned.lock().unwrap_or_else(PoisonError::into_inner);
            learned.get(node).cloned()
        };
        self.config
            .peer_address(node)
            .or_else(learned)
            .unwrap_or_else(|| format!("{node}:{DEFAULT_PORT}"))
    }
}
