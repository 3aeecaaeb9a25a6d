//! The cluster that is asked.

use std::fmt::Debug;
use std::time::Duration;

use anyhow::Context as _;
use kube::api::{Api, ListParams};
use kube::config::KubeConfigOptions;
use kube::{Client, Config, Resource};
use serde::de::DeserializeOwned;
use sterna_kube::Migration;

use crate::Place;

/// For one request.
const TIMEOUT: Duration = Duration::from_secs(20);

/// The cluster that is asked.
#[derive(Clone)]
pub(crate) struct Cluster {
    pub(crate) client: Client,
    pub(crate) namespace: String,
}

impl Cluster {
    pub(crate) async fn connect(place: &Place) -> anyhow::Result<Self> {
        let options = KubeConfigOptions {
            context: place.context.clone(),
            ..KubeConfigOptions::default()
        };
        let config = match Config::from_kubeconfig(&options).await {
            Ok(config) => config,
            // In a pod there is none.
            Err(error) => Config::incluster().map_err(|_| error)?,
        };
        let namespace = place.namespace.clone();
        let namespace = namespace.unwrap_or_else(|| config.default_namespace.clone());
        Ok(Self {
            client: Client::try_from(config)?,
            namespace,
        })
    }

    pub(crate) fn migrations(&self) -> Api<Migration> {
        Api::namespaced(self.client.clone(), &self.namespace)
    }
}

/// A request's answer, if there is one in time.
pub(crate) async fn timed<T>(
    request: impl Future<Output = Result<T, kube::Error>>,
) -> anyhow::Result<T> {
    let answer = tokio::time::timeout(TIMEOUT, request)
        .await
        .context("the API server does not answer")?;
    answer.map_err(|error| match error {
        // The rest of it says the same again.
        kube::Error::Api(status) if !status.message.is_empty() => anyhow::anyhow!(status.message),
        error => error.into(),
    })
}

pub(crate) async fn list<K>(api: &Api<K>, params: &ListParams) -> anyhow::Result<Vec<K>>
where
    K: Clone + Debug + DeserializeOwned + Resource,
{
    Ok(timed(api.list(params)).await?.items)
}
