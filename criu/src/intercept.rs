//! CRIU's system calls answered by us, so that it leaves memory alone.
//!
//! CRIU walks the page tables of every task, and reads `/proc/PID/smaps`, which
//! walks them too: 0.1 to 0.6 s of a freeze for each GiB. An [`Interceptor`]
//! answers these calls from what the page engine knows already, by seccomp user
//! notification, with an unmodified CRIU. It answers
//!
//! * `ioctl(PAGEMAP_SCAN)`: pages that the engine owns are not there, so that CRIU
//!   does not dump them ([`scan`]);
//! * `openat("smaps")`: a text prepared before the freeze;
//! * `prlimit64` of another process: CRIU needs `CAP_SYS_RESOURCE` for tasks of
//!   other users, `/proc/PID/limits` does not ([`limits`]);
//! * `ptrace` requests about seccomp: the kernel refuses them to a tracer that is
//!   under seccomp itself, as CRIU is because of us ([`crate::seccomp`]);
//! * `socket(NETLINK_NETFILTER)`, where the network namespace is not CRIU's to
//!   restore: it has no tracked connections ([`conntrack`]).
//!
//! Everything else passes; the filter does not even ask about it. In particular
//! calls that open a file by an absolute or a working-directory path are never
//! asked about, so that CRIU can start programs and reach the freezer whatever
//! happens to us.

mod conntrack;
pub(crate) mod limits;
mod ptrace;
mod scan;

use std::ffi::OsStr;
use std::fs::{self, File};
use std::io::{self, IoSlice, IoSliceMut, Seek, Write};
use std::ops::Range;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::Path;
use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant};

use nix::sys::uio::{RemoteIoVec, process_vm_readv, process_vm_writev};
use nix::unistd::Pid;
use sys::seccomp::{Call, Condition, Filter, Listener};
use sys::seccomp_filters::INSTRUCTION_BYTES;

use crate::channel::Asked;
use crate::seccomp::SeccompSlot;

/// `_IOWR('f', 16, struct pm_scan_arg)` of linux/fs.h, as the `unsigned int` that
/// the kernel looks at.
const PAGEMAP_SCAN: u32 = 0xC060_6610;

/// What CRIU opens, relative to a directory `/proc/PID`.
const SMAPS: &[u8; 6] = b"smaps\0";

/// Requests of include/uapi/linux/ptrace.h.
const PTRACE_SECCOMP_GET_FILTER: u32 = 0x420c;
const PTRACE_SECCOMP_GET_METADATA: u32 = 0x420d;

/// Bytes after which a mapping may end.
const PAGE_BYTES: u64 = 4096;

/// The calls of CRIU that an [`Interceptor`] is asked about; none where it is to be
/// under no filter.
pub(crate) fn filter(asked: Asked) -> Option<Filter> {
    let request = |number| (0, Condition::WordIs(number));
    // Alone, or with PTRACE_O_TRACESYSGOOD, which CRIU has set by then.
    let suspend = Condition::WordHas(libc::PTRACE_O_SUSPEND_SECCOMP as u32);
    let filter = Filter::new()
        .ask(
            libc::SYS_prlimit64,
            // Of another process, and only to read.
            &[(0, Condition::WordIsNot(0)), (2, Condition::Is(0))],
        )
        .ask(
            libc::SYS_ptrace,
            &[request(libc::PTRACE_SETOPTIONS), (3, suspend)],
        )
        .ask(libc::SYS_ptrace, &[request(PTRACE_SECCOMP_GET_FILTER)])
        .ask(libc::SYS_ptrace, &[request(PTRACE_SECCOMP_GET_METADATA)]);
    match asked {
        Asked::Nothing => None,
        Asked::Limits => Some(filter),
        Asked::Memory => Some(
            filter
                .ask(libc::SYS_ioctl, &[(1, Condition::WordIs(PAGEMAP_SCAN))])
                .ask(
                    libc::SYS_socket,
                    &[
                        (0, Condition::WordIs(libc::AF_NETLINK as u32)),
                        (1, Condition::WordIs(libc::SOCK_RAW as u32)),
                        (2, Condition::WordIs(libc::NETLINK_NETFILTER as u32)),
                    ],
                )
                .ask(
                    libc::SYS_openat,
                    &[
                        (0, Condition::WordIsNot(libc::AT_FDCWD as u32)),
                        (2, Condition::WordLacks(NOT_SMAPS as u32)),
                    ],
                ),
        ),
    }
}

/// Flags of which CRIU's open of smaps has none.
const NOT_SMAPS: i32 = libc::O_ACCMODE | libc::O_CREAT | libc::O_DIRECTORY | libc::O_PATH;

