//! One node, and commands in it.

use std::io::{BufRead, BufReader};
use std::path::PathBuf;
use std::process::{Child, ChildStdin, Command, Stdio};
use std::sync::mpsc::{Receiver, RecvTimeoutError, channel};
use std::time::{Duration, Instant};

use crate::lab::hack;
use crate::output::{Output, words};

/// Which Debian a node is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Flavour {
    /// criu 4.2, containerd 2.1, runc 1.3.
    Forky,
    /// criu 4.1, containerd 1.7, runc 1.1.
    Trixie,
}

impl Flavour {
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Forky => "forky",
            Self::Trixie => "trixie",
        }
    }
}

/// Which control groups a node sees.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Cgroup {
    /// One hierarchy for each controller.
    V1,
    /// One for all.
    V2,
}

impl Cgroup {
    /// What this machine has its controllers on: nodes that see the same have
    /// limits and counters.
    pub fn of_machine() -> Self {
        let groups = std::fs::read_to_string("/proc/self/cgroup").unwrap_or_default();
        let controllers = |line: &str| {
            let names = line.split(':').nth(1).unwrap_or_default();
            !names.is_empty() && !names.starts_with("name=")
        };
        if groups.lines().any(controllers) {
            Self::V1
        } else {
            Self::V2
        }
    }

    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::V1 => "v1",
            Self::V2 => "v2",
        }
    }
}

/// A running node.
#[derive(Debug, Clone)]
pub struct Node {
    lab: u8,
    name: String,
    flavour: Flavour,
    cgroup: Cgroup,
}

impl Node {
    pub(crate) fn new(lab: u8, name: &str, flavour: Flavour, cgroup: Cgroup) -> Self {
        Self {
            lab,
            name: name.to_owned(),
            flavour,
            cgroup,
        }
    }

    /// Its name, also its host name.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Which Debian it is.
    pub fn flavour(&self) -> Flavour {
        self.flavour
    }

    /// Which control groups it sees.
    pub fn cgroup(&self) -> Cgroup {
        self.cgroup
    }

    fn command(&self, words: &[&str]) -> Command {
        hack(self.lab, "nodes")
            .args(&["exec", &self.name, "--"])
            .args(words)
            .command()
    }

    /// Runs a command in the node.
    pub fn exec(&self, words: &[&str]) -> Output {
        self.exec_with(words, b"")
    }

    /// Runs a command in the node, with standard input.
    pub fn exec_with(&self, words: &[&str], input: &[u8]) -> Output {
        Output::of(&mut self.command(words), input)
    }

    /// Runs a command in the node, on a terminal of this machine.
    pub fn exec_on_terminal(&self, words: &[&str]) -> Output {
        Output::on_terminal(self.command(words))
    }

    /// Runs a shell script in the node; it ends with its first failure.
    pub fn sh(&self, script: &str) -> Output {
        self.exec(&["sh", "-euc", script])
    }

    /// `ctr` in the node.
    pub fn ctr(&self, words: &[&str]) -> Output {
        self.exec(&[&["ctr"], words].concat())
    }

    /// `sterna` in the node.
    pub fn sterna(&self, words: &[&str]) -> Output {
        self.exec(&[&["sterna"], words].concat())
    }

    /// Starts a command in the node and lets it run.
    pub fn spawn(&self, words: &[&str]) -> Background {
        Background::start(self.command(words))
    }

    /// Whether a shell condition holds in the node.
    pub fn holds(&self, condition: &str) -> bool {
        self.sh(condition).is_success()
    }

    /// The processes whose command line contains all of the words, as the node
    /// sees them.
    pub fn processes(&self, words: &[&str]) -> Vec<u32> {
        let listing = self.exec(&["ps", "-eo", "pid=,args="]);
        let lines = listing
            .success()
            .lines()
            .filter_map(|line| line.trim().split_once(' '));
        lines
            .filter(|(_, arguments)| words.iter().all(|word| arguments.contains(word)))
            .filter_map(|(pid, _)| pid.parse().ok())
            .collect()
    }

    /// Sends a signal to a process of the node.
    pub fn signal(&self, signal: &str, pid: u32) {
        self.exec(&["kill", "-s", signal, &pid.to_string()])
            .success();
    }

    /// Puts a file into the node.
    pub fn write(&self, path: &str, content: &str) {
        self.exec_with(
            &[
                "sh",
                "-c",
                "mkdir -p \"${1%/*}\" && cat >\"$1\"",
                "sh",
                path,
            ],
            content.as_bytes(),
        )
        .success();
    }

    /// A file of the node.
    pub fn read(&self, path: &str) -> String {
        self.exec(&["cat", path]).success().to_owned()
    }

    /// start, stop, kill or restart containerd or sternad.
    #[track_caller]
    pub fn service(&self, action: &str, service: &str) {
        hack(self.lab, "nodes")
            .args(&["service", &self.name, action, service])
            .run()
            .success();
    }

    /// Plugs or pulls the network cable.
    pub fn link(&self, state: &str) {
        hack(self.lab, "nodes")
            .args(&["link", &self.name, state])
            .run()
            .success();
    }

    /// The machine's end of the network cable. To pull that takes a millisecond,
    /// where [`link`](Self::link) takes fifty.
    pub fn device(&self) -> String {
        let address = self.address();
        let last = address.rsplit('.').next();
        let slot = last.and_then(|last| last.parse::<u8>().ok()?.checked_sub(11));
        // As hack/lib/network.sh numbers them.
        let slot = slot.unwrap_or_else(|| panic!("{address} is no node's"));
        format!("sterna{}-{slot}", self.lab)
    }

