//! What `std::process` leaves out: file descriptors at given numbers, signals on
//! a parent's death, foster children, who is at the other end of a socket.

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::process::CommandExt;
use std::process::Command;

use nix::sys::prctl;
use nix::sys::signal::Signal;
use nix::sys::socket::{getsockopt, sockopt};

/// Extensions of [`Command`].
pub trait CommandFds {
    /// Gives the program duplicates of the files at exactly these numbers (above
    /// 2; 0 to 2 are `stdin`, `stdout` and `stderr`), and nothing else that is
    /// close-on-exec here.
    ///
    /// The files are kept open until the `Command` is dropped.
    ///
    /// # Errors
    ///
    /// When a descriptor cannot be duplicated.
    ///
    /// # Panics
    ///
    /// For a number below 3 or one that is given twice.
    fn pass_fds(&mut self, files: &[(BorrowedFd<'_>, RawFd)]) -> io::Result<&mut Self>;

    /// Has the kernel send `signal` to the program when the *thread* that spawns
    /// it ends, even if the process lives on: spawn from a thread that stays.
    fn signal_when_parent_thread_ends(&mut self, signal: Signal) -> &mut Self;

    /// Turns transparent huge pages off for the program and all it starts
    /// (`PR_SET_THP_DISABLE`). CRIU turns them on again for the tasks it restores,
    /// where they were on.
    fn without_huge_pages(&mut self) -> &mut Self;
}

impl CommandFds for Command {
    fn pass_fds(&mut self, files: &[(BorrowedFd<'_>, RawFd)]) -> io::Result<&mut Self> {
        let highest = files.iter().map(|&(_, number)| number).max().unwrap_or(0);
        let mut moved: Vec<(OwnedFd, RawFd)> = Vec::with_capacity(files.len());
        let mut placeholders = Vec::with_capacity(files.len());
        for &(file, number) in files {
            assert!(number > 2, "stdio has its own setters");
            assert!(
                moved.iter().all(|&(_, taken)| taken != number),
                "number given twice"
            );
            // Duplicated above all targets, so that no dup2 below overwrites the
            // source of a later one.
            moved.push((duplicate_above(file, highest)?, number));
            // A number that is free now would be free for the pipe on which
            // `Command` hears of a failed exec, and dup2 would overwrite that.
            let placeholder = duplicate_above(file, number - 1)?;
            if placeholder.as_raw_fd() == number {
                placeholders.push(placeholder);
            }
        }
        let place = move || {
            let _held = &placeholders;
            for (file, number) in &moved {
                // SAFETY: both are descriptor numbers. The target may be open, such
                // as a file of ours that is close-on-exec anyway: dup2 replaces it,
                // in the child only.
                if unsafe { libc::dup2(file.as_raw_fd(), *number) } < 0 {
                    return Err(io::Error::last_os_error());
                }
            }
            Ok(())
        };
        // SAFETY: the closure runs between fork and exec and makes only dup2 calls,
        // which are async-signal-safe; it does not allocate.
        Ok(unsafe { self.pre_exec(place) })
    }

    fn signal_when_parent_thread_ends(&mut self, signal: Signal) -> &mut Self {
        let parent = std::process::id();
        let arm = move || {
            prctl::set_pdeathsig(signal)?;
            // The parent may have died before the call.
            if std::os::unix::process::parent_id() != parent {
                return Err(io::ErrorKind::BrokenPipe.into());
            }
            Ok(())
        };
        // SAFETY: the closure runs between fork and exec and makes two plain system
        // calls; it does not allocate.
        unsafe { self.pre_exec(arm) }
    }

    fn without_huge_pages(&mut self) -> &mut Self {
        let disable = || {
            prctl::set_thp_disable(true)?;
            Ok(())
        };
        // SAFETY: the closure runs between fork and exec and makes one plain system
        // call; it does not allocate.
        unsafe { self.pre_exec(disable) }
    }
}

fn duplicate_above(file: BorrowedFd<'_>, number: RawFd) -> io::Result<OwnedFd> {
    // SAFETY: F_DUPFD_CLOEXEC takes and returns numbers.
    let fd = unsafe { libc::fcntl(file.as_raw_fd(), libc::F_DUPFD_CLOEXEC, number + 1) };
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the call has just returned it, it is ours alone.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// Takes over a descriptor that the parent passed at a fixed number (see
/// [`CommandFds::pass_fds`]), close-on-exec from now on.
///
/// # Errors
///
/// `EBADF` when nothing is open there.
///
/// # Safety
///
/// Nothing else in this process may own `number`: call it once for each, at the
/// start of the program.
pub unsafe fn inherited(number: RawFd) -> io::Result<OwnedFd> {
    // SAFETY: F_SETFD takes numbers and fails for one that is not open.
    if unsafe { libc::fcntl(number, libc::F_SETFD, libc::FD_CLOEXEC) } < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: it is open, and the caller promises that nobody else owns it.
    Ok(unsafe { OwnedFd::from_raw_fd(number) })
}

/// A duplicate of a file that this process was started with under a fixed number
/// (see [`CommandFds::pass_fds`]). The number itself stays open until the process
/// ends, closed to programs that it executes.
///
/// # Errors
///
/// `EBADF` when there is no such file.
pub fn duplicate_inherited(number: RawFd) -> io::Result<OwnedFd> {
    // SAFETY: F_SETFD changes a flag of a descriptor and takes no pointers. That
    // it is closed on execve is right for any descriptor in this program.
    if unsafe { libc::fcntl(number, libc::F_SETFD, libc::FD_CLOEXEC) } < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: F_DUPFD_CLOEXEC makes a new descriptor and leaves the old one alone.
    let fd = unsafe { libc::fcntl(number, libc::F_DUPFD_CLOEXEC, 3) };
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: fcntl returned a new descriptor that nobody else owns.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// Makes orphaned descendants children of this process (`PR_SET_CHILD_SUBREAPER`),
/// which then has to wait for them.
///
/// # Errors
///
/// Those of prctl(2); there are none on kernels that we support.
pub fn become_subreaper() -> io::Result<()> {
    Ok(prctl::set_child_subreaper(true)?)
}

/// Who connected to a unix socket, at the time of the connection.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Peer {
    /// Process, in our pid namespace; 0 when it is not visible there.
    pub pid: i32,
    /// User, in our user namespace.
    pub uid: u32,
    /// Group, in our user namespace.
    pub gid: u32,
}

/// The peer of a connected unix socket, as the kernel knows it.
///
/// # Errors
///
/// When it is not a unix socket.
pub fn peer_credentials(socket: impl AsFd) -> io::Result<Peer> {
    let credentials = getsockopt(&socket, sockopt::PeerCredentials)?;
    Ok(Peer {
        pid: credentials.pid(),
        uid: credentials.uid(),
        gid: credentials.gid(),
    })
}

#[cfg(test)]
mod tests {
    use std::io::{Seek, Write};
    use std::os::unix::net::UnixStream;
    use std::os::unix::process::ExitStatusExt;
    use std::process::Stdio;

    use super::*;

    fn file_with(text: &str) -> std::fs::File {
        let mut file = tempfile::tempfile().unwrap();
        file.write_all(text.as_bytes()).unwrap();
        file.rewind().unwrap();
        file
    }

    #[test]
    fn a_program_finds_the_files_at_their_numbers_even_when_these_cross() {
        let (first, second) = (file_with("first"), file_with("second"));
        // Each is wanted at the number that the other has here.
        let wanted = [
            (first.as_fd(), second.as_raw_fd()),
            (second.as_fd(), first.as_raw_fd()),
        ];
        let [(_, a), (_, b)] = wanted;
        let output = Command::new("sh")
            .arg("-c")
            .arg(format!("cat /proc/self/fd/{a} /proc/self/fd/{b}"))
            .pass_fds(&wanted)
            .unwrap()
            .output()
            .unwrap();
        assert_eq!(String::from_utf8_lossy(&output.stdout), "firstsecond");
    }

    #[test]
    fn a_program_that_does_not_exist_is_an_error_with_files_at_free_numbers_too() {
        let file = file_with("");
        // The lowest free number: the one that the next pipe would get.
        let free = file.try_clone().unwrap().as_raw_fd();
        let error = Command::new("/nowhere")
            .pass_fds(&[(file.as_fd(), free)])
            .unwrap()
            .spawn()
            .unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::NotFound);
    }

    #[test]
    fn a_program_dies_with_the_thread_that_started_it() {
        let mut child = std::thread::spawn(|| {
            Command::new("sleep")
                .arg("60")
                .stdin(Stdio::null())
                .signal_when_parent_thread_ends(Signal::SIGKILL)
                .spawn()
                .unwrap()
        })
        .join()
        .unwrap();
        assert_eq!(child.wait().unwrap().signal(), Some(libc::SIGKILL));
    }

    #[test]
    fn the_peer_of_a_pair_is_this_process() {
        let (a, _b) = UnixStream::pair().unwrap();
        let peer = peer_credentials(&a).unwrap();
        assert_eq!(peer.pid as u32, std::process::id());
    }
}
