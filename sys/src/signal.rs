//! Signals by number, the real-time ones too, which no safe interface names.

use std::io;

/// Sends `signal` to the process `pid`; 0 only asks whether that could be done.
///
/// # Errors
///
/// Those of kill(2): `ESRCH` without such a process, `EINVAL` for a number that
/// is no signal or a `pid` below 1, which would mean a group.
pub fn send(pid: i32, signal: i32) -> io::Result<()> {
    if pid < 1 {
        return Err(io::Error::from_raw_os_error(libc::EINVAL));
    }
    // SAFETY: kill takes two integers and touches no memory of ours.
    match unsafe { libc::kill(pid, signal) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_existence_of_a_process_can_be_asked_for() {
        let own = i32::try_from(std::process::id()).unwrap();
        send(own, 0).unwrap();
        let error = send(i32::MAX, 0).unwrap_err();
        assert_eq!(error.raw_os_error(), Some(libc::ESRCH));
    }

    #[test]
    fn groups_and_numbers_that_are_no_signals_are_refused() {
        let own = i32::try_from(std::process::id()).unwrap();
        for (pid, signal) in [(0, 0), (-1, 0), (own, 1000)] {
            let error = send(pid, signal).unwrap_err();
            assert_eq!(error.raw_os_error(), Some(libc::EINVAL));
        }
    }
}
