//! Where the standard streams of a container's processes go.
//!
//! A process without a terminal has pipes, and the shim copies between them and
//! what containerd named: fifos, files, a logger program. Fifos are held open
//! for both directions, so that a containerd that restarts finds everything
//! where it left it and the process sees neither end nor error. Nothing here
//! blocks: the copies run on the reactor.

mod console;
mod fifo;
mod logger;

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use rustix::fs::{Gid, Uid, fchown};
use tokio::io::unix::AsyncFd;
use tokio::io::{AsyncRead, AsyncWrite, AsyncWriteExt};
use tokio::net::unix::pipe;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

pub(crate) use self::console::{Console, ConsoleSocket};
use self::fifo::{Keeper, Sink};
use self::logger::Logger;
use crate::error::{Error, Result};
use crate::reaper::Reaper;

/// How long output is still copied after a process is gone: its children may
/// hold the pipe for ever.
const DRAIN_LIMIT: Duration = Duration::from_secs(10);

/// One copy's buffer; a pipe holds 64 KiB.
const COPY_BYTES: usize = 16 << 10;

/// What containerd named for a process's standard streams.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct StdioSpec {
    pub(crate) stdin: String,
    pub(crate) stdout: String,
    pub(crate) stderr: String,
    pub(crate) terminal: bool,
}

/// The process's ends of its streams; /dev/null where there is none.
#[derive(Debug, Default)]
pub(crate) struct RuncStdio {
    pub(crate) stdin: Option<OwnedFd>,
    pub(crate) stdout: Option<OwnedFd>,
    pub(crate) stderr: Option<OwnedFd>,
}

/// What happens to streams for which nothing was named.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Unnamed {
    /// The process has /dev/null.
    Null,
    /// The process has a pipe whose output is thrown away: a restored process
    /// had a pipe where it was dumped, and CRIU insists on one.
    Pipe,
}

/// Where output goes, by the form of its name.
#[derive(Debug, PartialEq, Eq)]
enum Target {
    Path(PathBuf),
    File(PathBuf),
    Logger(String),
}

impl Target {
    /// `None` for an empty name.
    fn parse(name: &str) -> Result<Option<Self>> {
        if name.is_empty() {
            return Ok(None);
        }
        let Some((scheme, rest)) = name.split_once("://") else {
            return Ok(Some(Self::Path(name.into())));
        };
        match scheme {
            "fifo" => Ok(Some(Self::Path(rest.into()))),
            "file" => Ok(Some(Self::File(rest.into()))),
            "binary" => Ok(Some(Self::Logger(name.to_owned()))),
            _ => Err(Error::InvalidArgument {
                what: format!("unknown STDIO scheme {scheme}"),
            }),
        }
    }
}

/// The streams of one process while it lives.
#[derive(Debug)]
pub(crate) struct ProcessIo {
    outputs: TaskTracker,
    inputs: TaskTracker,
    cancel: CancellationToken,
    keeper: Mutex<Keeper>,
    logger: Mutex<Option<Logger>>,
}

/// Who asks for streams.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Owner<'a> {
    /// containerd's namespace, for loggers.
    pub(crate) namespace: &'a str,
    /// The container, for loggers.
    pub(crate) id: &'a str,
    /// Owner of the pipes.
    pub(crate) uid: u32,
    /// Group of the pipes.
    pub(crate) gid: u32,
    /// Reaps loggers.
    pub(crate) reaper: &'a Reaper,
}

impl ProcessIo {
    fn new() -> Self {
        Self {
            outputs: TaskTracker::new(),
            inputs: TaskTracker::new(),
            cancel: CancellationToken::new(),
            keeper: Mutex::new(Keeper::Waiting),
            logger: Mutex::new(None),
        }
    }

