//! userfaultfd(2) in missing mode: filling another process's memory from outside.
//!
//! A [`Userfaultfd`] belongs to the address space it was made in, whoever holds it. Whoever holds it can place pages
//! where that address space has none yet, and hears of page faults and of changes to the mappings. When the last
//! duplicate is closed the kernel resolves everything that is still missing as zero pages.

use std::io;
use std::ops::Range;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};

use nix::errno::Errno;

/// `UFFD_API` in linux/userfaultfd.h, the only version there has been.
const API_VERSION: u64 = 0xaa;
/// `UFFDIO_REGISTER_MODE_MISSING`
const REGISTER_MISSING: u64 = 1;
/// `UFFD_USER_MODE_ONLY`
const USER_MODE_ONLY: libc::c_int = 1;

/// `UFFD_FEATURE_EVENT_FORK`: needs `CAP_SYS_PTRACE`.
pub const FEATURE_EVENT_FORK: u64 = 1 << 1;
/// `UFFD_FEATURE_EVENT_REMAP`
pub const FEATURE_EVENT_REMAP: u64 = 1 << 2;
/// `UFFD_FEATURE_EVENT_REMOVE`
pub const FEATURE_EVENT_REMOVE: u64 = 1 << 3;
/// `UFFD_FEATURE_EVENT_UNMAP`
pub const FEATURE_EVENT_UNMAP: u64 = 1 << 6;

/// All events about mappings and forks.
pub const FEATURE_EVENTS: u64 =
    FEATURE_EVENT_FORK | FEATURE_EVENT_REMAP | FEATURE_EVENT_REMOVE | FEATURE_EVENT_UNMAP;

/// `sizeof(struct uffd_msg)`
const MESSAGE_BYTES: usize = 32;
/// Messages taken with one read(2). More faults than this are rarely pending at once: a thread has at most one.
const MESSAGES: usize = 32;

const EVENT_PAGEFAULT: u8 = 0x12;
const EVENT_FORK: u8 = 0x13;
const EVENT_REMAP: u8 = 0x14;
const EVENT_REMOVE: u8 = 0x15;
const EVENT_UNMAP: u8 = 0x16;

#[repr(C)]
struct ApiArgument {
    api: u64,
    features: u64,
    ioctls: u64,
}

#[repr(C)]
struct RangeArgument {
    start: u64,
    len: u64,
}

#[repr(C)]
struct RegisterArgument {
    range: RangeArgument,
    mode: u64,
    ioctls: u64,
}

#[repr(C)]
struct CopyArgument {
    dst: u64,
    src: u64,
    len: u64,
    mode: u64,
    copy: i64,
}

#[repr(C)]
struct ZeropageArgument {
    range: RangeArgument,
    mode: u64,
    zeropage: i64,
}

// The kernel encodes the size of the argument in the number of the request: a wrong layout is an unknown request.
nix::ioctl_readwrite! {
    /// `UFFDIO_API`
    uffdio_api, 0xaa, 0x3f, ApiArgument
}
nix::ioctl_readwrite! {
    /// `UFFDIO_REGISTER`
    uffdio_register, 0xaa, 0x00, RegisterArgument
}
nix::ioctl_read! {
    /// `UFFDIO_UNREGISTER`
    uffdio_unregister, 0xaa, 0x01, RangeArgument
}
nix::ioctl_read! {
    /// `UFFDIO_WAKE`
    uffdio_wake, 0xaa, 0x02, RangeArgument
}
nix::ioctl_readwrite! {
    /// `UFFDIO_COPY`
    uffdio_copy, 0xaa, 0x03, CopyArgument
}
nix::ioctl_readwrite! {
    /// `UFFDIO_ZEROPAGE`
    uffdio_zeropage, 0xaa, 0x04, ZeropageArgument
}

/// A userfaultfd; closed when dropped.
#[derive(Debug)]
pub struct Userfaultfd(OwnedFd);

