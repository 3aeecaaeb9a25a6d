//! `kubectl sterna`: moves pods with their memory, and shows how that goes.
//!
//! Everything is done by the controller and the nodes; this makes Migrations and
//! reads what they say of themselves.

mod cluster;
mod describe;
mod doctor;
mod drain;
mod follow;
mod list;
mod migrate;
mod table;

use std::process::ExitCode;

use clap::{Args, Parser, Subcommand};

use crate::cluster::Cluster;

#[derive(Debug, Parser)]
#[command(
    name = "kubectl-sterna",
    bin_name = "kubectl sterna",
    version,
    about = "Moves pods from node to node with what they hold in memory"
)]
struct Command {
    #[command(flatten)]
    place: Place,
    #[command(subcommand)]
    verb: Verb,
}

/// Which cluster and namespace.
#[derive(Debug, Args)]
pub(crate) struct Place {
    /// The namespace; default: the kubeconfig's.
    #[arg(short, long, global = true)]
    namespace: Option<String>,
    /// The context of the kubeconfig; default: its current one.
    #[arg(long, global = true)]
    context: Option<String>,
}

#[derive(Debug, Subcommand)]
enum Verb {
    /// List Migrations.
    List(list::Arguments),
    /// Show all about a Migration.
    Describe {
        /// Its name.
        migration: String,
    },
    /// Move a pod, and wait until it has arrived.
    Migrate(migrate::Arguments),
    /// Call a Migration off. After the commit that is too late.
    Cancel {
        /// Its name.
        migration: String,
    },
    /// Cordon a node and move all pods from it whose memory can follow them.
    Drain(drain::Arguments),
    /// Say what is in the way of migrations in this cluster.
    Doctor,
}

#[tokio::main(flavor = "current_thread")]
async fn main() -> ExitCode {
    let command = Command::parse();
    match run(command).await {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) => {
            eprintln!("kubectl sterna: {error:#}");
            ExitCode::FAILURE
        }
    }
}

/// Whether what was asked for came about.
async fn run(command: Command) -> anyhow::Result<bool> {
    // Whichever provider a dependency may bring: ours.
    rustls::crypto::ring::default_provider()
        .install_default()
        .map_err(|_| anyhow::anyhow!("another TLS provider is installed already"))?;
    let cluster = Cluster::connect(&command.place).await?;
    match command.verb {
        Verb::List(arguments) => list::run(&cluster, &arguments).await.map(|()| true),
        Verb::Describe { migration } => describe::run(&cluster, &migration).await.map(|()| true),
        Verb::Migrate(arguments) => migrate::run(&cluster, &arguments).await,
        Verb::Cancel { migration } => migrate::cancel(&cluster, &migration).await,
        Verb::Drain(arguments) => drain::run(&cluster, &arguments).await,
        Verb::Doctor => doctor::run(&cluster).await,
    }
}
