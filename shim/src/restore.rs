//! `runc restore`: of a checkpoint at start, and of a container that arrived.

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use nodeapi::RestoreFlags;
use serde::{Deserialize, Serialize};

use crate::bundle::{Spec, read_pid};
use crate::cgroup::Cgroup;
use crate::container::{CheckpointSource, Container};
use crate::error::{Error, Result};
use crate::io::{Console, ConsoleSocket, ProcessIo, RuncStdio, Unnamed};
use crate::reaper::Expectation;
use crate::runc::{Launch, RestoreArgs, Running};
use crate::standin;

/// Beside the images: with which options they were made, so that the restore
/// can use the same.
const OPTIONS_FILE: &str = "sterna-options.json";

/// runc's flags for options that must equal those of the dump.
pub(crate) fn flags(flags: RestoreFlags) -> Vec<&'static str> {
    [
        (flags.tcp_established, "--tcp-established"),
        (flags.file_locks, "--file-locks"),
        (flags.ext_unix_sk, "--ext-unix-sk"),
        (flags.shell_job, "--shell-job"),
    ]
    .into_iter()
    .filter_map(|(wanted, flag)| wanted.then_some(flag))
    .collect()
}

/// What is left beside the images of a checkpoint; may grow.
#[derive(Debug, Default, Serialize, Deserialize)]
struct DumpOptions {
    flags: RestoreFlags,
}

/// Leaves the options of a dump beside its images.
pub(crate) fn write_options(images: &Path, flags: RestoreFlags) -> Result<()> {
    let path = images.join(OPTIONS_FILE);
    let text = serde_json::to_vec(&DumpOptions { flags }).map_err(|source| Error::Json {
        action: "write",
        path: path.clone(),
        source,
    })?;
    fs::write(&path, text).map_err(Error::io("write", &path))
}

/// The options of a dump. The Go shim leaves none and restores without any.
fn read_options(images: &Path) -> RestoreFlags {
    let Ok(text) = fs::read(images.join(OPTIONS_FILE)) else {
        return RestoreFlags::default();
    };
    serde_json::from_slice::<DumpOptions>(&text)
        .map(|options| options.flags)
        .unwrap_or_default()
}

/// Serves `Start` of a container that was created from a checkpoint.
pub(crate) async fn restore(container: &Arc<Container>, source: &CheckpointSource) -> Result<()> {
    let work_dir = match container.options.criu_work_path.as_str() {
        "" => container.bundle.join("work"),
        path => PathBuf::from(path),
    };
    let args = RestoreArgs {
        images: source.images.clone(),
        work_dir: work_dir.clone(),
        parent: source.parent.clone(),
        programs: None,
        flags: flags(read_options(&source.images)),
    };
    let mut restore = Restore::begin(container, &args, &source.images).await?;
    match restore.finish().await {
        Ok(_pid) => Ok(()),
        Err(error) => {
            container.init.abort_io().await;
            Err(error)
        }
    }
}

/// The line of CRIU's log that says why, where runc does not.
pub(crate) fn explain(error: &Error, work_dir: &Path) -> String {
    let text = error.chain();
    match last_criu_error(&work_dir.join("restore.log")) {
        Some(line) if !text.contains(&line) => format!("{text}: {line}"),
        _ => text,
    }
}

/// The first error in a CRIU log: those that follow are its consequences. One
/// is in every log of a process without CAP_SYS_RESOURCE and harmless.
fn last_criu_error(log: &Path) -> Option<String> {
    let text = fs::read_to_string(log).ok()?;
    text.lines()
        .filter(|line| line.contains("Error (") && !line.contains("RLIMIT_NOFILE"))
        .map(|line| line.trim().to_owned())
        .next()
}

/// A `runc restore` that runs.
#[derive(Debug)]
pub(crate) struct Restore {
    container: Arc<Container>,
    launch: Launch,
    running: Option<Running>,
    runc_pid: u32,
    expectation: Option<Expectation>,
    console: Option<ConsoleSocket>,
    received: Option<Console>,
    runc_ended: bool,
    cgroup: Option<Cgroup>,
}

impl Restore {
    /// Prepares the streams and starts runc.
    pub(crate) async fn begin(
        container: &Arc<Container>,
        args: &RestoreArgs,
        images: &Path,
    ) -> Result<Self> {
        let init = &container.init;
        let mut launch = Launch {
            pid_file: container.pid_file(),
            console_socket: None,
        };
        fs::create_dir_all(&args.work_dir).map_err(Error::io("create", &args.work_dir))?;
        let expectation = container.context.reaper.expect();
        let mut console = None;
        let mut ends = RuncStdio::default();
        if init.stdio.terminal {
            let socket = ConsoleSocket::bind(&container.context.run_dir.path().join("console"))?;
            launch.console_socket = Some(socket.path().to_owned());
            console = Some(socket);
        } else {
            let (io, process_ends) =
                ProcessIo::pipes(&init.stdio, container.io_owner(), unnamed(images)).await?;
            init.attach(io, None);
            ends = process_ends;
        }
        let running = container.runc.restore(args, &launch, ends)?;
        Ok(Self {
            container: Arc::clone(container),
            launch,
            runc_pid: running.pid,
            running: Some(running),
            expectation: Some(expectation),
            console,
            received: None,
            runc_ended: false,
            cgroup: None,
        })
    }

