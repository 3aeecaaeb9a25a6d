//! A dump in steps, with a caller who can stop it.

use std::io;
use std::os::fd::AsFd;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::thread;
use std::time::Duration;

use std::os::unix::process::CommandExt;
use sys::seccomp::Listener;
use sys::spawn::CommandFds;

use crate::Interceptor;
use crate::channel::{Asked, Channel, Ending, FromHelper, ToHelper, packet_pair};
use crate::freezer::{Freezer, FreezerError};
use crate::helper::SESSION_FD;
use crate::intercept::limits;
use crate::log;
use crate::request::DumpRequest;
use crate::seccomp::{SeccompError, SeccompFilters, tasks_below};
use crate::version::Tools;

/// The argument that makes a program a helper.
pub const HELPER_ARGUMENT: &str = "criu-helper";

/// How long a helper may take to load libcriu and execute CRIU. Measured: 15 ms.
const PREPARE_TIMEOUT: Duration = Duration::from_secs(10);

/// How long a container may take to be paused again.
const FREEZE_TIMEOUT: Duration = Duration::from_secs(5);

/// How long a whole dump may be silent between two notifications in
/// [`checkpoint`]. It writes all memory: 0.5 s per GiB to memory, 1.5 s to disk.
const CHECKPOINT_TIMEOUT: Duration = Duration::from_secs(3600);

/// A step of a dump that CRIU announces, and takes when it is told to go on.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Action {
    /// CRIU has started up; the tasks have not been touched. The last stop before
    /// they are seized.
    PreDump,
    /// The tasks have been stopped, the network is about to be locked.
    NetworkLock,
    /// The tasks are stopped; files that are provided from outside may be named.
    QueryExternalFiles,
    /// Everything has been written. "Yes" kills the tasks (or lets them go on, if
    /// the request says so), "no" undoes everything: the commit point.
    PostDump,
    /// A dump is being undone.
    NetworkUnlock,
    /// Something else.
    Other(String),
}

impl Action {
    fn from_name(name: String) -> Self {
        match name.as_str() {
            "pre-dump" => Self::PreDump,
            "network-lock" => Self::NetworkLock,
            "query-ext-files" => Self::QueryExternalFiles,
            "post-dump" => Self::PostDump,
            "network-unlock" => Self::NetworkUnlock,
            _ => Self::Other(name),
        }
    }
}

/// What a dump does next.
#[derive(Debug, PartialEq, Eq)]
pub enum DumpEvent {
    /// CRIU waits for [`DumpSession::answer`].
    Notify(Action),
    /// The dump succeeded: the tasks are dead (or run on, if the request says so).
    Finished,
}

