//! The processes of a container.

use std::io;
use std::path::Path;

use crate::{PAGE_BYTES, SpaceId};

/// A process whose memory is to be moved.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Process {
    /// Its pid as we see it.
    pub pid: i32,
    /// Its pid in the innermost pid namespace, which it keeps when it moves.
    pub space: SpaceId,
}

/// The processes of a control group, by its `cgroup.procs` file.
///
/// Each once; threads are not processes, zombies have no memory, and one that ends meanwhile is left out.
///
/// # Errors
///
/// Those of reading the file; `InvalidData` if it or a process's status is not what we know.
pub fn processes_of_cgroup(procs_file: &Path) -> io::Result<Vec<Process>> {
    let mut pids = Vec::new();
    for line in std::fs::read_to_string(procs_file)?.lines() {
        let pid: i32 = line
            .trim()
            .parse()
            .map_err(|_| io::ErrorKind::InvalidData)?;
        // Zero stands for a process of another pid namespace.
        if pid > 0 {
            pids.push(pid);
        }
    }
    // Version 1 promises neither order nor uniqueness.
    pids.sort_unstable();
    pids.dedup();
    let mut processes = Vec::with_capacity(pids.len());
    for pid in pids {
        let Some(status) = read_unless_gone(&format!("/proc/{pid}/status"))? else {
            continue;
        };
        match parse_status(&status) {
            Status::Alive(space) => processes.push(Process { pid, space }),
            Status::Dead => {}
            Status::Unknown => return Err(io::ErrorKind::InvalidData.into()),
        }
    }
    Ok(processes)
}

enum Status {
    Alive(SpaceId),
    Dead,
    Unknown,
}

fn parse_status(status: &str) -> Status {
    let field = |name| {
        status
            .lines()
            .find_map(|line: &str| line.strip_prefix(name))
    };
    match field("State:").map(str::trim_start) {
        Some(state) if state.starts_with(['Z', 'X']) => return Status::Dead,
        Some(_) => {}
        None => return Status::Unknown,
    }
    // One pid for each namespace from ours inwards.
    match field("NSpid:").and_then(|pids| pids.split_ascii_whitespace().last()?.parse().ok()) {
        Some(pid) => Status::Alive(SpaceId(pid)),
        None => Status::Unknown,
    }
}

/// The pages that the stack pointers of a stopped or frozen process's threads point into, ascending.
///
/// A thread that runs has none: it is left out.
pub(crate) fn stack_pages(pid: i32) -> io::Result<Vec<u64>> {
    let mut pages = Vec::new();
    let tasks = match std::fs::read_dir(format!("/proc/{pid}/task")) {
        Ok(tasks) => tasks,
        Err(error) if is_gone(&error) => return Ok(pages),
        Err(error) => return Err(error),
    };
    for task in tasks {
        let path = task?.path().join("syscall");
        let Some(text) = read_unless_gone(&path.to_string_lossy())? else {
            continue;
        };
        if let Some(pointer) = parse_stack_pointer(&text) {
            pages.push(pointer - pointer % PAGE_BYTES as u64);
        }
    }
    pages.sort_unstable();
    pages.dedup();
    Ok(pages)
}

/// The stack pointer in the text of `/proc/PID/task/TID/syscall`: the last but one word of "number arguments sp pc", or
/// of "-1 sp pc" outside a system call. A thread that runs shows "running".
fn parse_stack_pointer(text: &str) -> Option<u64> {
    let pointer = text.split_ascii_whitespace().rev().nth(1)?;
    u64::from_str_radix(pointer.strip_prefix("0x")?, 16).ok()
}

/// The content of a file of /proc; `None` if the process is gone.
pub(crate) fn read_unless_gone(path: &str) -> io::Result<Option<String>> {
    match std::fs::read(path) {
        // A program may call itself anything; what we look for is plain text.
        Ok(text) => Ok(Some(String::from_utf8_lossy(&text).into_owned())),
        Err(error) if is_gone(&error) => Ok(None),
        Err(error) => Err(error),
    }
}

