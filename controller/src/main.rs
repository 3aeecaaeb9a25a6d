//! `sterna-controller`: decides who is restored from whom.
//!
//! ```text
//!  watches ──> World ──> plan (pure) ──> Actions ──> act ──> API server
//!              world.rs  plan/           plan/       act.rs
//! ```
//!
//! One replica decides at a time, by a Lease. It holds nothing that is not in the
//! API server: whoever takes over goes on from the objects.

mod act;
mod authority;
mod health;
mod leader;
mod metrics;
mod nodes;
mod owners;
mod plan;
mod remove;
mod work;
mod world;

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use anyhow::Context as _;
use clap::{Args, Parser, Subcommand};
use kube::CustomResourceExt as _;

#[derive(Debug, Parser)]
#[command(
    version,
    about = "Decides which pod is restored from which, in Kubernetes"
)]
struct Command {
    #[command(subcommand)]
    command: Verb,
}

#[derive(Debug, Subcommand)]
enum Verb {
    /// Run until told to stop.
    Run(Settings),
    /// Print the CustomResourceDefinitions, as the chart has them.
    Crds,
    /// Take Sterna off all nodes, unless pods need it.
    Remove(remove::Settings),
}

/// What `run` can be told.
#[derive(Debug, Clone, Args)]
pub(crate) struct Settings {
    /// Names of the RuntimeClasses whose pods are ours.
    #[arg(
        long,
        env = "STERNA_RUNTIME_CLASSES",
        value_delimiter = ',',
        default_value = "sterna,runc-architect"
    )]
    runtime_classes: Vec<String>,
    /// Namespace of the Lease that elects who decides.
    #[arg(long, env = "POD_NAMESPACE", default_value = "default")]
    namespace: String,
    /// This replica's name in the Lease.
    #[arg(long, env = "POD_NAME")]
    identity: Option<String>,
    /// Label the nodes whose sternad, a pod of this selector in our namespace, is ready.
    #[arg(long)]
    sternad_selector: Option<String>,
    /// Keep the authority that names nodes in this Secret of our namespace.
    #[arg(long)]
    authority_secret: Option<String>,
    /// Where health and metrics are served.
    #[arg(long, default_value = "0.0.0.0:8080")]
    listen: SocketAddr,
    /// How long Migrations that are over are kept, in seconds.
    #[arg(long, default_value_t = 86400)]
    keep_finished_seconds: u32,
    /// Write logs as JSON.
    #[arg(long, env = "STERNA_LOG_JSON")]
    log_json: bool,
}

fn main() -> anyhow::Result<()> {
    match Command::parse().command {
        Verb::Crds => {
            print!("{}", definitions()?);
            Ok(())
        }
        Verb::Run(settings) => {
            start_log(settings.log_json);
            use_our_tls()?;
            runtime()?.block_on(run(settings))
        }
        Verb::Remove(settings) => {
            start_log(false);
            use_our_tls()?;
            runtime()?.block_on(remove::run(settings))
        }
    }
}

fn runtime() -> anyhow::Result<tokio::runtime::Runtime> {
    tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .enable_all()
        .build()
        .context("start the runtime")
}

/// Whichever provider a dependency may bring: ours.
fn use_our_tls() -> anyhow::Result<()> {
    rustls::crypto::ring::default_provider()
        .install_default()
        .map_err(|_| anyhow::anyhow!("another TLS provider is installed already"))
}

fn start_log(json: bool) {
    let filter = tracing_subscriber::EnvFilter::try_from_default_env()
        .unwrap_or_else(|_| tracing_subscriber::EnvFilter::new("info"));
    let builder = tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(std::io::stderr);
    if json {
        builder.json().init();
    } else {
        builder.init();
    }
}

/// The chart's definitions by name, which a test keeps equal. As JSON: the chart
/// can read it, and nobody writes it by hand.
fn definitions() -> anyhow::Result<String> {
    let all = BTreeMap::from([("migrations", sterna_kube::Migration::crd())]);
    let mut text = serde_json::to_string_pretty(&all)?;
    text.push('\n');
    Ok(text)
}

async fn run(settings: Settings) -> anyhow::Result<()> {
    let client = kube::Client::try_default()
        .await
        .context("find the API server")?;
    let metrics = Arc::new(metrics::Metrics::new());
    let health = Arc::new(health::Health::default());
    let listener = health::listen(settings.listen).await?;
    let server = health::serve(listener, Arc::clone(&health), Arc::clone(&metrics));

    let identity = settings
        .identity
        .clone()
        .unwrap_or_else(|| format!("sterna-controller-{}", std::process::id()));
    let election = leader::Election::new(client.clone(), &settings.namespace, &identity);
    let work = async {
        health.set_ready(true);
        let held = election.acquire().await;
        tracing::info!(identity, "leads from now on");
        metrics.leads(true);
        let authority = async {
            if let Some(secret) = &settings.authority_secret {
                authority::keep(client.clone(), &settings.namespace, secret).await;
            }
        };
        let label = async {
            if let Some(selector) = &settings.sternad_selector {
                nodes::keep(client.clone(), &settings.namespace, selector).await;
            }
        };
        let aside = async {
            tokio::join!(authority, label);
            std::future::pending().await
        };
        tokio::select! {
            ended = aside => ended,
            lost = held.lost() => Err(lost.context("another one may lead: give up")),
            ended = work::run(client.clone(), settings.clone(), Arc::clone(&metrics)) => ended,
        }
    };
    tokio::select! {
        ended = work => ended,
        ended = server => ended,
        () = stop_signal() => {
            tracing::info!("told to stop");
            // So that the next one need not wait for the Lease to run out.
            if tokio::time::timeout(Duration::from_secs(2), election.release()).await.is_err() {
                tracing::warn!("could not give the Lease back in time");
            }
            Ok(())
        }
    }
}

async fn stop_signal() {
    use tokio::signal::unix::{SignalKind, signal};
    let Ok(mut terminate) = signal(SignalKind::terminate()) else {
        return std::future::pending().await;
    };
    tokio::select! {
        _ = terminate.recv() => (),
        _ = tokio::signal::ctrl_c() => (),
    }
}

#[cfg(test)]
mod tests {
    #[test]
    fn the_charts_definitions_are_those_of_the_types() {
        let chart = concat!(
            env!("CARGO_MANIFEST_DIR"),
            "/../install/helm/sterna/files/crds.json"
        );
        let chart = std::fs::read_to_string(chart).unwrap();
        assert!(
            chart == super::definitions().unwrap(),
            "run: sterna-controller crds >install/helm/sterna/files/crds.json"
        );
    }
}
