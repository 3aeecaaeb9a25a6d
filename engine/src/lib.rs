//! The two processes of a migration.
//!
//! A shim starts its own binary again as `engine` with a socket as file
//! descriptor 3; the first message on it says whether to send a container or to
//! receive one. The process lives as long as the migration: a shim at rest
//! carries none of this.
//!
//! | module | noun |
//! |---|---|
//! | [`send`], [`receive`] | the two sides: order of phases, unwinding, commit |
//! | [`session`], [`service`] | the two ends of the wire |
//! | [`link`] | connections: tickets, mutual TLS, gRPC settings |
//! | [`streams`], [`files`] | pages and files on their way |
//! | [`container`], [`dump`] | the container as the sender sees it: freezer, processes, CRIU |
//! | [`gate`], [`memory`] | where a restore waits for the commit, and its page server |
//! | [`tmpfs`] | what CRIU takes for tar |
//! | [`arrival`] | what a receiver has on disk about its ticket |
//! | [`park`] | a migration whose two halves are far apart in time; sternad's |
//! | [`progress`] | what is told to sternad |
//! | [`ipc`] | what is told to the shim |

mod arrival;
mod container;
mod dump;
mod files;
mod gate;
mod ipc;
mod link;
mod memory;
pub mod park;
mod progress;
mod receive;
mod receive_error;
mod send;
mod send_error;
mod service;
mod session;
mod streams;
pub mod tmpfs;
mod wire;

use std::error::Error;
use std::process::ExitCode;

use anyhow::Context;
use nodeapi::ToEngine;

/// Where an engine finds the socket to its shim.
const SHIM_FD: i32 = 3;

/// Runs the engine: what the shim's binary does when it is executed as `engine`.
/// Log lines go to standard error, which is the shim's log.
pub fn main() -> ExitCode {
    tracing_subscriber::fmt()
        .with_writer(std::io::stderr)
        .with_ansi(false)
        .with_env_filter(
            tracing_subscriber::EnvFilter::try_from_default_env()
                .unwrap_or_else(|_| tracing_subscriber::EnvFilter::new("info")),
        )
        .init();
    let runtime = match tokio::runtime::Builder::new_multi_thread()
        .enable_all()
        .build()
    {
        Ok(runtime) => runtime,
        Err(error) => {
            tracing::error!(%error, "cannot start a runtime");
            return ExitCode::FAILURE;
        }
    };
    match runtime.block_on(run()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            tracing::error!("{}", error_chain(error.as_ref()));
            ExitCode::FAILURE
        }
    }
}

async fn run() -> anyhow::Result<()> {
    let socket = sys::spawn::duplicate_inherited(SHIM_FD).context("started without a shim")?;
    let (job, shim, messages) = ipc::open(socket)?;
    match job {
        ToEngine::Send(job) => send::run(*job, shim, messages).await?,
        ToEngine::Recover(job) => send::recover(*job, shim).await?,
        ToEngine::Receive(job) => receive::run(*job, shim, messages).await?,
        other => anyhow::bail!("the shim began with {other:?}"),
    }
    Ok(())
}

/// An error and its causes on one line.
fn error_chain(error: &(dyn Error + 'static)) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        text = format!("{text}: {error}");
        cause = error.source();
    }
    text
}
