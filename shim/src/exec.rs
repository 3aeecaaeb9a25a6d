//! Processes that clients add to a container.

use std::fs::OpenOptions;
use std::io::Write;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};

use containerd_shim_protos::api::ExecProcessRequest;
use containerd_shim_protos::events::task::{TaskExecAdded, TaskExecStarted};
use serde_json::Value;

use crate::bundle::read_pid;
use crate::container::Container;
use crate::error::{Error, Result};
use crate::io::{Console, ConsoleSocket, ProcessIo, RuncStdio, StdioSpec, Unnamed};
use crate::process::Process;
use crate::reaper::ExitReceiver;
use crate::runc::Launch;
use crate::state::{ExecState, Verb};

/// One added process.
#[derive(Debug)]
pub(crate) struct Exec {
    pub(crate) process: Process,
    /// OCI's Process as JSON.
    spec: Vec<u8>,
    state: Mutex<ExecState>,
    operation: tokio::sync::Mutex<()>,
}

impl Exec {
    /// Its state.
    pub(crate) fn state(&self) -> ExecState {
        *self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn enter(&self, state: ExecState) {
        *self.state.lock().unwrap_or_else(PoisonError::into_inner) = state;
    }

    /// Sends a signal of any number.
    pub(crate) fn kill(&self, signal: u32) -> Result<()> {
        match (self.state(), self.process.pid()) {
            (ExecState::Created, _) | (_, 0) => return Err(Error::NotStarted),
            (ExecState::Stopped, _) => return Err(Error::AlreadyFinished),
            (ExecState::Running, _) => {}
        }
        let pid = self.process.pid().cast_signed();
        sys::signal::send(pid, signal.cast_signed()).map_err(|error| match error.raw_os_error() {
            Some(libc::ESRCH) => Error::AlreadyFinished,
            _ => Error::system("signal an added process")(error),
        })
    }
}

/// Counts a process that runs or is about to, until it is dropped.
#[derive(Debug)]
struct Counted(Arc<Container>);

impl Counted {
    fn new(container: &Arc<Container>) -> Result<Self> {
        // Under the view's lock, so that the end of the first process either
        // sees this one or is seen by it.
        let view = container.view();
        if view.init_ended {
            return Err(Error::InitNotRunning(container.id.clone()));
        }
        if view.activity.forbids(Verb::Exec) {
            return Err(Error::Migrating(container.id.clone()));
        }
        container.running_execs.send_modify(|running| *running += 1);
        drop(view);
        Ok(Self(Arc::clone(container)))
    }
}

impl Drop for Counted {
    fn drop(&mut self) {
        self.0.running_execs.send_modify(|running| *running -= 1);
    }
}

impl Container {
    /// Announces a process.
    pub(crate) fn add_exec(&self, request: ExecProcessRequest) -> Result<()> {
        let id = request.exec_id;
        // It becomes part of file names.
        if id.is_empty() || id.contains('/') || id.starts_with('.') {
            return Err(Error::InvalidArgument {
                what: format!("exec id {id:?}"),
            });
        }
        self.check(Verb::Exec)?;
        let exec = Arc::new(Exec {
            spec: with_terminal(&request.spec.value, request.terminal)?,
            process: Process::new(
                id.clone(),
                StdioSpec {
                    stdin: request.stdin,
                    stdout: request.stdout,
                    stderr: request.stderr,
                    terminal: request.terminal,
                },
            ),
            state: Mutex::new(ExecState::Created),
            operation: tokio::sync::Mutex::default(),
        });
        {
            let mut view = self.view();
            if id == self.id || view.execs.contains_key(&id) {
                return Err(Error::ExecExists(id));
            }
            view.execs.insert(id.clone(), exec);
        }
        self.context.publisher.publish(&TaskExecAdded {
            container_id: self.id.clone(),
            exec_id: id,
            ..Default::default()
        });
        Ok(())
    }

    /// Starts an announced process; answers its pid.
    pub(crate) async fn start_exec(self: &Arc<Self>, exec_id: &str) -> Result<u32> {
        let exec = self.exec(exec_id)?;
        let _operation = exec.operation.lock().await;
        exec.state().check_start()?;
        let counted = Counted::new(self)?;
        let _gate = exec.process.gate.lock().await;
        let expectation = self.context.reaper.expect();
        let pid = match self.launch_exec(&exec).await {
            Ok(pid) => pid,
            Err(error) => {
                exec.process.abort_io().await;
                return Err(error);
            }
        };
        exec.process.set_pid(pid);
        exec.enter(ExecState::Running);
        self.see_exec_end(&exec, expectation.claim(pid), counted);
        self.context.publisher.publish(&TaskExecStarted {
            container_id: self.id.clone(),
            exec_id: exec_id.to_owned(),
            pid,
            ..Default::default()
        });
        Ok(pid)
    }

