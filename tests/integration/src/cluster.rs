//! A Kubernetes cluster on a lab's nodes, and workloads in it.

use std::process::Command;
use std::time::Duration;

use crate::lab::Lab;
use crate::node::{Background, Node};
use crate::output::Output;
use crate::wait::eventually_within;

/// A pod is there in seconds; a busy machine takes longer.
const PATIENCE: Duration = Duration::from_secs(120);

/// A cluster that runs.
#[derive(Debug, Clone, Copy)]
pub struct Cluster<'a> {
    lab: &'a Lab,
}

impl<'a> Cluster<'a> {
    pub(crate) fn new(lab: &'a Lab) -> Self {
        Self { lab }
    }

    /// The node with the control plane.
    pub fn control(&self) -> Node {
        self.lab.control()
    }

    /// One of its nodes, by name.
    #[track_caller]
    pub fn node(&self, name: &str) -> &'a Node {
        self.lab.node(name)
    }

    /// `kubectl`, as the administrator.
    pub fn kubectl(&self, words: &[&str]) -> Output {
        self.kubectl_with(words, "")
    }

    /// [`Cluster::kubectl`] with standard input.
    pub fn kubectl_with(&self, words: &[&str], input: &str) -> Output {
        let command = self.lab.hack("kube").args(&["kubectl"]).args(words);
        command.run_with(input.as_bytes())
    }

    /// `helm`, as the administrator; paths are the repository's.
    pub fn helm(&self, words: &[&str]) -> Output {
        self.lab.hack("kube").args(&["helm"]).args(words).run()
    }

    /// `kubectl sterna`, as the administrator.
    pub fn kubectl_sterna(&self, words: &[&str]) -> Output {
        let config = self.lab.hack("kube").args(&["kubeconfig"]).run();
        let mut command = Command::new(self.lab.program("kubectl-sterna"));
        command.args(words);
        command.env("KUBECONFIG", config.success().trim());
        Output::of(&mut command, b"")
    }

    /// Starts `kubectl` and lets it run.
    pub fn spawn(&self, words: &[&str]) -> Background {
        let command = self.lab.hack("kube").args(&["kubectl"]).args(words);
        Background::start(command.command())
    }

    /// A field of an object, by JSON path.
    #[track_caller]
    pub fn field(&self, object: &str, path: &str) -> String {
        let path = format!("jsonpath={{{path}}}");
        let output = self.kubectl(&["get", object, "-o", &path]);
        output.success().to_owned()
    }

    /// Brings images of `hack/images` to all nodes.
    pub fn import(&self, images: &[&str]) {
        self.lab.import_on_all(images);
    }

    /// Runs Sterna in it: sternad on all nodes, and the controller.
    pub fn sterna(&self) {
        self.lab.hack("kube").args(&["sterna"]).run().success();
    }

    /// Makes the objects of a manifest.
    #[must_use = "the objects go with it"]
    pub fn apply(self, manifest: &str) -> Objects<'a> {
        let made = self.kubectl_with(&["apply", "-o", "name", "-f", "-"], manifest);
        let names = made.success().lines().map(str::to_owned).collect();
        Objects {
            cluster: self,
            names,
        }
    }

    /// Makes an object with `kubectl`, otherwise than from a manifest.
    #[must_use = "the object goes with it"]
    pub fn made(self, words: &[&str], name: &str) -> Objects<'a> {
        self.kubectl(words).success();
        Objects {
            cluster: self,
            names: vec![name.to_owned()],
        }
    }

    /// Waits until all replicas of an object are there and ready.
    #[track_caller]
    pub fn rolled_out(&self, object: &str) {
        self.kubectl(&["rollout", "status", object, "--timeout=120s"])
            .success();
    }

    /// Drains a node as its administrator would, and takes it into use again.
    #[track_caller]
    pub fn drain(&self, node: &str) {
        let words = [
            "drain",
            node,
            "--ignore-daemonsets",
            "--delete-emptydir-data",
            "--timeout=150s",
        ];
        let drained = self.kubectl(&words);
        self.kubectl(&["uncordon", node]).success();
        drained.success();
    }

    /// Waits until a pod is ready.
    #[track_caller]
    pub fn ready(&self, object: &str) {
        self.kubectl(&["wait", "--for=condition=Ready", object, "--timeout=120s"])
            .success();
    }

    /// The names of the pods of a selector that are ready and are to stay.
    #[track_caller]
    pub fn pods(&self, selector: &str) -> Vec<String> {
        let selector = format!("-l{selector}");
        let path = "jsonpath={range .items[*]}{.metadata.name} \
            {.status.conditions[?(@.type=='Ready')].status} {.metadata.deletionTimestamp}{'\\n'}{end}";
        let pods = self.kubectl(&["get", "pods", &selector, "-o", path]);
        let lines = pods.success().lines();
        lines
            .filter_map(|line| {
                let words: Vec<_> = line.split_whitespace().collect();
                match words[..] {
                    [name, "True"] => Some(name.to_owned()),
                    _ => None,
                }
            })
            .collect()
    }

    /// The name of one pod of a selector that is ready and is to stay, other than `not`.
    #[track_caller]
    pub fn pod_other_than(&self, selector: &str, not: &str) -> String {
        eventually_within(PATIENCE, "the pod is ready", || {
            let pods = self.pods(selector);
            pods.into_iter().find(|name| name != not)
        })
    }

    /// The Migration of a pod, once it is over.
    #[track_caller]
    pub fn migration_of(&self, pod: &str) -> String {
        let path = "jsonpath={range .items[*]}{.metadata.name} {.spec.podName} {.status.phase}{'\\n'}{end}";
        eventually_within(PATIENCE, "its Migration is over", || {
            let all = self.kubectl(&["get", "migrations", "-o", path]);
            all.success().lines().find_map(|line| {
                let words: Vec<_> = line.split_whitespace().collect();
                match words[..] {
                    [name, of, "Succeeded" | "Failed" | "Cancelled"] if of == pod => {
                        Some(format!("migration/{name}"))
                    }
                    _ => None,
                }
            })
        })
    }

    /// Runs a pod of one container to its end, on the node, and returns what it said.
    pub fn run_on(&self, node: &str, name: &str, image: &str, command: &[&str]) -> String {
        let node = format!(r#"{{"spec": {{"nodeName": "{node}"}}}}"#);
        let image = format!("--image={image}");
        let words = ["run", name, &image, "--restart=Never", "--overrides", &node];
        let words = [&words[..], &["--command", "--"], command].concat();
        self.kubectl(&words).success();
        let object = format!("pod/{name}");
        let phase = eventually_within(PATIENCE, "the pod ends", || {
            let phase = self.field(&object, ".status.phase");
            matches!(phase.as_str(), "Succeeded" | "Failed").then_some(phase)
        });
        let said = self.kubectl(&["logs", name]).success().to_owned();
        assert_eq!(phase, "Succeeded", "{name} said: {said}");
        self.kubectl(&["delete", &object, "--wait=false"]).success();
        said
    }

    /// Starts a Deployment of one pod, under our runtime, with a Service of the same
    /// name. `container` is the rest of the container's description, in JSON.
    pub fn deploy(self, name: &str, image: &str, port: u16, container: &str) -> Deployment<'a> {
        let more = if container.is_empty() { "" } else { ", " };
        let manifest = format!(
            r#"
apiVersion: apps/v1
kind: Deployment
metadata: {{ name: {name} }}
spec:
  selector: {{ matchLabels: {{ app: {name} }} }}
  template:
    metadata: {{ labels: {{ app: {name} }} }}
    spec:
      runtimeClassName: sterna
      terminationGracePeriodSeconds: 5
      containers: [{{ "name": "main", "image": "{image}"{more}{container} }}]
---
apiVersion: v1
kind: Service
metadata: {{ name: {name} }}
spec: {{ selector: {{ app: {name} }}, ports: [{{ port: {port} }}] }}
"#
        );
        self.kubectl_with(&["apply", "-f", "-"], &manifest)
            .success();
        Deployment {
            cluster: self,
            name: name.to_owned(),
        }
    }
}

