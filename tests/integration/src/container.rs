//! Containers as people start them, with ctr.

use crate::http::Http;
use crate::lab::Lab;
use crate::node::{Background, Cgroup, Node};
use crate::output::Output;
use crate::wait::eventually;

/// Sterna's name as a runtime.
pub const STERNA: &str = "io.containerd.sterna.v1";

/// The runtime under test. `STERNA_TEST_RUNTIME=io.containerd.runc.v2` shows
/// what containerd's own shim does in the same tests.
pub fn runtime() -> String {
    std::env::var("STERNA_TEST_RUNTIME").unwrap_or_else(|_| STERNA.to_owned())
}

/// A container that is to be.
#[derive(Debug, Clone)]
pub struct Container {
    name: String,
    image: &'static str,
    runtime: String,
    options: Vec<String>,
    command: Vec<String>,
    network: bool,
}

impl Container {
    /// A container of an image of hack/images. Its log is /var/log/NAME.log.
    pub fn new(name: &str, image: &str) -> Self {
        Self {
            name: name.to_owned(),
            image: reference(image),
            runtime: runtime(),
            options: Vec::new(),
            command: Vec::new(),
            network: false,
        }
    }

    /// A shell script in busybox.
    pub fn shell(name: &str, script: &str) -> Self {
        Self::new(name, "busybox").command(&["sh", "-c", script])
    }

    /// Valkey as its image's documentation starts it, without files.
    pub fn valkey(name: &str) -> Self {
        let words = [
            "valkey-server",
            "--save",
            "",
            "--protected-mode",
            "no",
            "--bind",
            "0.0.0.0",
        ];
        Self::new(name, "valkey").with_address().command(&words)
    }

    /// Instead of the image's command.
    pub fn command(mut self, words: &[&str]) -> Self {
        self.command = words.iter().map(|word| (*word).to_owned()).collect();
        self
    }

    /// More options of `ctr run`.
    pub fn options(mut self, words: &[&str]) -> Self {
        self.options
            .extend(words.iter().map(|word| (*word).to_owned()));
        self
    }

    /// Under another runtime.
    pub fn under(mut self, runtime: &str) -> Self {
        self.runtime = runtime.to_owned();
        self
    }

    /// In a network namespace of its own, with an address on the nodes' network.
    pub fn with_address(mut self) -> Self {
        self.network = true;
        self
    }

    fn words(&self, node: &Node, before: &[&str]) -> Vec<String> {
        let mut words: Vec<String> = ["ctr", "run", "--runtime", &self.runtime]
            .map(String::from)
            .into();
        if node.cgroup() == Cgroup::V2 && Cgroup::of_machine() == Cgroup::V1 {
            // ctr asks for CPU shares, and such a node has no controller for them.
            words.extend(["--cpu-shares", "0"].map(String::from));
        }
        words.extend(before.iter().map(|word| (*word).to_owned()));
        words.extend(self.options.iter().cloned());
        words.extend([self.image.to_owned(), self.name.clone()]);
        words.extend(self.command.iter().cloned());
        words
    }

    /// Runs it in the foreground, to its end, and removes it.
    pub fn run(&self, node: &Node) -> Output {
        self.run_with(node, b"")
    }

    /// [`Container::run`] with standard input.
    pub fn run_with(&self, node: &Node, input: &[u8]) -> Output {
        let words = self.words(node, &["--rm"]);
        node.exec_with(&borrowed(&words), input)
    }

    /// [`Container::run`] in the background, so that a test can talk to it.
    pub fn spawn(&self, node: &Node) -> Background {
        let words = self.words(node, &["--rm"]);
        node.spawn(&borrowed(&words))
    }

    /// [`Container::run`] on a terminal.
    pub fn run_on_terminal(&self, node: &Node) -> Output {
        node.exec_on_terminal(&borrowed(&self.words(node, &["--rm", "--tty"])))
    }

    /// Starts it detached, with a terminal that nobody looks at.
    #[track_caller]
    pub fn start_on_terminal<'lab>(&self, lab: &'lab Lab, node: &Node) -> Running<'lab> {
        let running = Running {
            lab,
            name: self.name.clone(),
            address: None,
        };
        let words = self.words(node, &["--detach", "--tty"]);
        node.exec_on_terminal(&borrowed(&words)).success();
        running
    }

    /// Starts it detached.
    #[track_caller]
    pub fn start<'lab>(&self, lab: &'lab Lab, node: &Node) -> Running<'lab> {
        let mut running = Running {
            lab,
            name: self.name.clone(),
            address: None,
        };
        let mut before = vec!["--detach".to_owned()];
        if !self
            .options
            .iter()
            .any(|word| word == "--log-uri" || word == "--null-io")
        {
            before.extend([
                "--log-uri".to_owned(),
                format!("file:///var/log/{}.log", self.name),
            ]);
        }
        if self.network {
            let address = lab.address();
            node.netns(&self.name, &address);
            before.extend([
                "--with-ns".to_owned(),
                format!("network:/run/netns/{}", self.name),
            ]);
            running.address = Some(address);
        }
        let words = self.words(node, &borrowed(&before));
        node.exec(&borrowed(&words)).success();
        running
    }
}

