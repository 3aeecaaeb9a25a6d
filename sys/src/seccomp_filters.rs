//! The seccomp filters of other threads, read with ptrace.
//!
//! The kernel shows them only to a tracer that is under no seccomp itself and has `CAP_SYS_ADMIN`. Each thread is stopped
//! for that, some fifty microseconds, and let go as it was: nothing of it is changed, signals that come in between are
//! passed on, a process that was stopped stays stopped. Calls that are never restarted after a stop (see signal(7)) return
//! `EINTR`, as with [`inject`](crate::inject).
//!
//! Everything runs on a thread of its own. Whatever happens, the kernel detaches what a dead thread traced.

use std::io;
use std::time::{Duration, Instant};

/// Requests of include/uapi/linux/ptrace.h.
const PTRACE_SECCOMP_GET_FILTER: libc::c_uint = 0x420c;
const PTRACE_SECCOMP_GET_METADATA: libc::c_uint = 0x420d;
/// `PTRACE_EVENT_STOP`: the event of an interrupt stop or a group stop.
const PTRACE_EVENT_STOP: libc::c_int = 128;
/// `NT_PRSTATUS` of include/uapi/linux/elf.h: the general registers.
const NT_PRSTATUS: usize = 1;

/// How long a thread may take to stop. It does within microseconds, unless it sleeps uninterruptibly or stands in a frozen
/// control group of version 1.
const STOP_TIMEOUT: Duration = Duration::from_millis(200);

/// Bytes of a `struct sock_filter`.
pub const INSTRUCTION_BYTES: usize = 8;

/// One filter of a thread.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Filter {
    /// Its program, as it was installed: each a `struct sock_filter`.
    pub instructions: Vec<[u8; INSTRUCTION_BYTES]>,
    /// `SECCOMP_FILTER_FLAG_LOG` or nothing: what the kernel tells of how it was installed.
    pub flags: u64,
}

/// Why the filters of a thread cannot be read. The thread runs on as before.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum FilterError {
    /// A ptrace request failed. `EPERM` for a thread that is traced already, `EACCES` without `CAP_SYS_ADMIN` or when we are
    /// under seccomp ourselves.
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
    /// It did not stop in time: uninterruptible sleep, or frozen.
    #[error("thread {tid} did not stop in time")]
    NotStopping {
        /// The thread.
        tid: i32,
    },
    /// A 32-bit thread on a 64-bit kernel.
    #[error("thread {tid} does not run native 64-bit code")]
    ForeignAbi {
        /// The thread.
        tid: i32,
    },
    /// No thread of our own could be started.
    #[error("cannot start a thread to trace with")]
    Thread(#[source] io::Error),
}

/// The filters of each of these threads, oldest first, which is their order of numbers in `PTRACE_SECCOMP_GET_FILTER`;
/// `None` for threads that are gone.
///
/// N.B. Waits for the threads with `waitpid`; nobody else in this process may wait for any child (`waitpid(-1)`) meanwhile,
/// for it could take our stops away.
///
/// # Errors
///
/// For the first thread that cannot be read.
pub fn read(tids: &[i32]) -> Result<Vec<Option<Vec<Filter>>>, FilterError> {
    std::thread::scope(|scope| {
        let thread = std::thread::Builder::new()
            .name("seccomp".to_owned())
            .spawn_scoped(scope, || tids.iter().map(|&tid| read_here(tid)).collect())
            .map_err(FilterError::Thread)?;
        match thread.join() {
            Ok(result) => result,
            Err(panic) => std::panic::resume_unwind(panic),
        }
    })
}

/// On an early return the thread stays seized, and is detached when this thread of ours ends, which it does then.
fn read_here(tid: i32) -> Result<Option<Vec<Filter>>, FilterError> {
    let gone = |error: &FilterError| match error {
        FilterError::Ptrace { source, .. } => match source.raw_os_error() {
            Some(libc::ESRCH) => true,
            // The kernel's word for a thread that is ending, too.
            Some(libc::EPERM) => has_ended(tid),
            _ => false,
        },
        _ => false,
    };
    match read_stopped(tid) {
        Err(error) if gone(&error) => Ok(None),
        result => result,
    }
}

/// Whether a thread is dead, or about to be: a zombie, or one that has given up its memory.
fn has_ended(tid: i32) -> bool {
    let Ok(status) = std::fs::read_to_string(format!("/proc/{tid}/status")) else {
        return true;
    };
    let field = |name| {
        status
            .lines()
            .find_map(|line: &str| line.strip_prefix(name))
    };
    field("State:").is_none_or(|state| state.trim_start().starts_with(['Z', 'X']))
        || field("VmSize:").is_none()
}

fn read_stopped(tid: i32) -> Result<Option<Vec<Filter>>, FilterError> {
    request(tid, "seize", libc::PTRACE_SEIZE, 0, 0)?;
    request(tid, "interrupt", libc::PTRACE_INTERRUPT, 0, 0)?;
    if !wait_for_interrupt(tid, Instant::now() + STOP_TIMEOUT)? {
        return Ok(None);
    }
    expect_native(tid)?;
    let mut filters = Vec::new();
    while let Some(filter) = filter(tid, filters.len())? {
        filters.push(filter);
    }
    request(tid, "detach", libc::PTRACE_DETACH, 0, 0)?;
    Ok(Some(filters))
}

