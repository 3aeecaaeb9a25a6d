//! Seccomp filters of the tasks to be dumped.
//!
//! CRIU asks the kernel for them, and to suspend them while its own code runs
//! inside the tasks. Both are refused to a tracer that is under a filter itself,
//! as CRIU is under ours. So the filters are read before, by a process that is
//! under none, and the [`Interceptor`](crate::Interceptor) answers from them.
//!
//! Nothing is suspended then: CRIU's code runs under the filters. That is fine
//! where they let pass what it calls, and where they refuse something the dump
//! fails and is undone. A filter that can kill, signal or ask somebody is another
//! matter, so that such a container is refused before anything is touched.

mod verdicts;

use std::collections::HashMap;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::{Arc, OnceLock};

use sys::seccomp_filters::{Filter, FilterError};

use verdicts::Verdict;

/// Calls without which CRIU's code cannot be taken out of a task again.
const NEEDED: [(&str, libc::c_long); 2] = [
    ("munmap", libc::SYS_munmap),
    ("rt_sigreturn", libc::SYS_rt_sigreturn),
];

/// Why a container under seccomp cannot be dumped. Nothing has been touched.
#[derive(Debug, thiserror::Error)]
pub enum SeccompError {
    /// The filters of a task cannot be read.
    #[error("cannot read the seccomp filters of the container")]
    Read(#[from] FilterError),
    /// procfs does not tell which tasks there are.
    #[error("cannot read {}", path.display())]
    Proc {
        /// The file.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// CRIU's code could kill the task.
    #[error(
        "the seccomp profile of process {pid} answers some system calls by {action}; CRIU's code inside it might not survive that"
    )]
    Profile {
        /// The process.
        pid: i32,
        /// By what.
        action: &'static str,
    },
    /// CRIU's code could not be removed.
    #[error(
        "the seccomp profile of process {pid} refuses {call}, without which it cannot be let go"
    )]
    Needed {
        /// The process.
        pid: i32,
        /// The system call.
        call: &'static str,
    },
    /// The original kind of seccomp, which kills.
    #[error("process {pid} is under strict seccomp")]
    Strict {
        /// The process.
        pid: i32,
    },
}

/// A task's filters, oldest first.
type Chain = Arc<[Filter]>;

/// The seccomp filters of a container's tasks.
#[derive(Debug, Default, Clone)]
pub struct SeccompFilters {
    tasks: HashMap<i32, Task>,
    /// There are tasks without any.
    some_have_none: bool,
}

#[derive(Debug, Clone)]
struct Task {
    /// Its process.
    group: i32,
    chain: Chain,
}

/// What `/proc/TID/status` says.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Status {
    group: i32,
    /// 0 without seccomp, 1 strict, 2 with filters.
    mode: u32,
    /// How many filters (Linux 5.9).
    count: Option<usize>,
    /// Only its number is left.
    ended: bool,
}

impl Status {
    fn of(tid: i32) -> Option<Self> {
        Self::parse(&fs::read_to_string(format!("/proc/{tid}/status")).ok()?)
    }

    fn parse(text: &str) -> Option<Self> {
        let field = |name: &str| {
            text.lines()
                .find_map(|line| Some(line.strip_prefix(name)?.trim()))
        };
        Some(Self {
            group: field("Tgid:")?.parse().ok()?,
            // A kernel without seccomp does not mention it.
            mode: field("Seccomp:").unwrap_or("0").parse().ok()?,
            count: field("Seccomp_filters:").and_then(|count| count.parse().ok()),
            ended: field("State:")?.starts_with(['Z', 'X']),
        })
    }
}

impl SeccompFilters {
    /// Reads the filters of a process and all below it. To be called by a process
    /// under no seccomp. Blocks; stops each task that has filters for some 50 µs,
    /// the others not.
    ///
    /// # Errors
    ///
    /// When they cannot be read, or CRIU's code could not run under them.
    pub fn read(root: i32) -> Result<Self, SeccompError> {
        let mut filters = Self::default();
        filters.update(root)?;
        Ok(filters)
    }

