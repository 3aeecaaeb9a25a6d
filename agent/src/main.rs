//! sternad: Sterna's node agent.
//!
//! One per node. It knows the containers under Sterna on its node, moves them to
//! other nodes when asked, and prepares this node for containers that come. It
//! decides who may talk to whom; memory and files pass it by, from engine to
//! engine.
//!
//! ```text
//! config         the file                     startup     what an earlier one left
//! serve          both doors                   doctor      can it be done, and if not, why
//! listener       the TCP port                 containerd  its API
//! peer           calls to other nodes         facts       what this node is
//! peer_service   calls from other nodes       probe       what its kernel can do
//! local_service  calls from the command line
//! answers        what is said in the place of an engine that is gone
//! arrivals       containers on their way here
//! departures     containers on their way from here
//! parked         states that wait on disk for a pod to take them
//! kubernetes     the API server's word on who leaves and who comes
//! pods           whose containers are their kubelet's: who asks for a state meets who has one
//! ```

mod answers;
mod arrivals;
mod cgroup;
mod clock;
mod config;
mod containerd;
mod departures;
mod doctor;
mod facts;
mod kubernetes;
mod listener;
mod local_service;
mod node;
mod parked;
mod peer;
mod peer_service;
mod pods;
mod probe;
mod process;
mod serve;
mod side;
mod startup;
mod sweep;

use std::io::IsTerminal as _;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::{Context as _, ensure};
use clap::{Parser, Subcommand};
use identity::{Authority, IdentityError, NodeIdentity, NodeName};
use tracing_subscriber::EnvFilter;

const DEFAULT_CONFIG: &str = "/etc/sterna/sternad.toml";
/// The netlink crate warns of every attribute that is newer than it.
const DEFAULT_LOG: &str = "info,netlink_packet_route=error";
const DEFAULT_IDENTITY_DIR: &str = "/etc/sterna/pki";

/// Sterna's node agent.
#[derive(Debug, Parser)]
#[command(version, arg_required_else_help = true)]
struct Arguments {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Run the agent.
    #[command(after_help = "\
Without a file every setting has its default: install/sternad.toml lists them.
STERNA_LOG says what is logged, to standard error: error, warn, info, debug, or by
module, such as info,sternad::listener=debug.")]
    Run {
        /// Configuration file [default: /etc/sterna/sternad.toml, if there is one].
        #[arg(long, value_name = "FILE")]
        config: Option<PathBuf>,
        /// Log lines as JSON objects.
        #[arg(long)]
        log_json: bool,
    },
    /// Make a new authority, which names the nodes that may exchange containers.
    ///
    /// Once, on one machine. Its key (ca.key) stays there: keep a copy in a safe
    /// place, whoever has it can join.
    InitCa {
        /// Directory for certificates and keys.
        #[arg(long, value_name = "DIR", default_value = DEFAULT_IDENTITY_DIR)]
        dir: PathBuf,
    },
    /// Make a node's certificate and key, where the authority is.
    ///
    /// Without --out for this node itself. For another node: with --out DIR, then
    /// copy the three files of DIR to /etc/sterna/pki there (for example with
    /// scp) and delete DIR. To renew, do the same again.
    #[command(after_help = "Example, for node b:\n  \
        sternad enroll b --out /root/b\n  \
        scp -r /root/b root@b:/etc/sterna/pki && rm -r /root/b")]
    Enroll {
        /// The node's name, as others will spell it.
        node: String,
        /// Directory for the node's files.
        #[arg(long, value_name = "DIR")]
        out: Option<PathBuf>,
        /// Directory of the authority.
        #[arg(long, value_name = "DIR", default_value = DEFAULT_IDENTITY_DIR)]
        dir: PathBuf,
    },
    /// What the kernel and the tools can do, as JSON.
    #[command(hide = true, name = probe::SUBCOMMAND)]
    Probe,
}

fn main() -> ExitCode {
    let result = match Arguments::parse().command {
        Command::Run { config, log_json } => run(config.as_deref(), log_json),
        Command::InitCa { dir } => init_ca(&dir),
        Command::Enroll { node, out, dir } => enroll(&node, out.as_deref(), &dir),
        Command::Probe => print_probe(),
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("sternad: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run(config: Option<&Path>, log_json: bool) -> anyhow::Result<()> {
    let filter =
        EnvFilter::try_from_env("STERNA_LOG").unwrap_or_else(|_| EnvFilter::new(DEFAULT_LOG));
    let log = tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_ansi(std::io::stderr().is_terminal())
        .with_writer(std::io::stderr);
    if log_json {
        log.json().init();
    } else {
        // The journal adds the time.
        log.without_time().with_target(false).init();
    }
    let config = config::Config::load(
        config.unwrap_or(Path::new(DEFAULT_CONFIG)),
        config.is_none(),
    )?;
    tokio::runtime::Builder::new_multi_thread()
        .enable_all()
        .build()
        .context("cannot start")?
        .block_on(serve::run(config, std::env::var_os("NOTIFY_SOCKET")))
}

fn init_ca(dir: &Path) -> anyhow::Result<()> {
    Authority::init(dir)?;
    println!("made an authority in {}", dir.display());
    println!("next: sternad enroll NODE, for this node and (with --out) for each other one");
    Ok(())
}

fn enroll(node: &str, out: Option<&Path>, dir: &Path) -> anyhow::Result<()> {
    let node: NodeName = node.parse()?;
    let authority = Authority::load(dir).with_context(|| {
        format!(
            "there is no authority in {} (sternad init-ca)",
            dir.display()
        )
    })?;
    let target = out.unwrap_or(dir);
    match NodeIdentity::load(target) {
        Ok(existing) => ensure!(
            existing.name() == &node,
            "{} is the identity of node {}: give --out DIR for another node's",
            target.display(),
            existing.name()
        ),
        // There is none, or one that does not work: it is made now.
        Err(IdentityError::File { .. } | IdentityError::Pem { .. } | IdentityError::Tls { .. }) => {
        }
        Err(error) => return Err(error.into()),
    }
    for file in authority.enroll(&node, target)? {
        println!("{}", file.display());
    }
    if out.is_some() {
        println!(
            "next: copy these files to {DEFAULT_IDENTITY_DIR} on node {node} and delete them here"
        );
    }
    Ok(())
}

fn print_probe() -> anyhow::Result<()> {
    println!("{}", serde_json::to_string(&probe::Probe::here())?);
    Ok(())
}
