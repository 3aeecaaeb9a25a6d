//! The server behind `restore --lazy-pages`: CRIU hands it the userfaultfd of every process it restores, and it fills
//! them from [`Staging`].
//!
//! ```text
//!  bind -- CRIU connects -- (pid, userfaultfd)... -- RSTF -- CRIU closes
//!                             |                        |
//!                             | faults are served, hot | all pages are placed in the background,
//!                             | pages placed ahead     | then: Filled, our userfaultfds are closed
//! ```
//!
//! CRIU's side of this is criu/uffd.c; the records are
//!
//! * a process: its pid in the innermost pid namespace, positive, as an `int`; then one byte with the userfaultfd;
//! * a zombie: its pid, negative; nothing follows;
//! * `RSTF`: everything is restored and tasks are about to resume.
//!
//! A restore can be stopped until `RSTF`: when the server has ended, CRIU finds the connection closed and ends the
//! processes. After it that is up to whoever started all this.
//!
//! N.B. A missing page of which nobody holds the userfaultfd reads as zeros. So every one is duplicated and handed out
//! ([`LazyEvent::Handed`]) before anything else is done with it, and whoever holds the duplicates has to end the
//! processes, and only then close them, if this server fails or dies.

mod crew;
mod error;
mod faults;
mod fill;
mod outstanding;
mod recipient;
mod report;
mod signal;

use std::collections::HashSet;
use std::fs::{self, Permissions};
use std::io::{self, ErrorKind};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use sys::fdpass::recv_with_fds;
use sys::uffd::{FEATURE_EVENT_FORK, FEATURE_EVENTS, Userfaultfd};

use self::crew::{Crew, Message};
pub use self::error::LazyError;
use self::outstanding::Outstanding;
use self::recipient::{Origin, Recipient};
pub use self::report::FillReport;
use self::signal::Signal;
use crate::{SpaceId, Staging};

/// The name CRIU connects to, in its work directory (criu/uffd.c, `LAZY_PAGES_SOCK_NAME`).
const SOCKET_NAME: &str = "lazy-pages.socket";

/// `LAZY_PAGES_RESTORE_FINISHED` in criu/uffd.c: "RSTF".
const RESTORE_FINISHED: i32 = 0x5253_5446;

/// How long the second half of a record may take. CRIU sends it right behind the first.
const RECORD_TIMEOUT: Duration = Duration::from_secs(10);

/// Which pages are placed before the restore has finished, while CRIU restores the rest.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Prefill {
    /// None but those somebody waits for.
    Off,
    /// Those that arrived since [`Staging::mark_hot_from_now`].
    #[default]
    Hot,
    /// As many as there is time for, hot ones first. CRIU gets less of the processor then.
    All,
}

/// How to fill.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct FillOptions {
    /// Threads that fill in the background, at least one. Page faults have one of their own.
    pub threads: usize,
    /// What to place ahead.
    pub prefill: Prefill,
    /// How long after the restore has finished pages that are not hot and that nobody waits for are left alone, unless
    /// [`Starter::start`] is called before. CRIU and whoever runs it have some work left then, with which filling
    /// would compete for processors and for the lock of the address space.
    pub patience: Duration,
    /// Refuse a process whose forks the kernel does not report. Only for a process that does not fork while it is
    /// filled can this be turned off: a child of which nobody hears reads zeros where its parent has content. To hear
    /// of forks CRIU needs `CAP_SYS_PTRACE`.
    pub require_forks: bool,
}

impl Default for FillOptions {
    /// Two threads: 6 GB/s on two processors, nine tenths of what the kernel can do there. The sooner it is over, the
    /// less do the tasks wait, even where they share the processors with it: one thread made for more pauses, not fewer.
    fn default() -> Self {
        Self {
            threads: 2,
            prefill: Prefill::default(),
            patience: Duration::ZERO,
            require_forks: true,
        }
    }
}

/// What happens while the server runs.
#[derive(Debug)]
pub enum LazyEvent {
    /// A process (or a child it forked, under the parent's id) is about to be filled.
    Handed {
        /// Whose memory.
        space: SpaceId,
        /// Keeps missing pages missing while it is open. To be kept by another process until `Filled`.
        guard: OwnedFd,
    },
    /// CRIU has restored everything; the tasks are about to resume.
    RestoreFinished,
    /// All memory is in place. The guards have to be closed now; that lets the kernel deal with the memory alone.
    /// Faults are served until the handler of this event returns.
    Filled,
}

/// Ends a server from another thread.
#[derive(Debug, Clone)]
pub struct Canceller {
    cancelled: Arc<AtomicBool>,
    signal: Arc<Signal>,
}

impl Canceller {
    /// Has [`LazyServer::run`] return [`LazyError::Cancelled`] soon.
    pub fn cancel(&self) {
        self.cancelled.store(true, Ordering::Release);
        self.signal.raise();
    }
}

/// Tells a server from another thread that the tasks run.
#[derive(Debug, Clone)]
pub struct Starter(Arc<AtomicBool>);