    /// Reads what is new since the last time. Tasks whose filters are known are
    /// not stopped again, so that this costs little; tasks in a frozen control
    /// group can be read only if it is one of version 2.
    ///
    /// # Errors
    ///
    /// As for [`read`](Self::read).
    pub fn update(&mut self, root: i32) -> Result<(), SeccompError> {
        let mut unread = Vec::new();
        for tid in tasks_below(root)? {
            let Some(status) = Status::of(tid).filter(|status| !status.ended) else {
                continue;
            };
            match status.mode {
                0 => self.some_have_none = true,
                1 => return Err(SeccompError::Strict { pid: status.group }),
                _ if self.known(tid, &status).is_some() => {}
                _ => unread.push((tid, status.group)),
            }
        }
        if unread.is_empty() {
            return Ok(());
        }
        let tids: Vec<i32> = unread.iter().map(|&(tid, _)| tid).collect();
        let chains = sys::seccomp_filters::read(&tids)?;
        for ((tid, group), chain) in unread.into_iter().zip(chains) {
            if let Some(chain) = chain {
                self.add(tid, group, chain)?;
            }
        }
        Ok(())
    }

    fn add(&mut self, tid: i32, group: i32, chain: Vec<Filter>) -> Result<(), SeccompError> {
        // Most tasks have what their parent has.
        let same = self.tasks.values().find(|task| *task.chain == *chain);
        let chain = match same {
            Some(task) => Arc::clone(&task.chain),
            None => {
                check(group, &chain)?;
                chain.into()
            }
        };
        self.tasks.insert(tid, Task { group, chain });
        Ok(())
    }

    /// A task's filters, provided that they are still the ones that were read.
    pub(crate) fn of(&self, tid: i32) -> Option<&[Filter]> {
        let status = Status::of(tid)?;
        self.known(tid, &status).map(|chain| &**chain)
    }

    /// Filters can only be added, so that their number tells whether they are
    /// the same. A thread that was not there has those of its fellows, if they all
    /// have the same; likewise a process, if all tasks of the container do.
    fn known(&self, tid: i32, status: &Status) -> Option<&Chain> {
        let task = self.tasks.get(&tid);
        let chain = match task.filter(|task| task.group == status.group) {
            Some(task) => &task.chain,
            None => {
                let all = || self.tasks.values();
                let is_thread = all().any(|task| task.group == status.group);
                if !is_thread && self.some_have_none {
                    return None;
                }
                let mut others = all().filter(|task| !is_thread || task.group == status.group);
                let chain = &others.next()?.chain;
                if others.any(|other| !Arc::ptr_eq(&other.chain, chain)) {
                    return None;
                }
                chain
            }
        };
        let same = status.mode == 2 && status.count.is_none_or(|count| count == chain.len());
        same.then_some(chain)
    }
}

/// Whether CRIU's code may run under these filters.
fn check(pid: i32, chain: &[Filter]) -> Result<(), SeccompError> {
    for filter in chain {
        for verdict in verdicts::of(&filter.instructions, &verdicts::NUMBERS) {
            if let Verdict::Other(action) = verdict {
                return Err(SeccompError::Profile { pid, action });
            }
        }
        for (call, number) in NEEDED {
            let number = number as u32;
            if verdicts::of(&filter.instructions, &(number..=number)).contains(&Verdict::Refused) {
                return Err(SeccompError::Needed { pid, call });
            }
        }
    }
    Ok(())
}

/// The threads of a process and of all processes below it, which is what CRIU
/// dumps.
pub(crate) fn tasks_below(root: i32) -> Result<Vec<i32>, SeccompError> {
    let mut tasks = Vec::new();
    let mut open = vec![root];
    while let Some(pid) = open.pop() {
        let path = PathBuf::from(format!("/proc/{pid}/task"));
        let threads = match threads(&path) {
            Ok(threads) => threads,
            // Ended in the meantime.
            Err(error) if pid != root && is_gone(&error) => continue,
            Err(source) => return Err(SeccompError::Proc { path, source }),
        };
        for tid in threads {
            let path = path.join(tid.to_string()).join("children");
            match fs::read_to_string(&path) {
                Ok(text) => open.extend(text.split_whitespace().flat_map(str::parse::<i32>)),
                Err(error) if is_gone(&error) => {}
                Err(source) => return Err(SeccompError::Proc { path, source }),
            }
            tasks.push(tid);
        }
    }
    Ok(tasks)
}

fn threads(directory: &Path) -> io::Result<Vec<i32>> {
    let mut threads = Vec::new();
    for entry in fs::read_dir(directory)? {
        threads.extend(
            entry?
                .file_name()
                .to_str()
                .and_then(|name| name.parse::<i32>().ok()),
        );
    }
    Ok(threads)
}

fn is_gone(error: &io::Error) -> bool {
    matches!(error.raw_os_error(), Some(libc::ENOENT | libc::ESRCH))
}

/// Where an [`Interceptor`](crate::Interceptor) finds the filters, once they have
/// been read.
#[derive(Debug, Clone, Default)]
pub struct SeccompSlot(Arc<OnceLock<SeccompFilters>>);

