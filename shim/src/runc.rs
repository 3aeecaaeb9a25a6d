//! The runc command line: its arguments, its exit, its errors. The only place
//! that looks at runc's texts.

use std::fs;
use std::io::{self, Read, Seek, SeekFrom, Write};
use std::os::fd::OwnedFd;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::time::Duration;

use nix::sys::signal::Signal;
use serde::Deserialize;
use sys::spawn::CommandFds;
use tokio::io::AsyncReadExt;
use tokio::net::unix::pipe;

use crate::io::RuncStdio;
use crate::options::Options;
use crate::reaper::{ExitReceiver, Reaper};

/// Most of runc's output that is kept: it is shown in an error or parsed, and
/// `runc state` is the longest that we parse.
const OUTPUT_LIMIT: u64 = 1 << 20;

/// How long to go on reading output after runc is gone: a hook may have left a
/// process behind that holds the pipe.
const OUTPUT_GRACE: Duration = Duration::from_millis(200);

/// A runc command that failed.
#[derive(Debug, thiserror::Error)]
pub(crate) enum RuncError {
    // In quotes: containerd's own tests look for them.
    #[error("cannot run {program:?}")]
    Spawn {
        program: PathBuf,
        #[source]
        source: io::Error,
    },
    #[error("{what}: {message}")]
    Failed { what: &'static str, message: String },
    #[error("cannot understand runc's answer to {verb}")]
    Answer {
        verb: &'static str,
        #[source]
        source: serde_json::Error,
    },
}

impl RuncError {
    fn mentions(&self, text: &str) -> bool {
        match self {
            Self::Failed { message, .. } => message.to_lowercase().contains(text),
            Self::Spawn { .. } | Self::Answer { .. } => false,
        }
    }

    /// runc knows no such container.
    pub(crate) fn is_missing(&self) -> bool {
        self.mentions("does not exist")
    }

    /// There is no process to send a signal to.
    pub(crate) fn is_finished(&self) -> bool {
        self.mentions("process already finished")
            || self.mentions("container not running")
            || self.mentions("no such process")
    }
}

/// How a command refers to a container's terminal.
#[derive(Debug, Clone, Default)]
pub(crate) struct Launch {
    /// Where runc writes the pid of the process that it leaves.
    pub(crate) pid_file: PathBuf,
    /// Where runc sends the terminal's master; none without a terminal.
    pub(crate) console_socket: Option<PathBuf>,
}

/// What `runc restore` needs beyond a [`Launch`].
#[derive(Debug, Clone, Default)]
pub(crate) struct RestoreArgs {
    /// `--image-path`
    pub(crate) images: PathBuf,
    /// `--work-path`
    pub(crate) work_dir: PathBuf,
    /// `--parent-path`, as the Go shim passes it
    pub(crate) parent: Option<String>,
    /// To come first in the `PATH` of runc and CRIU.
    pub(crate) programs: Option<PathBuf>,
    /// Plain flags, with their dashes.
    pub(crate) flags: Vec<&'static str>,
}

/// runc for one container.
#[derive(Debug, Clone)]
pub(crate) struct Runc {
    program: PathBuf,
    root: PathBuf,
    log: PathBuf,
    id: String,
    bundle: PathBuf,
    systemd_cgroup: bool,
    no_pivot: bool,
    no_new_keyring: bool,
    reaper: Arc<Reaper>,
}

/// A runc command that runs.
#[derive(Debug)]
pub(crate) struct Running {
    /// runc itself.
    pub(crate) pid: u32,
    exit: ExitReceiver,
    status: Option<u32>,
    what: &'static str,
    log: PathBuf,
    log_from: u64,
}

impl Runc {
    /// The driver for the container `id` in `bundle`.
    pub(crate) fn new(
        options: &Options,
        namespace: &str,
        id: &str,
        bundle: &Path,
        reaper: Arc<Reaper>,
    ) -> Self {
        Self {
            program: options.program(),
            root: options.runc_root(namespace),
            log: bundle.join("log.json"),
            id: id.to_owned(),
            bundle: bundle.to_owned(),
            systemd_cgroup: options.systemd_cgroup,
            no_pivot: options.no_pivot_root,
            no_new_keyring: options.no_new_keyring,
            reaper,
        }
    }

    /// The program.
    pub(crate) fn program(&self) -> &Path {
        &self.program
    }