    async fn launch_exec(&self, exec: &Exec) -> Result<u32> {
        let process = &exec.process;
        let spec = ProcessFile::write(&self.bundle, &process.id, &exec.spec)?;
        let mut launch = Launch {
            pid_file: self.exec_pid_file(&process.id),
            console_socket: None,
        };
        if process.stdio.terminal {
            let socket = ConsoleSocket::bind(&self.context.run_dir.path().join("console"))?;
            launch.console_socket = Some(socket.path().to_owned());
            let run = async {
                Ok(self
                    .runc
                    .exec(&spec.0, &launch, RuncStdio::default())
                    .await?)
            };
            let console = with_console(&socket, run).await?;
            let io = ProcessIo::terminal(&process.stdio, self.io_owner(), &console).await?;
            process.attach(io, Some(console));
        } else {
            let (io, ends) =
                ProcessIo::pipes(&process.stdio, self.io_owner(), Unnamed::Null).await?;
            process.attach(io, None);
            self.runc.exec(&spec.0, &launch, ends).await?;
        }
        read_pid(&launch.pid_file)
    }

    fn see_exec_end(self: &Arc<Self>, exec: &Arc<Exec>, exit: ExitReceiver, counted: Counted) {
        let (container, exec) = (Arc::clone(self), Arc::clone(exec));
        tokio::spawn(async move {
            let Ok(exit) = exit.await else { return };
            {
                let _gate = exec.process.gate.lock().await;
                exec.enter(ExecState::Stopped);
                container.publish_exit(&exec.process, exit);
            }
            // Only now may the first process's exit follow.
            drop(counted);
        });
    }

    /// Forgets an added process that does not run.
    pub(crate) async fn delete_exec(&self, exec_id: &str) -> Result<Arc<Exec>> {
        let exec = self.exec(exec_id)?;
        let _operation = exec.operation.lock().await;
        exec.state().check_delete()?;
        exec.process.finish_io().await;
        let pid_file = self.exec_pid_file(exec_id);
        if let Err(error) = std::fs::remove_file(&pid_file)
            && error.kind() != std::io::ErrorKind::NotFound
        {
            tracing::warn!(%error, file = %pid_file.display(), "a file is left");
        }
        self.view().execs.remove(exec_id);
        Ok(Arc::clone(&exec))
    }

    fn exec_pid_file(&self, exec_id: &str) -> PathBuf {
        self.bundle.join(format!("{exec_id}.pid"))
    }
}

/// Runs runc and receives the terminal that it sends, whichever fails first.
pub(crate) async fn with_console(
    socket: &ConsoleSocket,
    runc: impl Future<Output = Result<()>>,
) -> Result<Console> {
    let receive = socket.receive();
    tokio::pin!(runc);
    tokio::pin!(receive);
    tokio::select! {
        ended = &mut runc => {
            ended?;
            receive.await
        }
        console = &mut receive => {
            let console = console?;
            runc.await?;
            Ok(console)
        }
    }
}

/// OCI's Process with the terminal that the request wants.
fn with_terminal(spec: &[u8], terminal: bool) -> Result<Vec<u8>> {
    let invalid = |error: serde_json::Error| Error::InvalidArgument {
        what: format!("process spec: {error}"),
    };
    let mut process: Value = serde_json::from_slice(spec).map_err(invalid)?;
    let Some(fields) = process.as_object_mut() else {
        return Err(Error::InvalidArgument {
            what: "process spec is not an object".to_owned(),
        });
    };
    fields.insert("terminal".to_owned(), Value::Bool(terminal));
    serde_json::to_vec(&process).map_err(invalid)
}

/// The spec in a file that only root reads and that is gone after its use: it
/// holds the process's environment.
struct ProcessFile(PathBuf);

impl ProcessFile {
    fn write(bundle: &Path, exec_id: &str, spec: &[u8]) -> Result<Self> {
        let path = bundle.join(format!("{exec_id}-process.json"));
        OpenOptions::new()
            .write(true)
            .create(true)
            .truncate(true)
            .mode(0o600)
            .open(&path)
            .and_then(|mut file| file.write_all(spec))
            .map_err(Error::io("write", &path))?;
        Ok(Self(path))
    }
}

impl Drop for ProcessFile {
    fn drop(&mut self) {
        if let Err(error) = std::fs::remove_file(&self.0) {
            tracing::warn!(%error, file = %self.0.display(), "a file is left");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_request_decides_about_the_terminal() {
        let spec = with_terminal(br#"{"terminal":true,"args":["sh"]}"#, false).unwrap();
        let spec: Value = serde_json::from_slice(&spec).unwrap();
        assert_eq!(spec["terminal"], false);
        assert_eq!(spec["args"][0], "sh");
    }

    #[test]
    fn a_spec_that_is_no_process_is_an_invalid_argument() {
        for spec in [&b"nonsense"[..], b"[]", b""] {
            assert!(matches!(
                with_terminal(spec, false),
                Err(Error::InvalidArgument { .. })
            ));
        }
    }
}
