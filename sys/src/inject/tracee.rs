//! One thread of another process, stopped.

use std::io;
use std::time::{Duration, Instant};

use super::{InjectError, arch};

/// `PTRACE_GETSIGMASK` and `PTRACE_SETSIGMASK` of include/uapi/linux/ptrace.h; their address argument is the size.
const PTRACE_GETSIGMASK: libc::c_uint = 0x420a;
const PTRACE_SETSIGMASK: libc::c_uint = 0x420b;
const SIGMASK_BYTES: usize = 8;
/// `PTRACE_GET_RSEQ_CONFIGURATION` (Linux 5.13).
const PTRACE_GET_RSEQ_CONFIGURATION: libc::c_uint = 0x420f;
/// `PTRACE_EVENT_STOP`: the event of an interrupt stop or a group stop.
const PTRACE_EVENT_STOP: libc::c_int = 128;
/// `NT_PRSTATUS` of include/uapi/linux/elf.h: the general registers.
const NT_PRSTATUS: usize = 1;

/// How often a thread that is inside a restartable sequence is let go and stopped again. The sequences are a few
/// instructions long; stopping itself aborts one.
const RSEQ_ATTEMPTS: u32 = 32;

/// Where a thread stopped.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Stop {
    /// By our interrupt, or with its whole process by a stop signal.
    Interrupt,
    /// About to get this signal.
    Signal(libc::c_int),
    /// Entering or leaving a system call.
    Syscall,
    /// Not at all: it ended.
    Ended,
}

/// A thread in an interrupt stop, to be released with [`Stopped::release`] or at least dropped.
///
/// ptrace ties it to the thread of ours that created it.
#[derive(Debug)]
pub(super) struct Stopped {
    pid: i32,
    tid: i32,
    registers: arch::Registers,
    signal_mask: [u8; SIGMASK_BYTES],
    stopped_at: Instant,
    released: bool,
}

impl Stopped {
    /// Attaches to a thread and stops it, outside any restartable sequence, with all signals blocked.
    pub(super) fn seize(pid: i32, tid: i32, timeout: Duration) -> Result<Self, InjectError> {
        seize(pid, tid)?;
        request(tid, "interrupt", libc::PTRACE_INTERRUPT, 0, 0)?;
        let deadline = Instant::now() + timeout;
        for _ in 0..RSEQ_ATTEMPTS {
            // From here on an early return leaves the thread seized, and perhaps stopped; it is detached when this
            // thread of ours ends, which it does on every error.
            wait_for_interrupt(pid, tid, deadline)?;
            let stopped_at = Instant::now();
            let registers = registers_of(tid)?;
            if in_restartable_sequence(tid, arch::instruction_pointer(&registers)) {
                request(tid, "cont", libc::PTRACE_CONT, 0, 0)?;
                std::thread::yield_now();
                request(tid, "interrupt", libc::PTRACE_INTERRUPT, 0, 0)?;
                continue;
            }
            if !arch::is_native(&registers) {
                return Err(InjectError::ForeignAbi { tid });
            }
            let mut signal_mask = [0; SIGMASK_BYTES];
            // For a thread in sigsuspend and the like the kernel answers with the mask to return to, and that is the
            // right one to set later: the call is restarted and sets its own again.
            request(
                tid,
                "getsigmask",
                PTRACE_GETSIGMASK,
                SIGMASK_BYTES,
                signal_mask.as_mut_ptr() as usize,
            )?;
            let thread = Self {
                pid,
                tid,
                registers,
                signal_mask,
                stopped_at,
                released: false,
            };
            set_signal_mask(tid, [0xff; SIGMASK_BYTES])?;
            return Ok(thread);
        }
        Err(InjectError::Busy { tid })
    }

    /// When the thread stopped.
    pub(super) fn stopped_at(&self) -> Instant {
        self.stopped_at
    }

    /// Lets the thread make a system call at the given instruction. The inner result is the call's.
    pub(super) fn call(
        &mut self,
        instruction: u64,
        number: libc::c_long,
        arguments: [u64; 3],
    ) -> Result<io::Result<u64>, InjectError> {
        let call = arch::call(&self.registers, instruction, number, arguments);
        set_registers(self.tid, &call)?;
        // The first stop is the call's entry, the second its exit.
        let mut syscall_stops = 0;
        let mut signal = 0;
        while syscall_stops < 2 {
            request(self.tid, "syscall", libc::PTRACE_SYSCALL, 0, signal)?;
            signal = 0;
            // No deadline: neither call can sleep for long, and the thread cannot be left alone with our registers.
            match wait(self.tid, None)? {
                Some(Stop::Syscall) => syscall_stops += 1,
                Some(Stop::Signal(number)) => signal = number as usize,
                Some(Stop::Interrupt) | None => {}
                Some(Stop::Ended) => return Err(self.ended()),
            }
        }
        Ok(arch::result(&registers_of(self.tid)?))
    }