    /// Remembers where the processes come into being, while runc lives to tell.
    pub(crate) fn note_cgroup(&mut self) {
        if self.cgroup.is_none() && !self.runc_ended {
            self.cgroup = restoring_cgroup(self.runc_pid);
        }
    }

    /// Waits for runc; answers the first process's pid. It is safe to drop this
    /// future and call it again.
    pub(crate) async fn finish(&mut self) -> Result<u32> {
        if let Some(running) = &mut self.running {
            // The terminal comes before runc ends, which may wait for long.
            if let (Some(socket), None) = (&self.console, &self.received) {
                tokio::select! {
                    console = socket.receive_whenever() => self.received = Some(console?),
                    _ = running.ended() => {}
                }
            }
            self.runc_ended = running.ended().await;
        }
        if let Some(running) = self.running.take() {
            running.result()?;
        }
        if let (Some(socket), None) = (&self.console, &self.received) {
            self.received = Some(socket.receive().await?);
        }
        let container = &self.container;
        if let Some(console) = self.received.take() {
            let io =
                ProcessIo::terminal(&container.init.stdio, container.io_owner(), &console).await?;
            container.init.attach(io, Some(console));
        }
        let pid = read_pid(&self.launch.pid_file)?;
        if let Some(expectation) = self.expectation.take() {
            container.init_appeared(pid, expectation.claim(pid));
        }
        Ok(pid)
    }

    /// Gives up: ends runc and CRIU and whatever they had begun to restore, or left
    /// when they failed. Nothing of it is left when this returns.
    pub(crate) async fn abandon(mut self) {
        self.note_cgroup();
        let container = &self.container;
        if !self.runc_ended {
            let group = nix::unistd::Pid::from_raw(self.runc_pid.cast_signed());
            if let Err(error) = nix::sys::signal::killpg(group, nix::sys::signal::Signal::SIGKILL) {
                tracing::warn!(%error, "cannot kill runc");
            }
        }
        if let Some(cgroup) = self.cgroup {
            cgroup.kill_for_good().await;
            cgroup.remove();
            if let Ok(spec) = Spec::read(&container.bundle)
                && let Some(path) = spec.cgroup()
            {
                crate::cgroup::remove_in(path);
            }
        }
        container.discard_in_runc().await;
        // runc removes its directory only for containers that it has finished.
        if let Err(error) = standin::forget(&container.runc.root().join(&container.id)) {
            tracing::warn!(error = error.chain(), "runc's state is left");
        }
        container.init.abort_io().await;
    }
}

/// The container's control group while it is being restored: runc puts CRIU
/// there first. Never our own.
fn restoring_cgroup(runc: u32) -> Option<Cgroup> {
    let own = Cgroup::of(std::process::id()).ok()?;
    children(runc)
        .into_iter()
        .filter_map(|pid| Cgroup::of(pid).ok())
        .find(|cgroup| *cgroup != own)
}

/// Direct children of every thread of a process.
fn children(pid: u32) -> Vec<u32> {
    let Ok(threads) = fs::read_dir(format!("/proc/{pid}/task")) else {
        return Vec::new();
    };
    threads
        .flatten()
        .filter_map(|thread| fs::read_to_string(thread.path().join("children")).ok())
        .flat_map(|list| {
            list.split_whitespace()
                .filter_map(|pid| pid.parse().ok())
                .collect::<Vec<u32>>()
        })
        .collect()
}

/// Whether streams without a name have to be pipes: they were where the process
/// was dumped, which descriptors.json says.
fn unnamed(images: &Path) -> Unnamed {
    match fs::read_to_string(images.join("descriptors.json")) {
        Ok(text) if !text.contains("pipe:") => Unnamed::Null,
        // If in doubt: a pipe that CRIU does not ask for does no harm.
        _ => Unnamed::Pipe,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_options_of_a_dump_come_back() {
        let images = tempfile::tempdir().unwrap();
        assert_eq!(read_options(images.path()), RestoreFlags::default());
        let made = RestoreFlags {
            tcp_established: true,
            file_locks: true,
            ..Default::default()
        };
        write_options(images.path(), made).unwrap();
        assert_eq!(read_options(images.path()), made);
        assert_eq!(flags(made), ["--tcp-established", "--file-locks"]);
    }

    #[test]
    fn pipes_are_given_where_the_dumped_process_had_some() {
        let images = tempfile::tempdir().unwrap();
        let descriptors = images.path().join("descriptors.json");
        assert_eq!(unnamed(images.path()), Unnamed::Pipe);
        fs::write(&descriptors, r#"["/dev/null","pipe:[1]","pipe:[2]"]"#).unwrap();
        assert_eq!(unnamed(images.path()), Unnamed::Pipe);
        fs::write(&descriptors, r#"["/dev/null","/dev/null","/dev/null"]"#).unwrap();
        assert_eq!(unnamed(images.path()), Unnamed::Null);
    }

    #[test]
    fn the_telling_line_of_crius_log_is_found() {
        let work = tempfile::tempdir().unwrap();
        fs::write(
            work.path().join("restore.log"),
            "(0.1) Error (x.c:1): Can't set RLIMIT_NOFILE\n\
             (0.2) Error (files.c:2): File etc/x has bad size\n\
             (0.3) Error (cr.c:3): Restoring FAILED.\n",
        )
        .unwrap();
        let text = explain(&Error::NoContainer, work.path());
        assert!(text.ends_with("(0.2) Error (files.c:2): File etc/x has bad size"));
    }
}