    /// Streams of a process without a terminal, and that process's ends.
    pub(crate) async fn pipes(
        spec: &StdioSpec,
        owner: Owner<'_>,
        unnamed: Unnamed,
    ) -> Result<(Self, RuncStdio)> {
        let io = Self::new();
        let mut ends = RuncStdio::default();
        // As with the Go shim the form of stdout's name decides for both.
        match Target::parse(&spec.stdout)? {
            Some(Target::Logger(uri)) => {
                let (logger, stdout, stderr) = Logger::start(&uri, owner).await?;
                ends.stdout = Some(stdout);
                ends.stderr = Some(stderr);
                *io.logger.lock().unwrap_or_else(PoisonError::into_inner) = Some(logger);
            }
            stdout => {
                let stderr = match &stdout {
                    Some(Target::File(path)) => Some(Target::File(path.clone())),
                    _ => Target::parse(&spec.stderr)?,
                };
                ends.stdout = io.output(stdout, owner, unnamed).await?;
                ends.stderr = io.output(stderr, owner, unnamed).await?;
            }
        }
        ends.stdin = io.input(&spec.stdin, owner, unnamed)?;
        Ok((io, ends))
    }

    async fn output(
        &self,
        target: Option<Target>,
        owner: Owner<'_>,
        unnamed: Unnamed,
    ) -> Result<Option<OwnedFd>> {
        let sink = match target {
            None if unnamed == Unnamed::Null => return Ok(None),
            None => Sink::Nowhere,
            Some(Target::Path(path)) => Sink::open(&path).await?,
            Some(Target::File(path)) => Sink::append(&path).await?,
            Some(Target::Logger(_)) => {
                return Err(Error::InvalidArgument {
                    what: "a logger for stderr alone".to_owned(),
                });
            }
        };
        let (reader, writer) = owned_pipe(owner, End::Writer)?;
        let reader = pipe::Receiver::from_owned_fd(reader).map_err(Error::system("use a pipe"))?;
        self.copy_out(reader, sink);
        Ok(Some(writer))
    }

    fn input(&self, name: &str, owner: Owner<'_>, unnamed: Unnamed) -> Result<Option<OwnedFd>> {
        if name.is_empty() {
            if unnamed == Unnamed::Null {
                return Ok(None);
            }
            // Without a writer it reads as ended, as /dev/null does.
            return Ok(Some(owned_pipe(owner, End::Reader)?.0));
        }
        let (reader, writer) = owned_pipe(owner, End::Reader)?;
        let to = pipe::Sender::from_owned_fd(writer).map_err(Error::system("use a pipe"))?;
        let from = self.open_stdin(name)?;
        let cancel = self.cancel.clone();
        self.inputs.spawn(async move {
            copy(from, to, cancel).await;
        });
        Ok(Some(reader))
    }

    fn open_stdin(&self, name: &str) -> Result<pipe::Receiver> {
        let path = Path::new(name.strip_prefix("fifo://").unwrap_or(name));
        let (from, hold) = fifo::open_input(path)?;
        let mut keeper = self.keeper.lock().unwrap_or_else(PoisonError::into_inner);
        keeper.keep(hold);
        Ok(from)
    }

    fn copy_out(&self, from: impl AsyncRead + Unpin + Send + 'static, sink: Sink) {
        let cancel = self.cancel.clone();
        self.outputs.spawn(async move {
            copy(from, sink, cancel).await;
        });
    }

    /// Streams of a process with a terminal, once its master is there.
    pub(crate) async fn terminal(
        spec: &StdioSpec,
        owner: Owner<'_>,
        console: &Console,
    ) -> Result<Self> {
        let io = Self::new();
        let sink = match Target::parse(&spec.stdout)? {
            None => Sink::Nowhere,
            Some(Target::Path(path)) => Sink::open(&path).await?,
            Some(Target::File(path)) => Sink::append(&path).await?,
            Some(Target::Logger(uri)) => {
                let (logger, stdout, _stderr) = Logger::start(&uri, owner).await?;
                *io.logger.lock().unwrap_or_else(PoisonError::into_inner) = Some(logger);
                Sink::pipe(stdout)?
            }
        };
        io.copy_out(console.stream(), sink);
        if !spec.stdin.is_empty() {
            let from = io.open_stdin(&spec.stdin)?;
            let to = console.stream();
            let cancel = io.cancel.clone();
            io.inputs.spawn(async move {
                let stop = cancel.clone();
                copy(from, to, cancel).await;
                // As with the Go shim, the end of a terminal's input is the end
                // of the terminal.
                stop.cancel();
            });
        }
        Ok(io)
    }