/// Why pages could not be placed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum Obstacle {
    /// `EEXIST`: the first page of the range is there already. Whoever waits for it has to be woken.
    #[error("a page is there already")]
    Present,
    /// `EAGAIN`: an event about the mappings has not been read yet, or the thread that caused it has not yet gone on
    /// since. Read the events, act upon them, then try again.
    #[error("the mappings are changing")]
    Changing,
    /// `ENOENT`: the range is not wholly inside one mapping that is registered.
    #[error("no registered mapping holds the range")]
    Unregistered,
    /// `ESRCH`: the address space is gone; its process ended or runs another program.
    #[error("the address space is gone")]
    Gone,
    /// `ENOMEM`: no memory, often because the control group of the process is at its limit.
    #[error("no memory for the page")]
    NoMemory,
    /// Anything else. `ENOSPC`, which for private memory Linux 4.11 to 4.13 alone returned, is here as well: taking
    /// it for [`Obstacle::Gone`] could lose pages.
    #[error("userfaultfd request refused")]
    Refused(#[source] Errno),
}

impl From<Errno> for Obstacle {
    fn from(errno: Errno) -> Self {
        match errno {
            Errno::EEXIST => Self::Present,
            Errno::EAGAIN => Self::Changing,
            Errno::ENOENT => Self::Unregistered,
            Errno::ESRCH => Self::Gone,
            Errno::ENOMEM => Self::NoMemory,
            other => Self::Refused(other),
        }
    }
}

/// What the kernel reports.
#[derive(Debug)]
pub enum Event {
    /// A thread waits for a page until it is placed or the thread is woken.
    PageFault {
        /// The address touched, rounded down to its page by most kernels but not by all.
        addr: u64,
        /// `UFFD_PAGEFAULT_FLAG_*`
        flags: u64,
    },
    /// The process forked. The child's registered mappings miss the same pages; this is its userfaultfd.
    Fork(Userfaultfd),
    /// A mapping moved, the missing pages with it.
    Remap {
        /// Where it was.
        from: u64,
        /// Where it is now.
        to: u64,
        /// Bytes that moved. What a growing mapping gained lies behind them.
        len: u64,
    },
    /// The content of a range is given up (`MADV_DONTNEED`, `MADV_FREE`, `MADV_REMOVE`); the mapping stays. Sent
    /// before the pages go.
    Remove(Range<u64>),
    /// A range is no longer mapped. Sent after the fact.
    Unmap(Range<u64>),
}

impl Userfaultfd {
    /// Takes over a descriptor that is a userfaultfd; with any other every request fails.
    pub fn from_fd(fd: OwnedFd) -> Self {
        Self(fd)
    }

    /// Makes one for the address space of this process: close-on-exec, non-blocking.
    ///
    /// `user_mode_only`: faults that happen in the kernel (a `read(2)` into a missing page) fail instead of waiting.
    /// Without that, `CAP_SYS_PTRACE` or the `vm.unprivileged_userfaultfd` setting is needed.
    ///
    /// # Errors
    ///
    /// Those of userfaultfd(2), first of all `PermissionDenied`.
    pub fn create(user_mode_only: bool) -> io::Result<Self> {
        let mode = if user_mode_only { USER_MODE_ONLY } else { 0 };
        // SAFETY: the system call takes flags only and touches no memory of ours.
        let number = unsafe {
            libc::syscall(
                libc::SYS_userfaultfd,
                libc::O_CLOEXEC | libc::O_NONBLOCK | mode,
            )
        };
        let number = RawFd::try_from(Errno::result(number)?)
            .map_err(|_| io::Error::from(io::ErrorKind::InvalidData))?;
        // SAFETY: the kernel has just installed this descriptor for us and nobody else knows its number.
        Ok(Self(unsafe { OwnedFd::from_raw_fd(number) }))
    }

