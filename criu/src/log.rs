//! What CRIU's log says about a failure.
//!
//! libcriu drops the reason that CRIU puts into its answer, so that the log is
//! the only place where it can be read.

use std::fs::File;
use std::io::{self, BufRead, BufReader, Read};
use std::path::Path;

/// Most of a log that is looked at: with log level 4 it grows with the number of
/// mappings, and the first error is what counts.
const LIMIT_BYTES: u64 = 64 << 20;

/// Errors that CRIU reports and ignores.
const HARMLESS: &[&str] = &[
    // Every log has it where CAP_SYS_RESOURCE is missing (criu/util.c).
    "Can't setup RLIMIT_NOFILE for self",
];

/// The last line of every failure; says nothing.
const CONCLUSION: &str = "Dumping FAILED";

/// The first error in the log at `path` that is not harmless, without time stamp
/// and place in CRIU's source; `None` when there is none.
///
/// # Errors
///
/// When the log cannot be read.
pub fn first_error(path: &Path) -> io::Result<Option<String>> {
    first_error_in(BufReader::new(File::open(path)?.take(LIMIT_BYTES)))
}

fn first_error_in(mut log: impl BufRead) -> io::Result<Option<String>> {
    let mut line = Vec::new();
    let mut conclusion = None;
    loop {
        line.clear();
        if log.read_until(b'\n', &mut line)? == 0 {
            return Ok(conclusion);
        }
        let text = String::from_utf8_lossy(&line);
        let Some(message) = error_message(text.trim_end()) else {
            continue;
        };
        if HARMLESS.iter().any(|known| message.contains(known)) {
            continue;
        }
        if message.contains(CONCLUSION) {
            conclusion = Some(message.to_owned());
            continue;
        }
        return Ok(Some(message.to_owned()));
    }
}

/// The text of a line such as
/// "(00.115127) Error (criu/cr-dump.c:389): Can't get rlimit 0: Operation not permitted".
/// Lines of restored tasks begin with "(00.1)      1: Error", those of the code that
/// runs inside a task with "pie: 1: Error".
fn error_message(line: &str) -> Option<&str> {
    let (before, after) = line.split_once("Error (")?;
    // What stands before is a time stamp and a pid, not words.
    let words = before.trim_start_matches("pie:");
    if words.chars().any(char::is_alphabetic) {
        return None;
    }
    let (_place, message) = after.split_once("): ")?;
    Some(message.trim())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn first(log: &str) -> Option<String> {
        first_error_in(log.as_bytes()).unwrap()
    }

    /// runc's dump of a container whose process is not root, without CAP_SYS_RESOURCE.
    const NOT_ROOT: &str = "\
(00.000764) Dumping processes (pid: 439 comm: valkey-server)
(00.000766) ========================================
(00.000775) Error (criu/util.c:1534): rlimit: Can't setup RLIMIT_NOFILE for self: Operation not permitted
pie: 1: Daemon waits for command
(00.115094) Fetched ack: 64 64 0
(00.115117) dumping /proc/439/oom_score_adj
(00.115127) Error (criu/cr-dump.c:389): Can't get rlimit 0: Operation not permitted
(00.115129) ----------------------------------------
(00.115130) Error (criu/cr-dump.c:1584): Dump core (pid: 439) failed with -1
(00.159832) Error (criu/cr-dump.c:1975): Dumping FAILED.
";

    #[test]
    fn the_first_error_that_matters_is_found_behind_the_one_that_every_log_has() {
        let error = first(NOT_ROOT).unwrap();
        assert_eq!(error, "Can't get rlimit 0: Operation not permitted");
    }

    #[test]
    fn a_log_of_a_success_has_no_error() {
        let log = "\
(00.004302) Error (criu/util.c:1534): rlimit: Can't setup RLIMIT_NOFILE for self: Operation not permitted
(00.235985) \tUnseizing 381 into 1
(00.236140) Dumping finished successfully
";
        assert_eq!(first(log), None);
    }

    #[test]
    fn lines_of_a_terse_log_have_no_time_stamp() {
        let log = "\
Error (criu/util.c:1534): rlimit: Can't setup RLIMIT_NOFILE for self: Operation not permitted
Warn  (compel/arch/x86/src/lib/infect.c:419): Will restore 568 with interrupted system call
Error (criu/files-reg.c:1790): Can't lookup mount=24 for fd=10 path=/dev/null
Error (criu/cr-dump.c:1545): Dump files (pid: 526) failed with -1
";
        let error = first(log).unwrap();
        assert_eq!(error, "Can't lookup mount=24 for fd=10 path=/dev/null");
    }

    #[test]
    fn the_conclusion_is_better_than_nothing() {
        let log = "(00.1) Error (criu/cr-dump.c:1975): Dumping FAILED.\n";
        assert_eq!(first(log).unwrap(), "Dumping FAILED.");
    }

    #[test]
    fn errors_of_code_inside_a_task_and_of_restored_tasks_count() {
        let log = "pie: 12: Error (criu/pie/parasite.c:93): madvise failed: -22\n";
        assert_eq!(first(log).unwrap(), "madvise failed: -22");
        let log = "(00.020000)     29: Error (criu/files-reg.c:2171): Can't open file x on restore: No such file or directory\n";
        assert!(first(log).unwrap().starts_with("Can't open file x"));
    }

    #[test]
    fn a_word_in_the_middle_of_a_message_is_no_error() {
        let log = "(00.1) Dumping path for 4 fd via self 12 [/var/log/Error (old): x]\n";
        assert_eq!(first(log), None);
    }

    #[test]
    fn bytes_that_are_not_text_do_not_hide_the_error() {
        let log = b"(00.1) \xff\xfe\n(00.2) Error (criu/files.c:1): bad \xff name\n";
        let error = first_error_in(log.as_slice()).unwrap().unwrap();
        assert!(error.starts_with("bad "));
    }
}