/// The filter with this number; `None` behind the last one.
fn filter(tid: i32, index: usize) -> Result<Option<Filter>, FilterError> {
    const NAME: &str = "get-filter";
    let length = match request(tid, NAME, PTRACE_SECCOMP_GET_FILTER, index, 0) {
        Ok(length) => length,
        Err(FilterError::Ptrace { source, .. }) if source.raw_os_error() == Some(libc::ENOENT) => {
            return Ok(None);
        }
        Err(error) => return Err(error),
    };
    // Stopped, the thread cannot change its filters; others cannot either (TSYNC only adds behind the last one).
    let mut instructions = vec![[0u8; INSTRUCTION_BYTES]; length];
    let place = instructions.as_mut_ptr() as usize;
    request(tid, NAME, PTRACE_SECCOMP_GET_FILTER, index, place)?;
    // struct seccomp_metadata { filter_off, flags }
    let mut metadata = [index as u64, 0];
    let place = metadata.as_mut_ptr() as usize;
    let size = size_of_val(&metadata);
    request(
        tid,
        "get-metadata",
        PTRACE_SECCOMP_GET_METADATA,
        size,
        place,
    )?;
    let [_, flags] = metadata;
    Ok(Some(Filter {
        instructions,
        flags,
    }))
}

/// A 32-bit thread has a shorter set of registers.
fn expect_native(tid: i32) -> Result<(), FilterError> {
    let mut registers = [0u64; 64];
    let mut vector = libc::iovec {
        iov_base: registers.as_mut_ptr().cast(),
        iov_len: size_of_val(&registers),
    };
    let place = &raw mut vector as usize;
    request(tid, "getregset", libc::PTRACE_GETREGSET, NT_PRSTATUS, place)?;
    match vector.iov_len == size_of::<libc::user_regs_struct>() {
        true => Ok(()),
        false => Err(FilterError::ForeignAbi { tid }),
    }
}

/// Waits until the thread stands still, letting signals that come first take their course; false when it ends instead.
fn wait_for_interrupt(tid: i32, deadline: Instant) -> Result<bool, FilterError> {
    /// Looks before sleeping in between: a stop takes some ten microseconds, a sleep at least fifty.
    const SPINS: u32 = 200;
    const PAUSE: Duration = Duration::from_micros(50);

    let mut spins = 0;
    loop {
        let mut status = 0;
        // SAFETY: the status is a valid integer to write to; the call touches nothing else of ours.
        let waited = unsafe { libc::waitpid(tid, &raw mut status, libc::__WALL | libc::WNOHANG) };
        if waited == tid {
            if !libc::WIFSTOPPED(status) {
                return Ok(false);
            }
            if status >> 16 == PTRACE_EVENT_STOP {
                return Ok(true);
            }
            let signal = libc::WSTOPSIG(status) as usize;
            request(tid, "cont", libc::PTRACE_CONT, 0, signal)?;
            continue;
        }
        if waited < 0 {
            let source = io::Error::last_os_error();
            match source.raw_os_error() {
                Some(libc::EINTR) => continue,
                Some(libc::ECHILD) => return Ok(false),
                _ => {
                    return Err(FilterError::Ptrace {
                        request: "wait",
                        tid,
                        source,
                    });
                }
            }
        }
        if Instant::now() >= deadline {
            return Err(FilterError::NotStopping { tid });
        }
        spins += 1;
        if spins < SPINS {
            std::thread::yield_now();
        } else {
            std::thread::sleep(PAUSE);
        }
    }
}

/// One ptrace request; its result where it is not negative.
///
/// Callers pass a `data` address only together with a request that reads or writes a live object of the right size there;
/// this function is private to the module so that all of them can be seen.
fn request(
    tid: i32,
    name: &'static str,
    request: libc::c_uint,
    addr: usize,
    data: usize,
) -> Result<usize, FilterError> {
    // SAFETY: by the rule above, `data` is either an integer or the address of an object that outlives the call and that
    // the request may read or write; `addr` is never an address of ours.
    let result = unsafe { libc::ptrace(request, tid, addr, data) };
    usize::try_from(result).map_err(|_| FilterError::Ptrace {
        request: name,
        tid,
        source: io::Error::last_os_error(),
    })
}

#[cfg(test)]
mod tests {
    use std::os::unix::process::CommandExt;
    use std::process::Command;

    use super::*;
    use crate::seccomp;

    #[test]
    fn filters_are_read_as_they_were_installed_and_the_process_lives_on() {
        let program = seccomp::Filter::new()
            .ask(libc::SYS_getpriority, &[])
            .build();
        let mut command = Command::new("sleep");
        command.arg("0.3");
        // SAFETY: between fork and exec; `install` allocates nothing.
        unsafe { command.pre_exec(move || program.install().map(drop)) };
        // Not root: nothing to test here.
        let Ok(mut child) = command.spawn() else {
            return;
        };
        let filters = match read(&[child.id() as i32]) {
            Err(FilterError::Ptrace { source, .. })
                if source.raw_os_error() == Some(libc::EACCES) =>
            {
                // We are under seccomp ourselves.
                child.kill().unwrap();
                child.wait().unwrap();
                return;
            }
            result => result.unwrap().remove(0).unwrap(),
        };
        let ours = filters.last().unwrap();
        // Architecture, its check, allow; number, its check, the verdict; allow.
        assert_eq!(ours.instructions.len(), 7);
        assert_eq!(ours.instructions[6], [6, 0, 0, 0, 0, 0, 0xff, 0x7f]);
        assert_eq!(ours.flags, 0);
        assert!(child.wait().unwrap().success());
    }

    #[test]
    fn a_thread_that_is_gone_is_no_error() {
        assert_eq!(read(&[i32::MAX]).unwrap(), [None]);
    }
}
