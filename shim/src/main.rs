//! containerd-shim-sterna-v1: a containerd runtime shim whose containers can move.
//!
//! One binary, several roles. containerd runs it with flags and an action (see
//! [`args`]); the server that `start` leaves behind runs the same file again
//! for what must not live in a small single-threaded process:
//!
//! ```text
//! containerd -> shim start            answers the address of a server, perhaps a new one
//!               shim (serve)          the task service of a pod         server.rs
//!                 -> shim engine      one migration                     crate engine
//!                 -> shim checkpoint  one standard dump               checkpoint.rs
//!                   -> shim criu-helper   libcriu, which forks          crate criu
//! containerd -> shim delete           cleans up after a dead server
//! ```

mod any;
mod args;
mod bootstrap;
mod bundle;
mod cgroup;
mod checkpoint;
mod container;
mod control;
mod create;
mod delete;
mod engine_link;
mod error;
mod events;
mod exec;
mod hostname;
mod idmapped;
mod info;
mod io;
mod logging;
mod managed;
mod migrate_in;
mod migrate_out;
mod movable;
mod oom;
mod operations;
mod options;
mod pod;
mod process;
mod reaper;
mod rest;
mod restore;
mod rootfs;
#[cfg(test)]
mod rootfs_tests;
mod runc;
mod server;
mod service;
mod standin;
mod state;
mod stats;
mod volumes;

use std::ffi::OsStr;
use std::path::Path;
use std::process::ExitCode;

use anyhow::Context;

use crate::args::{Action, Invocation};

fn main() -> ExitCode {
    let name = std::env::args_os().next().unwrap_or_default();
    if Path::new(&name).file_name() == Some(OsStr::new(engine::tmpfs::NAME)) {
        return engine::tmpfs::main();
    }
    match std::env::args_os()
        .nth(1)
        .as_deref()
        .and_then(OsStr::to_str)
    {
        Some("engine") => engine::main(),
        Some("criu-helper") => criu::helper_main(),
        Some("checkpoint") => checkpoint::main(),
        _ => match shim() {
            Ok(()) => ExitCode::SUCCESS,
            Err(error) => {
                eprintln!("containerd-shim-sterna-v1: {error:#}");
                ExitCode::FAILURE
            }
        },
    }
}

fn shim() -> anyhow::Result<()> {
    let invocation = Invocation::parse(std::env::args().skip(1)).context("bad arguments")?;
    match invocation.action {
        Action::Version => info::version(),
        Action::Help => info::help(),
        Action::Info => info::info(),
        Action::Start => bootstrap::start(&invocation),
        Action::Delete => delete::delete(&invocation),
        Action::Serve => server::serve(&invocation),
    }
}
