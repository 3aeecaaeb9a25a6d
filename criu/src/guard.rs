//! Answers CRIU's system calls when the session is gone.
//!
//! While a session lives, its [`Interceptor`](crate::Interceptor) answers. If its
//! process is killed, the kernel would fail every call that the filter selects
//! with `ENOSYS`, for as long as CRIU lives, also those that CRIU needs to put the
//! tasks back. So the helper keeps a copy of the listener and steps in: it makes
//! the memory dump fail, which makes CRIU undo everything at once, and lets all
//! else pass.
//!
//! A call that the killed process had taken and not answered is nobody's: it is not
//! handed out again, and CRIU would wait for ever. CRIU is stopped and continued
//! once, which interrupts such a wait and makes it begin the call anew.

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::thread;
use std::time::Duration;

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use sys::seccomp::Listener;

use crate::channel::Channel;

/// How long a call may wait for a session's interceptor: fifty times what one takes.
const GRACE: Duration = Duration::from_micros(500);

/// How long an interceptor that outlives its session has for the call that it took.
const LAST_ANSWER: Duration = Duration::from_millis(20);

/// Starts to watch: the thread sleeps until the session's end of `channel` is
/// closed, then answers until no process has the filter. `criu` is the process that
/// has it first.
pub(crate) fn watch(channel: &Channel, listener: &Listener, criu: u32) -> io::Result<()> {
    let channel = channel.as_fd().try_clone_to_owned()?;
    let listener = Listener::from(listener.as_fd().try_clone_to_owned()?);
    thread::Builder::new().name("guard".into()).spawn(move || {
        wait_for_hangup(&channel);
        thread::scope(|scope| {
            scope.spawn(|| begin_anew(criu));
            answer_all(&listener);
        });
    })?;
    Ok(())
}

fn wait_for_hangup(channel: &OwnedFd) {
    // A hang-up is reported without being asked for. Errors other than EINTR
    // cannot happen here, and stepping in early does no harm.
    let mut files = [PollFd::new(channel.as_fd(), PollFlags::empty())];
    while poll(&mut files, PollTimeout::NONE) == Err(nix::Error::EINTR) {}
}

/// Makes CRIU repeat a call that nobody is left to answer; any other goes on as if
/// nothing had happened. See signal(7), "Interruption of system calls [...] by stop
/// signals".
fn begin_anew(criu: u32) {
    thread::sleep(LAST_ANSWER);
    for signal in [libc::SIGSTOP, libc::SIGCONT] {
        // CRIU may have ended, and its helper with it in a moment.
        sys::signal::send(criu.cast_signed(), signal).ok();
    }
}

fn answer_all(listener: &Listener) {
    while wait_for_unanswered(listener) {
        let Ok(Some(call)) = listener.receive() else {
            return;
        };
        let answered = if call.number == libc::SYS_ioctl {
            listener.fail(&call, libc::EIO)
        } else {
            listener.pass(&call)
        };
        if answered.is_err() {
            return;
        }
    }
}

/// Waits for a call that nobody takes; whether there may be one.
///
/// When a session is dropped, its interceptor goes on, and would have to wait for
/// ever (on kernels before 6.11) in the system call that takes a call, if we took
/// it first.
fn wait_for_unanswered(listener: &Listener) -> bool {
    loop {
        let mut files = [PollFd::new(listener.as_fd(), PollFlags::POLLIN)];
        let is_pending = |files: &[PollFd<'_>; 1]| files[0].any().unwrap_or(false);
        match poll(&mut files, PollTimeout::NONE) {
            Err(nix::Error::EINTR) => continue,
            Err(_) => return false,
            Ok(_) => {}
        }
        thread::sleep(GRACE);
        if poll(&mut files, PollTimeout::ZERO).is_ok() && is_pending(&files) {
            return true;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::channel::{Asked, packet_pair};
    use crate::intercept::filter;

    #[test]
    fn a_call_is_answered_once_the_session_is_gone() {
        let (session, helper) = packet_pair().unwrap();
        let program = filter(Asked::Memory).unwrap().build();
        let (sender, receiver) = std::sync::mpsc::channel();
        let caller = thread::spawn(move || {
            match program.install() {
                // Not root: nothing to test here.
                Err(error) if error.kind() == io::ErrorKind::PermissionDenied => return None,
                listener => sender.send(Listener::from(listener.unwrap())).unwrap(),
            }
            // Opened relative to a directory, read-only: one of the calls asked about.
            let root = std::fs::File::open("/").unwrap();
            let opened = nix::fcntl::openat(
                &root,
                "proc",
                nix::fcntl::OFlag::O_RDONLY,
                nix::sys::stat::Mode::empty(),
            );
            Some(opened.is_ok())
        });
        if let Ok(listener) = receiver.recv() {
            // Its calls are this process's, which must not stop itself.
            let mut criu = std::process::Command::new("sleep")
                .arg("60")
                .spawn()
                .unwrap();
            watch(&Channel::from(helper), &listener, criu.id()).unwrap();
            drop(listener);
            thread::sleep(Duration::from_millis(20));
            assert!(!caller.is_finished(), "answered while the session is there");
            drop(session);
            thread::sleep(2 * LAST_ANSWER);
            criu.kill().unwrap();
            criu.wait().unwrap();
        }
        assert_ne!(caller.join().unwrap(), Some(false));
    }

    #[test]
    fn a_call_that_was_taken_and_never_answered_is_made_again() {
        let (session, helper) = packet_pair().unwrap();
        let (ours, theirs) = packet_pair().unwrap();
        let program = filter(Asked::Limits).unwrap().build();
        let mut command = std::process::Command::new("prlimit");
        let own = std::process::id().to_string();
        command.args(["--nofile", "--pid", &own]);
        command.stdout(std::process::Stdio::null());
        // SAFETY: between fork and exec it makes system calls only; what the message
        // takes is allocated in a process that has one thread.
        unsafe {
            std::os::unix::process::CommandExt::pre_exec(&mut command, move || {
                let listener = program.install()?;
                sys::fdpass::send_with_fds(&theirs, b"L", &[listener.as_fd()]).map(drop)
            })
        };
        let mut criu = match command.spawn() {
            // Not root: nothing to test here.
            Err(error) if error.kind() == io::ErrorKind::PermissionDenied => return,
            spawned => spawned.unwrap(),
        };
        let (_, mut files) = sys::fdpass::recv_with_fds(&ours, &mut [0]).unwrap();
        let listener = Listener::from(files.pop().unwrap());
        watch(&Channel::from(helper), &listener, criu.id()).unwrap();
        let taken = listener.receive().unwrap();
        assert!(taken.is_some());
        drop((listener, session));
        for _ in 0..1000 {
            if let Some(status) = criu.try_wait().unwrap() {
                assert!(status.success(), "{status}");
                return;
            }
            thread::sleep(Duration::from_millis(10));
        }
        criu.kill().unwrap();
        panic!("it still waits for an answer");
    }
}
