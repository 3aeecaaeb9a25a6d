//! Moments of a migration that are over in milliseconds, hit from outside: the files
//! that mark them are watched from the machine, which sees into every node, and so
//! are the processes killed.

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use nix::sys::signal::Signal;
use nix::unistd::Pid;

use crate::node::Node;

/// Longer than any migration of these tests takes to get there.
const PATIENCE: Duration = Duration::from_secs(120);

/// The first sight of a file.
#[derive(Debug)]
pub struct Moment {
    what: &'static str,
    directory: PathBuf,
    extension: &'static str,
    known: Vec<PathBuf>,
}

impl Moment {
    /// CRIU dumps: the source stands still.
    pub fn of_dump(source: &Node) -> Self {
        Self::new("dump", source, "run/sterna/staging", "img")
    }

    /// CRIU dumps into a directory of the node.
    pub fn of_dump_into(node: &Node, directory: &str) -> Self {
        Self::new("dump", node, directory.trim_start_matches('/'), "img")
    }

    /// The source's commit record is on disk; the word has not been sent yet.
    pub fn of_commit(source: &Node) -> Self {
        Self::new("commit", source, "run/sterna/commits", "json")
    }

    /// The destination has decided: the tasks are being let go there, or it is fenced.
    pub fn of_decision(destination: &Node) -> Self {
        Self::new("decision", destination, "run/sterna/arrivals", "decided")
    }

    fn new(what: &'static str, node: &Node, path: &str, extension: &'static str) -> Self {
        let directory = node.root().join(path);
        Self {
            what,
            known: files(&directory, extension),
            directory,
            extension,
        }
    }

    /// Waits for it, and returns within a fraction of a millisecond.
    #[track_caller]
    pub fn wait(&self) {
        let begun = Instant::now();
        while files(&self.directory, self.extension)
            .iter()
            .all(|file| self.known.contains(file))
        {
            assert!(
                begun.elapsed() < PATIENCE,
                "there was no {} within {} s",
                self.what,
                PATIENCE.as_secs()
            );
            std::thread::sleep(Duration::from_micros(50));
        }
    }
}

/// Those in the directory, and those in the directories in it.
fn files(directory: &Path, extension: &str) -> Vec<PathBuf> {
    let listed = |directory: &Path| {
        let listing = std::fs::read_dir(directory).into_iter().flatten().flatten();
        listing.map(|entry| entry.path()).collect::<Vec<_>>()
    };
    let mut all = listed(directory);
    all.extend(listed(directory).iter().flat_map(|below| listed(below)));
    all.retain(|path| path.extension().is_some_and(|found| found == extension));
    all
}

/// A process of a node, as the machine numbers it: to be killed without a detour
/// through the node.
#[derive(Debug)]
pub struct Victim(i32);

impl Victim {
    /// The one process of a node whose command line contains all of the words.
    #[track_caller]
    pub fn find(node: &Node, words: &[&str]) -> Self {
        let namespace = |process: &Path| std::fs::read_link(process.join("ns/pid")).ok();
        let wanted = node.root().parent().and_then(namespace);
        let found: Vec<i32> = std::fs::read_dir("/proc")
            .expect("there is a /proc")
            .flatten()
            .filter_map(|entry| entry.file_name().to_str()?.parse().ok())
            .filter(|pid| {
                let found = namespace(&PathBuf::from(format!("/proc/{pid}")));
                let line = std::fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
                let line = String::from_utf8_lossy(&line).replace('\0', " ");
                found == wanted && words.iter().all(|word| line.contains(word))
            })
            .collect();
        match found.as_slice() {
            [pid] => Self(*pid),
            _ => panic!(
                "there should be one process {words:?} on {}: {found:?}",
                node.name()
            ),
        }
    }

    /// Kills it, now.
    #[track_caller]
    pub fn kill(&self) {
        self.signal(Signal::SIGKILL);
    }

    /// Has it stand still: it is as slow as it takes.
    #[track_caller]
    pub fn stop(&self) {
        self.signal(Signal::SIGSTOP);
    }

    /// Has it go on after a stop.
    #[track_caller]
    pub fn go_on(&self) {
        self.signal(Signal::SIGCONT);
    }

    #[track_caller]
    fn signal(&self, signal: Signal) {
        let pid = Pid::from_raw(self.0);
        nix::sys::signal::kill(pid, signal)
            .unwrap_or_else(|error| panic!("cannot send {signal} to {pid}: {error}"));
    }
}
