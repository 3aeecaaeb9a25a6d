//! What is watched, and which namespaces changed.

use std::collections::BTreeSet;
use std::fmt::Debug;
use std::sync::{Arc, Mutex, PoisonError};

use anyhow::Context as _;
use futures::TryStreamExt as _;
use k8s_openapi::api::core::v1::Pod;
use kube::api::Api;
use kube::runtime::reflector::{self, Store};
use kube::runtime::{WatchStreamExt as _, watcher};
use kube::{Client, Resource, ResourceExt as _};
use serde::de::DeserializeOwned;
use sterna_kube::{Migration, annotations};
use tokio::sync::Notify;

/// Namespaces that are to be planned again.
#[derive(Debug, Default)]
pub(crate) struct Dirty {
    namespaces: Mutex<BTreeSet<String>>,
    some: Notify,
}

impl Dirty {
    pub(crate) fn mark(&self, namespace: &str) {
        let mut namespaces = self
            .namespaces
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        namespaces.insert(namespace.to_owned());
        self.some.notify_one();
    }

    /// Those marked since it was last called; waits for one.
    pub(crate) async fn take(&self) -> BTreeSet<String> {
        loop {
            let some = self.some.notified();
            let taken = std::mem::take(
                &mut *self
                    .namespaces
                    .lock()
                    .unwrap_or_else(PoisonError::into_inner),
            );
            if !taken.is_empty() {
                return taken;
            }
            some.await;
        }
    }
}

/// All that is watched.
#[derive(Debug, Clone)]
pub(crate) struct World {
    pods: Store<Pod>,
    migrations: Store<Migration>,
}

impl World {
    /// Begins to watch; the second is what watches, until it fails.
    pub(crate) fn watch(
        client: &Client,
        dirty: &Arc<Dirty>,
    ) -> (Self, impl Future<Output = anyhow::Result<()>> + use<>) {
        let (pods, watch_pods) = watch(
            Api::<Pod>::all(client.clone()),
            Arc::clone(dirty),
            // A cluster has many pods; we need few. One that is in the store stays
            // until it is deleted, whatever becomes of its annotations.
            annotations::concerns_us,
        );
        let (migrations, watch_migrations) = watch(
            Api::<Migration>::all(client.clone()),
            Arc::clone(dirty),
            |_| true,
        );
        let watch = async move {
            tokio::select! {
                ended = watch_pods => ended.context("watch pods"),
                ended = watch_migrations => ended.context("watch Migrations"),
            }
        };
        (Self { pods, migrations }, watch)
    }

    /// Waits until all is known.
    pub(crate) async fn ready(&self) -> anyhow::Result<()> {
        self.pods.wait_until_ready().await.context("list pods")?;
        self.migrations
            .wait_until_ready()
            .await
            .context("list Migrations")
    }

    pub(crate) fn pods(&self, namespace: &str) -> Vec<Arc<Pod>> {
        self.pods
            .state_filter(|pod| pod.metadata.namespace.as_deref() == Some(namespace))
    }

    pub(crate) fn migrations(&self, namespace: &str) -> Vec<Arc<Migration>> {
        self.migrations
            .state_filter(|one| one.metadata.namespace.as_deref() == Some(namespace))
    }

    /// Namespaces with anything in them.
    pub(crate) fn namespaces(&self) -> BTreeSet<String> {
        let pods = self.pods.state();
        let migrations = self.migrations.state();
        let pods = pods.iter().filter_map(|pod| pod.metadata.namespace.clone());
        let migrations = migrations
            .iter()
            .filter_map(|one| one.metadata.namespace.clone());
        pods.chain(migrations).collect()
    }

    /// Migrations that are not over, in all namespaces.
    pub(crate) fn in_flight(&self) -> usize {
        let over = |one: &Migration| {
            one.status
                .as_ref()
                .is_some_and(|status| status.phase.is_final())
        };
        self.migrations.state_filter(|one| !over(one)).len()
    }
}

fn watch<K>(
    api: Api<K>,
    dirty: Arc<Dirty>,
    keep: impl Fn(&K) -> bool + Send + 'static,
) -> (Store<K>, impl Future<Output = anyhow::Result<()>>)
where
    K: Resource<DynamicType = ()> + Clone + Debug + DeserializeOwned + Send + Sync + 'static,
{
    let (store, mut writer) = reflector::store();
    let watch = async move {
        let events = watcher(api, watcher::Config::default())
            .default_backoff()
            .modify(|object| object.managed_fields_mut().clear());
        let mut events = std::pin::pin!(events);
        loop {
            let event = match events.try_next().await {
                Ok(Some(event)) => event,
                Ok(None) => anyhow::bail!("the watch ended"),
                Err(error) => {
                    // It begins again by itself, after a while.
                    tracing::warn!(%error, "watch");
                    continue;
                }
            };
            let concerns = match &event {
                watcher::Event::Apply(object) | watcher::Event::InitApply(object) => keep(object),
                _ => true,
            };
            if !concerns {
                continue;
            }
            writer.apply_watcher_event(&event);
            match &event {
                watcher::Event::Apply(object) | watcher::Event::Delete(object) => {
                    dirty.mark(&object.namespace().unwrap_or_default());
                }
                watcher::Event::InitDone => {
                    for object in writer.as_reader().state() {
                        dirty.mark(&object.namespace().unwrap_or_default());
                    }
                }
                watcher::Event::Init | watcher::Event::InitApply(_) => (),
            }
        }
    };
    (store, watch)
}
