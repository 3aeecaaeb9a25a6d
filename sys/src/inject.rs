//! One system call made by another process on our behalf: `userfaultfd`.
//!
//! A userfaultfd watches the address space of whoever opens it, so the process to be tracked must open it itself. We
//! stop one of its threads with ptrace, let it make the call, take the descriptor with `pidfd_getfd`, let it close its
//! own and let the thread go: a few dozen microseconds in which the other threads run on.
//!
//! What makes this safe for the thread:
//!
//! * No code is patched. The thread is pointed at a system call instruction that is mapped already (the vDSO has one).
//! * It is driven with `PTRACE_SYSCALL`, whose stops involve no signal. (`PTRACE_SINGLESTEP` would force a `SIGTRAP`,
//!   which resets a `SIGTRAP` handler that the program ignores or blocks.)
//! * Signals are blocked for the time, so they stay pending with all they carry and are delivered afterwards. `SIGSTOP`
//!   cannot be blocked; it is passed on, takes effect, and is still in effect when we leave.
//! * The registers are given back in a second interrupt stop, not where the injected call ended. That stop lies inside
//!   the kernel's signal delivery, like the first one, so that the kernel itself decides how an interrupted system call
//!   goes on: restart it, restart it with the remaining time, or `EINTR` if a handler is about to run.
//! * A restartable sequence (rseq) is never interrupted: moving the instruction pointer would hide from the kernel that
//!   it has to be aborted.
//! * Everything runs on a thread of its own. Whatever happens, the kernel detaches what a dead thread traced.
//!
//! What cannot be avoided: calls that are never restarted after a stop (`epoll_wait`, `sigtimedwait` and others, see
//! signal(7)) return `EINTR`, as with any debugger or `SIGSTOP`/`SIGCONT`; and for some microseconds the descriptor
//! exists in the process, where a concurrent `fork` would copy it.

use std::io;
use std::os::fd::{OwnedFd, RawFd};
use std::time::Duration;

use crate::pidfd::PidFd;

#[cfg(target_arch = "x86_64")]
mod x86_64;
#[cfg(target_arch = "x86_64")]
use x86_64 as arch;
#[cfg(target_arch = "x86_64")]
mod tracee;

/// How long a thread may take to stop before another one is tried.
///
/// A thread stops within microseconds, unless it sleeps uninterruptibly (disk, vfork) or is frozen.
#[cfg(target_arch = "x86_64")]
const STOP_TIMEOUT: Duration = Duration::from_millis(200);

/// How many threads of a process are tried.
#[cfg(target_arch = "x86_64")]
const MAX_THREADS_TRIED: usize = 8;

