//! `delete`: cleans up after a container whose server is gone.

use std::fs;
use std::io::{self, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::SystemTime;

use anyhow::Context;
use containerd_shim_protos::api::DeleteResponse;
use nodeapi::{ContainerRecord, Incoming, RunDir};
use protobuf::{Message, MessageField};

use crate::args::Invocation;
use crate::bundle::{Spec, read_pid};
use crate::cgroup;
use crate::events::timestamp;
use crate::options::Options;
use crate::rootfs;
use crate::standin;

/// What containerd shows for a container that was lost: 128 and SIGKILL.
const LOST: u32 = 137;

/// Serves `delete`. Tries everything; only the answer goes to standard output,
/// and what could not be done to standard error, which containerd logs.
pub(crate) fn delete(invocation: &Invocation) -> anyhow::Result<()> {
    let bundle = match &invocation.bundle {
        Some(bundle) => bundle.clone(),
        None => {
            // containerd may run this in the bundle of another container of the
            // pod, beside which ours lies.
            let directory = std::env::current_dir().context("no working directory")?;
            directory
                .parent()
                .context("the bundle has no parent")?
                .join(&invocation.id)
        }
    };
    let options = Options::read(&bundle).unwrap_or_default();
    report(delete_in_runc(&options, invocation));
    report(settle_migrations(&bundle, invocation));
    let state = options
        .runc_root(&invocation.namespace)
        .join(&invocation.id);
    report(standin::forget(&state).context("runc keeps something"));
    report(rootfs::unmount(&bundle.join("rootfs")).context("cannot unmount the rootfs"));
    report(remove_traces(invocation));
    report(remove_dead_socket(&bundle));

    let answer = DeleteResponse {
        pid: read_pid(&bundle.join("init.pid")).unwrap_or(0),
        exit_status: LOST,
        exited_at: MessageField::some(timestamp(SystemTime::now())),
        ..Default::default()
    };
    io::stdout()
        .write_all(&answer.write_to_bytes()?)
        .context("cannot answer")
}

fn report(result: anyhow::Result<()>) {
    if let Err(error) = result {
        eprintln!("{error:#}");
    }
}

fn delete_in_runc(options: &Options, invocation: &Invocation) -> anyhow::Result<()> {
    let mut command = Command::new(options.program());
    command
        .env_remove("NOTIFY_SOCKET")
        .arg("--root")
        .arg(options.runc_root(&invocation.namespace));
    if options.systemd_cgroup {
        command.arg("--systemd-cgroup");
    }
    let output = command
        .args(["delete", "--force", &invocation.id])
        .stdin(Stdio::null())
        .output()
        .with_context(|| format!("cannot run {}", options.program().display()))?;
    let said = String::from_utf8_lossy(&output.stderr);
    if !output.status.success() && !said.contains("does not exist") {
        anyhow::bail!("runc cannot delete {}: {}", invocation.id, said.trim());
    }
    Ok(())
}

/// What the server of this container would have done about a migration that was
/// under way, by `migrate::arrival::after_engine_death`: its engine died with it.
fn settle_migrations(bundle: &Path, invocation: &Invocation) -> anyhow::Result<()> {
    let run_dir = RunDir::default();
    let (namespace, id) = (&invocation.namespace, &invocation.id);
    // A copy that was sent away is gone for good: nobody has to ask what became
    // of the other.
    for record in nodeapi::commit::of_container(&run_dir, namespace, id)? {
        nodeapi::commit::remove(&run_dir, &record.migration_id)?;
    }
    // runc knows nothing of a container that it had not restored to its end.
    let spec = Spec::read(bundle)?;
    let cgroup = spec
        .cgroup()
        .context("its control group is not named by a path: not known to be empty")?;
    cgroup::kill_in(cgroup).context("cannot end its processes")?;
    cgroup::remove_in(cgroup);
    nodeapi::arrival::fence_container(&run_dir, namespace, id)?;
    Ok(())
}

fn remove_traces(invocation: &Invocation) -> anyhow::Result<()> {
    let run_dir = RunDir::default();
    ContainerRecord::remove(&run_dir, &invocation.namespace, &invocation.id)?;
    Incoming::remove(&run_dir, &invocation.namespace, &invocation.id)?;
    Ok(())
}

/// The server of a pod that lost one container may serve the others.
fn remove_dead_socket(bundle: &Path) -> anyhow::Result<()> {
    let Ok(address) = fs::read_to_string(bundle.join("address")) else {
        return Ok(());
    };
    let socket = address.trim().strip_prefix("unix://").unwrap_or(&address);
    match UnixStream::connect(socket) {
        Err(error) if error.kind() == io::ErrorKind::ConnectionRefused => {
            fs::remove_file(socket).context("cannot remove a dead server's socket")
        }
        _ => Ok(()),
    }
}