/// Why there was no dump. In every case the tasks were let go, except where it
/// says that this is not known.
#[derive(Debug, thiserror::Error)]
pub enum DumpError {
    /// The helper process cannot be started.
    #[error("cannot start {} {HELPER_ARGUMENT}", program.display())]
    Spawn {
        /// Our own program.
        program: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// The helper cannot be talked to.
    #[error("cannot talk to the dump's helper process")]
    Channel(#[source] io::Error),
    /// The helper is gone. CRIU undoes the dump by itself; when it is through,
    /// [`Interceptor::run`] returns.
    #[error("the dump's helper process died")]
    HelperDied,
    /// Nothing happened for too long. Nothing is known about the tasks until the
    /// session is dropped and [`Interceptor::run`] returns.
    #[error("criu did nothing for {} s", waited.as_secs())]
    Timeout {
        /// How long.
        waited: Duration,
    },
    /// The helper did not get to a dump.
    #[error("{reason}")]
    Helper {
        /// The chain of its errors.
        reason: String,
    },
    /// The helper said something out of turn.
    #[error("the dump's helper process said something out of turn")]
    OutOfTurn,
    /// The container is under a seccomp profile that does not go with a dump.
    #[error("cannot dump a container with these seccomp filters")]
    Seccomp(#[from] SeccompError),
    /// A paused container cannot be looked at.
    #[error("cannot use the container's freezer")]
    Freezer(#[from] FreezerError),
    /// The dump was answered with "no", and undone.
    #[error("the dump was stopped at {action:?} and undone")]
    Aborted {
        /// Where.
        action: Action,
    },
    /// CRIU failed.
    #[error("criu cannot dump the container: {reason} (see {})", log.display())]
    Failed {
        /// The first error in its log that matters.
        reason: String,
        /// The log.
        log: PathBuf,
    },
}

/// A dump in steps.
///
/// [`spawn`](Self::spawn) executes CRIU, which then waits; so that this costs no
/// time in a freeze. [`start`](Self::start) sends the request; each
/// [`next`](Self::next) that returns a notification is to be
/// [answered](Self::answer). CRIU's calls have to be answered by an
/// [`Interceptor`] on another thread from `spawn` on.
///
/// Dropping a session that has not finished aborts the dump: CRIU undoes
/// everything, which [`Interceptor::run`] returning tells. See the module
/// `helper` for what happens when a process dies.
#[derive(Debug)]
pub struct DumpSession {
    helper: Option<Child>,
    channel: Channel,
    listener: Option<Listener>,
    log: PathBuf,
}

impl Drop for DumpSession {
    fn drop(&mut self) {
        if let Some(mut helper) = self.helper.take() {
            // Its socket closes with this value. It ends when CRIU has undone the
            // dump: reaped, but not waited for here.
            let reaper = thread::Builder::new().name("criu-reaper".into());
            drop(reaper.spawn(move || helper.wait()));
        }
    }
}

impl DumpSession {
    /// Executes `program criu-helper` (our own program, whose `main` has to call
    /// [`helper_main`](crate::helper_main) then), which executes CRIU under a
    /// seccomp filter. When this returns, CRIU waits for a request.
    ///
    /// # Errors
    ///
    /// When either cannot be executed, or libcriu cannot be loaded.
    pub fn spawn(program: &Path, tools: &Tools) -> Result<Self, DumpError> {
        Self::spawn_asking(program, tools, Asked::Memory)
    }

    fn spawn_asking(program: &Path, tools: &Tools, asked: Asked) -> Result<Self, DumpError> {
        let failed = |source| DumpError::Spawn {
            program: program.to_owned(),
            source,
        };
        let (ours, theirs) = packet_pair().map_err(failed)?;
        let helper = Command::new(program)
            .arg(HELPER_ARGUMENT)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            // Signals from a terminal, or to our process group, must not reach
            // CRIU while it has its code inside the tasks.
            .process_group(0)
            .pass_fds(&[(theirs.as_fd(), SESSION_FD)])
            .map_err(failed)?
            .spawn()
            .map_err(failed)?;
        drop(theirs);
        let mut session = Self {
            helper: Some(helper),
            channel: ours.into(),
            listener: None,
            log: PathBuf::new(),
        };
        let prepare = ToHelper::Prepare {
            criu: tools.criu.clone(),
            search_path: tools.search_path.clone(),
            asked,
        };
        session.send(&prepare)?;
        match session.receive(PREPARE_TIMEOUT)? {
            (FromHelper::Ready, listener) if listener.is_some() == (asked != Asked::Nothing) => {
                session.listener = listener;
            }
            _ => return Err(DumpError::OutOfTurn),
        }
        Ok(session)
    }

    /// What an [`Interceptor`] needs; `None` when it was taken before.
    pub fn take_listener(&mut self) -> Option<Listener> {
        self.listener.take()
    }

    /// Sends the request. CRIU starts up and then announces [`Action::PreDump`].
    ///
    /// # Errors
    ///
    /// When the helper is gone, or the request is too large for a packet.
    pub fn start(&mut self, request: &DumpRequest) -> Result<(), DumpError> {
        self.log = request.log();
        self.send(&ToHelper::Start(Box::new(request.clone())))
    }

    /// The next step, waited for as long as `timeout`.
    ///
    /// # Errors
    ///
    /// [`DumpError::Aborted`] and [`DumpError::Failed`] are how a dump ends that
    /// did not succeed; the tasks have been let go then. After any error the
    /// session is of no more use.
    pub fn next(&mut self, timeout: Duration) -> Result<DumpEvent, DumpError> {
        match self.receive(timeout)?.0 {
            FromHelper::Notify { action } => Ok(DumpEvent::Notify(Action::from_name(action))),
            FromHelper::Ended(ending) => self.ended(ending),
            FromHelper::Ready | FromHelper::Failed { .. } => Err(DumpError::OutOfTurn),
        }
    }

    /// Answers a notification: go on, or undo everything and fail with
    /// [`DumpError::Aborted`] (which [`next`](Self::next) then returns).
    ///
    /// # Errors
    ///
    /// When the helper is gone: the dump is being undone, whatever the answer was.
    pub fn answer(&mut self, go_on: bool) -> Result<(), DumpError> {
        self.send(&ToHelper::Answer { go_on })
    }

    /// Whether CRIU and the helper still wait for the answer to the last
    /// notification. To be asked right before an answer that cannot be taken back:
    /// if CRIU died in the meantime, the kernel has let the tasks go.
    ///
    /// # Errors
    ///
    /// When the socket to the helper is broken.
    pub fn still_waits(&self) -> Result<bool, DumpError> {
        // While a notification waits, the helper has nothing to say.
        let spoke = self
            .channel
            .wait(Duration::ZERO)
            .map_err(DumpError::Channel)?;
        Ok(!spoke)
    }

    fn send(&mut self, message: &ToHelper) -> Result<(), DumpError> {
        match self.channel.send(message, &[]) {
            Err(error) if error.kind() == io::ErrorKind::BrokenPipe => Err(self.last_words()),
            result => result.map_err(DumpError::Channel),
        }
    }

    /// Why the helper went: it may have said so before.
    fn last_words(&mut self) -> DumpError {
        match self.channel.receive() {
            Ok(Some((FromHelper::Failed { reason }, _))) => DumpError::Helper { reason },
            Ok(Some((FromHelper::Ended(ending), _))) => {
                self.ended(ending).err().unwrap_or(DumpError::OutOfTurn)
            }
            _ => DumpError::HelperDied,
        }
    }

    /// The helper has said its last word, and ends.
    fn ended(&mut self, ending: Ending) -> Result<DumpEvent, DumpError> {
        if let Some(mut helper) = self.helper.take() {
            // Only its messages count.
            drop(helper.wait());
        }
        match ending {
            Ending::Done => Ok(DumpEvent::Finished),
            Ending::Aborted { action } => Err(DumpError::Aborted {
                action: Action::from_name(action),
            }),
            Ending::Failed { result, criu } => Err(self.failure(result, criu)),
        }
    }

    fn receive(&self, timeout: Duration) -> Result<(FromHelper, Option<Listener>), DumpError> {
        if !self.channel.wait(timeout).map_err(DumpError::Channel)? {
            return Err(DumpError::Timeout { waited: timeout });
        }
        match self.channel.receive().map_err(DumpError::Channel)? {
            None => Err(DumpError::HelperDied),
            Some((FromHelper::Failed { reason }, _)) => Err(DumpError::Helper { reason }),
            Some((message, mut files)) => Ok((message, files.pop().map(Listener::from))),
        }
    }

    fn failure(&self, result: i32, criu: Option<String>) -> DumpError {
        let logged = log::first_error(&self.log).ok().flatten();
        let reason = match (criu, logged) {
            (Some(died), Some(logged)) => format!("{died}; before that: {logged}"),
            (Some(only), None) | (None, Some(only)) => only,
            (None, None) => {
                let error = io::Error::from_raw_os_error(result.saturating_neg());
                format!("its log has no error, libcriu says: {error}")
            }
        };
        DumpError::Failed {
            reason,
            log: self.log.clone(),
        }
    }
}

/// A whole dump at one go: for checkpoints. Blocks until it is done. Not to be
/// called by a process under seccomp.
///
/// CRIU is under no filter, as runc's is, unless it may not read the limits of
/// one of the processes (of another user, without `CAP_SYS_RESOURCE`). Only then has
/// it to be helped, and with it what comes of a tracer that is under a filter: the
/// container's own filters have to be read beforehand.
///
/// # Errors
///
/// As for [`DumpSession`].
pub fn checkpoint(program: &Path, tools: &Tools, request: &DumpRequest) -> Result<(), DumpError> {
    match may_read_limits(request.pid)? {
        true => unfiltered(program, tools, request),
        false => filtered(program, tools, request),
    }
}

/// Whether CRIU, who has our rights, may read the limits of every process.
fn may_read_limits(root: i32) -> Result<bool, DumpError> {
    let mut tasks = tasks_below(root)?.into_iter();
    Ok(!tasks.any(|tid| limits::is_refused(tid, libc::RLIMIT_NOFILE as _)))
}

fn unfiltered(program: &Path, tools: &Tools, request: &DumpRequest) -> Result<(), DumpError> {
    let mut session = DumpSession::spawn_asking(program, tools, Asked::Nothing)?;
    let dumped = answer_all(&mut session, request, || Ok(()));
    let helper = session.helper.take();
    drop(session);
    if let Some(mut helper) = helper {
        // It ends when CRIU has undone the dump. Only its messages counted.
        drop(helper.wait());
    }
    dumped
}

fn filtered(program: &Path, tools: &Tools, request: &DumpRequest) -> Result<(), DumpError> {
    // Refused before anything is started, where it has to be.
    let mut filters = read_filters(request)?;
    let mut session = DumpSession::spawn_asking(program, tools, Asked::Limits)?;
    let listener = session.take_listener().ok_or(DumpError::OutOfTurn)?;
    let interceptor = Interceptor::new(listener);
    let slot = interceptor.seccomp();
    thread::scope(|scope| {
        let watching = scope.spawn(|| interceptor.run());
        let dumped = answer_all(&mut session, request, || {
            // What was started meanwhile, if anything could be; on an error the
            // session is dropped.
            filters.update(request.pid)?;
            slot.set(filters);
            Ok(())
        });
        // Lets CRIU go, whatever happened, so that the thread ends.
        drop(session);
        // What the interceptor could not do shows in CRIU's log, as a failure.
        drop(watching.join());
        dumped
    })
}

/// A caller may have paused the container. Tasks in a freezer of version 1 cannot
/// be traced, so that they have to run for the milliseconds that this takes.
fn read_filters(request: &DumpRequest) -> Result<SeccompFilters, DumpError> {
    let freezer = request.freeze_cgroup.clone().map(Freezer::V1);
    let paused = match freezer {
        Some(freezer) if freezer.is_frozen().unwrap_or(false) => freezer,
        // Running, or a group of version 2, which has no such file.
        _ => return Ok(SeccompFilters::read(request.pid)?),
    };
    paused.thaw()?;
    let filters = SeccompFilters::read(request.pid);
    paused.freeze(FREEZE_TIMEOUT)?;
    Ok(filters?)
}

/// Lets CRIU do all that it wants; `before` is called before it seizes the tasks.
fn answer_all(
    session: &mut DumpSession,
    request: &DumpRequest,
    before: impl FnOnce() -> Result<(), DumpError>,
) -> Result<(), DumpError> {
    session.start(request)?;
    let mut before = Some(before);
    while let DumpEvent::Notify(action) = session.next(CHECKPOINT_TIMEOUT)? {
        if action == Action::PreDump
            && let Some(before) = before.take()
        {
            before()?;
        }
        session.answer(true)?;
    }
    Ok(())
}
