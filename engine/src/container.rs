//! The container as the sender sees it: its processes, its freezer, and what
//! CRIU has to be told about it.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;

use criu::{CheckpointOptions, DumpRequest, Freezer, FreezerError, NetworkLock, RuncContainer};
use migrate::commit::InitProcess;
use nodeapi::ContainerFacts;
use pages::Process;

/// A freezer that takes longer has a task in an uninterruptible sleep.
const FREEZE_TIMEOUT: Duration = Duration::from_secs(5);
/// How long dead processes may take to leave their control group.
const EXIT_TIMEOUT: Duration = Duration::from_secs(10);
/// Log level of CRIU: errors and warnings. At 4, a restore takes twice as long.
const LOG_LEVEL: i32 = 2;

/// Why the container cannot be worked with.
#[derive(Debug, thiserror::Error)]
pub(crate) enum ContainerError {
    #[error("cannot find out what runc knows of it")]
    Runc(#[from] criu::ContainerError),
    #[error("cannot use its freezer")]
    Freezer(#[from] FreezerError),
    #[error("cannot read {path}")]
    Read {
        path: PathBuf,
        #[source]
        source: io::Error,
    },
    #[error("its first process is {found} to runc and {expected} to the shim")]
    OtherInit { expected: u32, found: i32 },
    #[error("a worker of the engine panicked")]
    Worker,
}

/// A running container.
#[derive(Debug)]
pub(crate) struct Container {
    runc: RuncContainer,
    freezer: Freezer,
}

impl Container {
    pub(crate) fn open(facts: &ContainerFacts, init_pid: u32) -> Result<Self, ContainerError> {
        let runc = RuncContainer {
            runc_root: facts.runc_root.clone(),
            id: facts.id.clone(),
        };
        let state = runc.state()?;
        if u32::try_from(state.init_pid()) != Ok(init_pid) {
            return Err(ContainerError::OtherInit {
                expected: init_pid,
                found: state.init_pid(),
            });
        }
        let freezer = state.freezer()?;
        Ok(Self { runc, freezer })
    }

    /// All of its processes, those in control groups of its own making too.
    pub(crate) fn processes(&self) -> Result<Vec<Process>, ContainerError> {
        let mut processes = Vec::new();
        for group in groups(self.freezer.directory())? {
            let procs = group.join("cgroup.procs");
            match pages::processes_of_cgroup(&procs) {
                Ok(found) => processes.extend(found),
                Err(source) => match source.kind() {
                    // A group below may go at any time; so may a threaded one be
                    // unreadable, whose processes its parent lists.
                    io::ErrorKind::NotFound | io::ErrorKind::Unsupported => {}
                    _ => {
                        return Err(ContainerError::Read {
                            path: procs,
                            source,
                        });
                    }
                },
            }
        }
        Ok(processes)
    }

    /// Memory of all processes, shared pages counted in each of them: an upper
    /// bound of what would have to travel.
    pub(crate) fn resident_bytes(&self) -> Result<u64, ContainerError> {
        let pages = |process: &Process| {
            let statm = fs::read_to_string(format!("/proc/{}/statm", process.pid)).ok()?;
            statm.split_whitespace().nth(1)?.parse::<u64>().ok()
        };
        Ok(self.processes()?.iter().filter_map(pages).sum::<u64>() * pages::PAGE_BYTES as u64)
    }

    /// Options of the dump: with an address that moves connections survive,
    /// without one they are closed.
    pub(crate) fn checkpoint_options(&self, images: &Path, address: bool) -> CheckpointOptions {
        CheckpointOptions {
            exit: true,
            open_tcp: address,
            tcp_close: !address,
            tcp_skip_in_flight: true,
            external_unix_sockets: true,
            file_locks: true,
            link_remap: true,
            network_lock: Some(NetworkLock::Nftables),
            log_level: LOG_LEVEL,
            ..CheckpointOptions::new(images)
        }
    }

    /// What CRIU is told; writes `descriptors.json` beside the images to come.
    pub(crate) fn dump_request(
        &self,
        options: &CheckpointOptions,
    ) -> Result<DumpRequest, ContainerError> {
        Ok(criu::dump_request_for_runc(&self.runc, options)?)
    }

    /// What an engine before this one has frozen, or has not.
    pub(crate) fn left_frozen(&self) -> Frozen {
        Frozen {
            freezer: self.freezer.clone(),
        }
    }

    /// Stops every process; they stand still when this returns. Blocks, for 0.1
    /// to 10 ms as a rule, on purpose: a freeze that went on after its caller was
    /// dropped would stop a container that nobody thaws.
    pub(crate) fn freeze(&self) -> Result<Frozen, ContainerError> {
        let freezer = self.freezer.clone();
        freezer.freeze(FREEZE_TIMEOUT)?;
        Ok(Frozen { freezer })
    }
}

/// The container while nothing of it runs. Ends in [`thaw`](Self::thaw) or
/// [`kill`](Self::kill), never by itself: dropped, it stays frozen.
#[derive(Debug)]
pub(crate) struct Frozen {
    freezer: Freezer,
}

impl Frozen {
    /// CRIU thaws the control group once it holds the tasks. Frozen again, they
    /// stand still even if CRIU dies: to be called before the commit.
    pub(crate) fn hold(&self) -> Result<(), ContainerError> {
        Ok(self.freezer.freeze_later()?)
    }

    /// Lets it go on.
    pub(crate) async fn thaw(self) {
        let thawed = blocking(move || self.freezer.thaw()).await;
        match thawed {
            Ok(Ok(())) => {}
            Ok(Err(error)) => {
                tracing::error!(
                    error = crate::error_chain(&error),
                    "cannot thaw the container"
                );
            }
            Err(error) => tracing::error!(%error, "cannot thaw the container"),
        }
    }

    /// Ends whatever CRIU left of it, and returns when nothing is left. Every
    /// process is killed while it stands still: none runs again.
    pub(crate) async fn kill(self) {
        let killed = blocking(move || kill(&self.freezer)).await;
        match killed {
            Ok(Ok(())) => {}
            Ok(Err(error)) => {
                tracing::error!(
                    error = crate::error_chain(&error),
                    "cannot end the container"
                );
            }
            Err(error) => tracing::error!(%error, "cannot end the container"),
        }
    }
}

fn kill(freezer: &Freezer) -> Result<(), ContainerError> {
    let begun = std::time::Instant::now();
    loop {
        let pids = pids(freezer.directory())?;
        if pids.is_empty() || begun.elapsed() > EXIT_TIMEOUT {
            if !pids.is_empty() {
                tracing::error!(?pids, "processes outlive SIGKILL");
            }
            return Ok(());
        }
        for pid in pids {
            let pid = nix::unistd::Pid::from_raw(pid);
            match nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGKILL) {
                Ok(()) | Err(nix::errno::Errno::ESRCH) => {}
                Err(error) => tracing::error!(%pid, %error, "cannot kill a process"),
            }
        }
        // A frozen task of a v1 group dies only when it is thawed; with the
        // signal pending it never returns to user space.
        freezer.thaw()?;
        std::thread::sleep(Duration::from_millis(2));
    }
}

fn pids(group: &Path) -> Result<Vec<i32>, ContainerError> {
    let mut pids = Vec::new();
    for group in groups(group)? {
        if let Ok(text) = fs::read_to_string(group.join("cgroup.procs")) {
            pids.extend(text.lines().filter_map(|line| line.parse::<i32>().ok()));
        }
    }
    // Zombies stay listed in v1 until they are reaped, which is the shim's to do.
    pids.retain(|pid| {
        fs::read_to_string(format!("/proc/{pid}/stat")).is_ok_and(|stat| {
            stat.rsplit_once(')')
                .is_some_and(|(_, rest)| !rest.trim_start().starts_with('Z'))
        })
    });
    Ok(pids)
}

/// A control group and all below it; an empty list where it is gone.
fn groups(top: &Path) -> Result<Vec<PathBuf>, ContainerError> {
    let mut found = Vec::new();
    let mut open = vec![top.to_owned()];
    while let Some(group) = open.pop() {
        let entries = match fs::read_dir(&group) {
            Ok(entries) => entries,
            Err(error) if error.kind() == io::ErrorKind::NotFound => continue,
            Err(source) => {
                return Err(ContainerError::Read {
                    path: group,
                    source,
                });
            }
        };
        for entry in entries.flatten() {
            if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
                open.push(entry.path());
            }
        }
        found.push(group);
    }
    Ok(found)
}

/// A process named for good: its pid and when it started.
pub(crate) fn init_process(pid: u32) -> Result<InitProcess, ContainerError> {
    let path = PathBuf::from(format!("/proc/{pid}/stat"));
    let read = |source| ContainerError::Read {
        path: path.clone(),
        source,
    };
    let stat = fs::read_to_string(&path).map_err(read)?;
    // The second field, the name, may hold anything.
    let start_ticks = stat
        .rsplit_once(')')
        .and_then(|(_, fields)| fields.split_whitespace().nth(19)?.parse().ok())
        .ok_or_else(|| read(io::ErrorKind::InvalidData.into()))?;
    let pid = i32::try_from(pid).map_err(|_| read(io::ErrorKind::InvalidData.into()))?;
    Ok(InitProcess { pid, start_ticks })
}

/// The engine's one door to blocking work on control groups.
async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> T + Send + 'static,
) -> Result<T, ContainerError> {
    tokio::task::spawn_blocking(work)
        .await
        .map_err(|_| ContainerError::Worker)
}