/// What the page engine has copied, or will, while the tasks are frozen.
///
/// Process ids are those of our own pid namespace.
pub trait Memory: Send + Sync {
    /// Does the engine own every page in `range`? Then CRIU must not dump them.
    fn owns(&self, pid: i32, range: Range<u64>) -> bool;

    /// Could the engine own any page in `range`? Only saves time: where the answer
    /// is no, the range is not taken apart further.
    fn may_own(&self, pid: i32, range: Range<u64>) -> bool {
        let _ = (pid, range);
        true
    }

    /// Addresses of pages that CRIU has to dump although the engine owns the range
    /// around them: those that the stack pointers of threads point into. Sorted.
    fn stack_pages(&self, pid: i32) -> &[u64];

    /// The text of `/proc/PID/smaps`, provided that its mappings are the current
    /// ones; `None` lets CRIU read the file.
    fn smaps(&self, pid: i32) -> Option<Vec<u8>>;
}

/// Where an [`Interceptor`] finds its [`Memory`], once there is one.
#[derive(Clone, Default)]
pub struct MemorySlot(Arc<OnceLock<Arc<dyn Memory>>>);

impl std::fmt::Debug for MemorySlot {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_tuple("MemorySlot")
            .field(&self.0.get().is_some())
            .finish()
    }
}

impl MemorySlot {
    /// From now on CRIU sees only what the engine does not own. To be set before
    /// CRIU is told to go on at [`Action::PreDump`](crate::Action::PreDump).
    ///
    /// # Panics
    ///
    /// When it is set twice.
    pub fn set(&self, memory: Arc<dyn Memory>) {
        assert!(self.0.set(memory).is_ok(), "one dump has one memory");
    }
}

/// What an [`Interceptor`] did.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct InterceptStats {
    /// Calls that it was asked about.
    pub calls: u64,
    /// Scans answered with "no pages".
    pub scans_empty: u64,
    /// Scans of ranges that the engine owns in part (or that hold stack pages).
    pub scans_composed: u64,
    /// Scans left to the kernel.
    pub scans_passed: u64,
    /// Opens of smaps answered with a prepared text.
    pub smaps_given: u64,
    /// Opens of smaps left to the kernel.
    pub smaps_passed: u64,
    /// Limits of other users' processes.
    pub limits_given: u64,
    /// Requests about seccomp filters answered.
    pub seccomp_given: u64,
    /// Those left to the kernel, which refuses them: the dump fails.
    pub seccomp_passed: u64,
    /// Tables of tracked connections that were said to be empty.
    pub conntrack_empty: u64,
    /// Time spent on all of them, without waiting.
    pub busy: Duration,
}

/// Answers the system calls of a [`DumpSession`](crate::DumpSession)'s CRIU.
#[derive(Debug)]
pub struct Interceptor {
    listener: Listener,
    memory: MemorySlot,
    seccomp: SeccompSlot,
    external_network: bool,
    /// Our ends of sockets that CRIU may still use.
    tables: Vec<OwnedFd>,
    stats: InterceptStats,
}

impl Interceptor {
    /// For the listener of a session, without a [`Memory`] for now: then CRIU sees
    /// all memory.
    pub fn new(listener: Listener) -> Self {
        Self {
            listener,
            memory: MemorySlot::default(),
            seccomp: SeccompSlot::default(),
            external_network: false,
            tables: Vec::new(),
            stats: InterceptStats::default(),
        }
    }

    /// The restore provides the network namespace, and what CRIU would dump of it
    /// is not used: its tracked connections are said to be none.
    #[must_use]
    pub fn with_external_network(mut self) -> Self {
        self.external_network = true;
        self
    }

    /// Where to put the memory that CRIU must not see.
    pub fn memory(&self) -> MemorySlot {
        self.memory.clone()
    }

    /// Where to put the seccomp filters of the tasks, without which tasks that
    /// have any cannot be dumped.
    pub fn seccomp(&self) -> SeccompSlot {
        self.seccomp.clone()
    }

    /// Answers until CRIU is gone. Blocks: give it a thread, from the moment the
    /// session was spawned. There is no way to stop it, on purpose: CRIU waits for
    /// the answers, also when it undoes a dump. To end it, drop the session.
    ///
    /// # Errors
    ///
    /// When the listener fails. Drop the session then: its helper takes over.
    pub fn run(mut self) -> io::Result<InterceptStats> {
        self.listener.take_turns();
        while let Some(call) = self.listener.receive()? {
            let begun = Instant::now();
            self.serve(&call)?;
            self.stats.calls += 1;
            self.stats.busy += begun.elapsed();
        }
        Ok(self.stats)
    }