    /// Lets only so much through to the node, such as `100mbit`: what takes
    /// moments then takes seconds. The limit ends with the value; none where the
    /// kernel cannot do that.
    pub fn slow_link(&self, rate: &str) -> Option<SlowLink> {
        let device = self.device();
        let limit = [
            "root", "tbf", "rate", rate, "burst", "256kb", "latency", "200ms",
        ];
        let words = [&["qdisc", "replace", "dev", &device], &limit[..]].concat();
        let set = Output::of(Command::new("tc").args(words), b"");
        set.is_success().then_some(SlowLink { device })
    }

    /// Makes a network namespace whose eth0 has the address.
    pub fn netns(&self, name: &str, address: &str) {
        let address = format!("{address}/24");
        hack(self.lab, "nodes")
            .args(&["netns", &self.name, name, &address])
            .run()
            .success();
    }

    /// The node's address.
    pub fn address(&self) -> String {
        hack(self.lab, "nodes")
            .args(&["ip", &self.name])
            .run()
            .success()
            .trim()
            .to_owned()
    }

    /// The node's root directory as the machine sees it.
    pub fn root(&self) -> PathBuf {
        hack(self.lab, "nodes")
            .args(&["root", &self.name])
            .run()
            .success()
            .trim()
            .into()
    }

    /// What containerd or sternad said, from the end.
    pub fn log_tail(&self, service: &str) -> String {
        self.exec(&["tail", "-n", "40", &format!("/var/log/{service}.log")])
            .stdout
    }
}

/// A link that lets little through, until this ends.
#[derive(Debug)]
pub struct SlowLink {
    device: String,
}

impl Drop for SlowLink {
    fn drop(&mut self) {
        // Where the node is gone, so is the device.
        drop(
            Command::new("tc")
                .args(["qdisc", "del", "dev", &self.device, "root"])
                .output(),
        );
    }
}

/// A command that runs while a test goes on. Ends with this value.
#[derive(Debug)]
pub struct Background {
    command: String,
    child: Child,
    stdin: Option<ChildStdin>,
    lines: Receiver<String>,
    seen: Vec<String>,
    errors: Option<std::thread::JoinHandle<String>>,
}

impl Background {
    pub(crate) fn start(mut command: Command) -> Self {
        let name = words(&command);
        let mut child = command
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap_or_else(|error| panic!("cannot run {name}: {error}"));
        let stdin = child.stdin.take();
        let stdout = child.stdout.take().expect("it was asked for");
        let stderr = child.stderr.take().expect("it was asked for");
        let (sender, lines) = channel();
        std::thread::spawn(move || {
            for line in BufReader::new(stdout).lines() {
                let Ok(line) = line else { return };
                if sender.send(line).is_err() {
                    return;
                }
            }
        });
        let errors = std::thread::spawn(move || {
            std::io::read_to_string(stderr).unwrap_or_else(|error| error.to_string())
        });
        Self {
            command: name,
            child,
            stdin,
            lines,
            seen: Vec::new(),
            errors: Some(errors),
        }
    }

    /// Waits for a line of standard output. All lines before it are passed over;
    /// none if the command ends first.
    pub fn line(&mut self, within: Duration, wanted: impl Fn(&str) -> bool) -> Option<String> {
        let begun = Instant::now();
        loop {
            let left = within.saturating_sub(begun.elapsed());
            match self.lines.recv_timeout(left) {
                Ok(line) => {
                    self.seen.push(line.clone());
                    if wanted(&line) {
                        return Some(line);
                    }
                }
                Err(RecvTimeoutError::Disconnected) => return None,
                Err(RecvTimeoutError::Timeout) => panic!(
                    "{} did not say what was expected within {} s; it said:\n{}",
                    self.command,
                    within.as_secs(),
                    self.seen.join("\n")
                ),
            }
        }
    }

    /// All lines of standard output up to now.
    pub fn lines(&mut self) -> &[String] {
        self.seen.extend(self.lines.try_iter());
        &self.seen
    }

    /// Writes to its standard input.
    pub fn say(&mut self, line: &str) {
        use std::io::Write;
        let stdin = self
            .stdin
            .as_mut()
            .expect("its standard input was not closed");
        writeln!(stdin, "{line}")
            .unwrap_or_else(|error| panic!("{} does not listen: {error}", self.command));
    }

    /// Waits for its end, at most this long.
    #[track_caller]
    pub fn end(mut self, within: Duration) -> Output {
        drop(self.stdin.take());
        let status = crate::output::wait(&mut self.child, within).unwrap_or_else(|| {
            let lines = self.lines().join("\n");
            panic!(
                "{} still runs after {} s; it said:\n{lines}",
                self.command,
                within.as_secs()
            )
        });
        self.seen.extend(self.lines.iter());
        let errors = self.errors.take().map(std::thread::JoinHandle::join);
        let stderr = errors.and_then(Result::ok).unwrap_or_default();
        let mut stdout = self.seen.join("\n");
        stdout.push('\n');
        let output = std::process::Output {
            status,
            stdout: stdout.into_bytes(),
            stderr: stderr.into_bytes(),
        };
        Output::new(self.command.clone(), output)
    }

    /// Whether it has not ended yet.
    pub fn is_running(&mut self) -> bool {
        matches!(self.child.try_wait(), Ok(None))
    }

    /// Its process, as the machine sees it.
    pub fn pid(&self) -> u32 {
        self.child.id()
    }
}

impl Drop for Background {
    fn drop(&mut self) {
        crate::output::kill_all(&mut self.child);
    }
}
