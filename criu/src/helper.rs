//! The process that talks to libcriu.
//!
//! libcriu keeps process-global state, and CRIU opens the directories that it is
//! given through `/proc/<peer>/fd`, where the peer is whoever made the socket. So
//! each dump has a process of its own: our binary, executed again. It makes the
//! socket pair, executes `criu swrk` (under a seccomp filter, whose listener it
//! passes up, unless nothing is to be asked), and then carries notifications and answers between CRIU and the session.
//!
//! ```text
//!  session ──SEQPACKET (fd 3)── helper ──SEQPACKET, libcriu── criu swrk
//!     └──────────────── seccomp listener ──────────────────────┘
//! ```
//!
//! # When a process dies
//!
//! Nobody here has a parent-death signal: it would kill CRIU while it has its code
//! inside the tasks, and they would be lost. A process that dies closes its
//! sockets instead, and that is enough:
//!
//! * *The session goes* (closed, or its process killed). The helper answers the
//!   notification that waits, or comes next, with "no"; `post-dump` always comes,
//!   so a dump never commits by itself. CRIU undoes everything and lets the tasks
//!   go. The helper keeps a copy of the seccomp listener and answers CRIU's calls
//!   meanwhile ([`guard`](crate::guard)): with nobody there they would fail with
//!   `ENOSYS`, and with them the clean-up.
//! * *The helper goes*. CRIU fails at its next notification, at the latest at
//!   `post-dump`, and undoes everything. The session's interceptor goes on
//!   answering until CRIU is gone.
//! * *CRIU goes*. The kernel lets the tasks go. The helper says so at once, even
//!   while a notification waits for its answer.
//!
//! N.B. a cgroup that was frozen stays frozen in the first two cases, because CRIU
//! restores the state that it found. Whoever froze it thaws it, and only they
//! know whether the container was committed to another node in the meantime.

use std::cell::RefCell;
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitCode, ExitStatus, Stdio};

use std::ffi::{CStr, OsStr, c_char, c_int};

use criu_sys::{CriuNotify, Libcriu};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use sys::seccomp::Listener;

use crate::channel::{Asked, Channel, Ending, FromHelper, ToHelper, packet_pair};
use crate::intercept::filter;
use crate::options::{OptionError, Options};
use crate::request::{DumpRequest, RUNC_CONFIG_FILE};
use crate::{guard, report};

/// The socket to the session.
pub(crate) const SESSION_FD: i32 = 3;

/// How CRIU finds a file of options where libcriu (4.1) has no setter for it.
const CONFIG_VARIABLE: &str = "CRIU_CONFIG_FILE";