    fn serve(&mut self, call: &Call) -> io::Result<()> {
        match call.number {
            libc::SYS_prlimit64 => self.serve_limits(call),
            libc::SYS_openat => self.serve_open(call),
            libc::SYS_ioctl => self.serve_scan(call),
            libc::SYS_ptrace => self.serve_ptrace(call),
            libc::SYS_socket => self.serve_socket(call),
            _ => self.listener.pass(call),
        }
    }

    /// prlimit64(pid, resource, NULL, old)
    fn serve_limits(&mut self, call: &Call) -> io::Result<()> {
        let [pid, resource, _, old, ..] = call.arguments;
        let (pid, resource) = (pid as i32, resource as u32);
        // Where we may, CRIU may.
        let Some(limit) = limits::refused(pid, resource) else {
            return self.listener.pass(call);
        };
        if self.listener.still_waits(call) && write(call, old, &limit.to_bytes()) {
            self.stats.limits_given += 1;
            return self.listener.succeed(call, 0);
        }
        self.listener.pass(call)
    }

    /// ptrace(request, thread, address, data)
    fn serve_ptrace(&mut self, call: &Call) -> io::Result<()> {
        let [request, tid, address, data, ..] = call.arguments;
        // A task of which nothing is known has to be refused, which the kernel does.
        let Some(filters) = self.seccomp.of(tid as i32) else {
            self.stats.seccomp_passed += 1;
            return self.listener.pass(call);
        };
        if !self.listener.still_waits(call) {
            return Ok(());
        }
        let answer = match request as u32 {
            PTRACE_SECCOMP_GET_FILTER => ptrace::filter(filters, address).map(|filter| {
                let length = filter.len() / INSTRUCTION_BYTES;
                (length, if data == 0 { Vec::new() } else { filter })
            }),
            PTRACE_SECCOMP_GET_METADATA => read(call, data)
                .ok_or(libc::EFAULT)
                .and_then(|number| ptrace::metadata(filters, u64::from_ne_bytes(number), address))
                .map(|metadata| (metadata.len(), metadata)),
            // The filters stay on; they are known to do no harm.
            _ => Ok((0, Vec::new())),
        };
        self.stats.seccomp_given += 1;
        match answer {
            Ok((value, bytes)) if bytes.is_empty() || write(call, data, &bytes) => {
                self.listener.succeed(call, value as i64)
            }
            Ok(_) => self.listener.fail(call, libc::EFAULT),
            Err(errno) => self.listener.fail(call, errno),
        }
    }

    /// openat(directory, path, flags)
    fn serve_open(&mut self, call: &Call) -> io::Result<()> {
        let [directory, path, ..] = call.arguments;
        if !is_smaps(call, path) {
            return self.listener.pass(call);
        }
        let text = self.memory.0.get().and_then(|memory| {
            let pid = process_directory(&link(call, directory as i32)?)?;
            memory.smaps(pid)
        });
        if let Some(file) = text.and_then(|text| memory_file(&text).ok())
            && self.listener.still_waits(call)
            && self.listener.succeed_with_file(call, file.as_fd()).is_ok()
        {
            self.stats.smaps_given += 1;
            return Ok(());
        }
        self.stats.smaps_passed += 1;
        self.listener.pass(call)
    }

    /// socket(AF_NETLINK, SOCK_RAW, NETLINK_NETFILTER)
    fn serve_socket(&mut self, call: &Call) -> io::Result<()> {
        // CRIU itself locks the network with it, a child of it dumps the tables.
        if self.external_network
            && is_forked(call.pid)
            && let Ok(table) = conntrack::empty_table()
            && self.listener.still_waits(call)
            && self
                .listener
                .succeed_with_file(call, table.theirs.as_fd())
                .is_ok()
        {
            self.tables.push(table.ours);
            self.stats.conntrack_empty += 1;
            return Ok(());
        }
        self.listener.pass(call)
    }

    /// ioctl(pagemap, PAGEMAP_SCAN, argument)
    fn serve_scan(&mut self, call: &Call) -> io::Result<()> {
        let [pagemap, _, argument, ..] = call.arguments;
        let answer = self.memory.0.get().and_then(|memory| {
            let pid = process_pagemap(&link(call, pagemap as i32)?)?;
            let asked = scan::Argument::from_bytes(&read(call, argument)?)?;
            scan::answer(pid, &asked, memory.as_ref())
        });
        let Some(answer) = answer else {
            self.stats.scans_passed += 1;
            return self.listener.pass(call);
        };
        let regions = answer.region_bytes();
        let delivered = self.listener.still_waits(call)
            && (regions.is_empty() || write(call, answer.vector, &regions))
            && write(
                call,
                argument + scan::WALK_END_OFFSET,
                &answer.walk_end.to_ne_bytes(),
            );
        if !delivered {
            self.stats.scans_passed += 1;
            return self.listener.pass(call);
        }
        match answer.regions.len() {
            0 => self.stats.scans_empty += 1,
            _ => self.stats.scans_composed += 1,
        }
        self.listener.succeed(call, answer.regions.len() as i64)
    }
}

