//! Processes to be tracked: this program, started again.

use std::collections::BTreeSet;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use sterna_pages::{Process, SpaceId};
use sys::churn::Churn;

/// Says what a program that was started again does.
pub(crate) const ROLE: &str = "STERNA_TRACKER_TEST_ROLE";

/// A process and its descendants; killed when dropped.
pub(crate) struct Helper(Child);

impl Helper {
    pub(crate) fn start(role: &str) -> Self {
        let child = Command::new(std::env::current_exe().unwrap())
            .args(["--exact", "another_role", "--nocapture", "--test-threads=1"])
            .env(ROLE, role)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .spawn()
            .unwrap();
        let helper = Self(child);
        // Until it has become the program, its memory is a copy of ours.
        let begin = Instant::now();
        while !std::fs::read(format!("/proc/{}/environ", helper.pid())).is_ok_and(|environment| {
            environment
                .windows(ROLE.len())
                .any(|w| w == ROLE.as_bytes())
        }) {
            assert!(begin.elapsed() < Duration::from_secs(10));
            std::thread::sleep(Duration::from_millis(1));
        }
        helper
    }

    pub(crate) fn churn(churn: Churn) -> Self {
        let Churn {
            seed,
            forks,
            guards,
            threads,
            pause,
        } = churn;
        let pause = pause.as_micros();
        Self::start(&format!("churn {seed} {forks} {guards} {threads} {pause}"))
    }

    pub(crate) fn pid(&self) -> i32 {
        i32::try_from(self.0.id()).unwrap()
    }

    pub(crate) fn has_ended(&mut self) -> bool {
        self.0.try_wait().unwrap().is_some()
    }

    /// The process and its living descendants.
    pub(crate) fn processes(&self) -> Vec<Process> {
        let mut family = BTreeSet::from([self.pid()]);
        let mut living = vec![self.pid()];
        // Children have larger pids than their parents, unless pids wrapped around.
        let mut all: Vec<i32> = std::fs::read_dir("/proc")
            .unwrap()
            .filter_map(|entry| entry.unwrap().file_name().to_str()?.parse().ok())
            .collect();
        all.sort_unstable();
        for pid in all {
            let Ok(stat) = std::fs::read_to_string(format!("/proc/{pid}/stat")) else {
                continue;
            };
            let mut fields = stat.rsplit_once(") ").unwrap().1.split(' ');
            let state = fields.next().unwrap();
            let parent: i32 = fields.next().unwrap().parse().unwrap();
            if family.contains(&parent) {
                family.insert(pid);
                if !matches!(state, "Z" | "X") {
                    living.push(pid);
                }
            }
        }
        let process = |pid| Process {
            pid,
            space: SpaceId(u32::try_from(pid).unwrap()),
        };
        living.into_iter().map(process).collect()
    }

    /// Stops everything and returns who was stopped.
    pub(crate) fn freeze(&self) -> Vec<Process> {
        loop {
            let before = self.processes();
            for process in &before {
                let _ended = kill(Pid::from_raw(process.pid), Signal::SIGSTOP);
            }
            for process in &before {
                wait_until_stopped(process.pid);
            }
            // What was forked before its parent stopped.
            let after = self.processes();
            if before.iter().map(|p| p.pid).eq(after.iter().map(|p| p.pid)) {
                return after;
            }
        }
    }

    pub(crate) fn thaw(&self, processes: &[Process]) {
        for process in processes {
            let _ended = kill(Pid::from_raw(process.pid), Signal::SIGCONT);
        }
    }
}

pub(crate) fn wait_until_stopped(pid: i32) {
    let begin = Instant::now();
    let stopped = |tid: &str| {
        let stat = std::fs::read_to_string(format!("/proc/{pid}/task/{tid}/stat"));
        let state = |stat: String| stat.rsplit_once(") ").map(|(_, rest)| rest.as_bytes()[0]);
        stat.ok()
            .and_then(state)
            .is_none_or(|state| matches!(state, b'T' | b'Z' | b'X'))
    };
    loop {
        let Ok(tasks) = std::fs::read_dir(format!("/proc/{pid}/task")) else {
            return;
        };
        let mut tasks = tasks.filter_map(|task| task.ok()?.file_name().into_string().ok());
        if tasks.all(|tid| stopped(&tid)) {
            return;
        }
        assert!(
            begin.elapsed() < Duration::from_secs(10),
            "process {pid} does not stop"
        );
        std::thread::sleep(Duration::from_micros(200));
    }
}

impl Drop for Helper {
    fn drop(&mut self) {
        for process in self.processes() {
            let _ended = kill(Pid::from_raw(process.pid), Signal::SIGKILL);
        }
        let _reaped = self.0.wait();
    }
}
