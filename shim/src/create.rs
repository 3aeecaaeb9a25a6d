//! How a container comes into being: from a spec, from a checkpoint, or from
//! another node.

use std::fs::DirBuilder;
use std::io;
use std::os::unix::fs::DirBuilderExt;
use std::path::PathBuf;
use std::sync::Arc;

use containerd_shim_protos::api::CreateTaskRequest;
use containerd_shim_protos::events::task::{TaskCreate, TaskIO};
use nodeapi::{ContainerRecord, Incoming, RunState};
use protobuf::MessageField;

use crate::bundle::{Spec, read_pid};
use crate::container::{CheckpointSource, Container, Context, Parts, Rootfs};
use crate::error::{Error, Result};
use crate::exec::with_console;
use crate::io::{ConsoleSocket, ProcessIo, RuncStdio, StdioSpec, Unnamed};
use crate::managed;
use crate::migrate_in::{self, Arrival};
use crate::options::Options;
use crate::runc::Launch;
use crate::state::State;
use crate::volumes;

/// Serves `Create`. What fails leaves nothing behind.
pub(crate) async fn create(
    context: Arc<Context>,
    request: CreateTaskRequest,
) -> Result<Arc<Container>> {
    let options = Options::from_any(request.options.as_ref())?;
    let bundle = PathBuf::from(&request.bundle);
    options.write(&bundle)?;
    let mut spec = Spec::read(&bundle)?;
    let pod = managed::managed(&spec);
    // What a pod's owner did not give to Sterna runs exactly as under runc.
    if pod.is_some() || !spec.is_of_a_pod() {
        spec.keep_movable()?;
    }
    let rootfs = rootfs(&bundle, &request, &spec)?;

    let volumes = pod
        .as_ref()
        .map(|pod| volumes::empty_dirs(&spec, &pod.name.uid))
        .unwrap_or_default();
    if !volumes.is_empty() {
        let (context, volumes) = (Arc::clone(&context), volumes.clone());
        let swept = tokio::task::spawn_blocking(move || {
            volumes::sweep(&volumes, |id| is_arriving(&context, id));
        });
        swept.await.map_err(Error::Interrupted)?;
    }
    if let Some(pod) = &pod {
        let upperdir = crate::rootfs::upperdir(&rootfs.mounts);
        managed::await_state(&context, &request.id, pod, upperdir.as_deref()).await?;
    }
    let incoming = Incoming::take(&context.run_dir, &context.namespace, &request.id)
        .map_err(|error| Error::RunDir(error, "a permission to receive"))?;
    let checkpoint = checkpoint(&request, &options);
    let state = match (&incoming, &checkpoint) {
        (Some(_), _) => State::Receiving,
        (None, Some(_)) => State::CreatedCheckpoint,
        (None, None) => State::Created,
    };
    let container = Arc::new(Container::new(Parts {
        context,
        bundle,
        options,
        rootfs,
        shares_pid_namespace: spec.shares_pid_namespace(),
        stdio: StdioSpec {
            stdin: request.stdin.clone(),
            stdout: request.stdout.clone(),
            stderr: request.stderr.clone(),
            terminal: request.terminal,
        },
        state,
        checkpoint,
        pod: pod.map(|pod| pod.name),
        volumes,
        arrival: incoming.as_ref().map(|_| Arc::new(Arrival::new())),
        id: request.id.clone(),
    }));

    // Until the container is announced, its end is not.
    let gate = Arc::clone(&container.init.gate).lock_owned().await;
    let made = match incoming {
        Some(incoming) => migrate_in::prepare(&container, incoming, &spec).await,
        None => bring_up(&container, state).await,
    };
    if let Err(error) = made {
        container.discard().await;
        return Err(error);
    }
    container.publish_record();
    container
        .context
        .publisher
        .publish(&announcement(&request, container.init.pid()));
    drop(gate);
    Ok(container)
}

fn is_arriving(context: &Context, id: &str) -> bool {
    let record = ContainerRecord::read(&context.run_dir, &context.namespace, id);
    match record {
        Ok(record) => record.is_some_and(|record| record.state == RunState::Receiving),
        Err(_) => true, // it may be
    }
}

async fn bring_up(container: &Arc<Container>, state: State) -> Result<()> {
    container.mount_rootfs().await?;
    if state == State::Created {
        run_create(container).await?;
    }
    Ok(())
}

async fn run_create(container: &Arc<Container>) -> Result<()> {
    let init = &container.init;
    let mut launch = Launch {
        pid_file: container.pid_file(),
        console_socket: None,
    };
    let expectation = container.context.reaper.expect();
    if init.stdio.terminal {
        let socket = ConsoleSocket::bind(&container.context.run_dir.path().join("console"))?;
        launch.console_socket = Some(socket.path().to_owned());
        let run = async { Ok(container.runc.create(&launch, RuncStdio::default()).await?) };
        let console = with_console(&socket, run).await?;
        match ProcessIo::terminal(&init.stdio, container.io_owner(), &console).await {
            Ok(io) => init.attach(io, Some(console)),
            Err(error) => {
                container.discard_in_runc().await;
                return Err(error);
            }
        }
    } else {
        let (io, ends) = ProcessIo::pipes(&init.stdio, container.io_owner(), Unnamed::Null).await?;
        init.attach(io, None);
        container.runc.create(&launch, ends).await?;
    }
    match read_pid(&launch.pid_file) {
        Ok(pid) => {
            container.init_appeared(pid, expectation.claim(pid));
            Ok(())
        }
        Err(error) => {
            container.discard_in_runc().await;
            Err(error)
        }
    }
}

/// The root file system's place; made if something is to be mounted there.
fn rootfs(bundle: &std::path::Path, request: &CreateTaskRequest, spec: &Spec) -> Result<Rootfs> {
    if request.rootfs.is_empty() {
        return Ok(Rootfs {
            path: spec.root(bundle),
            mounts: Vec::new(),
        });
    }
    let path = bundle.join("rootfs");
    match DirBuilder::new().mode(0o711).create(&path) {
        Err(error) if error.kind() != io::ErrorKind::AlreadyExists => {
            Err(Error::io("create", &path)(error))
        }
        _ => Ok(Rootfs {
            path,
            mounts: request.rootfs.clone(),
        }),
    }
}

/// Where to restore from: the request, else the option that containerd 1.7
/// honours only for a runtime that is called runc.
fn checkpoint(request: &CreateTaskRequest, options: &Options) -> Option<CheckpointSource> {
    let images = [&request.checkpoint, &options.criu_image_path]
        .into_iter()
        .find(|path| !path.is_empty())?;
    Some(CheckpointSource {
        images: PathBuf::from(images),
        parent: Some(request.parent_checkpoint.clone()).filter(|parent| !parent.is_empty()),
    })
}

fn announcement(request: &CreateTaskRequest, pid: u32) -> TaskCreate {
    TaskCreate {
        container_id: request.id.clone(),
        bundle: request.bundle.clone(),
        rootfs: request.rootfs.clone(),
        io: MessageField::some(TaskIO {
            stdin: request.stdin.clone(),
            stdout: request.stdout.clone(),
            stderr: request.stderr.clone(),
            terminal: request.terminal,
            ..Default::default()
        }),
        checkpoint: request.checkpoint.clone(),
        pid,
        ..Default::default()
    }
}