/// A Deployment and its Service, which go with this value.
#[derive(Debug)]
pub struct Deployment<'a> {
    cluster: Cluster<'a>,
    name: String,
}

impl Deployment<'_> {
    /// The name of the one pod that runs, is ready and is to stay, other than `not`.
    #[track_caller]
    pub fn pod_other_than(&self, not: &str) -> String {
        self.cluster
            .pod_other_than(&format!("app={}", self.name), not)
    }

    /// The pod, once it is ready.
    #[track_caller]
    pub fn pod(&self) -> String {
        self.pod_other_than("")
    }
}

impl Drop for Deployment<'_> {
    fn drop(&mut self) {
        let objects = [
            format!("deployment/{}", self.name),
            format!("service/{}", self.name),
        ];
        let words = ["delete", &objects[0], &objects[1], "--wait=false"];
        // The cluster goes with its nodes: what is left is of no harm.
        drop(self.cluster.kubectl(&words));
    }
}

/// Objects that go with this value.
#[derive(Debug)]
pub struct Objects<'a> {
    cluster: Cluster<'a>,
    names: Vec<String>,
}

impl Objects<'_> {
    /// Each as KIND/NAME.
    #[must_use]
    pub fn names(&self) -> &[String] {
        &self.names
    }
}

impl Drop for Objects<'_> {
    fn drop(&mut self) {
        let names = self.names.iter().map(String::as_str);
        let words = ["delete", "--wait=false", "--ignore-not-found"];
        let words: Vec<&str> = words.into_iter().chain(names).collect();
        // The cluster goes with its nodes: what is left is of no harm.
        drop(self.cluster.kubectl(&words));
    }
}
