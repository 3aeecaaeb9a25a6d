//! System calls of a child answered by us: seccomp user notification.
//!
//! A [`Filter`] says which calls are to be asked about; all others run as if it
//! were not there. [`Filter::install`] puts it on the calling thread (and what it
//! forks and executes later) and returns the file behind a [`Listener`], on which
//! another process receives each such call while the caller waits, and lets it
//! pass, answers in its place, or puts a file descriptor into the caller.
//!
//! N.B. when the last copy of the listening file is closed, calls that the filter
//! selects fail with `ENOSYS`, for ever. See seccomp_unotify(2).

use std::io;
use std::mem;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

/// `AUDIT_ARCH_*` of linux/audit.h: ELF machine, 64 bit, little endian.
#[cfg(target_arch = "x86_64")]
const NATIVE_ARCH: u32 = 62 | 0x8000_0000 | 0x4000_0000;
#[cfg(target_arch = "aarch64")]
const NATIVE_ARCH: u32 = 183 | 0x8000_0000 | 0x4000_0000;

/// `SECCOMP_USER_NOTIF_FD_SYNC_WAKE_UP` of linux/seccomp.h.
const USER_NOTIF_FD_SYNC_WAKE_UP: libc::c_ulong = 1;

/// Offsets in `struct seccomp_data`.
const OFFSET_NR: u32 = 0;
const OFFSET_ARCH: u32 = 4;
const OFFSET_ARGS: u32 = 16;

/// What an argument has to be like for a call to be asked about.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Condition {
    /// The whole argument is this value.
    Is(u64),
    /// Its lower 32 bits, all that an `int` or `unsigned int` has, are this value.
    WordIs(u32),
    /// They are not.
    WordIsNot(u32),
    /// None of these bits is set in its lower 32 bits.
    WordLacks(u32),
    /// Some of these bits are set in its lower 32 bits.
    WordHas(u32),
}

/// A program for seccomp: calls that match a rule are asked about, the rest runs.
#[derive(Debug, Clone)]
pub struct Filter(Vec<libc::sock_filter>);

impl Default for Filter {
    fn default() -> Self {
        Self::new()
    }
}

impl Filter {
    /// A filter that lets everything pass. Calls of another architecture's entry
    /// (32-bit programs) always do: their numbers mean other calls.
    pub fn new() -> Self {
        Self(vec![
            load(OFFSET_ARCH),
            jump(libc::BPF_JEQ, NATIVE_ARCH, 1, 0),
            verdict(libc::SECCOMP_RET_ALLOW),
        ])
    }

    /// Asks about the system call `number` when all `conditions` hold, each on the
    /// argument with the given index.
    ///
    /// # Panics
    ///
    /// For an index above 5 or more conditions than a jump can leap: our mistakes.
    #[must_use]
    pub fn ask(mut self, number: libc::c_long, conditions: &[(u32, Condition)]) -> Self {
        let mut checks = vec![(OFFSET_NR, libc::BPF_JEQ, number as u32, true)];
        for &(argument, condition) in conditions {
            assert!(argument < 6, "a system call has six arguments");
            // Little endian: the lower word comes first.
            let (low, high) = (OFFSET_ARGS + 8 * argument, OFFSET_ARGS + 8 * argument + 4);
            match condition {
                Condition::WordIs(word) => checks.push((low, libc::BPF_JEQ, word, true)),
                Condition::WordIsNot(word) => checks.push((low, libc::BPF_JEQ, word, false)),
                Condition::WordLacks(bits) => checks.push((low, libc::BPF_JSET, bits, false)),
                Condition::WordHas(bits) => checks.push((low, libc::BPF_JSET, bits, true)),
                Condition::Is(value) => {
                    checks.push((low, libc::BPF_JEQ, value as u32, true));
                    checks.push((high, libc::BPF_JEQ, (value >> 32) as u32, true));
                }
            }
        }
        // A failed check jumps behind the verdict of this rule, to the next one:
        // over the two statements of each check that follows and the verdict.
        assert!(checks.len() < 100, "jumps are 8 bits wide");
        for (index, &(offset, test, value, wanted)) in checks.iter().enumerate() {
            let away = ((checks.len() - 1 - index) * 2 + 1) as u8;
            let (yes, no) = if wanted { (0, away) } else { (away, 0) };
            self.0.push(load(offset));
            self.0.push(jump(test, value, yes, no));
        }
        self.0.push(verdict(libc::SECCOMP_RET_USER_NOTIF));
        self
    }

