//! Limits of processes of other users.
//!
//! prlimit(2) wants `CAP_SYS_RESOURCE` for them, even to read;
//! `/proc/PID/limits` says the same to anybody with ptrace rights.

use std::fs;
use std::io;

/// What the file says for no limit.
const UNLIMITED: &str = "unlimited";

/// The resources in the order of their numbers (include/asm-generic/resource.h,
/// which x86_64 and arm64 use), as `/proc/PID/limits` names them (fs/proc/base.c).
const NAMES: [&str; 16] = [
    "Max cpu time",
    "Max file size",
    "Max data size",
    "Max stack size",
    "Max core file size",
    "Max resident set",
    "Max processes",
    "Max open files",
    "Max locked memory",
    "Max address space",
    "Max file locks",
    "Max pending signals",
    "Max msgqueue size",
    "Max nice priority",
    "Max realtime priority",
    "Max realtime timeout",
];

/// `struct rlimit64`
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Limit {
    current: u64,
    most: u64,
}

impl Limit {
    pub(super) fn to_bytes(self) -> [u8; 16] {
        let mut bytes = [0; 16];
        bytes[..8].copy_from_slice(&self.current.to_ne_bytes());
        bytes[8..].copy_from_slice(&self.most.to_ne_bytes());
        bytes
    }
}

/// Whether prlimit(2) refuses to tell us, and CRIU, a limit of another process.
pub(crate) fn is_refused(pid: i32, resource: u32) -> bool {
    // SAFETY: asks for nothing and about nothing but the permission: with two null
    // pointers the kernel reads and writes no memory of ours.
    let asked =
        unsafe { libc::prlimit64(pid, resource as _, std::ptr::null(), std::ptr::null_mut()) };
    asked != 0 && io::Error::last_os_error().raw_os_error() == Some(libc::EPERM)
}

/// The limit of another process that prlimit(2) does not tell; `None` where it
/// does, or where nothing does.
pub(super) fn refused(pid: i32, resource: u32) -> Option<Limit> {
    if !is_refused(pid, resource) {
        return None;
    }
    let text = fs::read_to_string(format!("/proc/{pid}/limits")).ok()?;
    parse(&text, resource)
}

fn parse(text: &str, resource: u32) -> Option<Limit> {
    let name = NAMES.get(usize::try_from(resource).ok()?)?;
    let line = text.lines().find_map(|line| line.strip_prefix(name))?;
    let mut values = line.split_whitespace().map(|value| match value {
        UNLIMITED => Some(libc::RLIM64_INFINITY),
        number => number.parse().ok(),
    });
    Some(Limit {
        current: values.next()??,
        most: values.next()??,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_file_of_this_process_says_what_the_system_call_says() {
        let text = fs::read_to_string("/proc/self/limits").unwrap();
        for resource in 0..NAMES.len() as u32 {
            let mut limit = libc::rlimit64 {
                rlim_cur: 0,
                rlim_max: 0,
            };
            // SAFETY: `limit` is a valid place for the answer.
            let asked =
                unsafe { libc::prlimit64(0, resource as _, std::ptr::null(), &raw mut limit) };
            assert_eq!(asked, 0);
            let expected = Limit {
                current: limit.rlim_cur,
                most: limit.rlim_max,
            };
            assert_eq!(parse(&text, resource), Some(expected), "{resource}");
        }
    }

    #[test]
    fn a_resource_of_a_newer_kernel_is_not_guessed() {
        assert_eq!(parse("Max cpu time  1  2  seconds\n", 99), None);
        assert_eq!(parse("Max cpu time  1\n", 0), None);
        assert_eq!(parse("Max cpu time  some  2\n", 0), None);
    }

    #[test]
    fn own_limits_are_left_to_the_kernel() {
        assert_eq!(refused(std::process::id() as i32, 7), None);
    }
}