    /// Gives the thread back what it had and lets it go.
    pub(super) fn release(mut self) -> Result<(), InjectError> {
        self.released = true;
        self.give_back()
    }

    fn give_back(&self) -> Result<(), InjectError> {
        let tid = self.tid;
        set_registers(tid, &self.registers)?;
        request(tid, "interrupt", libc::PTRACE_INTERRUPT, 0, 0)?;
        request(tid, "cont", libc::PTRACE_CONT, 0, 0)?;
        let mut signal;
        loop {
            match wait(tid, None)? {
                Some(Stop::Interrupt) => break,
                Some(Stop::Signal(number)) => signal = number as usize,
                Some(Stop::Syscall) | None => signal = 0,
                Some(Stop::Ended) => return Err(self.ended()),
            }
            request(tid, "cont", libc::PTRACE_CONT, 0, signal)?;
        }
        set_signal_mask(tid, self.signal_mask)?;
        request(tid, "detach", libc::PTRACE_DETACH, 0, 0)
    }

    fn ended(&self) -> InjectError {
        InjectError::Gone { pid: self.pid }
    }
}

impl Drop for Stopped {
    fn drop(&mut self) {
        if !self.released {
            // After an error in the middle. What fails here too fails because the thread ended; otherwise the kernel
            // detaches it when our thread ends.
            let _best_effort = self.give_back();
        }
    }
}

fn seize(pid: i32, tid: i32) -> Result<(), InjectError> {
    let options = libc::PTRACE_O_TRACESYSGOOD;
    let with_seccomp_off = options | libc::PTRACE_O_SUSPEND_SECCOMP;
    match request(
        tid,
        "seize",
        libc::PTRACE_SEIZE,
        0,
        with_seccomp_off as usize,
    ) {
        Ok(()) => return Ok(()),
        Err(error) => match errno_of(&error) {
            Some(libc::ESRCH) => return Err(InjectError::Gone { pid }),
            // EPERM also where we lack CAP_SYS_ADMIN, EINVAL where the kernel lacks the option.
            Some(libc::EPERM | libc::EINVAL) => {}
            _ => return Err(error),
        },
    }
    if status_field(tid, "Seccomp:").is_some_and(|mode| mode != 0) {
        return Err(InjectError::Seccomp { pid });
    }
    request(tid, "seize", libc::PTRACE_SEIZE, 0, options as usize).map_err(|error| {
        match (errno_of(&error), status_field(tid, "TracerPid:")) {
            (Some(libc::ESRCH), _) => InjectError::Gone { pid },
            (_, Some(tracer)) if tracer != 0 => InjectError::Traced { tid, tracer },
            _ => error,
        }
    })
}

fn errno_of(error: &InjectError) -> Option<i32> {
    match error {
        InjectError::Ptrace { source, .. } => source.raw_os_error(),
        _ => None,
    }
}

fn status_field(tid: i32, name: &str) -> Option<i32> {
    let status = std::fs::read_to_string(format!("/proc/{tid}/status")).ok()?;
    status
        .lines()
        .find_map(|line| line.strip_prefix(name)?.trim().parse().ok())
}

/// Waits until the thread is in an interrupt stop, letting signals that come first take their course.
fn wait_for_interrupt(pid: i32, tid: i32, deadline: Instant) -> Result<(), InjectError> {
    loop {
        let signal = match wait(tid, Some(deadline))? {
            Some(Stop::Interrupt) => return Ok(()),
            Some(Stop::Signal(number)) => number as usize,
            Some(Stop::Syscall) => 0,
            Some(Stop::Ended) => return Err(InjectError::Gone { pid }),
            None => return Err(InjectError::NotStopping { pid }),
        };
        request(tid, "cont", libc::PTRACE_CONT, 0, signal)?;
    }
}

/// Waits for the next stop; `None` when the deadline passes.
fn wait(tid: i32, deadline: Option<Instant>) -> Result<Option<Stop>, InjectError> {
    /// Looks before sleeping in between: a stop takes some ten microseconds, a sleep at least fifty.
    const SPINS: u32 = 200;
    const PAUSE: Duration = Duration::from_micros(50);

    let options = libc::__WALL | if deadline.is_some() { libc::WNOHANG } else { 0 };
    let mut spins = 0;
    loop {
        let mut status = 0;
        // SAFETY: the status is a valid integer to write to; the call touches nothing else of ours.
        let waited = unsafe { libc::waitpid(tid, &raw mut status, options) };
        if waited == tid {
            return Ok(Some(stop_of(status)));
        }
        if waited < 0 {
            let source = io::Error::last_os_error();
            match source.raw_os_error() {
                Some(libc::EINTR) => continue,
                Some(libc::ECHILD) => return Ok(Some(Stop::Ended)),
                _ => {
                    return Err(InjectError::Ptrace {
                        request: "wait",
                        tid,
                        source,
                    });
                }
            }
        }
        if deadline.is_some_and(|deadline| Instant::now() >= deadline) {
            return Ok(None);
        }
        spins += 1;
        if spins < SPINS {
            std::thread::yield_now();
        } else {
            std::thread::sleep(PAUSE);
        }
    }
}