    /// runc's `--root`, with the namespace.
    pub(crate) fn root(&self) -> &Path {
        &self.root
    }

    fn command(&self, verb: &str) -> Command {
        let mut command = Command::new(&self.program);
        // The socket would be containerd's own, of its service manager.
        command.env_remove("NOTIFY_SOCKET");
        command.arg("--root").arg(&self.root);
        command.arg("--log").arg(&self.log);
        command.args(["--log-format", "json"]);
        if self.systemd_cgroup {
            command.arg("--systemd-cgroup");
        }
        command.arg(verb);
        // runc must not outlive the shim and then create what nobody knows of.
        // The signal comes when the *thread* ends that spawned it, so that runc
        // is only ever spawned from the main thread, where the runtime is.
        command.signal_when_parent_thread_ends(Signal::SIGKILL);
        command
    }

    fn spawn(&self, what: &'static str, mut command: Command) -> Result<Running, RuncError> {
        let log_from = fs::metadata(&self.log).map_or(0, |metadata| metadata.len());
        let (pid, exit) = self
            .reaper
            .spawn(|| command.spawn().map(|child| child.id()))
            .map_err(|source| RuncError::Spawn {
                program: self.program.clone(),
                source,
            })?;
        Ok(Running {
            pid,
            exit,
            status: None,
            what,
            log: self.log.clone(),
            log_from,
        })
    }

    /// Runs a command that leaves no process behind; answers its output.
    async fn run(
        &self,
        what: &'static str,
        command: Command,
        input: Option<&[u8]>,
    ) -> Result<String, RuncError> {
        let spawn_error = |source| RuncError::Spawn {
            program: self.program.clone(),
            source,
        };
        let mut command = command;
        let (reader, writer) = io::pipe().map_err(spawn_error)?;
        let stderr = writer.try_clone().map_err(spawn_error)?;
        command.stdout(writer).stderr(stderr);
        command.stdin(match input {
            None => Stdio::null(),
            Some(bytes) => Stdio::from(filled(bytes).map_err(spawn_error)?),
        });
        let running = self.spawn(what, command);
        // `command` is gone with its copies of the pipe, or nobody would ever
        // see its end.
        let running = running?;
        let reader = pipe::Receiver::from_owned_fd(OwnedFd::from(reader)).map_err(spawn_error)?;
        let collect = tokio::spawn(async move {
            let mut output = Vec::new();
            let mut reader = reader.take(OUTPUT_LIMIT);
            // A read error ends the output, as its end does.
            drop(reader.read_to_end(&mut output).await);
            output
        });
        let stop = collect.abort_handle();
        let finished = running.wait().await;
        let output = match tokio::time::timeout(OUTPUT_GRACE, collect).await {
            Ok(Ok(output)) => String::from_utf8_lossy(&output).into_owned(),
            _ => {
                stop.abort();
                String::new()
            }
        };
        match finished {
            Ok(()) => Ok(output),
            Err(RuncError::Failed { what, message }) => Err(RuncError::Failed {
                what,
                message: pick(&message, &output),
            }),
            Err(error) => Err(error),
        }
    }

    fn launch(&self, command: &mut Command, launch: &Launch, stdio: RuncStdio) {
        if let Some(socket) = &launch.console_socket {
            command.arg("--console-socket").arg(socket);
        }
        let end = |fd: Option<OwnedFd>| fd.map_or_else(Stdio::null, Stdio::from);
        command
            .stdin(end(stdio.stdin))
            .stdout(end(stdio.stdout))
            .stderr(end(stdio.stderr));
    }

    /// `runc create`.
    pub(crate) async fn create(&self, launch: &Launch, stdio: RuncStdio) -> Result<(), RuncError> {
        let mut command = self.command("create");
        command.arg("--bundle").arg(&self.bundle);
        command.arg("--pid-file").arg(&launch.pid_file);
        if self.no_pivot {
            command.arg("--no-pivot");
        }
        if self.no_new_keyring {
            command.arg("--no-new-keyring");
        }
        self.launch(&mut command, launch, stdio);
        command.arg(&self.id);
        self.spawn("OCI runtime create failed", command)?
            .wait()
            .await
    }

    /// `runc start`.
    pub(crate) async fn start(&self) -> Result<(), RuncError> {
        let mut command = self.command("start");
        command.arg(&self.id);
        self.run("OCI runtime start failed", command, None).await?;
        Ok(())
    }