    /// The handshake that comes before anything else and can be done once: asks for `features` (`FEATURE_*`), returns
    /// what the kernel has.
    ///
    /// # Errors
    ///
    /// `InvalidInput` when the kernel lacks a feature or the handshake is done already; `PermissionDenied` for
    /// [`FEATURE_EVENT_FORK`] without the capability.
    pub fn handshake(&self, features: u64) -> io::Result<u64> {
        let mut argument = ApiArgument {
            api: API_VERSION,
            features,
            ioctls: 0,
        };
        // SAFETY: the argument has the kernel's layout, is writable and outlives the call.
        unsafe { uffdio_api(self.0.as_raw_fd(), &raw mut argument) }?;
        Ok(argument.features)
    }

    /// What whoever did the handshake asked for (`FEATURE_*`, and bits of the kernel's own).
    ///
    /// # Errors
    ///
    /// Those of reading /proc/self/fdinfo; `InvalidData` if that does not describe a userfaultfd.
    pub fn features(&self) -> io::Result<u64> {
        let path = format!("/proc/self/fdinfo/{}", self.0.as_raw_fd());
        features_in(&std::fs::read_to_string(path)?)
            .ok_or_else(|| io::ErrorKind::InvalidData.into())
    }

    /// Has missing pages of private or shared memory in `range` reported from now on.
    ///
    /// # Safety
    ///
    /// The descriptor belongs to the address space of another process, or `range` holds no memory whose content this
    /// process relies on: whoever holds the descriptor decides what the missing pages read as, and while nobody
    /// does, touching them blocks.
    ///
    /// # Errors
    ///
    /// Those of `UFFDIO_REGISTER`: `InvalidInput` where nothing, or something else than such memory is mapped.
    pub unsafe fn register_missing(&self, range: Range<u64>) -> io::Result<()> {
        let mut argument = RegisterArgument {
            range: argument_of(&range),
            mode: REGISTER_MISSING,
            ioctls: 0,
        };
        // SAFETY: the argument has the kernel's layout, is writable and outlives the call; the caller answers for
        // the range.
        unsafe { uffdio_register(self.0.as_raw_fd(), &raw mut argument) }?;
        Ok(())
    }

    /// Ends the reporting in `range`: pages still missing there read as zeros. Wakes who waits for one.
    ///
    /// # Errors
    ///
    /// Those of `UFFDIO_UNREGISTER`: `InvalidInput` where nothing, or what cannot be registered, is mapped.
    pub fn unregister(&self, range: Range<u64>) -> io::Result<()> {
        let mut argument = argument_of(&range);
        // SAFETY: the argument has the kernel's layout and outlives the call. Missing pages becoming zeros is what
        // they are without userfaultfd, so that no memory of ours changes under a reference.
        unsafe { uffdio_unregister(self.0.as_raw_fd(), &raw mut argument) }?;
        Ok(())
    }

    /// Places pages and wakes who waits for them. Returns how many bytes were placed, from the front, which can be
    /// less than all without an error: call again for the rest to learn why.
    ///
    /// `dst` and the length of `content` have to be multiples of the page size; `content` may lie anywhere.
    ///
    /// # Errors
    ///
    /// See [`Obstacle`]; nothing has been placed then.
    pub fn copy(&self, dst: u64, content: &[u8]) -> Result<usize, Obstacle> {
        let mut argument = CopyArgument {
            dst,
            src: content.as_ptr() as u64,
            len: content.len() as u64,
            mode: 0,
            copy: 0,
        };
        // SAFETY: the argument has the kernel's layout, is writable and outlives the call; `src` is readable for
        // `len` bytes. Pages are placed only where a mapping was registered, for which `register_missing` or the
        // other process answers.
        let outcome = unsafe { uffdio_copy(self.0.as_raw_fd(), &raw mut argument) };
        placed(outcome, argument.copy, content.len())
    }

