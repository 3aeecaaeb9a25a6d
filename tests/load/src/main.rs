//! The client of the demo, the tests and the benchmarks.
//!
//! `run` fills a Valkey, writes at a rate and probes it every millisecond, all
//! over connections opened before anything happens to the server, and afterwards
//! reads everything back. On standard output it prints one JSON object per line:
//! `filled`, `ready` once the load is steady, `mark` for each line `mark` of
//! standard input, and after the line `stop`, `result`.

mod client;
mod dataset;
mod gap;
mod probe;
mod rate;
mod run;
mod verify;
mod writer;

use anyhow::Result;
use clap::Parser;

/// Fill a Valkey, write to it, probe it, and check that nothing was lost.
#[derive(Debug, Parser)]
enum Command {
    /// Load a server until `stop` is read from standard input.
    #[command(
        after_help = "Example: sterna-load run --address 10.77.0.50:6379 --memory 1G --write-rate 20000/s"
    )]
    Run(run::Options),
}

fn main() -> Result<()> {
    match Command::parse() {
        Command::Run(options) => run::run(&options),
    }
}