/// Why no descriptor was obtained. The process runs on as before in every case.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum InjectError {
    /// The process, or all its threads that were tried, ended.
    #[error("process {pid} is gone")]
    Gone {
        /// The process.
        pid: i32,
    },
    /// Somebody else (a debugger, strace, CRIU) traces it.
    #[error("thread {tid} is already traced by process {tracer}")]
    Traced {
        /// The thread.
        tid: i32,
        /// Who traces it.
        tracer: i32,
    },
    /// A ptrace request failed.
    #[error("ptrace {request} of thread {tid} failed")]
    Ptrace {
        /// Which request.
        request: &'static str,
        /// On which thread.
        tid: i32,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// No thread stopped in time: uninterruptible sleep, or frozen.
    #[error("no thread of process {pid} stopped in time")]
    NotStopping {
        /// The process.
        pid: i32,
    },
    /// The process is under seccomp and the kernel does not let us suspend it: the call might kill the process.
    #[error("process {pid} is under seccomp, which may not be suspended")]
    Seccomp {
        /// The process.
        pid: i32,
    },
    /// A 32-bit process on a 64-bit kernel.
    #[error("thread {tid} does not run native 64-bit code")]
    ForeignAbi {
        /// The thread.
        tid: i32,
    },
    /// Nothing executable in the process contains a system call instruction.
    #[error("process {pid} has no system call instruction mapped")]
    NoInstruction {
        /// The process.
        pid: i32,
    },
    /// The thread was inside a restartable sequence each time it was stopped.
    #[error("thread {tid} is always inside a restartable sequence")]
    Busy {
        /// The thread.
        tid: i32,
    },
    /// The call was made and the kernel refused it, for example for lack of descriptors (`EMFILE`).
    #[error("process {pid} was refused a userfaultfd")]
    Refused {
        /// The process.
        pid: i32,
        /// By what.
        #[source]
        source: io::Error,
    },
    /// The descriptor could not be taken over; the process has closed its own.
    #[error("cannot take the userfaultfd from process {pid}")]
    Take {
        /// The process.
        pid: i32,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// Something of the process could not be read, or no thread of our own could be started.
    #[error("cannot prepare to stop process {pid}")]
    Prepare {
        /// The process.
        pid: i32,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// There is no code for this architecture.
    #[error("injecting system calls is not supported on {0}")]
    Architecture(&'static str),
}

/// A userfaultfd of a process, and how long one of its threads was stopped for it.
#[derive(Debug)]
pub struct Injected {
    /// The userfaultfd, user-mode only, non-blocking; no API handshake has been made.
    pub userfaultfd: OwnedFd,
    /// From the thread's stop to its release.
    pub stopped: Duration,
}

/// Makes a process open a userfaultfd for us.
///
/// Blocks while the thread is stopped, typically 0.1 ms, at most about two seconds when threads do not stop.
///
/// N.B. Waits for the traced thread with `waitpid`; nobody else in this process may wait for any child (`waitpid(-1)`)
/// meanwhile, for it could take our stops away.
#[cfg(target_arch = "x86_64")]
pub fn userfaultfd_of(pid: i32) -> Result<Injected, InjectError> {
    let thread = std::thread::Builder::new()
        .name("inject".to_owned())
        .spawn(move || userfaultfd_here(pid))
        .map_err(|source| InjectError::Prepare { pid, source })?;
    match thread.join() {
        Ok(result) => result,
        Err(panic) => std::panic::resume_unwind(panic),
    }
}

/// Makes a process open a userfaultfd for us: not on this architecture.
#[cfg(not(target_arch = "x86_64"))]
pub fn userfaultfd_of(_pid: i32) -> Result<Injected, InjectError> {
    Err(InjectError::Architecture(std::env::consts::ARCH))
}

#[cfg(target_arch = "x86_64")]
fn userfaultfd_here(pid: i32) -> Result<Injected, InjectError> {
    let prepare = |source: io::Error| match source.raw_os_error() {
        Some(libc::ESRCH | libc::ENOENT) => InjectError::Gone { pid },
        _ => InjectError::Prepare { pid, source },
    };
    // Everything that can be done beforehand is done before the thread stops.
    let process = PidFd::open(pid).map_err(prepare)?;
    let instruction = syscall_instruction(pid)?;
    let mut last = InjectError::Gone { pid };
    for tid in threads_of(pid)
        .map_err(prepare)?
        .into_iter()
        .take(MAX_THREADS_TRIED)
    {
        match with_thread(pid, tid, instruction, &process) {
            Err(error @ (InjectError::Gone { .. } | InjectError::NotStopping { .. })) => {
                last = error;
            }
            decided => return decided,
        }
    }
    Err(last)
}

#[cfg(target_arch = "x86_64")]
fn with_thread(
    pid: i32,
    tid: i32,
    instruction: u64,
    process: &PidFd,
) -> Result<Injected, InjectError> {
    /// `UFFD_USER_MODE_ONLY` of include/uapi/linux/userfaultfd.h: no privilege is needed for such a descriptor, and
    /// asynchronous write protection, which the kernel resolves itself, covers the kernel's own writes all the same.
    const UFFD_USER_MODE_ONLY: u64 = 1;

    let mut thread = tracee::Stopped::seize(pid, tid, STOP_TIMEOUT)?;
    let begin = thread.stopped_at();
    let flags = (libc::O_CLOEXEC | libc::O_NONBLOCK) as u64 | UFFD_USER_MODE_ONLY;
    let opened = thread.call(instruction, libc::SYS_userfaultfd, [flags, 0, 0])?;
    let taken = match opened {
        Ok(remote) => {
            let taken = process.get_fd(remote as RawFd);
            // Its result does not matter: EBADF would mean that the program closed the descriptor itself.
            let _closed = thread.call(instruction, libc::SYS_close, [remote, 0, 0])?;
            taken.map_err(|source| InjectError::Take { pid, source })
        }
        Err(source) => Err(InjectError::Refused { pid, source }),
    };
    thread.release()?;
    let userfaultfd = taken?;
    Ok(Injected {
        userfaultfd,
        stopped: begin.elapsed(),
    })
}

/// The threads of a process, the first one first.
#[cfg(target_arch = "x86_64")]
fn threads_of(pid: i32) -> io::Result<Vec<i32>> {
    let mut threads = Vec::new();
    for entry in std::fs::read_dir(format!("/proc/{pid}/task"))? {
        if let Some(tid) = entry?
            .file_name()
            .to_str()
            .and_then(|name| name.parse().ok())
        {
            threads.push(tid);
        }
    }
    threads.sort_by_key(|tid| (*tid != pid, *tid));
    Ok(threads)
}

/// Address of a system call instruction in executable memory of the process.
#[cfg(target_arch = "x86_64")]
fn syscall_instruction(pid: i32) -> Result<u64, InjectError> {
    /// How much of one mapping is searched. The C library's text is 1.5 MiB and full of them.
    const SEARCHED_BYTES: u64 = 16 << 20;

    let maps =
        std::fs::read_to_string(format!("/proc/{pid}/maps")).map_err(|source| {
            match source.raw_os_error() {
                Some(libc::ESRCH | libc::ENOENT) => InjectError::Gone { pid },
                _ => InjectError::Prepare { pid, source },
            }
        })?;
    if maps.is_empty() {
        return Err(InjectError::Gone { pid }); // a zombie
    }
    let mut buffer = Vec::new();
    for range in executable_mappings(&maps) {
        let searched = range.start..range.end.min(range.start.saturating_add(SEARCHED_BYTES));
        let bytes = usize::try_from(searched.end - searched.start).unwrap_or(0);
        buffer.clear();
        buffer.reserve_exact(bytes);
        // Not readable is not an error: the next mapping may be.
        if crate::memory::read_appending(pid, std::slice::from_ref(&searched), &mut buffer).is_ok()
            && let Some(offset) = arch::find_syscall_instruction(&buffer)
        {
            return Ok(searched.start + offset as u64);
        }
    }
    Err(InjectError::NoInstruction { pid })
}

/// Executable mappings in the text of `/proc/PID/maps`, the vDSO first.
#[cfg(target_arch = "x86_64")]
fn executable_mappings(maps: &str) -> Vec<std::ops::Range<u64>> {
    let mut found = Vec::new();
    for line in maps.lines() {
        let mut fields = line.split_ascii_whitespace();
        let (Some(range), Some(permissions)) = (fields.next(), fields.next()) else {
            continue;
        };
        let Some((start, end)) = range.split_once('-') else {
            continue;
        };
        let (Ok(start), Ok(end)) = (u64::from_str_radix(start, 16), u64::from_str_radix(end, 16))
        else {
            continue;
        };
        // vsyscall lies in the kernel's half and is emulated: nothing there executes as user code.
        if permissions.starts_with("r-x") && !line.ends_with("[vsyscall]") {
            found.push((!line.ends_with("[vdso]"), start..end));
        }
    }
    found.sort_by_key(|(not_vdso, range)| (*not_vdso, range.start));
    found.into_iter().map(|(_, range)| range).collect()
}

#[cfg(test)]
#[cfg(target_arch = "x86_64")]
mod tests;