fn reference(image: &str) -> &'static str {
    match image {
        "valkey" => "docker.io/valkey/valkey:9",
        "busybox" => "docker.io/library/busybox:1",
        "python" => "docker.io/library/python:3",
        "nginx" => "docker.io/library/nginx:1",
        "node" => "docker.io/library/node:24",
        "goserver" => "localhost/goserver:1",
        _ => panic!("hack/images has no image {image}"),
    }
}

fn borrowed(words: &[String]) -> Vec<&str> {
    words.iter().map(String::as_str).collect()
}

/// A container that runs somewhere in a lab. Removed, wherever it is, with this
/// value: what a failed test leaves must not fail the next.
#[derive(Debug)]
pub struct Running<'lab> {
    lab: &'lab Lab,
    name: String,
    address: Option<String>,
}

impl<'lab> Running<'lab> {
    /// A container that something else has started or is about to start.
    pub fn expected(lab: &'lab Lab, name: &str) -> Self {
        Self {
            lab,
            name: name.to_owned(),
            address: None,
        }
    }

    /// Its name.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// The lab that it runs in.
    pub fn lab(&self) -> &'lab Lab {
        self.lab
    }

    /// Its own address.
    #[track_caller]
    pub fn address(&self) -> &str {
        self.address
            .as_deref()
            .expect("the container was started with an address")
    }

    /// A client connected to it, as soon as it serves.
    #[track_caller]
    pub fn http(&self) -> Http {
        let address = format!("{}:8080", self.address());
        eventually(&format!("{} serves", self.name), || {
            Http::connect(&address).ok()
        })
    }

    /// Runs a command in it, on the node where it is.
    pub fn exec(&self, node: &Node, words: &[&str]) -> Output {
        let id = format!("exec-{}", next());
        node.ctr(&[&["task", "exec", "--exec-id", &id, &self.name], words].concat())
    }

    /// containerd's word for its state on that node; none where it has no task.
    pub fn status(&self, node: &Node) -> Option<String> {
        let listing = node.ctr(&["task", "list"]);
        let mut tasks = listing
            .success()
            .lines()
            .map(|line| line.split_whitespace().collect::<Vec<_>>());
        let task = tasks.find(|fields| fields.first() == Some(&self.name.as_str()))?;
        task.last().map(|status| (*status).to_owned())
    }

    /// Its first process, as the node sees it.
    #[track_caller]
    pub fn pid(&self, node: &Node) -> u32 {
        let listing = node.ctr(&["task", "list"]);
        let mut tasks = listing
            .success()
            .lines()
            .map(|line| line.split_whitespace().collect::<Vec<_>>());
        let task = tasks.find(|fields| fields.first() == Some(&self.name.as_str()));
        let pid = task.and_then(|fields| fields.get(1)?.parse().ok());
        pid.unwrap_or_else(|| panic!("{} has no task on {}", self.name, node.name()))
    }

    /// What it has written to its log on that node.
    pub fn log(&self, node: &Node) -> String {
        node.exec(&["cat", &format!("/var/log/{}.log", self.name)])
            .stdout
    }

    /// Kills it and removes it as a person would, each step of which has to work.
    #[track_caller]
    pub fn delete(self, node: &Node) {
        node.ctr(&["task", "kill", "--signal", "SIGKILL", &self.name])
            .success();
        eventually("the killed container stops", || {
            (self.status(node).as_deref() == Some("STOPPED")).then_some(())
        });
        node.ctr(&["task", "delete", &self.name]).success();
        node.ctr(&["container", "delete", &self.name]).success();
    }
}

impl Drop for Running<'_> {
    fn drop(&mut self) {
        // Most of this usually fails, because there is nothing left to remove.
        let script =
            "ctr task delete --force \"$1\"; ctr container delete \"$1\"; ip netns delete \"$1\"";
        for node in self.lab.nodes() {
            node.exec(&["sh", "-c", script, "sh", &self.name]);
        }
    }
}

fn next() -> u64 {
    static NEXT: std::sync::atomic::AtomicU64 = std::sync::atomic::AtomicU64::new(1);
    NEXT.fetch_add(1, std::sync::atomic::Ordering::Relaxed)
}
