//! Processes by number.

use std::path::Path;

/// Whether a process of this pid exists and has not ended.
pub(crate) fn is_alive(pid: u32) -> bool {
    pid != 0 && !matches!(state(pid), None | Some('Z' | 'X'))
}

/// The state letter of /proc/PID/stat.
fn state(pid: u32) -> Option<char> {
    let stat =
        std::fs::read_to_string(Path::new("/proc").join(pid.to_string()).join("stat")).ok()?;
    // The name may contain anything, a closing bracket too: the last one counts.
    stat.rsplit_once(')')?.1.trim_start().chars().next()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn this_process_lives_and_a_reaped_one_does_not() {
        assert!(is_alive(std::process::id()));
        assert!(!is_alive(0));
        let mut child = std::process::Command::new("true").spawn().unwrap();
        child.wait().unwrap();
        assert!(!is_alive(child.id()));
    }
}