    /// Places zero pages and wakes who waits for them. Like [`Userfaultfd::copy`] otherwise.
    ///
    /// # Errors
    ///
    /// See [`Obstacle`]; nothing has been placed then.
    pub fn zeropage(&self, range: Range<u64>) -> Result<usize, Obstacle> {
        let len = range.end.saturating_sub(range.start) as usize;
        let mut argument = ZeropageArgument {
            range: argument_of(&range),
            mode: 0,
            zeropage: 0,
        };
        // SAFETY: as in `copy`, without a source.
        let outcome = unsafe { uffdio_zeropage(self.0.as_raw_fd(), &raw mut argument) };
        placed(outcome, argument.zeropage, len)
    }

    /// Wakes who waits for a page in `range`; they touch it again.
    ///
    /// # Errors
    ///
    /// Those of `UFFDIO_WAKE`: `InvalidInput` for a range that is empty or not page aligned.
    pub fn wake(&self, range: Range<u64>) -> io::Result<()> {
        let mut argument = argument_of(&range);
        // SAFETY: the argument has the kernel's layout and outlives the call; no memory changes.
        unsafe { uffdio_wake(self.0.as_raw_fd(), &raw mut argument) }?;
        Ok(())
    }

    /// Takes what has been reported, oldest fault first, then oldest event; appends it to `events` and returns how
    /// many there were, 0 if nothing is pending.
    ///
    /// Reading an event about the mappings lets the thread that caused it go on. The descriptor has to be
    /// non-blocking, as one made by [`Userfaultfd::create`] and CRIU's are.
    ///
    /// # Errors
    ///
    /// Those of read(2); `InvalidData` for an event this program does not know. With too many descriptors open the
    /// read fails at a fork and can be repeated.
    pub fn read_events(&self, events: &mut Vec<Event>) -> io::Result<usize> {
        let mut buffer = [0_u8; MESSAGE_BYTES * MESSAGES];
        let length = loop {
            match nix::unistd::read(&self.0, &mut buffer) {
                Ok(length) => break length,
                Err(Errno::EINTR) => {}
                Err(Errno::EAGAIN) => return Ok(0),
                Err(error) => return Err(error.into()),
            }
        };
        let (messages, _) = buffer[..length].as_chunks::<MESSAGE_BYTES>();
        for message in messages {
            events.push(parse(message)?);
        }
        Ok(messages.len())
    }

    /// Another descriptor for the same userfaultfd; while one is open, missing pages stay missing.
    ///
    /// # Errors
    ///
    /// Those of fcntl(2) with `F_DUPFD_CLOEXEC`.
    pub fn try_clone(&self) -> io::Result<OwnedFd> {
        self.0.try_clone()
    }
}