/// Why there was no dump.
#[derive(Debug, thiserror::Error)]
enum HelperError {
    #[error("cannot talk to the session")]
    Channel(#[source] io::Error),
    #[error("the session said something out of turn")]
    OutOfTurn,
    #[error("cannot load libcriu")]
    Library(#[from] criu_sys::LoadError),
    #[error("cannot make a socket for criu")]
    Socket(#[source] io::Error),
    #[error("cannot execute {} under a seccomp filter", program.display())]
    Execute { program: PathBuf, source: io::Error },
    #[error("the seccomp listener did not arrive")]
    Listener,
    #[error("cannot watch over criu's system calls")]
    Guard(#[source] io::Error),
    #[error("cannot open directory {}", path.display())]
    Directory { path: PathBuf, source: io::Error },
    #[error("cannot set the options of the dump")]
    Options(#[from] OptionError),
}

/// The whole life of a helper process; what a program calls when its first
/// argument is `criu-helper`, before it starts any thread or runtime.
///
/// Expects the session's socket as file descriptor 3.
pub fn helper_main() -> ExitCode {
    // SAFETY: called once, at the start of the program, before anything is opened.
    let Ok(socket) = (unsafe { sys::spawn::inherited(SESSION_FD) }) else {
        return ExitCode::FAILURE;
    };
    let channel = Channel::from(socket);
    match run(&channel) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            let reason = report(&error);
            // A session that is gone does not want to know.
            drop(channel.send(&FromHelper::Failed { reason }, &[]));
            ExitCode::FAILURE
        }
    }
}

fn run(channel: &Channel) -> Result<(), HelperError> {
    let Some((message, _)) = channel.receive().map_err(HelperError::Channel)? else {
        return Ok(());
    };
    let ToHelper::Prepare {
        criu,
        search_path,
        asked,
    } = message
    else {
        return Err(HelperError::OutOfTurn);
    };
    let library = Libcriu::load()?;
    let mut worker = Worker::spawn(&library, &criu, &search_path, asked)?;
    if let Some(listener) = &worker.listener {
        guard::watch(channel, listener, worker.process.id()).map_err(HelperError::Guard)?;
    }
    let listener: Vec<_> = worker.listener.iter().map(AsFd::as_fd).collect();
    channel
        .send(&FromHelper::Ready, &listener)
        .map_err(HelperError::Channel)?;
    let request = match channel.receive().map_err(HelperError::Channel)? {
        Some((ToHelper::Start(request), _)) => request,
        Some(_) => return Err(HelperError::OutOfTurn),
        // CRIU sees its socket closed, and goes too.
        None => return Ok(()),
    };
    let ending = worker.dump(&library, &request, channel)?;
    // A session that is gone does not want to know.
    drop(channel.send(&FromHelper::Ended(ending), &[]));
    Ok(())
}

/// `criu swrk`, executed and waiting for its request.
struct Worker {
    process: Child,
    socket: Option<OwnedFd>,
    /// Where CRIU is under a filter.
    listener: Option<Listener>,
}

impl Worker {
    fn spawn(
        library: &Libcriu,
        criu: &Path,
        search_path: &OsStr,
        asked: Asked,
    ) -> Result<Self, HelperError> {
        let (socket, criu_end) = packet_pair().map_err(HelperError::Socket)?;
        let (listener_end, child_end) = packet_pair().map_err(HelperError::Socket)?;
        let number = criu_end.as_raw_fd();
        let program = filter(asked).map(|filter| filter.build());
        let is_asked = program.is_some();
        let mut command = Command::new(criu);
        command
            .arg("swrk")
            .arg(number.to_string())
            .env("PATH", search_path)
            .stdin(Stdio::null());
        if library.set_config_file.is_none()
            && std::env::var_os(CONFIG_VARIABLE).is_none()
            && Path::new(RUNC_CONFIG_FILE).exists()
        {
            command.env(CONFIG_VARIABLE, RUNC_CONFIG_FILE);
        }
        let before_exec = move || {
            nix::fcntl::fcntl(
                &criu_end,
                nix::fcntl::FcntlArg::F_SETFD(nix::fcntl::FdFlag::empty()),
            )?;
            if let Some(program) = &program {
                let listener = program.install()?;
                sys::fdpass::send_with_fds(&child_end, b"L", &[listener.as_fd()])?;
            }
            Ok(())
        };
        // SAFETY: between fork and exec, in a process that has one thread: nobody
        // can hold a lock there, so even the allocation in `send_with_fds` is fine.
        unsafe { command.pre_exec(before_exec) };
        let spawned = command.spawn();
        // Closes our copies of the child's ends.
        drop(command);
        let process = spawned.map_err(|source| HelperError::Execute {
            program: criu.to_owned(),
            source,
        })?;
        let listener = match is_asked {
            false => None,
            true => {
                let (_, mut files) = sys::fdpass::recv_with_fds(&listener_end, &mut [0])
                    .map_err(|_| HelperError::Listener)?;
                Some(files.pop().ok_or(HelperError::Listener)?)
            }
        };
        Ok(Self {
            process,
            socket: Some(socket),
            listener: listener.map(Listener::from),
        })
    }

    /// Dumps and waits until CRIU is gone, and the tasks with it or let go.
    fn dump(
        &mut self,
        library: &Libcriu,
        request: &DumpRequest,
        channel: &Channel,
    ) -> Result<Ending, HelperError> {
        let images = open_directory(&request.images)?;
        let work_dir = open_directory(request.log_directory())?;
        let mut options = Options::new(library)?;
        options.apply(request, images.as_fd(), work_dir.as_fd())?;
        let socket = self.socket.take().ok_or(HelperError::OutOfTurn)?;
        let watched = socket.try_clone().map_err(HelperError::Socket)?;
        let session = channel
            .as_fd()
            .try_clone_to_owned()
            .map_err(HelperError::Channel)?;
        options.use_socket(socket);
        options.notify(on_notify);
        RELAY.set(Some(Relay {
            session: session.into(),
            criu: watched,
            refused: None,
        }));
        let result = options.dump();
        // Closes the last copy of the socket: CRIU must not wait for an answer.
        let refused = RELAY.take().and_then(|relay| relay.refused);
        // After a refusal the library returns at once; CRIU ends when it has
        // undone everything.
        let status = self.process.wait();
        Ok(match refused {
            Some(action) => Ending::Aborted { action },
            None if result == 0 => Ending::Done,
            None => Ending::Failed {
                result,
                criu: status.ok().and_then(died),
            },
        })
    }
}

/// How CRIU ended, where that says more than its log.
fn died(status: ExitStatus) -> Option<String> {
    status
        .signal()
        .map(|signal| format!("criu was killed by signal {signal}"))
}

fn open_directory(path: &Path) -> Result<File, HelperError> {
    File::open(path).map_err(|source| HelperError::Directory {
        path: path.to_owned(),
        source,
    })
}

/// Carries notifications to the session and answers back.
struct Relay {
    session: Channel,
    /// Hangs up when CRIU is gone.
    criu: OwnedFd,
    /// The action that was answered with "no".
    refused: Option<String>,
}

thread_local! {
    // libcriu's callback has no argument for its user.
    static RELAY: RefCell<Option<Relay>> = const { RefCell::new(None) };
}

/// libcriu's callback. Runs on the thread that called `Options::dump`.
unsafe extern "C" fn on_notify(action: *mut c_char, _notify: *mut CriuNotify) -> c_int {
    // SAFETY: libcriu passes the action's name, a terminated string that lives
    // during the call.
    let action = unsafe { CStr::from_ptr(action) }.to_string_lossy();
    // A panic must not unwind into C.
    let go_on = std::panic::catch_unwind(|| {
        RELAY.with_borrow_mut(|relay| relay.as_mut().is_some_and(|relay| relay.ask(&action)))
    });
    if go_on.unwrap_or(false) { 0 } else { -1 }
}

impl Relay {
    /// Whether the session wants CRIU to go on. A session that is gone does not.
    fn ask(&mut self, action: &str) -> bool {
        match self.answer(action) {
            Ok(Some(true)) => true,
            // CRIU is gone; it was not refused.
            Ok(None) => false,
            Ok(Some(false)) | Err(_) => {
                self.refused = Some(action.to_owned());
                false
            }
        }
    }

    /// The session's answer; `None` when CRIU dies in the meantime.
    fn answer(&self, action: &str) -> io::Result<Option<bool>> {
        let action = action.to_owned();
        self.session.send(&FromHelper::Notify { action }, &[])?;
        loop {
            let mut files = [
                PollFd::new(self.session.as_fd(), PollFlags::POLLIN),
                PollFd::new(self.criu.as_fd(), PollFlags::empty()),
            ];
            match poll(&mut files, PollTimeout::NONE) {
                Err(nix::Error::EINTR) => continue,
                result => result?,
            };
            if files[1].any().unwrap_or(false) {
                return Ok(None);
            }
            return match self.session.receive()? {
                Some((ToHelper::Answer { go_on }, _)) => Ok(Some(go_on)),
                Some(_) => Err(io::ErrorKind::InvalidData.into()),
                None => Ok(Some(false)),
            };
        }
    }
}
