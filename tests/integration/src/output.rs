//! What a command said and how it ended.

use std::io::{Read, Write};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

/// No command of a test takes this long, however slow the machine.
const PATIENCE: Duration = Duration::from_secs(180);
const POLL: Duration = Duration::from_millis(5);

/// The end of a command.
#[derive(Debug, Clone)]
pub struct Output {
    command: String,
    status: ExitStatus,
    /// Standard output.
    pub stdout: String,
    /// Standard error.
    pub stderr: String,
}

impl Output {
    /// Runs a command to its end, with `input` on its standard input.
    #[track_caller]
    pub(crate) fn of(command: &mut Command, input: &[u8]) -> Self {
        Self::of_within(command, input, PATIENCE)
    }

    /// [`Output::of`] with a deadline of its own.
    #[track_caller]
    pub(crate) fn of_within(command: &mut Command, input: &[u8], patience: Duration) -> Self {
        let name = words(command);
        let mut child = command
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap_or_else(|error| panic!("cannot run {name}: {error}"));
        let stdout = collect(child.stdout.take());
        let stderr = collect(child.stderr.take());
        if let Some(mut stdin) = child.stdin.take() {
            // A command that ends without reading everything is its own affair.
            drop(stdin.write_all(input));
        }
        let status = wait(&mut child, patience);
        if status.is_none() {
            kill_all(&mut child);
        }
        let (stdout, stderr) = (stdout.join(), stderr.join());
        let output = std::process::Output {
            status: status.unwrap_or_default(),
            stdout: stdout.unwrap_or_default(),
            stderr: stderr.unwrap_or_default(),
        };
        let output = Self::new(name, output);
        assert!(
            status.is_some(),
            "no end after {} s: {output}",
            patience.as_secs()
        );
        output
    }

    /// Runs a command to its end on a terminal; what it shows there is its standard output.
    ///
    /// The terminal controls no session: with a session's end goes what has not been read
    /// from its terminal yet.
    #[track_caller]
    pub(crate) fn on_terminal(mut command: Command) -> Self {
        let name = words(&command);
        let pty = nix::pty::openpty(None, None).expect("this machine has terminals");
        let end = || {
            pty.slave
                .try_clone()
                .expect("a descriptor can be duplicated")
        };
        let mut child = command
            .stdin(end())
            .stdout(end())
            .stderr(end())
            .spawn()
            .unwrap_or_else(|error| panic!("cannot run {name}: {error}"));
        // What is shown ends when nobody has the terminal any more, and so do we not.
        drop((command, pty.slave));
        let shown = collect(Some(std::fs::File::from(pty.master)));
        let status = wait(&mut child, PATIENCE);
        if status.is_none() {
            kill_all(&mut child);
        }
        let output = std::process::Output {
            status: status.unwrap_or_default(),
            stdout: shown.join().unwrap_or_default(),
            stderr: Vec::new(),
        };
        let output = Self::new(name, output);
        assert!(
            status.is_some(),
            "no end after {} s: {output}",
            PATIENCE.as_secs()
        );
        output
    }

    pub(crate) fn new(command: String, output: std::process::Output) -> Self {
        Self {
            command,
            status: output.status,
            stdout: String::from_utf8_lossy(&output.stdout).into_owned(),
            stderr: String::from_utf8_lossy(&output.stderr).into_owned(),
        }
    }

    /// Standard output of a command that has to succeed.
    #[track_caller]
    pub fn success(&self) -> &str {
        assert!(self.status.success(), "failed: {self}");
        &self.stdout
    }

    /// Everything that a command said that has to fail.
    #[track_caller]
    pub fn failure(&self) -> String {
        assert!(!self.status.success(), "should have failed: {self}");
        format!("{}{}", self.stdout, self.stderr)
    }

    /// Whether it succeeded.
    pub fn is_success(&self) -> bool {
        self.status.success()
    }

    /// The exit code; a command that a signal ended has none.
    #[track_caller]
    pub fn code(&self) -> i32 {
        self.status
            .code()
            .unwrap_or_else(|| panic!("ended by a signal: {self}"))
    }
}

impl std::fmt::Display for Output {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(
            f,
            "{}: {}\n--- standard output\n{}\n--- standard error\n{}",
            self.command, self.status, self.stdout, self.stderr
        )
    }
}

/// Reads a pipe to its end, so that its writer never has to wait.
fn collect(pipe: Option<impl Read + Send + 'static>) -> JoinHandle<Vec<u8>> {
    std::thread::spawn(move || {
        let mut bytes = Vec::new();
        if let Some(mut pipe) = pipe {
            // What was read before an error counts.
            drop(pipe.read_to_end(&mut bytes));
        }
        bytes
    })
}

/// Waits for the end of a process; none if that does not come in time.
pub(crate) fn wait(child: &mut Child, within: Duration) -> Option<ExitStatus> {
    let begun = Instant::now();
    loop {
        match child.try_wait() {
            Ok(Some(status)) => return Some(status),
            Ok(None) if begun.elapsed() < within => std::thread::sleep(POLL),
            Ok(None) => return None,
            Err(error) => panic!("cannot wait for a process: {error}"),
        }
    }
}

/// Kills a command of hack/nodes: the process that enters the node and the one
/// that it has started in there.
pub(crate) fn kill_all(child: &mut Child) {
    let pid = child.id();
    let children = std::fs::read_to_string(format!("/proc/{pid}/task/{pid}/children"));
    for inner in children.unwrap_or_default().split_whitespace() {
        drop(Command::new("kill").args(["-KILL", inner]).status());
    }
    drop(child.kill());
    drop(child.wait());
}

/// A command as a person would write it, near enough.
pub(crate) fn words(command: &Command) -> String {
    let arguments = command
        .get_args()
        .map(|word| word.to_string_lossy().into_owned());
    std::iter::once(command.get_program().to_string_lossy().into_owned())
        .chain(arguments)
        .collect::<Vec<_>>()
        .join(" ")
}
