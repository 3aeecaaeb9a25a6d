//! `Checkpoint`: a standard CRIU dump that `runc restore` takes.
//!
//! The dump is made by this program executed once more, because it runs other
//! programs and waits for them, which the shim's reaper would spoil, and loads
//! libcriu, which the shim does not want to carry.

use std::fs;
use std::io::{self, Read, Write};
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode, Stdio};

use containerd_shim_protos::api::CheckpointTaskRequest;
use containerd_shim_protos::shim::oci;
use nix::sys::signal::Signal;
use nodeapi::RestoreFlags;
use protobuf::Message;
use serde::{Deserialize, Serialize};
use sys::spawn::CommandFds;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::unix::pipe;

use crate::container::Container;
use crate::error::{Error, Result, chain};
use crate::restore;
use crate::state::{Activity, Verb};

/// Most that the answer of the executed program may be.
const ANSWER_BYTES: u64 = 64 << 10;

/// What the executed program is to do.
#[derive(Debug, Serialize, Deserialize)]
struct Job {
    runc_root: PathBuf,
    id: String,
    images: PathBuf,
    work_dir: PathBuf,
    exit: bool,
    flags: RestoreFlags,
    empty_namespaces: Vec<String>,
}

/// What came of it.
#[derive(Debug, Serialize, Deserialize)]
enum Answer {
    Done,
    /// This node cannot checkpoint.
    Unavailable(String),
    Failed(String),
}

/// Serves `Checkpoint`.
pub(crate) async fn checkpoint(
    container: &Container,
    request: &CheckpointTaskRequest,
) -> Result<()> {
    let options = match request.options.as_ref() {
        Some(any) => oci::CheckpointOptions::parse_from_bytes(&any.value).map_err(|error| {
            Error::InvalidArgument {
                what: format!("checkpoint options: {error}"),
            }
        })?,
        None => oci::CheckpointOptions::default(),
    };
    let _operation = container.operation.lock().await;
    container.check(Verb::Checkpoint)?;
    container.set_activity(Activity::Checkpointing);
    let made = dump(container, Path::new(&request.path), &options).await;
    // After a dump with exit the end may have come already.
    if !container.view().init_ended {
        container.set_activity(Activity::Idle);
    }
    made
}

async fn dump(
    container: &Container,
    images: &Path,
    options: &oci::CheckpointOptions,
) -> Result<()> {
    let own_work_dir = options.work_path.is_empty();
    let work_dir = match own_work_dir {
        true => container.bundle.join("work").join("criu-work"),
        false => PathBuf::from(&options.work_path),
    };
    let flags = RestoreFlags {
        tcp_established: options.open_tcp,
        tcp_close: false,
        file_locks: options.file_locks,
        ext_unix_sk: options.external_unix_sockets,
        shell_job: options.terminal,
    };
    let job = Job {
        runc_root: container.runc.root().to_owned(),
        id: container.id.clone(),
        images: images.to_owned(),
        work_dir: work_dir.clone(),
        exit: options.exit,
        flags,
        empty_namespaces: options.empty_namespaces.clone(),
    };
    let answer = run(container, &job).await;
    let result = match answer {
        Ok(Answer::Done) => restore::write_options(images, flags),
        Ok(Answer::Unavailable(reason)) => Err(Error::CheckpointUnavailable {
            id: container.id.clone(),
            reason,
        }),
        Ok(Answer::Failed(reason)) => {
            let log = container.bundle.join("criu-dump.log");
            if let Err(error) = fs::copy(work_dir.join("dump.log"), &log) {
                tracing::warn!(%error, "no log of the dump");
            }
            Err(Error::Checkpoint {
                id: container.id.clone(),
                reason,
                log,
            })
        }
        Err(error) => Err(error),
    };
    if own_work_dir
        && let Err(error) = fs::remove_dir_all(&work_dir)
        && error.kind() != io::ErrorKind::NotFound
    {
        tracing::warn!(%error, "files of a dump are left");
    }
    result
}

