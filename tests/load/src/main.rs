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
mod report;
mod run;
mod verify;
mod writer;

use std::process::ExitCode;

use clap::Parser;

/// Fill a Valkey, write to it, probe it, and check that nothing was lost.
#[derive(Debug, Parser)]
enum Command {
    /// Load a server until `stop` is read from standard input.
    #[command(
        after_help = "Example: sterna-load run --address 10.77.0.50:6379 --memory 1G --write-rate 20000/s"
    )]
    Run(run::Options),
    /// Print a table and one JSON object of what was collected.
    Report(report::Options),
}

fn main() -> ExitCode {
    let done = match Command::parse() {
        Command::Run(options) => run::run(&options),
        Command::Report(options) => report::run(&options),
    };
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("sterna-load: {error:#}");
            ExitCode::FAILURE
        }
    }
}