    /// `runc exec` of the process described in `process`.
    pub(crate) async fn exec(
        &self,
        process: &Path,
        launch: &Launch,
        stdio: RuncStdio,
    ) -> Result<(), RuncError> {
        let mut command = self.command("exec");
        command.arg("--process").arg(process).arg("--detach");
        command.arg("--pid-file").arg(&launch.pid_file);
        self.launch(&mut command, launch, stdio);
        command.arg(&self.id);
        self.spawn("OCI runtime exec failed", command)?.wait().await
    }

    /// `runc restore`, in a process group of its own so that it can be given
    /// up together with CRIU.
    pub(crate) fn restore(
        &self,
        args: &RestoreArgs,
        launch: &Launch,
        stdio: RuncStdio,
    ) -> Result<Running, RuncError> {
        let mut command = self.command("restore");
        command.arg("--image-path").arg(&args.images);
        command.arg("--work-path").arg(&args.work_dir);
        if let Some(parent) = &args.parent {
            command.arg("--parent-path").arg(parent);
        }
        command.args(&args.flags);
        command.args(["--detach", "--no-subreaper"]);
        command.arg("--pid-file").arg(&launch.pid_file);
        if self.no_pivot {
            command.arg("--no-pivot");
        }
        command.arg("--bundle").arg(&self.bundle);
        self.launch(&mut command, launch, stdio);
        command.arg(&self.id);
        command.process_group(0);
        if let Some(programs) = &args.programs {
            let mut path = programs.clone().into_os_string();
            path.push(":");
            path.push(std::env::var_os("PATH").unwrap_or_default());
            command.env("PATH", path);
        }
        if args.flags.contains(&"--lazy-pages") {
            // A page that CRIU restores itself would bring a huge page with it,
            // with zeros where the page server has content.
            command.without_huge_pages();
        }
        self.spawn("OCI runtime restore failed", command)
    }

    /// `runc kill`.
    pub(crate) async fn kill(&self, signal: u32, all: bool) -> Result<(), RuncError> {
        let mut command = self.command("kill");
        if all {
            command.arg("--all");
        }
        command.arg(&self.id).arg(signal.to_string());
        self.run("OCI runtime kill failed", command, None).await?;
        Ok(())
    }

    /// `runc delete`.
    pub(crate) async fn delete(&self, force: bool) -> Result<(), RuncError> {
        let mut command = self.command("delete");
        if force {
            command.arg("--force");
        }
        command.arg(&self.id);
        self.run("failed to delete task", command, None).await?;
        Ok(())
    }

    /// `runc pause`.
    pub(crate) async fn pause(&self) -> Result<(), RuncError> {
        let mut command = self.command("pause");
        command.arg(&self.id);
        self.run("OCI runtime pause failed", command, None).await?;
        Ok(())
    }

    /// `runc resume`.
    pub(crate) async fn resume(&self) -> Result<(), RuncError> {
        let mut command = self.command("resume");
        command.arg(&self.id);
        self.run("OCI runtime resume failed", command, None).await?;
        Ok(())
    }

    /// `runc update` with `resources` as JSON of OCI's LinuxResources.
    pub(crate) async fn update(&self, resources: &[u8]) -> Result<(), RuncError> {
        let mut command = self.command("update");
        command.arg("--resources=-").arg(&self.id);
        self.run("OCI runtime update failed", command, Some(resources))
            .await?;
        Ok(())
    }

    /// `runc ps`: pids of the container's processes.
    pub(crate) async fn ps(&self) -> Result<Vec<u32>, RuncError> {
        let mut command = self.command("ps");
        command.args(["--format", "json"]).arg(&self.id);
        let output = self.run("OCI runtime ps failed", command, None).await?;
        // runc prints `null` for no processes.
        serde_json::from_str::<Option<Vec<u32>>>(output.trim())
            .map(Option::unwrap_or_default)
            .map_err(|source| RuncError::Answer { verb: "ps", source })
    }
}

impl Running {
    /// Waits for the end of the command. It is safe to drop this future and
    /// call it again.
    pub(crate) async fn ended(&mut self) -> bool {
        if self.status.is_none() {
            // An error only when the reaper is gone, which is the end of this
            // process.
            self.status = (&mut self.exit).await.ok().map(|exit| exit.status);
        }
        true
    }

