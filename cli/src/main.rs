//! sterna: moves running containers between nodes, from the command line.
//!
//! Everything is done by sternad; this asks it over its unix socket and shows the
//! answer, to people as text and to scripts as JSON.

mod arguments;
mod cancel;
mod client;
mod doctor;
mod exit;
mod format;
mod migrate;
mod ps;
mod release;
mod report;

use std::process::ExitCode;

use clap::Parser as _;

use arguments::{Arguments, Command};
use exit::Exit;

#[tokio::main(flavor = "current_thread")]
async fn main() -> ExitCode {
    let arguments = Arguments::parse();
    let result = match &arguments.command {
        Command::Ps(command) => ps::run(&arguments, command).await,
        Command::Migrate(command) => migrate::run(&arguments, command).await,
        Command::Cancel(command) => cancel::run(&arguments, command).await,
        Command::Release(command) => release::run(&arguments, command).await,
        Command::Doctor(command) => doctor::run(&arguments, command).await,
    };
    match result {
        Ok(exit) => exit.into(),
        Err(error) => {
            eprintln!("sterna: {:#}", error.error);
            error.exit.into()
        }
    }
}

/// What went wrong, and what to tell the shell.
#[derive(Debug)]
struct Failed {
    exit: Exit,
    error: anyhow::Error,
}

impl From<anyhow::Error> for Failed {
    fn from(error: anyhow::Error) -> Self {
        Self {
            exit: Exit::Failed,
            error,
        }
    }
}