/// Executes this program for a job.
async fn run(container: &Container, job: &Job) -> Result<Answer> {
    let failed = || Error::system("run the checkpoint");
    let (stdin, to) = io::pipe().map_err(failed())?;
    let (from, stdout) = io::pipe().map_err(failed())?;
    let log = match &container.context.log {
        Some(log) => log.try_clone().map_or_else(|_| Stdio::null(), Stdio::from),
        None => Stdio::null(),
    };
    let mut command = Command::new("/proc/self/exe");
    command
        .arg("checkpoint")
        .stdin(stdin)
        .stdout(stdout)
        .stderr(log)
        .signal_when_parent_thread_ends(Signal::SIGKILL);
    let (_, exit) = container
        .context
        .reaper
        .spawn(|| command.spawn().map(|child| child.id()))
        .map_err(failed())?;
    drop(command);
    let text = serde_json::to_vec(job).map_err(|error| failed()(io::Error::from(error)))?;
    let mut to = pipe::Sender::from_owned_fd(OwnedFd::from(to)).map_err(failed())?;
    to.write_all(&text).await.map_err(failed())?;
    drop(to);
    let from = pipe::Receiver::from_owned_fd(OwnedFd::from(from)).map_err(failed())?;
    let mut answer = Vec::new();
    from.take(ANSWER_BYTES)
        .read_to_end(&mut answer)
        .await
        .map_err(failed())?;
    if let Ok(answer) = serde_json::from_slice(&answer) {
        return Ok(answer);
    }
    let status = exit.await.map_or(0, |exit| exit.status);
    Ok(Answer::Failed(format!(
        "the process that dumps ended without an answer, exit status {status}"
    )))
}

/// `main` of the executed program: job on standard input, answer on standard
/// output.
pub(crate) fn main() -> ExitCode {
    let mut text = Vec::new();
    let job = match io::stdin().lock().read_to_end(&mut text) {
        Ok(_) => serde_json::from_slice::<Job>(&text).map_err(|error| error.to_string()),
        Err(error) => Err(error.to_string()),
    };
    let answer = match job {
        Ok(job) => perform(&job),
        Err(error) => Answer::Failed(format!("cannot understand the job: {error}")),
    };
    let written = serde_json::to_vec(&answer)
        .map_err(io::Error::from)
        .and_then(|text| io::stdout().lock().write_all(&text));
    match written {
        Ok(()) => ExitCode::SUCCESS,
        Err(_) => ExitCode::FAILURE,
    }
}

fn perform(job: &Job) -> Answer {
    let tools = match criu::Tools::find() {
        Ok(tools) => tools,
        Err(missing) => return Answer::Unavailable(chain(&missing)),
    };
    let container = criu::RuncContainer {
        runc_root: job.runc_root.clone(),
        id: job.id.clone(),
    };
    let options = criu::CheckpointOptions {
        exit: job.exit,
        open_tcp: job.flags.tcp_established,
        external_unix_sockets: job.flags.ext_unix_sk,
        terminal: job.flags.shell_job,
        file_locks: job.flags.file_locks,
        empty_namespaces: job.empty_namespaces.clone(),
        work_path: Some(job.work_dir.clone()),
        ..criu::CheckpointOptions::new(&job.images)
    };
    let request = match criu::dump_request_for_runc(&container, &options) {
        Ok(request) => request,
        Err(error) => return Answer::Failed(chain(&error)),
    };
    match criu::checkpoint(Path::new("/proc/self/exe"), &tools, &request) {
        Ok(()) => Answer::Done,
        Err(error) => Answer::Failed(chain(&error)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_job_and_its_answer_survive_the_pipes() {
        let job = Job {
            runc_root: "/run/runc".into(),
            id: "web".into(),
            images: "/images".into(),
            work_dir: "/work".into(),
            exit: true,
            flags: RestoreFlags::default(),
            empty_namespaces: vec!["network".into()],
        };
        let text = serde_json::to_vec(&job).unwrap();
        let read: Job = serde_json::from_slice(&text).unwrap();
        assert_eq!(format!("{read:?}"), format!("{job:?}"));
        let text = serde_json::to_vec(&Answer::Unavailable("no criu".into())).unwrap();
        assert!(matches!(
            serde_json::from_slice(&text).unwrap(),
            Answer::Unavailable(reason) if reason == "no criu"
        ));
    }
}