    /// The program, ready to be installed: everything that allocates is done, so
    /// that [`Program::install`] may run between fork and exec.
    pub fn build(mut self) -> Program {
        self.0.push(verdict(libc::SECCOMP_RET_ALLOW));
        Program(self.0)
    }
}

/// A finished [`Filter`].
#[derive(Debug)]
pub struct Program(Vec<libc::sock_filter>);

impl Program {
    /// Puts the filter on the calling thread, for good, and returns the listening
    /// file. Allocates nothing.
    ///
    /// # Errors
    ///
    /// `PermissionDenied` without `CAP_SYS_ADMIN` (and `no_new_privs`, which would
    /// change what the thread may execute); `EBUSY` where there is a listener.
    pub fn install(&self) -> io::Result<OwnedFd> {
        let program = libc::sock_fprog {
            len: self.0.len() as libc::c_ushort,
            filter: self.0.as_ptr().cast_mut(),
        };
        // N.B. without WAIT_KILLABLE_RECV (Linux 5.19). With it, a call that was received
        // could be interrupted by nothing but SIGKILL, so that the death of whoever had
        // received it would leave the caller waiting for ever. Without it, a signal has
        // the call made again, and asked about again.
        set_filter(&program, libc::SECCOMP_FILTER_FLAG_NEW_LISTENER)
    }
}

fn set_filter(program: &libc::sock_fprog, flags: libc::c_ulong) -> io::Result<OwnedFd> {
    // SAFETY: `program` points at as many instructions as it says, which the kernel
    // checks and copies.
    let fd = unsafe {
        libc::syscall(
            libc::SYS_seccomp,
            libc::SECCOMP_SET_MODE_FILTER,
            flags,
            std::ptr::from_ref(program),
        )
    };
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: with NEW_LISTENER the call returns a descriptor that is ours alone.
    Ok(unsafe { OwnedFd::from_raw_fd(fd as i32) })
}

fn load(offset: u32) -> libc::sock_filter {
    statement(libc::BPF_LD | libc::BPF_W | libc::BPF_ABS, offset)
}

fn verdict(verdict: u32) -> libc::sock_filter {
    statement(libc::BPF_RET | libc::BPF_K, verdict)
}

fn statement(code: u32, k: u32) -> libc::sock_filter {
    libc::sock_filter {
        code: code as u16,
        jt: 0,
        jf: 0,
        k,
    }
}

fn jump(test: u32, k: u32, jt: u8, jf: u8) -> libc::sock_filter {
    libc::sock_filter {
        code: (libc::BPF_JMP | test | libc::BPF_K) as u16,
        jt,
        jf,
        k,
    }
}

/// A system call that waits for an answer.
#[derive(Debug, Clone, Copy)]
pub struct Call {
    id: u64,
    /// Who calls (a thread), as a process id in our own pid namespace.
    pub pid: i32,
    /// Number of the system call.
    pub number: libc::c_long,
    /// Its arguments. Pointers are the caller's.
    pub arguments: [u64; 6],
}

/// The other end of an installed [`Filter`].
#[derive(Debug)]
pub struct Listener(OwnedFd);

impl From<OwnedFd> for Listener {
    fn from(file: OwnedFd) -> Self {
        Self(file)
    }
}

impl From<Listener> for OwnedFd {
    fn from(listener: Listener) -> Self {
        listener.0
    }
}

impl AsFd for Listener {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

impl Listener {
    /// Tells the kernel that caller and listener take turns, so that it need not
    /// look for an idle processor to wake either on (Linux 6.6; older ones do
    /// without). Measured on two busy processors: CRIU's dump of 40 processes with
    /// 160 threads and 3 900 calls took 410 ms instead of 490.
    pub fn take_turns(&self) {
        // SAFETY: the request takes the flags by value.
        unsafe {
            libc::ioctl(
                self.0.as_raw_fd(),
                libc::SECCOMP_IOCTL_NOTIF_SET_FLAGS,
                USER_NOTIF_FD_SYNC_WAKE_UP,
            )
        };
    }