/// Whether an error means that the process ended: before the file was opened, or between that and the reading.
pub(crate) fn is_gone(error: &io::Error) -> bool {
    matches!(
        error.raw_os_error(),
        Some(nix::libc::ENOENT | nix::libc::ESRCH)
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_control_group_is_its_living_processes() {
        let mut zombie = std::process::Command::new("/bin/true").spawn().unwrap();
        let status = format!("/proc/{}/status", zombie.id());
        while !std::fs::read_to_string(&status)
            .unwrap()
            .contains("State:\tZ")
        {
            std::thread::yield_now();
        }
        let directory = tempfile::tempdir().unwrap();
        let procs = directory.path().join("cgroup.procs");
        let own = std::process::id();
        std::fs::write(
            &procs,
            format!("{own}\n{}\n0\n{own}\n{}\n", zombie.id(), i32::MAX),
        )
        .unwrap();
        let processes = processes_of_cgroup(&procs).unwrap();
        zombie.wait().unwrap();
        assert_eq!(processes.len(), 1);
        assert_eq!(processes[0].pid, i32::try_from(own).unwrap());
        std::fs::write(&procs, "no pid\n").unwrap();
        assert_eq!(
            processes_of_cgroup(&procs).unwrap_err().kind(),
            io::ErrorKind::InvalidData
        );
    }

    #[test]
    fn the_space_is_the_pid_of_the_innermost_namespace() {
        let Status::Alive(space) = parse_status("State:\tS (sleeping)\nNSpid:\t4711\t12\t1\n")
        else {
            panic!("alive");
        };
        assert_eq!(space, SpaceId(1));
        assert!(matches!(
            parse_status("State:\tZ (zombie)\nNSpid:\t7\n"),
            Status::Dead
        ));
        assert!(matches!(
            parse_status("State:\tS (sleeping)\n"),
            Status::Unknown
        ));
    }

    #[test]
    fn stack_pointers_are_read_in_and_outside_of_system_calls() {
        let text = "35 0x7ffd 0x0 0x0 0x8 0x7ff 0x0 0x7ffdbb0b1e88 0x7fe9d66a23c7\n";
        assert_eq!(parse_stack_pointer(text), Some(0x7ffd_bb0b_1e88));
        assert_eq!(
            parse_stack_pointer("-1 0x7ffdbb0b1e88 0x4011\n"),
            Some(0x7ffd_bb0b_1e88)
        );
        assert_eq!(parse_stack_pointer("running\n"), None);
    }

    #[test]
    fn a_sleeping_process_has_its_stack_page_on_its_stack() {
        let mut child = std::process::Command::new("/bin/sleep")
            .arg("10")
            .spawn()
            .unwrap();
        let pid = i32::try_from(child.id()).unwrap();
        let mut pages = stack_pages(pid);
        for _ in 0..1000 {
            if !matches!(&pages, Ok(pages) if pages.is_empty()) {
                break;
            }
            std::thread::sleep(std::time::Duration::from_millis(1));
            pages = stack_pages(pid);
        }
        // Between fork and exec the child shows our stack: look at the maps only once it sleeps.
        std::thread::sleep(std::time::Duration::from_millis(50));
        let maps = crate::maps::parse(&crate::maps::read(pid).unwrap()).unwrap();
        let pages = stack_pages(pid);
        child.kill().unwrap();
        child.wait().unwrap();
        match pages {
            Err(error) => println!("skipped: not permitted here: {error}"),
            Ok(pages) => {
                let stack = maps
                    .iter()
                    .find(|mapping| mapping.name() == b"[stack]")
                    .unwrap();
                assert_eq!(pages.len(), 1);
                assert!(stack.range.contains(&pages[0]));
            }
        }
    }
}
