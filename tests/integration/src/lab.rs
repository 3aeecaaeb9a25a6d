//! A set of nodes of one's own.

use std::collections::BTreeMap;
use std::io::Write;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::OnceLock;
use std::sync::atomic::{AtomicU8, Ordering};
use std::time::Duration;

use crate::cluster::Cluster;
use crate::node::{Cgroup, Flavour, Node};
use crate::output::Output;

/// The first address that a container may have: below are nodes.
const FIRST_ADDRESS: u8 = 20;
const LAST_ADDRESS: u8 = 127;

/// `hack/kube` ends with this where the machine cannot have a cluster.
const UNAVAILABLE: i32 = 69;
/// The first time it compiles Kubernetes.
const COMPILING: Duration = Duration::from_secs(45 * 60);

/// Says that a test was not done, and why. `hack/test` counts these lines.
pub fn skip(reason: &str) {
    println!("skipped: {reason}");
    let Some(path) = std::env::var_os("STERNA_SKIPPED") else {
        return;
    };
    let mut file = std::fs::OpenOptions::new()
        .append(true)
        .create(true)
        .open(&path)
        .unwrap_or_else(|error| panic!("cannot open {}: {error}", path.display()));
    writeln!(file, "{reason}")
        .unwrap_or_else(|error| panic!("cannot write {}: {error}", path.display()));
}

/// A lab that the tests of one file share: booted by the first that asks, taken
/// down after the last.
#[derive(Debug)]
pub struct SharedLab {
    offset: u8,
    furnish: fn(&mut Lab),
    lab: OnceLock<Option<Lab>>,
}

impl SharedLab {
    /// `offset` is the file's own: no two files may have the same, because one
    /// may still be taken down while the next boots. `furnish` boots the nodes.
    pub const fn new(offset: u8, furnish: fn(&mut Lab)) -> Self {
        Self {
            offset,
            furnish,
            lab: OnceLock::new(),
        }
    }

    /// The lab; none where tests on real nodes are not wanted.
    pub fn get(&self) -> Option<&Lab> {
        if std::env::var_os("STERNA_INTEGRATION").is_none() {
            skip("tests on real nodes need root and STERNA_INTEGRATION=1 (hack/test sets it)");
            return None;
        }
        let mut first = false;
        let lab = self.lab.get_or_init(|| {
            first = true;
            let boot = std::panic::AssertUnwindSafe(|| {
                let mut lab = Lab::new(self.offset);
                (self.furnish)(&mut lab);
                lab
            });
            // A lab that does not boot fails every test, and is tried once.
            std::panic::catch_unwind(boot).ok()
        });
        match lab {
            Some(lab) => Some(lab),
            None if first => panic!("the lab did not boot (above: why)"),
            None => panic!("the lab did not boot"),
        }
    }
}

/// Nodes on one bridge, apart from all others.
#[derive(Debug)]
pub struct Lab {
    number: u8,
    bin: PathBuf,
    nodes: BTreeMap<String, Node>,
    /// Why there is no Kubernetes cluster on them.
    no_cluster: Option<String>,
    next_address: AtomicU8,
    /// Its end is the end of the lab, however this process ends.
    _watchdog: Child,
}

impl Lab {
    fn new(offset: u8) -> Self {
        let first: u8 = setting("STERNA_TEST_LAB", "20")
            .parse()
            .expect("STERNA_TEST_LAB is a number");
        let bin = setting(
            "STERNA_TEST_BIN",
            &format!("{}/target/release", repository().display()),
        );
        let number = first + offset;
        down(number);
        Self {
            number,
            bin: bin.into(),
            nodes: BTreeMap::new(),
            no_cluster: Some("nobody asked for a cluster".to_owned()),
            next_address: AtomicU8::new(FIRST_ADDRESS),
            _watchdog: watch(number),
        }
    }

    /// Boots nodes that are alike.
    pub fn up(&mut self, names: &[&str], flavour: Flavour, cgroup: Cgroup) {
        self.hack("nodes")
            .args(&["up", "--flavour", flavour.name(), "--cgroup", cgroup.name()])
            .arg("--bin")
            .arg(&self.bin)
            .args(names)
            .run()
            .success();
        for name in names {
            let node = Node::new(self.number, name, flavour, cgroup);
            self.nodes.insert((*name).to_owned(), node);
        }
    }

    /// Boots a Kubernetes cluster of so many nodes, with our runtime, if this
    /// machine can have one.
    pub fn cluster_up(&mut self, nodes: usize) {
        let up = self.hack("kube").args(&["up", "--bin"]).arg(&self.bin);
        self.boot_cluster(nodes, up);
    }

    /// The same on nodes that never heard of Sterna.
    pub fn bare_cluster_up(&mut self, nodes: usize) {
        let up = self.hack("kube").args(&["up"]);
        self.boot_cluster(nodes, up);
    }

    fn boot_cluster(&mut self, nodes: usize, up: Hack) {
        let count = nodes.to_string();
        let up = up.args(&["--nodes", &count]).run_within(COMPILING);
        if up.code() == UNAVAILABLE {
            let reason = up.stderr.lines().last().unwrap_or_default();
            self.no_cluster = Some(format!("no Kubernetes cluster here: {reason}"));
            return;
        }
        up.success();
        self.no_cluster = None;
        for name in ('a'..).take(nodes) {
            let name = name.to_string();
            let node = Node::new(self.number, &name, Flavour::Forky, Cgroup::of_machine());
            self.nodes.insert(name, node);
        }
    }