impl AsFd for Userfaultfd {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

impl From<Userfaultfd> for OwnedFd {
    fn from(uffd: Userfaultfd) -> Self {
        uffd.0
    }
}

fn argument_of(range: &Range<u64>) -> RangeArgument {
    RangeArgument {
        start: range.start,
        len: range.end.saturating_sub(range.start),
    }
}

/// The features in `API:<tab>version:features:ioctls`, all in hexadecimal.
fn features_in(fdinfo: &str) -> Option<u64> {
    let api = fdinfo.lines().find_map(|line| line.strip_prefix("API:"))?;
    let features = api.trim().split(':').nth(1)?;
    u64::from_str_radix(features, 16).ok()
}

/// The outcome of a request that places pages. One that was cut short is `EAGAIN` with a count; the count of one that
/// placed nothing is 0, or an error number, depending on the kernel.
fn placed(outcome: nix::Result<i32>, count: i64, len: usize) -> Result<usize, Obstacle> {
    match (outcome, usize::try_from(count)) {
        (Ok(_), _) => Ok(len),
        (Err(Errno::EAGAIN), Ok(count)) if count > 0 => Ok(count),
        (Err(errno), _) => Err(errno.into()),
    }
}

fn parse(message: &[u8; MESSAGE_BYTES]) -> io::Result<Event> {
    let word = |index: usize| {
        let mut bytes = [0; 8];
        bytes.copy_from_slice(&message[8 * index..8 * index + 8]);
        u64::from_ne_bytes(bytes)
    };
    Ok(match message[0] {
        EVENT_PAGEFAULT => Event::PageFault {
            flags: word(1),
            addr: word(2),
        },
        EVENT_FORK => {
            let mut number = [0; 4];
            number.copy_from_slice(&message[8..12]);
            let number = RawFd::from_ne_bytes(number);
            // SAFETY: while it copied the message out, the kernel installed this descriptor for us; it is named
            // nowhere else.
            Event::Fork(Userfaultfd(unsafe { OwnedFd::from_raw_fd(number) }))
        }
        EVENT_REMAP => Event::Remap {
            from: word(1),
            to: word(2),
            len: word(3),
        },
        EVENT_REMOVE => Event::Remove(word(1)..word(2)),
        EVENT_UNMAP => Event::Unmap(word(1)..word(2)),
        _ => return Err(io::ErrorKind::InvalidData.into()),
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{Region, not_permitted};

    #[test]
    fn the_layouts_are_those_of_the_kernel_header() {
        assert_eq!(size_of::<ApiArgument>(), 24);
        assert_eq!(size_of::<RangeArgument>(), 16);
        assert_eq!(size_of::<RegisterArgument>(), 32);
        assert_eq!(size_of::<CopyArgument>(), 40);
        assert_eq!(size_of::<ZeropageArgument>(), 32);
    }

    #[test]
    fn a_request_cut_short_tells_how_far_it_came_and_one_that_did_nothing_why() {
        assert_eq!(placed(Ok(0), 8192, 8192), Ok(8192));
        assert_eq!(placed(Err(Errno::EAGAIN), 4096, 8192), Ok(4096));
        assert_eq!(placed(Err(Errno::EAGAIN), 0, 8192), Err(Obstacle::Changing));
        let same = -i64::from(libc::EAGAIN);
        assert_eq!(
            placed(Err(Errno::EAGAIN), same, 8192),
            Err(Obstacle::Changing)
        );
        let present = -i64::from(libc::EEXIST);
        assert_eq!(
            placed(Err(Errno::EEXIST), present, 8192),
            Err(Obstacle::Present)
        );
    }

    #[test]
    fn messages_are_read_as_the_kernel_writes_them() {
        let mut message = [0; MESSAGE_BYTES];
        message[0] = EVENT_REMAP;
        for (index, value) in [(1, 0x1000_u64), (2, 0x5000), (3, 0x2000)] {
            message[8 * index..8 * index + 8].copy_from_slice(&value.to_ne_bytes());
        }
        assert!(matches!(
            parse(&message).unwrap(),
            Event::Remap {
                from: 0x1000,
                to: 0x5000,
                len: 0x2000
            }
        ));
        message[0] = EVENT_REMOVE;
        let Event::Remove(range) = parse(&message).unwrap() else {
            panic!("not a removal");
        };
        assert_eq!(range, 0x1000..0x5000);
        message[0] = 0x7f;
        assert_eq!(
            parse(&message).unwrap_err().kind(),
            io::ErrorKind::InvalidData
        );
    }

    #[test]
    fn features_are_found_in_fdinfo() {
        let text = "pos:\t0\nflags:\t02004002\npending:\t0\ntotal:\t0\nAPI:\taa:8000004c:1ff\n";
        let events = FEATURE_EVENT_REMAP | FEATURE_EVENT_REMOVE | FEATURE_EVENT_UNMAP;
        assert_eq!(features_in(text), Some(events | 1 << 31));
        assert_eq!(features_in("pos:\t0\n"), None);
        if let Some((uffd, _)) = registered(1, FEATURE_EVENT_UNMAP) {
            let asked_for = uffd.features().unwrap() & FEATURE_EVENTS;
            assert_eq!(asked_for, FEATURE_EVENT_UNMAP);
        }
    }

    const PAGE: u64 = 4096;

    /// A registered region of `pages` pages, or a printed reason why there is none.
    fn registered(pages: u64, features: u64) -> Option<(Userfaultfd, Region)> {
        let uffd = match Userfaultfd::create(true) {
            Err(error) if not_permitted(&error) => {
                println!("skipped: userfaultfd: {error}");
                return None;
            }
            other => other.unwrap(),
        };
        uffd.handshake(features).unwrap();
        let region = Region::map(None, pages * PAGE).unwrap();
        region.register(&uffd).unwrap();
        Some((uffd, region))
    }

    #[test]
    fn pages_are_placed_once_and_up_to_the_first_that_is_there() {
        let Some((uffd, region)) = registered(8, 0) else {
            return;
        };
        let start = region.range().start;
        let content = [7; 4 * PAGE as usize];
        uffd.zeropage(start + 2 * PAGE..start + 3 * PAGE).unwrap();
        assert_eq!(uffd.copy(start, &content).unwrap() as u64, 2 * PAGE);
        assert_eq!(
            uffd.copy(start + 2 * PAGE, &content).unwrap_err(),
            Obstacle::Present
        );
        assert_eq!(
            uffd.copy(start + 3 * PAGE, &content).unwrap(),
            content.len()
        );
        assert_eq!(region.read(0), 0x0707_0707_0707_0707);
        assert_eq!(region.read(2 * PAGE), 0);
        assert_eq!(
            uffd.copy(start + 7 * PAGE, &content).unwrap_err(),
            Obstacle::Unregistered
        );
    }

    #[test]
    fn unregistered_memory_reads_as_zeros_and_takes_no_pages() {
        let Some((uffd, region)) = registered(2, 0) else {
            return;
        };
        let range = region.range();
        uffd.unregister(range.clone()).unwrap();
        assert_eq!(region.read(0), 0);
        assert_eq!(
            uffd.copy(range.start + PAGE, &[1; PAGE as usize])
                .unwrap_err(),
            Obstacle::Unregistered
        );
    }

    #[test]
    fn a_fault_waits_until_its_page_is_placed() {
        let Some((uffd, region)) = registered(2, 0) else {
            return;
        };
        let start = region.range().start;
        let reader = std::thread::spawn(move || region.read(PAGE));
        let mut events = Vec::new();
        while uffd.read_events(&mut events).unwrap() == 0 {
            std::thread::yield_now();
        }
        let [Event::PageFault { addr, .. }] = events[..] else {
            panic!("{events:?} is not a fault");
        };
        assert_eq!(addr, start + PAGE);
        uffd.copy(addr, &[9; PAGE as usize]).unwrap();
        assert_eq!(reader.join().unwrap(), 0x0909_0909_0909_0909);
    }

    #[test]
    fn nothing_is_placed_while_a_removal_has_not_been_read() {
        let Some((uffd, region)) = registered(4, FEATURE_EVENT_REMOVE) else {
            return;
        };
        let start = region.range().start;
        let content = [5; PAGE as usize];
        uffd.copy(start, &content).unwrap();
        let discarder = std::thread::spawn(move || {
            region.discard(0, 2 * PAGE).unwrap();
            region
        });
        while uffd.copy(start + 2 * PAGE, &content) != Err(Obstacle::Changing) {
            assert!(!discarder.is_finished());
            match uffd.copy(start + 3 * PAGE, &content) {
                Err(Obstacle::Changing) => break,
                Ok(_) | Err(Obstacle::Present) => std::thread::yield_now(),
                Err(other) => panic!("{other}"),
            }
        }
        let mut events = Vec::new();
        assert_eq!(uffd.read_events(&mut events).unwrap(), 1);
        let [Event::Remove(ref range)] = events[..] else {
            panic!("{events:?} is not a removal");
        };
        assert_eq!(*range, start..start + 2 * PAGE);
        let region = discarder.join().unwrap();
        uffd.copy(region.range().start, &content).unwrap();
        assert_eq!(region.read(0), 0x0505_0505_0505_0505);
    }
}