    /// What came of a command that has ended.
    pub(crate) fn result(self) -> Result<(), RuncError> {
        let status = match self.status {
            None | Some(0) => return Ok(()),
            Some(status) => status,
        };
        let message = last_error(&self.log, self.log_from).unwrap_or_else(|| {
            format!("runc did not terminate successfully: exit status {status}")
        });
        Err(RuncError::Failed {
            what: self.what,
            message,
        })
    }

    async fn wait(mut self) -> Result<(), RuncError> {
        self.ended().await;
        self.result()
    }
}

/// A pipe with `bytes` in it, or a file where they do not fit into one.
fn filled(bytes: &[u8]) -> io::Result<OwnedFd> {
    /// What a pipe takes at least without blocking (pipe(7)).
    const PIPE_ROOM: usize = 4096;
    if bytes.len() <= PIPE_ROOM {
        let (reader, mut writer) = io::pipe()?;
        writer.write_all(bytes)?;
        return Ok(reader.into());
    }
    let memory = rustix::fs::memfd_create("input", rustix::fs::MemfdFlags::CLOEXEC)?;
    let mut file = fs::File::from(memory);
    file.write_all(bytes)?;
    file.seek(SeekFrom::Start(0))?;
    Ok(file.into())
}

/// The better of two explanations: runc says some errors only to its log and
/// some only to its output.
fn pick(message: &str, output: &str) -> String {
    let output = output.trim();
    if output.is_empty() || output.contains(message) || message.contains(output) {
        return message.to_owned();
    }
    format!("{message}: {output}")
}

#[derive(Deserialize)]
struct LogLine {
    #[serde(default)]
    level: String,
    #[serde(default)]
    msg: String,
}

/// The last error in runc's log, of what was written after `from`.
fn last_error(log: &Path, from: u64) -> Option<String> {
    let mut file = fs::File::open(log).ok()?;
    file.seek(SeekFrom::Start(from)).ok()?;
    let mut text = String::new();
    file.take(OUTPUT_LIMIT).read_to_string(&mut text).ok()?;
    text.lines()
        .rev()
        .filter_map(|line| serde_json::from_str::<LogLine>(line).ok())
        .find(|line| line.level == "error")
        .map(|line| line.msg.trim().to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_last_error_of_the_log_is_the_message() {
        let dir = tempfile::tempdir().unwrap();
        let log = dir.path().join("log.json");
        let old = r#"{"level":"error","msg":"from an earlier command"}"#.to_owned() + "\n";
        fs::write(
            &log,
            old.clone()
                + "{\"level\":\"error\",\"msg\":\"first\"}\n\
                   {\"level\":\"error\",\"msg\":\"exec: \\\"nope\\\": not found\"}\n\
                   {\"level\":\"warning\",\"msg\":\"noise\"}\nnot json\n",
        )
        .unwrap();
        let from = u64::try_from(old.len()).unwrap();
        assert_eq!(last_error(&log, from).unwrap(), "exec: \"nope\": not found");
        assert_eq!(last_error(&log, 1 << 20), None);
        assert_eq!(last_error(&dir.path().join("none"), 0), None);
    }

    #[test]
    fn runcs_texts_are_told_apart() {
        let failed = |message: &str| RuncError::Failed {
            what: "OCI runtime kill failed",
            message: message.to_owned(),
        };
        assert!(failed("container does not exist").is_missing());
        assert!(failed("container not running").is_finished());
        assert!(failed("os: process already finished").is_finished());
        assert!(failed("unable to signal init: No such process").is_finished());
        assert!(!failed("permission denied").is_finished());
        assert_eq!(
            failed("container not running").to_string(),
            "OCI runtime kill failed: container not running"
        );
    }

    #[test]
    fn output_is_added_where_it_says_more() {
        assert_eq!(pick("exit status 1", "boom\n"), "exit status 1: boom");
        assert_eq!(pick("boom", "time=.. boom"), "boom");
        assert_eq!(pick("boom", ""), "boom");
    }

    #[test]
    fn input_of_any_size_can_be_read_back() {
        for size in [0, 10, 1 << 17] {
            let bytes = vec![b'x'; size];
            let mut file = fs::File::from(filled(&bytes).unwrap());
            let mut read = Vec::new();
            file.read_to_end(&mut read).unwrap();
            assert_eq!(read.len(), size);
        }
    }
}
