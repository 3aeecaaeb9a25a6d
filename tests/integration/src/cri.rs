//! Pods as the kubelet makes them: over containerd's CRI, with crictl.

use std::time::Duration;

use serde_json::{Value, json};

use crate::node::Node;
use crate::output::Output;
use crate::wait::eventually;

/// The runtime handler of the nodes that leads to containerd's own shim.
pub const RUNC_HANDLER: &str = "runc";
/// The one that leads to ours.
pub const STERNA_HANDLER: &str = "sterna";

/// Where the logs of all pods are, and here also what they were made from.
const LOGS: &str = "/var/log/pods";

/// The CRI of a node, with one runtime handler.
#[derive(Debug, Clone, Copy)]
pub struct Cri<'lab> {
    node: &'lab Node,
    handler: &'static str,
}

impl<'lab> Cri<'lab> {
    /// Pods on that node under that handler.
    pub fn new(node: &'lab Node, handler: &'static str) -> Self {
        Self { node, handler }
    }

    /// The node that it is of.
    pub fn node(&self) -> &'lab Node {
        self.node
    }

    /// The runtime handler of its pods.
    pub fn handler(&self) -> &'static str {
        self.handler
    }

    /// `crictl` in the node.
    pub fn crictl(&self, words: &[&str]) -> Output {
        self.node.exec(&[&["crictl"], words].concat())
    }

    /// What `crictl` prints as JSON.
    #[track_caller]
    pub fn json(&self, words: &[&str]) -> Value {
        let output = self.crictl(words);
        serde_json::from_str(output.success())
            .unwrap_or_else(|error| panic!("{error} in the JSON of {output}"))
    }

    /// Runs a pod with a network of its own.
    #[track_caller]
    pub fn pod(&self, name: &str) -> Pod<'lab> {
        self.pod_with(name, |_| {})
    }

    /// [`Cri::pod`], with changes to its `PodSandboxConfig`.
    #[track_caller]
    pub fn pod_with(&self, name: &str, change: impl FnOnce(&mut Value)) -> Pod<'lab> {
        let mut config = json!({
            "metadata": { "name": name, "uid": format!("{name}-uid"), "namespace": "default" },
            "hostname": name,
            "log_directory": format!("{LOGS}/{name}"),
            "annotations": {},
            "linux": {
                "cgroup_parent": "/pods",
                "security_context": { "namespace_options": as_usual() },
            },
        });
        change(&mut config);
        let file = format!("{LOGS}/{name}/pod.json");
        self.node.write(&file, &config.to_string());
        let id = self.crictl(&["runp", "--runtime", self.handler, &file]);
        Pod {
            cri: *self,
            name: name.to_owned(),
            id: id.success().trim().to_owned(),
        }
    }
}

/// The namespaces of a pod of which nothing special was asked: its containers do
/// not see each other's processes (`NamespaceMode::CONTAINER`).
fn as_usual() -> Value {
    json!({ "pid": 1 })
}

/// A pod. Removed with this value: what a failed test leaves must not fail the next.
#[derive(Debug)]
pub struct Pod<'lab> {
    cri: Cri<'lab>,
    name: String,
    id: String,
}

impl<'lab> Pod<'lab> {
    /// Its id, which is that of its sandbox.
    pub fn id(&self) -> &str {
        &self.id
    }

    /// Whether its sandbox runs.
    #[track_caller]
    pub fn is_ready(&self) -> bool {
        let answer = self.cri.json(&["inspectp", &self.id]);
        answer["status"]["state"] == "SANDBOX_READY"
    }