impl Starter {
    /// Has all pages filled in from now on, whatever [`FillOptions::patience`] says.
    pub fn start(&self) {
        self.0.store(true, Ordering::Release);
    }
}

/// The server, waiting for CRIU.
#[derive(Debug)]
pub struct LazyServer {
    path: PathBuf,
    listener: UnixListener,
    canceller: Canceller,
    running: Arc<AtomicBool>,
}

impl LazyServer {
    /// Listens in CRIU's work directory, which has to be done before CRIU starts to restore. What another server left
    /// there is replaced.
    ///
    /// # Errors
    ///
    /// Those of the directory and of bind(2); the path must fit into a socket address, 107 bytes.
    pub fn bind(work_dir: &Path) -> io::Result<Self> {
        let path = work_dir.join(SOCKET_NAME);
        match fs::remove_file(&path) {
            Err(error) if error.kind() != ErrorKind::NotFound => return Err(error),
            _ => {}
        }
        let listener = UnixListener::bind(&path)?;
        fs::set_permissions(&path, Permissions::from_mode(0o600))?;
        let signal = Arc::new(Signal::new()?);
        let cancelled = Arc::default();
        Ok(Self {
            path,
            listener,
            canceller: Canceller { cancelled, signal },
            running: Arc::default(),
        })
    }

    /// Something to tell the server with that the tasks run.
    pub fn starter(&self) -> Starter {
        Starter(Arc::clone(&self.running))
    }

    /// Something to end the server with.
    pub fn canceller(&self) -> Canceller {
        self.canceller.clone()
    }

    /// Serves one restore; returns when all memory is in place.
    ///
    /// Staging has to be complete. What it holds for the processes is given back bit by bit once the restore has
    /// finished; before that, an error leaves it as it was.
    ///
    /// `events` is called on this thread, in order, and holds up everything but faults while it runs.
    ///
    /// # Errors
    ///
    /// See [`LazyError`].
    pub fn run(
        self,
        staging: &Staging,
        options: FillOptions,
        events: &mut dyn FnMut(LazyEvent),
    ) -> Result<FillReport, LazyError> {
        let crew = Crew::new(options, Arc::clone(&self.running)).map_err(LazyError::Wait)?;
        let outcome = thread::scope(|scope| {
            // However this ends, the threads have to, or the scope would not.
            let _stop = StopOnDrop(&crew);
            let named = |name: &str| thread::Builder::new().name(name.to_owned());
            named("lazy-faults")
                .spawn_scoped(scope, || faults::run(&crew))
                .map_err(LazyError::Thread)?;
            for index in 0..options.threads.max(1) {
                let crew = &crew;
                named("lazy-fill")
                    .spawn_scoped(scope, move || fill::run(crew, index == 0))
                    .map_err(LazyError::Thread)?;
            }
            let mut session = Session {
                server: &self,
                staging,
                options,
                crew: &crew,
                events,
                spaces: HashSet::new(),
            };
            session.run()
        });
        // Children of which nobody was told when it failed: they must not read zeros either.
        for message in crew.messages() {
            if let Message::Forked { parent, uffd, .. } = message {
                events(LazyEvent::Handed {
                    space: parent,
                    guard: uffd.into(),
                });
            }
        }
        outcome
    }
}

impl Drop for LazyServer {
    fn drop(&mut self) {
        // It is in the way of nobody but a later server, which removes it itself.
        fs::remove_file(&self.path).ok();
    }
}

struct StopOnDrop<'a>(&'a Crew);

impl Drop for StopOnDrop<'_> {
    fn drop(&mut self) {
        self.0.stop();
    }
}

/// What CRIU sent.
enum Received {
    Process(SpaceId, OwnedFd),
    Zombie(SpaceId),
    Finished,
    Closed,
}

/// One restore.
struct Session<'a> {
    server: &'a LazyServer,
    staging: &'a Staging,
    options: FillOptions,
    crew: &'a Crew,
    events: &'a mut dyn FnMut(LazyEvent),
    /// The processes CRIU sent, zombies too.
    spaces: HashSet<SpaceId>,
}