/// Does this process run the same program as its parent? CRIU's parent is the
/// helper, which does not.
fn is_forked(pid: i32) -> bool {
    let program = |pid: &str| fs::read_link(format!("/proc/{pid}/exe")).ok();
    let parent = || {
        let status = fs::read_to_string(format!("/proc/{pid}/status")).ok()?;
        let parent = status.lines().find_map(|line| line.strip_prefix("PPid:"))?;
        program(parent.trim())
    };
    program(&pid.to_string()).is_some_and(|own| parent() == Some(own))
}

/// What a descriptor of the caller refers to.
fn link(call: &Call, number: i32) -> Option<std::path::PathBuf> {
    fs::read_link(format!("/proc/{}/fd/{number}", call.pid)).ok()
}

/// The process whose directory in procfs this is.
fn process_directory(path: &Path) -> Option<i32> {
    path.strip_prefix("/proc").ok()?.to_str()?.parse().ok()
}

/// The process whose pagemap this is.
fn process_pagemap(path: &Path) -> Option<i32> {
    if path.file_name() != Some(OsStr::from_bytes(b"pagemap")) {
        return None;
    }
    process_directory(path.parent()?)
}

/// Is the string at `address` of the caller exactly the name?
fn is_smaps(call: &Call, address: u64) -> bool {
    let mut bytes = [0; SMAPS.len()];
    // A shorter string may end right before memory that is not there; what lies
    // in two pages is read in two parts, so that the first does not fail with it.
    let to_page_end = (PAGE_BYTES - address % PAGE_BYTES) as usize;
    let first = to_page_end.min(bytes.len());
    let parts = [
        RemoteIoVec {
            base: address as usize,
            len: first,
        },
        RemoteIoVec {
            base: address as usize + first,
            len: bytes.len() - first,
        },
    ];
    let pid = Pid::from_raw(call.pid);
    let read = process_vm_readv(pid, &mut [IoSliceMut::new(&mut bytes)], &parts);
    read == Ok(SMAPS.len()) && bytes == *SMAPS
}

/// Reads a structure of the caller.
fn read<const N: usize>(call: &Call, address: u64) -> Option<[u8; N]> {
    let mut bytes = [0; N];
    let there = [RemoteIoVec {
        base: address as usize,
        len: N,
    }];
    let pid = Pid::from_raw(call.pid);
    let read = process_vm_readv(pid, &mut [IoSliceMut::new(&mut bytes)], &there);
    (read == Ok(N)).then_some(bytes)
}

/// Writes into the caller's memory; whether all of it was.
fn write(call: &Call, address: u64, bytes: &[u8]) -> bool {
    let there = [RemoteIoVec {
        base: address as usize,
        len: bytes.len(),
    }];
    let pid = Pid::from_raw(call.pid);
    process_vm_writev(pid, &[IoSlice::new(bytes)], &there) == Ok(bytes.len())
}

/// A file in memory with this content, at its beginning.
fn memory_file(content: &[u8]) -> io::Result<File> {
    use nix::sys::memfd::{MFdFlags, memfd_create};
    let mut file = File::from(memfd_create("smaps", MFdFlags::MFD_CLOEXEC)?);
    file.write_all(content)?;
    file.rewind()?;
    Ok(file)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_process_that_executed_another_program_is_not_one_that_was_forked() {
        let mut other = std::process::Command::new("sleep")
            .arg("9")
            .spawn()
            .unwrap();
        let forked = is_forked(other.id().cast_signed());
        other.kill().unwrap();
        other.wait().unwrap();
        assert!(!forked);
        assert!(!is_forked(0));
    }

    #[test]
    fn processes_are_recognised_by_their_directory_and_their_pagemap() {
        assert_eq!(process_directory(Path::new("/proc/17")), Some(17));
        assert_eq!(process_pagemap(Path::new("/proc/17/pagemap")), Some(17));
        for other in [
            "/proc/17/maps",
            "/proc/pagemap",
            "/tmp/17/pagemap",
            "/proc/self/pagemap",
        ] {
            assert_eq!(process_pagemap(Path::new(other)), None, "{other}");
        }
        assert_eq!(process_directory(Path::new("/proc/17/task")), None);
    }

    #[test]
    fn a_memory_file_is_read_from_its_beginning() {
        let file = memory_file(b"1000-2000 rw-p\n").unwrap();
        assert_eq!(io::read_to_string(file).unwrap(), "1000-2000 rw-p\n");
    }
}
