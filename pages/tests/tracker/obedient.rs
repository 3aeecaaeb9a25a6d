//! A process that changes its memory when told to, and only then.

use std::collections::HashMap;
use std::io::{BufRead, BufReader, Lines, Write};
use std::os::unix::process::CommandExt;
use std::process::{Child, ChildStderr, ChildStdin, Command, Stdio};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use sterna_pages::{Process, SpaceId};
use sys::testing::Region;

use crate::helper::{ROLE, wait_until_stopped};
use crate::model::PAGE;

/// The process; killed when dropped.
pub(crate) struct Obedient {
    child: Child,
    commands: ChildStdin,
    answers: Lines<BufReader<ChildStderr>>,
    forked: Vec<i32>,
}

fn program() -> Command {
    let mut command = Command::new(std::env::current_exe().unwrap());
    command
        .args(["--exact", "another_role", "--nocapture", "--test-threads=1"])
        .env(ROLE, "obey");
    command
}

impl Obedient {
    pub(crate) fn start() -> Self {
        let mut child = program()
            .stdin(Stdio::piped())
            .stdout(Stdio::null())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        let commands = child.stdin.take().unwrap();
        let answers = BufReader::new(child.stderr.take().unwrap()).lines();
        let mut process = Self {
            child,
            commands,
            answers,
            forked: Vec::new(),
        };
        process.answer();
        process
    }

    pub(crate) fn pid(&self) -> i32 {
        i32::try_from(self.child.id()).unwrap()
    }

    pub(crate) fn process(&self) -> Process {
        Process {
            pid: self.pid(),
            space: SpaceId(1),
        }
    }

    /// Tells it to do something, waits until it is done, and returns what it says.
    pub(crate) fn tell(&mut self, command: &str) -> String {
        writeln!(self.commands, "{command}").unwrap();
        self.answer()
    }

    fn answer(&mut self) -> String {
        let answer = self.answers.next().unwrap().unwrap();
        answer
            .strip_prefix("done ")
            .unwrap_or_else(|| panic!("{answer}"))
            .to_owned()
    }

    pub(crate) fn fork(&mut self) -> Process {
        let pid: i32 = self.tell("fork").parse().unwrap();
        self.forked.push(pid);
        Process {
            pid,
            space: SpaceId(2),
        }
    }

    pub(crate) fn freeze(&self) {
        kill(Pid::from_raw(self.pid()), Signal::SIGSTOP).unwrap();
        wait_until_stopped(self.pid());
    }

    pub(crate) fn thaw(&self) {
        kill(Pid::from_raw(self.pid()), Signal::SIGCONT).unwrap();
    }

    /// A line of its status, in KiB.
    pub(crate) fn status_kib(&self, name: &str) -> u64 {
        let status = std::fs::read_to_string(format!("/proc/{}/status", self.pid())).unwrap();
        let line = status
            .lines()
            .find_map(|line| line.strip_prefix(name))
            .unwrap();
        line.trim().strip_suffix(" kB").unwrap().parse().unwrap()
    }
}

impl Drop for Obedient {
    fn drop(&mut self) {
        for pid in &self.forked {
            let _ended = kill(Pid::from_raw(*pid), Signal::SIGKILL);
        }
        let _ended = self.child.kill();
        let _reaped = self.child.wait();
    }
}

/// The part of the process. Ends with the commands.
pub(crate) fn run() {
    let mut regions = HashMap::new();
    // Also the answer to "exec", by what came of it.
    eprintln!("done starting");
    for command in std::io::stdin().lines() {
        let command = command.unwrap();
        let mut words = command.split(' ');
        let verb = words.next().unwrap();
        let numbers: Vec<u64> = words.map(|word| word.parse().unwrap()).collect();
        let answer = obey(&mut regions, verb, &numbers);
        eprintln!("done {answer}");
    }
}

fn obey(regions: &mut HashMap<u64, Region>, verb: &str, numbers: &[u64]) -> String {
    match (verb, numbers) {
        // Places and lengths are in pages.
        ("map", [place, pages]) => {
            let region = Region::map(Some(place * PAGE), pages * PAGE).unwrap();
            regions.insert(*place, region);
        }
        ("write", [place, first, pages, value]) => {
            for page in *first..first + pages {
                regions[place].write(page * PAGE + 8 * (page % 512), *value);
            }
        }
        ("read", [place, first, pages]) => {
            let sum: u64 = (*first..first + pages)
                .map(|page| regions[place].read(page * PAGE))
                .sum();
            return sum.to_string();
        }
        ("scatter", [place, pages, stride]) => {
            for page in (0..*pages).step_by(usize::try_from(*stride).unwrap()) {
                regions[place].write(page * PAGE, page);
            }
        }
        ("discard", [place, first, pages]) => {
            regions[place].discard(first * PAGE, pages * PAGE).unwrap();
        }
        ("move", [from, to]) => {
            let moved = regions.remove(from).unwrap().move_to(to * PAGE).unwrap();
            regions.insert(*to, moved);
        }
        ("unmap", [place]) => regions.remove(place).unwrap().unmap().unwrap(),
        ("fork", []) => {
            let child = sys::testing::fork(|| {
                for region in regions.values() {
                    region.write(0, 0xc41d);
                }
                loop {
                    std::thread::park();
                }
            });
            return child.unwrap().to_string();
        }
        ("exec", []) => {
            let error = program().exec();
            panic!("{error}");
        }
        _ => panic!("{verb} {numbers:?}"),
    }
    String::new()
}