    /// Waits for the next call; `None` when no process has the filter any more.
    ///
    /// # Errors
    ///
    /// Those of poll(2) and of `SECCOMP_IOCTL_NOTIF_RECV`.
    pub fn receive(&self) -> io::Result<Option<Call>> {
        loop {
            let mut files = [PollFd::new(self.0.as_fd(), PollFlags::POLLIN)];
            match poll(&mut files, PollTimeout::NONE) {
                Err(nix::Error::EINTR) => continue,
                result => result?,
            };
            if !files[0]
                .revents()
                .is_some_and(|r| r.contains(PollFlags::POLLIN))
            {
                return Ok(None);
            }
            // SAFETY: all zeros are a valid seccomp_notif, and what the kernel asks for.
            let mut call: libc::seccomp_notif = unsafe { mem::zeroed() };
            // SAFETY: the request fits the structure, which the kernel fills.
            let done = unsafe {
                libc::ioctl(
                    self.0.as_raw_fd(),
                    libc::SECCOMP_IOCTL_NOTIF_RECV,
                    &raw mut call,
                )
            };
            if done == 0 {
                return Ok(Some(Call {
                    id: call.id,
                    pid: call.pid as i32,
                    number: call.data.nr.into(),
                    arguments: call.data.args,
                }));
            }
            let error = io::Error::last_os_error();
            match error.raw_os_error() {
                // ENOENT: the caller died or was interrupted in the meantime.
                Some(libc::ENOENT | libc::EINTR) => {}
                _ => return Err(error),
            }
        }
    }

    /// Is the caller still waiting? What has been read from its memory or looked
    /// up by its process id means something only if it is, afterwards.
    pub fn still_waits(&self, call: &Call) -> bool {
        // SAFETY: the request takes a pointer to a u64, which it reads.
        let done = unsafe {
            libc::ioctl(
                self.0.as_raw_fd(),
                libc::SECCOMP_IOCTL_NOTIF_ID_VALID,
                &raw const call.id,
            )
        };
        done == 0
    }

    /// Lets the kernel do what the caller asked for.
    ///
    /// # Errors
    ///
    /// As for [`Listener::succeed`].
    pub fn pass(&self, call: &Call) -> io::Result<()> {
        self.answer(call, 0, 0, libc::SECCOMP_USER_NOTIF_FLAG_CONTINUE as u32)
    }

    /// Makes the call return `value` without doing anything.
    ///
    /// # Errors
    ///
    /// Those of `SECCOMP_IOCTL_NOTIF_SEND`. That the caller is gone is none.
    pub fn succeed(&self, call: &Call, value: i64) -> io::Result<()> {
        self.answer(call, value, 0, 0)
    }

    /// Makes the call fail with `errno` (positive).
    ///
    /// # Errors
    ///
    /// As for [`Listener::succeed`].
    pub fn fail(&self, call: &Call, errno: i32) -> io::Result<()> {
        self.answer(call, 0, -errno, 0)
    }

    fn answer(&self, call: &Call, val: i64, error: i32, flags: u32) -> io::Result<()> {
        let response = libc::seccomp_notif_resp {
            id: call.id,
            val,
            error,
            flags,
        };
        // SAFETY: the request fits the structure, which the kernel reads.
        let done = unsafe {
            libc::ioctl(
                self.0.as_raw_fd(),
                libc::SECCOMP_IOCTL_NOTIF_SEND,
                &raw const response,
            )
        };
        if done == 0 {
            return Ok(());
        }
        let error = io::Error::last_os_error();
        match error.raw_os_error() {
            Some(libc::ENOENT) => Ok(()),
            _ => Err(error),
        }
    }

    /// Opens `file` in the caller, close-on-exec, and makes the call return its
    /// number there, in one step (Linux 5.14).
    ///
    /// # Errors
    ///
    /// Those of `SECCOMP_IOCTL_NOTIF_ADDFD`, for instance when the caller may not
    /// open more files; the call then still waits for an answer.
    pub fn succeed_with_file(&self, call: &Call, file: BorrowedFd<'_>) -> io::Result<()> {
        let added = libc::seccomp_notif_addfd {
            id: call.id,
            flags: libc::SECCOMP_ADDFD_FLAG_SEND as u32,
            srcfd: file.as_raw_fd() as u32,
            newfd: 0,
            newfd_flags: libc::O_CLOEXEC as u32,
        };
        // SAFETY: the request fits the structure, which the kernel reads.
        let done = unsafe {
            libc::ioctl(
                self.0.as_raw_fd(),
                libc::SECCOMP_IOCTL_NOTIF_ADDFD,
                &raw const added,
            )
        };
        if done < 0 {
            Err(io::Error::last_os_error())
        } else {
            Ok(())
        }
    }
}

#[cfg(test)]
mod tests {
    use std::ffi::CStr;
    use std::io::{Seek, Write};
    use std::thread;

    use super::*;

    const NOWHERE: &CStr = c"/nowhere/at/all";