fn stop_of(status: libc::c_int) -> Stop {
    if !libc::WIFSTOPPED(status) {
        Stop::Ended
    } else if status >> 16 == PTRACE_EVENT_STOP {
        Stop::Interrupt
    } else if libc::WSTOPSIG(status) == libc::SIGTRAP | 0x80 {
        Stop::Syscall
    } else {
        Stop::Signal(libc::WSTOPSIG(status))
    }
}

/// Whether the thread's instruction pointer lies in a restartable sequence (see rseq(2)).
fn in_restartable_sequence(tid: i32, instruction_pointer: u64) -> bool {
    /// `struct ptrace_rseq_configuration`.
    #[repr(C)]
    #[derive(Default)]
    struct Configuration {
        abi_pointer: u64,
        abi_size: u32,
        signature: u32,
        flags: u32,
        pad: u32,
    }
    /// Offset of `rseq_cs` in `struct rseq`.
    const SEQUENCE_POINTER: u64 = 8;
    /// Offset of `start_ip` in `struct rseq_cs`, followed by the length.
    const START: u64 = 8;

    let mut configuration = Configuration::default();
    let pointer = &raw mut configuration;
    let size = size_of::<Configuration>();
    // A kernel without the request (before 5.13) leaves the sequence unknown; CRIU has the same gap there.
    if request(
        tid,
        "rseq",
        PTRACE_GET_RSEQ_CONFIGURATION,
        size,
        pointer as usize,
    )
    .is_err()
        || configuration.abi_pointer == 0
    {
        return false;
    }
    let Some([sequence]) = read_words(tid, configuration.abi_pointer + SEQUENCE_POINTER) else {
        return false;
    };
    if sequence == 0 {
        return false;
    }
    match read_words(tid, sequence.wrapping_add(START)) {
        Some([start, length]) => instruction_pointer.wrapping_sub(start) < length,
        None => false,
    }
}

fn read_words<const N: usize>(tid: i32, addr: u64) -> Option<[u64; N]> {
    let range = addr..addr.checked_add(N as u64 * 8)?;
    let mut bytes = Vec::with_capacity(N * 8);
    crate::memory::read_appending(tid, &[range], &mut bytes).ok()?;
    let mut words = [0; N];
    for (word, chunk) in words.iter_mut().zip(bytes.chunks_exact(8)) {
        *word = u64::from_ne_bytes(chunk.try_into().ok()?);
    }
    (bytes.len() == N * 8).then_some(words)
}

fn registers_of(tid: i32) -> Result<arch::Registers, InjectError> {
    let mut registers = std::mem::MaybeUninit::<arch::Registers>::zeroed();
    let mut vector = libc::iovec {
        iov_base: registers.as_mut_ptr().cast(),
        iov_len: size_of::<arch::Registers>(),
    };
    let pointer = &raw mut vector;
    request(
        tid,
        "getregset",
        libc::PTRACE_GETREGSET,
        NT_PRSTATUS,
        pointer as usize,
    )?;
    if vector.iov_len != size_of::<arch::Registers>() {
        return Err(InjectError::ForeignAbi { tid });
    }
    // SAFETY: zeroed above and then written by the kernel; the structure is integers only, any bits are valid.
    Ok(unsafe { registers.assume_init() })
}

fn set_registers(tid: i32, registers: &arch::Registers) -> Result<(), InjectError> {
    let vector = libc::iovec {
        iov_base: std::ptr::from_ref(registers).cast_mut().cast(),
        iov_len: size_of::<arch::Registers>(),
    };
    let pointer = &raw const vector;
    request(
        tid,
        "setregset",
        libc::PTRACE_SETREGSET,
        NT_PRSTATUS,
        pointer as usize,
    )
}

fn set_signal_mask(tid: i32, mask: [u8; SIGMASK_BYTES]) -> Result<(), InjectError> {
    request(
        tid,
        "setsigmask",
        PTRACE_SETSIGMASK,
        SIGMASK_BYTES,
        mask.as_ptr() as usize,
    )
}

/// One ptrace request whose result is only success or failure.
///
/// Callers pass a `data` address only together with a request that reads or writes a live object of the right size
/// there; this function is private to the module so that all of them can be seen.
fn request(
    tid: i32,
    name: &'static str,
    request: libc::c_uint,
    addr: usize,
    data: usize,
) -> Result<(), InjectError> {
    // SAFETY: by the rule above, `data` is either an integer or the address of an object that outlives the call and
    // that the request may read or write; `addr` is never an address of ours.
    let result = unsafe { libc::ptrace(request, tid, addr, data) };
    if result < 0 {
        let source = io::Error::last_os_error();
        return Err(InjectError::Ptrace {
            request: name,
            tid,
            source,
        });
    }
    Ok(())
}
