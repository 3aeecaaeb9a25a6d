//! The example that is published for Architect: a Valkey, its Service, and somebody
//! on another node who uses it.

use std::time::Duration;

use crate::cluster::{Cluster, Objects};
use crate::node::Background;
use crate::wait::eventually_within;

/// Word for word.
const MANIFEST: &str = include_str!("../manifests/architect.yaml");
const CLIENT: &str = include_str!("../manifests/client.yaml");
const SELECTOR: &str = "app=valkey";

/// Counts in Valkey, with a connection for each step, and says what it is told and
/// when, in seconds of the machine's uptime.
const WRITER: &str = "while :; do
    step=$(timeout 2 valkey-cli -t 1 -h valkey incr writes)
    read -r now idle </proc/uptime
    echo $step $now
    sleep 0.02
done";

const PATIENCE: Duration = Duration::from_secs(120);

/// The example in a cluster; ends with this value.
#[derive(Debug)]
pub struct Published<'a> {
    cluster: Cluster<'a>,
    _objects: [Objects<'a>; 3],
}

impl<'a> Published<'a> {
    /// Starts it.
    pub fn start(cluster: Cluster<'a>) -> Self {
        let words = ["expose", "deployment", "valkey", "--port=6379"];
        let objects = [
            cluster.apply(MANIFEST),
            cluster.made(&words, "service/valkey"),
            cluster.apply(CLIENT),
        ];
        cluster.rolled_out("deployment/valkey");
        cluster.ready("pod/client");
        // A pod that runs does not listen yet, and kube-proxy has to hear of it.
        let ping = ["exec", "client", "--", "valkey-cli", "-h", "valkey", "ping"];
        eventually_within(PATIENCE, "the service answers", || {
            cluster.kubectl(&ping).is_success().then_some(())
        });
        Self {
            cluster,
            _objects: objects,
        }
    }

    /// The name of its pod, once that is ready.
    #[track_caller]
    pub fn pod_other_than(&self, not: &str) -> String {
        self.cluster.pod_other_than(SELECTOR, not)
    }

    /// What the client is told.
    #[track_caller]
    pub fn ask(&self, words: &[&str]) -> String {
        let client = ["exec", "client", "--", "valkey-cli", "-h", "valkey"];
        let answer = self.cluster.kubectl(&[&client, words].concat());
        answer.success().to_owned()
    }

    /// Has the client write a little of everything.
    pub fn fill(&self) {
        self.ask(&["hset", "bird", "name", "tern", "km", "70900"]);
        self.ask(&["lpush", "stops", "weddell", "walvis", "farne"]);
        self.ask(&["set", "greeting", "hello"]);
    }

    /// What has to be the same before and after.
    #[track_caller]
    pub fn answers(&self) -> [String; 4] {
        // Drawn by a Valkey that starts: another one is another process.
        let server = self.ask(&["info", "server"]);
        let run_id = server.lines().find(|line| line.starts_with("run_id:"));
        [
            self.ask(&["hgetall", "bird"]),
            self.ask(&["lrange", "stops", "0", "-1"]),
            self.ask(&["get", "greeting"]),
            run_id.expect("Valkey has a run id").to_owned(),
        ]
    }

    /// Has the client write all the time.
    pub fn write(&self) -> Writer {
        let words = ["exec", "client", "--", "sh", "-c", WRITER];
        let mut writer = Writer(self.cluster.spawn(&words));
        writer.goes_on();
        writer
    }
}

/// A client that writes all the time.
#[derive(Debug)]
pub struct Writer(Background);

impl Writer {
    /// The steps that it was told of, and when.
    fn steps(&mut self) -> Vec<(u64, f64)> {
        let lines = self.0.lines().iter();
        lines
            .filter_map(|line| {
                let (step, at) = line.split_once(' ')?;
                Some((step.parse().ok()?, at.parse().ok()?))
            })
            .collect()
    }

    /// Waits until it has written some more.
    #[track_caller]
    pub fn goes_on(&mut self) {
        let before = self.steps().len();
        eventually_within(PATIENCE, "the client writes", || {
            (self.steps().len() > before + 10).then_some(())
        });
    }

    /// Checks that no write was lost after it was acknowledged: it would have been
    /// counted twice.
    #[track_caller]
    pub fn lost_nothing(mut self, published: &Published<'_>) {
        let told = self.steps();
        drop(self);
        assert!(told.is_sorted_by(|a, b| a.0 < b.0), "{told:?}");
        let (last, _) = told[told.len() - 1];
        let now = published.ask(&["get", "writes"]);
        assert!(
            now.trim().parse().is_ok_and(|now: u64| now >= last),
            "{now}"
        );
        let gaps = told.windows(2).map(|two| two[1].1 - two[0].1);
        let gap = gaps.fold(0.0, f64::max);
        println!("longest time between two answers: {gap:.2} s");
    }
}