    /// No more input will come than what containerd has already written.
    pub(crate) fn close_input(&self) {
        let mut keeper = self.keeper.lock().unwrap_or_else(PoisonError::into_inner);
        *keeper = Keeper::Closed;
    }

    /// The process is gone: waits for the rest of its output, but not for ever,
    /// and lets everything go.
    pub(crate) async fn finish(&self) {
        self.outputs.close();
        if tokio::time::timeout(DRAIN_LIMIT, self.outputs.wait())
            .await
            .is_err()
        {
            tracing::warn!("output of a process did not end, somebody else holds it");
        }
        self.abort().await;
    }

    /// Lets everything go at once.
    pub(crate) async fn abort(&self) {
        self.cancel.cancel();
        self.close_input();
        self.outputs.close();
        self.inputs.close();
        self.outputs.wait().await;
        self.inputs.wait().await;
        let logger = self
            .logger
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .take();
        if let Some(logger) = logger {
            logger.stop();
        }
    }
}

/// Puts a descriptor that does not block under the reactor.
pub(crate) fn on_reactor(fd: OwnedFd) -> io::Result<AsyncFd<OwnedFd>> {
    #[expect(
        deprecated,
        reason = "its replacement is unsafe for types whose descriptor may change; OwnedFd's does not"
    )]
    AsyncFd::new(fd)
}

#[derive(Debug, Clone, Copy)]
enum End {
    Reader,
    Writer,
}

/// A pipe whose one end goes to the process and belongs to its owner.
fn owned_pipe(owner: Owner<'_>, process_end: End) -> Result<(OwnedFd, OwnedFd)> {
    let (reader, writer) = io::pipe().map_err(Error::system("make a pipe"))?;
    let end = match process_end {
        End::Reader => reader.as_fd(),
        End::Writer => writer.as_fd(),
    };
    if (owner.uid, owner.gid) != (0, 0) {
        fchown(
            end,
            Some(Uid::from_raw(owner.uid)),
            Some(Gid::from_raw(owner.gid)),
        )
        .map_err(Error::system("give a pipe to its owner"))?;
    }
    Ok((reader.into(), writer.into()))
}

async fn copy(
    mut from: impl AsyncRead + Unpin,
    mut to: impl AsyncWrite + Unpin,
    cancel: CancellationToken,
) {
    use tokio::io::AsyncReadExt;
    let work = async {
        let mut buffer = vec![0; COPY_BYTES];
        loop {
            let length = from.read(&mut buffer).await?;
            if length == 0 {
                return to.flush().await;
            }
            to.write_all(&buffer[..length]).await?;
        }
    };
    let ended: io::Result<()> = tokio::select! {
        () = cancel.cancelled() => return,
        ended = work => ended,
    };
    match ended {
        Ok(()) => {}
        // How a copy ends whose other side is gone.
        Err(error) if error.kind() == io::ErrorKind::BrokenPipe => {}
        Err(error) => tracing::warn!(%error, "a stream of a process ended early"),
    }
}

#[cfg(test)]
mod tests {
    use std::io::{Read, Write};

    use super::*;