    /// Creates a container of it that runs a shell script in busybox.
    #[track_caller]
    pub fn create(&self, name: &str, script: &str) -> PodContainer<'lab> {
        self.create_with(name, script, |_| {})
    }

    /// [`Pod::create`], with changes to its `ContainerConfig`.
    #[track_caller]
    pub fn create_with(
        &self,
        name: &str,
        script: &str,
        change: impl FnOnce(&mut Value),
    ) -> PodContainer<'lab> {
        let mut config = json!({
            "metadata": { "name": name },
            "image": { "image": "docker.io/library/busybox:1" },
            "command": ["sh", "-c", script],
            "log_path": format!("{name}.log"),
            "mounts": [],
            "linux": {
                "resources": {},
                "security_context": { "namespace_options": as_usual() },
            },
        });
        change(&mut config);
        let directory = format!("{LOGS}/{}", self.name);
        let (file, pod) = (
            format!("{directory}/{name}.json"),
            format!("{directory}/pod.json"),
        );
        self.cri.node.write(&file, &config.to_string());
        let id = self.cri.crictl(&["create", &self.id, &file, &pod]);
        let log = config["log_path"].as_str().unwrap_or_default();
        PodContainer {
            cri: self.cri,
            id: id.success().trim().to_owned(),
            log: format!("{directory}/{log}"),
        }
    }

    /// Creates a container and starts it.
    #[track_caller]
    pub fn start(&self, name: &str, script: &str) -> PodContainer<'lab> {
        self.start_with(name, script, |_| {})
    }

    /// [`Pod::start`], with changes to its `ContainerConfig`.
    #[track_caller]
    pub fn start_with(
        &self,
        name: &str,
        script: &str,
        change: impl FnOnce(&mut Value),
    ) -> PodContainer<'lab> {
        let container = self.create_with(name, script, change);
        self.cri.crictl(&["start", &container.id]).success();
        container
    }

    /// Stops and removes it, both of which has to work.
    #[track_caller]
    pub fn remove(self) {
        self.cri.crictl(&["stopp", &self.id]).success();
        self.cri.crictl(&["rmp", &self.id]).success();
    }
}

impl Drop for Pod<'_> {
    fn drop(&mut self) {
        // Nothing is left to remove if the test did that.
        self.cri.crictl(&["rmp", "--force", &self.id]);
        let logs = format!("{LOGS}/{}", self.name);
        self.cri.node.exec(&["rm", "-rf", &logs]);
    }
}

/// A container of a pod. It goes with the pod.
#[derive(Debug, Clone)]
pub struct PodContainer<'lab> {
    cri: Cri<'lab>,
    id: String,
    log: String,
}

impl PodContainer<'_> {
    /// Its id.
    pub fn id(&self) -> &str {
        &self.id
    }

    /// Where its log is on the node.
    pub fn log_path(&self) -> &str {
        &self.log
    }

    /// Stops it, with SIGKILL after the grace period.
    #[track_caller]
    pub fn stop(&self, grace: Duration) {
        let grace = grace.as_secs().to_string();
        let words = ["stop", "--timeout", &grace, &self.id];
        self.cri.crictl(&words).success();
    }

    /// What containerd says of it: its `ContainerStatus`.
    #[track_caller]
    pub fn status(&self) -> Value {
        self.cri.json(&["inspect", &self.id])["status"].take()
    }

    /// Whether it runs.
    #[track_caller]
    pub fn is_running(&self) -> bool {
        self.status()["state"] == "CONTAINER_RUNNING"
    }

    /// Its first process, as the node sees it.
    #[track_caller]
    pub fn pid(&self) -> u64 {
        let info = self.cri.json(&["inspect", &self.id]);
        info["info"]["pid"]
            .as_u64()
            .unwrap_or_else(|| panic!("there is no pid in {info}"))
    }

    /// Waits for its end; returns the exit code and the reason.
    #[track_caller]
    pub fn end(&self) -> (i64, String) {
        eventually("the container ends", || {
            let status = self.status();
            let reason = status["reason"].as_str().unwrap_or_default().to_owned();
            let ended = status["state"] == "CONTAINER_EXITED";
            ended.then(|| (status["exitCode"].as_i64().unwrap_or(-1), reason))
        })
    }

    /// Runs a command in it, to its end (`ExecSync`).
    pub fn try_exec(&self, words: &[&str]) -> Output {
        let exec = ["exec", "--sync", "--timeout", "30", &self.id];
        self.cri.crictl(&[&exec, words].concat())
    }

    /// Runs a command in it that has to succeed; returns what it printed, without the
    /// end of the last line, as crictl adds some.
    #[track_caller]
    pub fn exec(&self, words: &[&str]) -> String {
        self.try_exec(words).success().trim_end().to_owned()
    }

    /// What it has written to its log, without the times and tags of the format.
    pub fn log(&self) -> Vec<String> {
        self.log_at(&self.log)
    }

    /// [`PodContainer::log`] of a log that was moved.
    pub fn log_at(&self, path: &str) -> Vec<String> {
        let text = self.cri.node.exec(&["cat", path]).stdout;
        let lines = text.lines();
        lines
            .filter_map(|line| line.splitn(4, ' ').nth(3).map(str::to_owned))
            .collect()
    }
}
