//! Deployments of Valkey whose memory follows them.

use std::time::Duration;

use crate::cluster::{Cluster, Objects};
use crate::wait::eventually_within;

const PATIENCE: Duration = Duration::from_secs(120);

/// A Deployment of Valkeys; ends with this value.
#[derive(Debug)]
pub struct Caches<'a> {
    cluster: Cluster<'a>,
    name: String,
    _objects: Objects<'a>,
}

impl<'a> Caches<'a> {
    /// Starts so many, and waits until they are ready.
    pub fn start(cluster: Cluster<'a>, name: &str, replicas: u32) -> Self {
        let manifest = format!(
            r#"
apiVersion: apps/v1
kind: Deployment
metadata: {{ name: {name} }}
spec:
  replicas: {replicas}
  selector: {{ matchLabels: {{ app: {name} }} }}
  template:
    metadata:
      labels: {{ app: {name} }}
      annotations: {{ sterna.dev/managed-containers: '["cache"]' }}
    spec:
      runtimeClassName: sterna
      terminationGracePeriodSeconds: 5
      containers: [{{ name: cache, image: "valkey/valkey:9" }}]
"#
        );
        let objects = cluster.apply(&manifest);
        cluster.rolled_out(&format!("deployment/{name}"));
        Self {
            cluster,
            name: name.to_owned(),
            _objects: objects,
        }
    }

    /// The same, all of them on one of the nodes.
    pub fn start_on(cluster: Cluster<'a>, node: &str, name: &str, replicas: u32) -> Self {
        let full = ["a", "b", "c"].into_iter().filter(|other| *other != node);
        let full: Vec<&str> = full.collect();
        let others = |verb| cluster.kubectl(&[&[verb], &full[..]].concat());
        others("cordon").success();
        let caches = Self::start(cluster, name, replicas);
        others("uncordon").success();
        caches
    }

    /// So many pods, once they are ready and none is of `not`.
    #[track_caller]
    pub fn pods_other_than(&self, count: usize, not: &[String]) -> Vec<String> {
        let selector = format!("app={}", self.name);
        eventually_within(PATIENCE, "all pods are replaced and ready", || {
            let pods = self.cluster.pods(&selector);
            let replaced = pods.iter().all(|pod| !not.contains(pod));
            (pods.len() == count && replaced).then_some(pods)
        })
    }

    /// The one pod, once it is ready and another than `not`.
    #[track_caller]
    pub fn pod_other_than(&self, not: &str) -> String {
        let mut pods = self.pods_other_than(1, &[not.to_owned()]);
        pods.remove(0)
    }

    /// What the Valkey in a pod answers.
    #[track_caller]
    pub fn ask(&self, pod: &str, words: &[&str]) -> String {
        let words = [&["exec", pod, "--", "valkey-cli"], words].concat();
        self.cluster.kubectl(&words).success().trim().to_owned()
    }

    /// Drawn by a Valkey that starts: the same one is the same process.
    #[track_caller]
    pub fn run_id(&self, pod: &str) -> String {
        let server = self.ask(pod, &["info", "server"]);
        let line = server.lines().find(|line| line.starts_with("run_id:"));
        line.expect("Valkey has a run id").to_owned()
    }

    /// Gives it so much to remember.
    pub fn fill(&self, pod: &str, megabytes: u32) {
        let script = "for i = 1, ARGV[1] do \
            redis.call('set', i, string.rep(tostring(math.random()), 60000)) end";
        let megabytes = megabytes.to_string();
        self.ask(pod, &["eval", script, "0", &megabytes]);
    }
}