    /// Runs `call` on a thread of its own under `filter`, `serve` on this one.
    fn under<T: Send + 'static>(
        filter: Filter,
        call: impl FnOnce() -> T + Send + 'static,
        serve: impl FnOnce(Listener),
    ) -> Option<T> {
        let program = filter.build();
        let (sender, receiver) = std::sync::mpsc::channel();
        let thread = thread::spawn(move || {
            match program.install() {
                // Not root: nothing to test here.
                Err(error) if error.kind() == io::ErrorKind::PermissionDenied => return None,
                listener => sender.send(Listener::from(listener.unwrap())).unwrap(),
            }
            Some(call())
        });
        if let Ok(listener) = receiver.recv() {
            serve(listener);
        }
        thread.join().unwrap()
    }

    fn open_nowhere(directory: i32, flags: i32) -> io::Result<OwnedFd> {
        // SAFETY: openat reads a terminated string.
        let fd = unsafe { libc::openat(directory, NOWHERE.as_ptr(), flags) };
        if fd < 0 {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: the call has just returned it.
        Ok(unsafe { OwnedFd::from_raw_fd(fd) })
    }

    #[test]
    fn only_calls_that_meet_all_conditions_are_asked_about() {
        let filter = Filter::new().ask(libc::SYS_getpriority, &[]).ask(
            libc::SYS_openat,
            &[
                (0, Condition::WordIsNot(libc::AT_FDCWD as u32)),
                (
                    2,
                    Condition::WordLacks((libc::O_ACCMODE | libc::O_CREAT) as u32),
                ),
            ],
        );
        let errors = under(
            filter,
            || {
                [
                    (libc::AT_FDCWD, libc::O_RDONLY),
                    (7, libc::O_RDWR),
                    (7, libc::O_RDONLY),
                ]
                .map(|(directory, flags)| open_nowhere(directory, flags).unwrap_err())
                .map(|error| error.raw_os_error())
            },
            |listener| {
                let call = listener.receive().unwrap().unwrap();
                assert_eq!((call.number, call.arguments[0]), (libc::SYS_openat, 7));
                assert!(listener.still_waits(&call));
                listener.fail(&call, libc::EXDEV).unwrap();
                assert!(!listener.still_waits(&call));
                assert!(listener.receive().unwrap().is_none());
            },
        );
        if let Some(errors) = errors {
            let absent = Some(libc::ENOENT);
            assert_eq!(errors, [absent, absent, Some(libc::EXDEV)]);
        }
    }

    #[test]
    fn a_whole_argument_is_compared_in_both_halves() {
        let large = 0x7_0000_0001u64;
        let filter = Filter::new().ask(libc::SYS_getpgid, &[(1, Condition::Is(large))]);
        let pid = |second: u64| {
            // SAFETY: getpgid takes numbers only.
            unsafe { libc::syscall(libc::SYS_getpgid, 0, second) }
        };
        let results = under(
            filter,
            move || [1, large, 0x7_0000_0000].map(pid),
            |listener| {
                let call = listener.receive().unwrap().unwrap();
                listener.succeed(&call, -7).unwrap();
                assert!(listener.receive().unwrap().is_none());
            },
        );
        if let Some([first, second, third]) = results {
            assert!(first > 0 && third > 0, "{first} {third}");
            assert_eq!(second, -1, "an answer in the range of errors is one");
        }
    }

    #[test]
    fn a_call_can_be_passed_or_given_a_file() {
        let filter = Filter::new().ask(
            libc::SYS_openat,
            &[(0, Condition::WordIs(libc::AT_FDCWD as u32))],
        );
        let results = under(
            filter,
            || {
                let passed = open_nowhere(libc::AT_FDCWD, libc::O_RDONLY);
                let given = open_nowhere(libc::AT_FDCWD, libc::O_RDONLY);
                (passed, given)
            },
            |listener| {
                let call = listener.receive().unwrap().unwrap();
                listener.pass(&call).unwrap();
                let call = listener.receive().unwrap().unwrap();
                let mut file = tempfile::tempfile().unwrap();
                file.write_all(b"given").unwrap();
                file.rewind().unwrap();
                listener.succeed_with_file(&call, file.as_fd()).unwrap();
            },
        );
        if let Some((passed, given)) = results {
            assert_eq!(passed.unwrap_err().kind(), io::ErrorKind::NotFound);
            let text = io::read_to_string(std::fs::File::from(given.unwrap())).unwrap();
            assert_eq!(text, "given");
        }
    }
}
