//! What every part of sternad needs to know about its own node.

use std::sync::Arc;

use anyhow::{Context as _, ensure};
use identity::{NodeIdentity, NodeName};
use nodeapi::RunDir;

use crate::config::Config;
use crate::containerd::Containerd;

/// This node.
#[derive(Debug)]
pub(crate) struct Node {
    pub(crate) name: NodeName,
    pub(crate) config: Config,
    pub(crate) identity: NodeIdentity,
    pub(crate) containerd: Containerd,
    pub(crate) run_dir: RunDir,
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
        Ok(Arc::new(Self {
            containerd: Containerd::new(&config.containerd),
            run_dir: RunDir::at(&config.run_dir),
            name,
            identity,
            config,
        }))
    }
}