impl SeccompSlot {
    /// From now on CRIU can dump tasks with these filters. To be set before CRIU
    /// is told to go on at [`Action::PreDump`](crate::Action::PreDump).
    ///
    /// # Panics
    ///
    /// When it is set twice.
    pub fn set(&self, filters: SeccompFilters) {
        assert!(
            self.0.set(filters).is_ok(),
            "one dump has one set of filters"
        );
    }

    /// A task's filters.
    pub(crate) fn of(&self, tid: i32) -> Option<&[Filter]> {
        self.0.get()?.of(tid)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use verdicts::tests::{answer, profile};

    fn filter(instructions: Vec<[u8; 8]>) -> Filter {
        Filter {
            instructions,
            flags: 0,
        }
    }

    fn harmless() -> Filter {
        filter(profile(
            425,
            libc::SECCOMP_RET_ERRNO | 38,
            libc::SECCOMP_RET_ALLOW,
        ))
    }

    fn status(group: i32, count: usize) -> Status {
        Status {
            group,
            mode: 2,
            count: Some(count),
            ended: false,
        }
    }

    #[test]
    fn filters_that_refuse_are_fine_and_filters_that_kill_are_not() {
        assert!(check(1, &[harmless(), harmless()]).is_ok());
        let kills = profile(425, libc::SECCOMP_RET_KILL_PROCESS, libc::SECCOMP_RET_ALLOW);
        let error = check(1, &[harmless(), filter(kills)]).unwrap_err();
        assert!(matches!(error, SeccompError::Profile { pid: 1, .. }));
    }

    #[test]
    fn filters_that_keep_criu_from_letting_go_are_not_fine() {
        for (_, number) in NEEDED {
            let number = number as u32;
            let refuses = profile(number, libc::SECCOMP_RET_ERRNO | 1, libc::SECCOMP_RET_ALLOW);
            let error = check(1, &[filter(refuses)]).unwrap_err();
            assert!(matches!(error, SeccompError::Needed { .. }));
        }
        let all = vec![answer(libc::SECCOMP_RET_ERRNO | 1)];
        assert!(check(1, &[filter(all)]).is_err());
    }

    #[test]
    fn filters_are_known_as_long_as_their_number_is_the_same() {
        let mut filters = SeccompFilters::default();
        filters.add(10, 10, vec![harmless()]).unwrap();
        assert!(filters.known(10, &status(10, 1)).is_some());
        assert!(filters.known(10, &status(10, 2)).is_none());
    }

    #[test]
    fn a_new_process_has_the_filters_of_all_others_if_they_agree() {
        let mut filters = SeccompFilters::default();
        filters.add(10, 10, vec![harmless()]).unwrap();
        assert!(filters.known(20, &status(20, 1)).is_some());
        assert!(filters.known(20, &status(20, 2)).is_none());
        filters.some_have_none = true;
        assert!(filters.known(20, &status(20, 1)).is_none());
        filters.some_have_none = false;
        filters.add(11, 11, vec![harmless(), harmless()]).unwrap();
        assert!(filters.known(20, &status(20, 1)).is_none());
    }

    #[test]
    fn a_new_thread_has_the_filters_of_the_others_if_they_agree() {
        let mut filters = SeccompFilters::default();
        filters.add(10, 10, vec![harmless()]).unwrap();
        filters.add(11, 10, vec![harmless()]).unwrap();
        assert!(filters.known(12, &status(10, 1)).is_some());
        assert!(filters.known(12, &status(10, 2)).is_none());
        filters.add(13, 10, vec![harmless(), harmless()]).unwrap();
        assert!(filters.known(12, &status(10, 1)).is_none());
    }

    #[test]
    fn a_status_file_is_understood() {
        let text = "Name:\tsh\nState:\tS (sleeping)\nTgid:\t7\nSeccomp:\t2\nSeccomp_filters:\t3\n";
        assert_eq!(Status::parse(text), Some(status(7, 3)));
        let own = Status::of(std::process::id() as i32).unwrap();
        assert_eq!(own.group, std::process::id() as i32);
        assert!(!own.ended);
    }

    #[test]
    fn the_tasks_of_a_process_are_its_threads_and_those_of_its_children() {
        let mut child = std::process::Command::new("sleep")
            .arg("5")
            .spawn()
            .unwrap();
        let tasks = tasks_below(std::process::id() as i32).unwrap();
        assert!(tasks.contains(&(std::process::id() as i32)));
        assert!(tasks.contains(&(child.id() as i32)));
        child.kill().unwrap();
        child.wait().unwrap();
    }
}
