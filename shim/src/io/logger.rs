//! Logger programs: `binary:///path/to/program?key=value`.
//!
//! The program gets the keys and values as arguments, stdout and stderr of the
//! container as file descriptors 3 and 4, and closes 5 when it is ready.

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::process::{Command, Stdio};
use std::time::Duration;

use sys::spawn::CommandFds;
use tokio::io::AsyncReadExt;
use tokio::net::unix::pipe;

use super::{End, Owner, owned_pipe};
use crate::error::{Error, Result};
use crate::reaper::ExitReceiver;

/// How long a logger may take to get ready; `Create` waits for it.
const READY_LIMIT: Duration = Duration::from_secs(10);

/// How long it may go on after SIGTERM, as in the Go shim.
const STOP_LIMIT: Duration = Duration::from_secs(12);

/// A logger that runs.
#[derive(Debug)]
pub(super) struct Logger {
    pid: u32,
    exit: ExitReceiver,
}

impl Logger {
    /// Starts the program and waits until it is ready; answers the pipes to
    /// which the container writes.
    pub(super) async fn start(uri: &str, owner: Owner<'_>) -> Result<(Self, OwnedFd, OwnedFd)> {
        let (program, arguments) = parse(uri).ok_or_else(|| Error::InvalidArgument {
            what: format!("logger {uri}"),
        })?;
        let (stdout, stdout_writer) = owned_pipe(owner, End::Writer)?;
        let (stderr, stderr_writer) = owned_pipe(owner, End::Writer)?;
        let (ready, ready_writer) = io::pipe().map_err(Error::system("make a pipe"))?;
        let failed = || Error::system("start the logger");
        let mut command = Command::new(program);
        command
            .args(arguments)
            .env_clear()
            .env("CONTAINER_ID", owner.id)
            .env("CONTAINER_NAMESPACE", owner.namespace)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::null());
        command
            .pass_fds(&[
                (stdout.as_fd(), 3),
                (stderr.as_fd(), 4),
                (ready_writer.as_fd(), 5),
            ])
            .map_err(failed())?;
        let (pid, exit) = owner
            .reaper
            .spawn(|| command.spawn().map(|child| child.id()))
            .map_err(failed())?;
        // With it go our copies of what the logger has now.
        drop(command);
        drop((stdout, stderr, ready_writer));
        let logger = Self { pid, exit };

        let mut ready = pipe::Receiver::from_owned_fd(ready.into()).map_err(failed())?;
        // A byte or the end: both say ready.
        let waited = tokio::time::timeout(READY_LIMIT, ready.read(&mut [0; 1])).await;
        if waited.is_err() {
            logger.stop();
            return Err(failed()(io::Error::from(io::ErrorKind::TimedOut)));
        }
        Ok((logger, stdout_writer, stderr_writer))
    }

    /// Asks the logger to end, and ends it if it does not.
    pub(super) fn stop(self) {
        let Self { pid, mut exit } = self;
        if exit.try_recv().is_ok() {
            return;
        }
        signal(pid, libc::SIGTERM);
        tokio::spawn(async move {
            if tokio::time::timeout(STOP_LIMIT, exit).await.is_err() {
                signal(pid, libc::SIGKILL);
            }
        });
    }
}

fn signal(pid: u32, number: i32) {
    if let Err(error) = sys::signal::send(pid.cast_signed(), number) {
        tracing::debug!(%error, pid, "cannot signal a logger");
    }
}

/// Program and arguments of a logger's address.
fn parse(uri: &str) -> Option<(String, Vec<String>)> {
    let rest = uri.strip_prefix("binary://")?;
    let (path, query) = rest.split_once('?').unwrap_or((rest, ""));
    if !path.starts_with('/') {
        return None;
    }
    let mut arguments = Vec::new();
    for pair in query.split('&').filter(|pair| !pair.is_empty()) {
        let (key, value) = pair.split_once('=').unwrap_or((pair, ""));
        arguments.push(decode(key, true)?);
        arguments.push(decode(value, true)?);
    }
    Some((decode(path, false)?, arguments))
}

/// Percent-decoding; in a query `+` is a space.
fn decode(text: &str, plus_is_space: bool) -> Option<String> {
    let mut bytes = Vec::with_capacity(text.len());
    let mut rest = text.bytes();
    while let Some(byte) = rest.next() {
        bytes.push(match byte {
            b'%' => {
                let digits = [rest.next()?, rest.next()?];
                let digits = std::str::from_utf8(&digits).ok()?;
                u8::from_str_radix(digits, 16).ok()?
            }
            b'+' if plus_is_space => b' ',
            byte => byte,
        });
    }
    String::from_utf8(bytes).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_address_gives_program_and_arguments() {
        let (program, arguments) =
            parse("binary:///usr/bin/nerdctl?_NERDCTL_INTERNAL_LOGGING=%2Fvar%2Flib&x=a+b")
                .unwrap();
        assert_eq!(program, "/usr/bin/nerdctl");
        assert_eq!(
            arguments,
            ["_NERDCTL_INTERNAL_LOGGING", "/var/lib", "x", "a b"]
        );
        assert_eq!(parse("binary:///bin/l").unwrap(), ("/bin/l".into(), vec![]));
    }

    #[test]
    fn an_address_without_a_program_is_refused() {
        for uri in [
            "binary://relative",
            "binary://",
            "file:///x",
            "binary:///x%2",
        ] {
            assert!(parse(uri).is_none(), "{uri}");
        }
    }
}