    fn owner() -> Owner<'static> {
        Owner {
            namespace: "default",
            id: "web",
            uid: 0,
            gid: 0,
            reaper: Box::leak(Box::default()),
        }
    }

    fn mkfifo(path: &Path) -> String {
        nix::unistd::mkfifo(path, nix::sys::stat::Mode::S_IRWXU).unwrap();
        path.to_str().unwrap().to_owned()
    }

    #[test]
    fn the_form_of_a_name_decides_where_output_goes() {
        assert_eq!(Target::parse("").unwrap(), None);
        assert_eq!(
            Target::parse("/run/x").unwrap(),
            Some(Target::Path("/run/x".into()))
        );
        assert_eq!(
            Target::parse("file:///var/log/x").unwrap(),
            Some(Target::File("/var/log/x".into()))
        );
        assert_eq!(
            Target::parse("binary:///bin/logger?id=1").unwrap(),
            Some(Target::Logger("binary:///bin/logger?id=1".into()))
        );
        assert!(matches!(
            Target::parse("http://x"),
            Err(Error::InvalidArgument { .. })
        ));
    }

    #[tokio::test]
    async fn output_reaches_a_fifo_and_waits_for_a_reader_that_comes_back() {
        let dir = tempfile::tempdir().unwrap();
        let spec = StdioSpec {
            stdout: mkfifo(&dir.path().join("out")),
            ..StdioSpec::default()
        };
        let (io, ends) = ProcessIo::pipes(&spec, owner(), Unnamed::Null)
            .await
            .unwrap();
        let mut process = std::fs::File::from(ends.stdout.unwrap());
        assert!(ends.stderr.is_none());

        for round in 0..2 {
            // The reader of the first round is gone before the second.
            let text = format!("round {round}");
            let path = spec.stdout.clone();
            process.write_all(text.as_bytes()).unwrap();
            let length = text.len();
            let read = tokio::task::spawn_blocking(move || {
                let mut reader = std::fs::File::open(path).unwrap();
                let mut bytes = vec![0; length];
                reader.read_exact(&mut bytes).unwrap();
                bytes
            });
            assert_eq!(read.await.unwrap(), text.as_bytes());
        }
        drop(process);
        io.finish().await;
    }

    #[tokio::test]
    async fn input_ends_when_it_was_closed_and_containerd_is_done() {
        let dir = tempfile::tempdir().unwrap();
        let spec = StdioSpec {
            stdin: mkfifo(&dir.path().join("in")),
            ..StdioSpec::default()
        };
        let (io, ends) = ProcessIo::pipes(&spec, owner(), Unnamed::Null)
            .await
            .unwrap();
        let mut containerd = std::fs::File::options()
            .write(true)
            .open(&spec.stdin)
            .unwrap();
        containerd.write_all(b"hello").unwrap();
        io.close_input();
        drop(containerd);
        let mut process = std::fs::File::from(ends.stdin.unwrap());
        let read = tokio::task::spawn_blocking(move || {
            let mut text = String::new();
            process.read_to_string(&mut text).unwrap();
            text
        });
        assert_eq!(read.await.unwrap(), "hello");
        io.finish().await;
    }

    #[tokio::test]
    async fn a_file_gets_both_streams_appended() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("logs/out");
        let spec = StdioSpec {
            stdout: format!("file://{}", path.display()),
            ..StdioSpec::default()
        };
        let (io, ends) = ProcessIo::pipes(&spec, owner(), Unnamed::Null)
            .await
            .unwrap();
        std::fs::File::from(ends.stdout.unwrap())
            .write_all(b"one ")
            .unwrap();
        io.outputs.close();
        std::fs::File::from(ends.stderr.unwrap())
            .write_all(b"two")
            .unwrap();
        io.finish().await;
        let text = std::fs::read_to_string(path).unwrap();
        assert!(text == "one two" || text == "twoone ", "{text}");
    }

    #[tokio::test]
    async fn streams_without_a_name_can_be_pipes_that_lead_nowhere() {
        let spec = StdioSpec::default();
        let (_, ends) = ProcessIo::pipes(&spec, owner(), Unnamed::Null)
            .await
            .unwrap();
        assert!(ends.stdin.is_none() && ends.stdout.is_none());

        let (io, ends) = ProcessIo::pipes(&spec, owner(), Unnamed::Pipe)
            .await
            .unwrap();
        let mut stdin = std::fs::File::from(ends.stdin.unwrap());
        assert_eq!(stdin.read(&mut [0; 1]).unwrap(), 0);
        let mut stdout = std::fs::File::from(ends.stdout.unwrap());
        let written = tokio::task::spawn_blocking(move || stdout.write_all(&[0; 1 << 18]));
        written.await.unwrap().unwrap();
        drop(ends.stderr);
        io.finish().await;
    }
}