    /// The cluster; none, and said so, where the machine cannot have one.
    pub fn cluster(&self) -> Option<Cluster<'_>> {
        if let Some(reason) = &self.no_cluster {
            skip(reason);
            return None;
        }
        Some(Cluster::new(self))
    }

    pub(crate) fn import_on_all(&self, images: &[&str]) {
        let mut hack = self.hack("kube").args(&["images", "import"]).args(images);
        // Those of the chart are made of the programs that are tested.
        hack.0.env("STERNA_PROGRAMS", &self.bin);
        hack.run().success();
    }

    /// Makes the nodes trust each other and starts sternad on them.
    pub fn pair(&self, names: &[&str]) {
        self.hack("pair").args(names).run().success();
    }

    /// Brings images to a node.
    pub fn import(&self, node: &str, images: &[&str]) {
        self.hack("images")
            .args(&["import", node])
            .args(images)
            .run()
            .success();
    }

    /// Brings images to a node, for its CRI.
    pub fn import_for_pods(&self, node: &str, images: &[&str]) {
        self.hack("images")
            .args(&["import", "-n", "k8s.io", node])
            .args(images)
            .run()
            .success();
    }

    /// Brings `crictl` to a node. Where it cannot be built, the node has none.
    pub fn bring_crictl(&self, node: &str) {
        const CANNOT: i32 = 77;
        let built = self.hack("judge").arg("cri-tools").run();
        if built.code() == CANNOT {
            return;
        }
        let program = Path::new(built.success().trim()).join("crictl");
        let program = std::fs::read(&program)
            .unwrap_or_else(|error| panic!("cannot read {}: {error}", program.display()));
        let install = "cat >/usr/local/bin/crictl && chmod 755 /usr/local/bin/crictl
            echo 'runtime-endpoint: unix:///run/containerd/containerd.sock' >/etc/crictl.yaml";
        self.node(node)
            .exec_with(&["sh", "-c", install], &program)
            .success();
    }

    /// A node by its name.
    #[track_caller]
    pub fn node(&self, name: &str) -> &Node {
        self.nodes
            .get(name)
            .unwrap_or_else(|| panic!("the lab has no node {name}"))
    }

    /// All nodes.
    pub fn nodes(&self) -> impl Iterator<Item = &Node> {
        self.nodes.values()
    }

    /// An address that no container of this lab has had.
    pub fn address(&self) -> String {
        let last = self.next_address.fetch_add(1, Ordering::Relaxed);
        assert!(last <= LAST_ADDRESS, "the lab is out of addresses");
        format!("10.77.{}.{last}", self.number)
    }

    /// The machine's own address on the nodes' network.
    pub fn machine(&self) -> String {
        format!("10.77.{}.1", self.number)
    }

    /// The program of that name, as the machine runs it.
    pub fn program(&self, name: &str) -> PathBuf {
        self.bin.join(name)
    }

    /// The node with a cluster's control plane.
    pub(crate) fn control(&self) -> Node {
        let cgroup = Cgroup::of_machine();
        Node::new(self.number, "control", Flavour::Forky, cgroup)
    }

    pub(crate) fn hack(&self, script: &str) -> Hack {
        hack(self.number, script)
    }
}

/// One of the scripts in hack/, about one lab.
pub(crate) struct Hack(Command);

pub(crate) fn hack(lab: u8, script: &str) -> Hack {
    let mut command = Command::new(repository().join("hack").join(script));
    command
        .current_dir(repository())
        .env("STERNA_LAB", lab.to_string());
    Hack(command)
}

impl Hack {
    pub(crate) fn arg(mut self, word: impl AsRef<std::ffi::OsStr>) -> Self {
        self.0.arg(word);
        self
    }

    pub(crate) fn args(mut self, words: &[&str]) -> Self {
        self.0.args(words);
        self
    }

    pub(crate) fn run(self) -> Output {
        self.run_with(b"")
    }

    pub(crate) fn run_with(mut self, input: &[u8]) -> Output {
        Output::of(&mut self.0, input)
    }

    fn run_within(mut self, patience: Duration) -> Output {
        Output::of_within(&mut self.0, b"", patience)
    }

    pub(crate) fn command(self) -> Command {
        self.0
    }
}

/// The repository that this crate is part of.
pub(crate) fn repository() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .parent()
        .and_then(Path::parent)
        .expect("the crate is two directories below the repository's root")
}

fn setting(name: &str, default: &str) -> String {
    std::env::var(name).unwrap_or_else(|_| default.to_owned())
}

fn down(number: u8) {
    hack(number, "nodes")
        .args(&["down", "--all"])
        .run()
        .success();
}

/// A process that takes the lab down when this one ends, because then its
/// standard input does. A static is never dropped, and a test that was killed
/// drops nothing.
fn watch(number: u8) -> Child {
    Command::new("sh")
        .args(["-c", "read -r line; exec \"$0\" down --all"])
        .arg(repository().join("hack/nodes"))
        .env("STERNA_LAB", number.to_string())
        .stdin(Stdio::piped())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        // Out of reach of a Ctrl-C, which ends this process.
        .process_group(0)
        .spawn()
        .expect("a shell can be started")
}
