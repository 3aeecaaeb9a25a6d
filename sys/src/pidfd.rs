//! pidfds: names of processes that do not get reused.

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};

/// A process by descriptor.
#[derive(Debug)]
pub struct PidFd(OwnedFd);

impl PidFd {
    /// Opens the process with this pid in our pid namespace (Linux 5.3).
    ///
    /// The pid may have been reused before the call; from then on the descriptor means one process only.
    pub fn open(pid: i32) -> io::Result<Self> {
        // SAFETY: pidfd_open takes two integers and touches no memory of ours.
        let result = unsafe { libc::syscall(libc::SYS_pidfd_open, pid, 0) };
        Ok(Self(owned_from_result(result)?))
    }

    /// Duplicates a descriptor of that process into ours (Linux 5.6), close-on-exec.
    ///
    /// Needs ptrace rights on the process.
    pub fn get_fd(&self, remote: RawFd) -> io::Result<OwnedFd> {
        // SAFETY: pidfd_getfd takes three integers and touches no memory of ours; the pidfd is open as long as self.
        let result = unsafe { libc::syscall(libc::SYS_pidfd_getfd, self.0.as_raw_fd(), remote, 0) };
        owned_from_result(result)
    }
}

impl AsFd for PidFd {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

/// Turns the result of a system call that makes a descriptor into that descriptor.
pub(crate) fn owned_from_result(result: libc::c_long) -> io::Result<OwnedFd> {
    if result < 0 {
        return Err(io::Error::last_os_error());
    }
    let fd = RawFd::try_from(result).map_err(|_| io::Error::from_raw_os_error(libc::EBADF))?;
    // SAFETY: the kernel just returned this descriptor for us, nobody else owns it.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

#[cfg(test)]
mod tests {
    use std::io::{Read, Write};

    use super::*;

    #[test]
    fn a_descriptor_taken_from_a_process_is_the_same_file() {
        let (mut reader, mut writer) = std::io::pipe().unwrap();
        let own = PidFd::open(i32::try_from(std::process::id()).unwrap()).unwrap();
        let taken = own.get_fd(reader.as_raw_fd()).unwrap();
        writer.write_all(b"tern").unwrap();
        let mut bytes = [0; 4];
        std::fs::File::from(taken).read_exact(&mut bytes).unwrap();
        assert_eq!(&bytes, b"tern");
        drop(writer);
        assert_eq!(reader.read(&mut bytes).unwrap(), 0);
    }

    #[test]
    fn a_pid_that_cannot_exist_is_refused() {
        assert!(PidFd::open(i32::MAX).is_err());
    }
}
