//! How eagerly the scheduler lets a thread run.

use std::io;
use std::time::Duration;

use nix::errno::Errno;

/// `struct sched_attr` (linux/sched/types.h) in its second version, which Linux has known since 5.3.
#[repr(C)]
#[derive(Default)]
struct Attributes {
    size: u32,
    policy: u32,
    flags: u64,
    nice: i32,
    priority: u32,
    runtime: u64,
    deadline: u64,
    period: u64,
    util_min: u32,
    util_max: u32,
}

/// Asks for time slices of a length for the calling thread, 0.1 to 100 ms; its share of the processor stays the same.
///
/// A thread that wakes up takes the processor from one with longer slices, which otherwise keeps it for about 3 ms
/// (Linux 6.12; older kernels accept the wish and forget it). So long slices suit work that nobody waits for.
///
/// # Errors
///
/// Those of sched_setattr(2).
pub fn set_time_slice(slice: Duration) -> io::Result<()> {
    let mut attributes = Attributes::default();
    let size = size_of::<Attributes>();
    // SAFETY: the kernel writes at most `size` bytes to `attributes`, which has that many; 0 is this thread.
    let outcome = unsafe {
        libc::syscall(
            libc::SYS_sched_getattr,
            0,
            &raw mut attributes,
            size as libc::c_uint,
            0,
        )
    };
    Errno::result(outcome)?;
    attributes.size = size as u32;
    attributes.runtime = u64::try_from(slice.as_nanos()).unwrap_or(u64::MAX);
    // SAFETY: the kernel reads `attributes.size` bytes, which is its size.
    let outcome = unsafe { libc::syscall(libc::SYS_sched_setattr, 0, &raw const attributes, 0) };
    Errno::result(outcome)?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_time_slice_can_be_asked_for() {
        set_time_slice(Duration::from_millis(100)).unwrap();
    }
}
