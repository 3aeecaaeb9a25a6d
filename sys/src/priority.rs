//! How much of a processor a thread gets beside others.

use std::io;

/// Sets the nice value of the calling thread: from -20, which is served first, to
/// 19. The other threads of the process keep theirs.
///
/// # Errors
///
/// `EACCES` for a lower value than the thread has, without `CAP_SYS_NICE`.
pub fn set_nice_of_thread(nice: i32) -> io::Result<()> {
    // SAFETY: setpriority takes integers and touches no memory of ours. With
    // PRIO_PROCESS and 0 it is about the calling thread (setpriority(2), C library/kernel differences).
    match unsafe { libc::setpriority(libc::PRIO_PROCESS, 0, nice) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn nice() -> i32 {
        let stat = std::fs::read_to_string("/proc/thread-self/stat").unwrap();
        // Fields are counted behind the name, which may contain spaces: proc(5).
        let (_, fields) = stat.rsplit_once(')').unwrap();
        fields.split_whitespace().nth(16).unwrap().parse().unwrap()
    }

    #[test]
    fn only_the_calling_thread_becomes_nicer() {
        let before = nice();
        let there = std::thread::spawn(|| {
            set_nice_of_thread(19).unwrap();
            nice()
        });
        assert_eq!(there.join().unwrap(), 19);
        assert_eq!(nice(), before);
    }
}