impl Session<'_> {
    fn run(&mut self) -> Result<FillReport, LazyError> {
        let connection = self.accept()?;
        self.restore(&connection)?;
        drop(connection);

        let resumed = Instant::now();
        let prefilled_pages = self.crew.tally.report().pages_copied;
        (self.events)(LazyEvent::RestoreFinished);
        self.crew.resume();
        for space in self.staging.spaces() {
            if !self.spaces.contains(&space) {
                return Err(LazyError::NotRestored(space));
            }
        }
        for space in &self.spaces {
            self.staging.release(*space);
        }
        while !self.crew.is_done() {
            self.wait(None)?;
        }
        let duration = resumed.elapsed();
        (self.events)(LazyEvent::Filled);
        Ok(FillReport {
            prefilled_pages,
            duration,
            ..self.crew.tally.report()
        })
    }

    fn accept(&mut self) -> Result<UnixStream, LazyError> {
        while !self.wait(Some(self.server.listener.as_fd()))? {}
        let accepted = self.server.listener.accept();
        let (connection, _) = accepted.map_err(|source| self.broken(source))?;
        connection
            .set_read_timeout(Some(RECORD_TIMEOUT))
            .map_err(|source| self.broken(source))?;
        Ok(connection)
    }

    /// Takes processes until CRIU has restored them all.
    fn restore(&mut self, connection: &UnixStream) -> Result<(), LazyError> {
        loop {
            while !self.wait(Some(connection.as_fd()))? {}
            match self.receive(connection)? {
                Received::Process(id, fd) => {
                    if !self.spaces.insert(id) {
                        return Err(LazyError::Twice(id));
                    }
                    let uffd = Userfaultfd::from_fd(fd);
                    self.check(id, &uffd)?;
                    let outstanding = Outstanding::new(self.staging.seal(id));
                    self.take_over(id, Origin::Restored, uffd, outstanding)?;
                }
                Received::Zombie(id) => {
                    self.spaces.insert(id);
                }
                Received::Finished => return Ok(()),
                Received::Closed => return Err(LazyError::RestoreFailed),
            }
        }
    }

    /// A process that changes its memory unheard would be given pages it has given up.
    fn check(&self, space: SpaceId, uffd: &Userfaultfd) -> Result<(), LazyError> {
        let features = uffd
            .features()
            .map_err(|source| LazyError::Inspect { space, source })?;
        let needed = match self.options.require_forks {
            true => FEATURE_EVENTS,
            false => FEATURE_EVENTS & !FEATURE_EVENT_FORK,
        };
        if features & needed != needed {
            return Err(LazyError::Deaf { space, features });
        }
        Ok(())
    }

    /// The guard first, then everything else.
    fn take_over(
        &mut self,
        id: SpaceId,
        origin: Origin,
        uffd: Userfaultfd,
        outstanding: Outstanding,
    ) -> Result<(), LazyError> {
        let tally = Arc::clone(&self.crew.tally);
        let filled = Arc::clone(&self.crew.news);
        let space = Recipient::new(id, origin, uffd, outstanding, tally, filled);
        let guard = space
            .guard()
            .map_err(|source| LazyError::Guard { space: id, source })?;
        (self.events)(LazyEvent::Handed { space: id, guard });
        self.crew.add(space).map_err(LazyError::Wait)
    }

    /// Waits until there is something to read from `fd` (true) or news from the crew, which is dealt with.
    fn wait(&mut self, fd: Option<std::os::fd::BorrowedFd<'_>>) -> Result<bool, LazyError> {
        let readable = |fd| PollFd::new(fd, PollFlags::POLLIN);
        let mut fds = vec![
            readable(self.crew.news.as_fd()),
            readable(self.server.canceller.signal.as_fd()),
        ];
        fds.extend(fd.map(readable));
        match poll(&mut fds, PollTimeout::NONE) {
            Ok(_) | Err(Errno::EINTR) => {}
            Err(errno) => return Err(LazyError::Wait(errno.into())),
        }
        let is_ready = |index: usize| fds.get(index).and_then(PollFd::any).unwrap_or(false);
        if self.server.canceller.cancelled.load(Ordering::Acquire) {
            return Err(LazyError::Cancelled);
        }
        if is_ready(0) {
            self.crew.news.clear();
            // The first failure ends it, but not before everybody in the same post has a guard.
            let mut outcome = Ok(());
            for message in self.crew.messages() {
                outcome = outcome.and(match message {
                    Message::Failed(error) => Err(error),
                    Message::Forked {
                        parent,
                        uffd,
                        outstanding,
                    } => self.take_over(parent, Origin::Forked, uffd, outstanding),
                });
            }
            outcome?;
        }
        Ok(is_ready(2))
    }

    fn receive(&self, connection: &UnixStream) -> Result<Received, LazyError> {
        let mut pid = [0; 4];
        let mut length = 0;
        while length < pid.len() {
            let (count, _) = recv_with_fds(connection, &mut pid[length..])
                .map_err(|source| self.broken(source))?;
            match count {
                0 if length == 0 => return Ok(Received::Closed),
                0 => return Err(self.broken(ErrorKind::UnexpectedEof.into())),
                count => length += count,
            }
        }
        let pid = i32::from_ne_bytes(pid);
        let id = SpaceId(pid.unsigned_abs());
        if pid == RESTORE_FINISHED {
            return Ok(Received::Finished);
        }
        if pid <= 0 {
            return Ok(Received::Zombie(id));
        }
        let (_, mut fds) =
            recv_with_fds(connection, &mut [0]).map_err(|source| self.broken(source))?;
        match (fds.pop(), fds.is_empty()) {
            (Some(fd), true) => Ok(Received::Process(id, fd)),
            _ => Err(LazyError::NoUserfaultfd(id)),
        }
    }

    fn broken(&self, source: io::Error) -> LazyError {
        LazyError::Receive {
            path: self.server.path.clone(),
            source,
        }
    }
}
