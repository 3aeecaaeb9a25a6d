//! What goes wrong while a pod moves, and what is asked for that cannot be: nothing is
//! lost, and nothing starts from nothing in silence.

use std::time::Duration;

use sterna_integration::{Background, Caches, Cluster, SharedLab, SlowLink, eventually_within};

static LAB: SharedLab = SharedLab::new(14, |lab| {
    lab.cluster_up(3);
    if let Some(cluster) = lab.cluster() {
        cluster.import(&["valkey"]);
        cluster.sterna();
    }
});

const PATIENCE: Duration = Duration::from_secs(150);

/// On a link of this rate, so many megabytes take some seconds.
const SLOW: &str = "100mbit";
const MEGABYTES: u32 = 60;

fn cluster() -> Option<Cluster<'static>> {
    LAB.get()?.cluster()
}

fn home(cluster: Cluster<'_>, pod: &str) -> String {
    cluster.field(&format!("pod/{pod}"), ".spec.nodeName")
}

/// A drain under way; the node is taken into use again when it is over.
struct Drain<'a> {
    cluster: Cluster<'a>,
    node: String,
    drain: Background,
}

impl<'a> Drain<'a> {
    fn begin(cluster: Cluster<'a>, node: &str) -> Self {
        let words = [
            "drain",
            node,
            "--ignore-daemonsets",
            "--delete-emptydir-data",
        ];
        Self {
            cluster,
            node: node.to_owned(),
            drain: cluster.spawn(&words),
        }
    }

    fn end(self) {
        let ended = self.drain.end(PATIENCE);
        self.cluster.kubectl(&["uncordon", &self.node]).success();
        ended.success();
    }
}

/// The name of the pod that is to have the state, once it is known.
fn target(cluster: Cluster<'_>, pod: &str, not: &str) -> String {
    let path = "jsonpath={range .items[*]}{.spec.podName} {.status.phase} {.status.targetPod.name} \
        {.status.targetPod.node}{'\\n'}{end}";
    eventually_within(PATIENCE, "a replacement is claimed and sent to", || {
        let all = cluster.kubectl(&["get", "migrations", "-o", path]);
        all.success().lines().find_map(|line| {
            let words: Vec<_> = line.split_whitespace().collect();
            match words[..] {
                [of, "Transferring", target, _] if of == pod && target != not => {
                    Some(target.to_owned())
                }
                _ => None,
            }
        })
    })
}

/// A Valkey with something to carry, on a slow link.
struct Heavy<'a> {
    cluster: Cluster<'a>,
    caches: Caches<'a>,
    old: String,
    from: String,
    run_id: String,
    _slow: Vec<SlowLink>,
}

impl<'a> Heavy<'a> {
    fn start(cluster: Cluster<'a>, name: &str) -> Self {
        let caches = Caches::start(cluster, name, 1);
        let old = caches.pod_other_than("");
        caches.fill(&old, MEGABYTES);
        let (from, run_id) = (home(cluster, &old), caches.run_id(&old));
        // The other nodes' ends: what goes to them is slow.
        let others = ["a", "b", "c"].into_iter().filter(|node| *node != from);
        let slow = others.filter_map(|node| cluster.node(node).slow_link(SLOW));
        Self {
            _slow: slow.collect(),
            cluster,
            caches,
            old,
            from,
            run_id,
        }
    }

    /// It is the same process elsewhere.
    fn has_arrived(&self) {
        let new = self.caches.pod_other_than(&self.old);
        assert_ne!(home(self.cluster, &new), self.from);
        assert_eq!(self.caches.run_id(&new), self.run_id);
        let migration = self.cluster.migration_of(&self.old);
        assert_eq!(self.cluster.field(&migration, ".status.phase"), "Succeeded");
    }
}

#[test]
fn a_replacement_that_dies_while_memory_is_copied_is_given_up_for_another() {
    let Some(cluster) = cluster() else { return };
    let heavy = Heavy::start(cluster, "replaced");
    let drain = Drain::begin(cluster, &heavy.from);
    let first = target(cluster, &heavy.old, "");
    let delete = ["delete", "pod", &first, "--wait=false"];
    cluster.kubectl(&delete).success();
    drain.end();
    heavy.has_arrived();
    let new = heavy.caches.pod_other_than(&heavy.old);
    assert_ne!(new, first);
}

#[test]
fn a_controller_that_dies_while_a_pod_leaves_goes_on_when_it_is_back() {
    let Some(cluster) = cluster() else { return };
    let heavy = Heavy::start(cluster, "headless");
    let drain = Drain::begin(cluster, &heavy.from);
    target(cluster, &heavy.old, "");
    let control = cluster.control();
    control.service("kill", "sterna-controller");
    control.service("start", "sterna-controller");
    drain.end();
    heavy.has_arrived();
}

#[test]
fn agents_that_are_restarted_while_memory_is_copied_lose_nothing() {
    let Some(cluster) = cluster() else { return };
    for (name, of_source) in [("source", true), ("destination", false)] {
        let heavy = Heavy::start(cluster, name);
        let drain = Drain::begin(cluster, &heavy.from);
        let first = target(cluster, &heavy.old, "");
        let node = match of_source {
            true => heavy.from.clone(),
            false => home(cluster, &first),
        };
        cluster.node(&node).service("restart", "sternad");
        drain.end();
        heavy.has_arrived();
    }
}

#[test]
fn containerd_that_is_restarted_while_memory_is_copied_loses_nothing() {
    let Some(cluster) = cluster() else { return };
    for (name, of_source) in [("shim-source", true), ("shim-destination", false)] {
        let heavy = Heavy::start(cluster, name);
        let drain = Drain::begin(cluster, &heavy.from);
        let first = target(cluster, &heavy.old, "");
        let node = match of_source {
            true => heavy.from.clone(),
            false => home(cluster, &first),
        };
        cluster.node(&node).service("restart", "containerd");
        drain.end();
        heavy.has_arrived();
    }
}

#[test]
fn a_replacement_that_finds_no_node_at_first_is_waited_for_by_a_source_that_serves() {
    let Some(cluster) = cluster() else { return };
    let caches = Caches::start(cluster, "waited-for", 1);
    let old = caches.pod_other_than("");
    let (from, run_id) = (home(cluster, &old), caches.run_id(&old));
    let others: Vec<&str> = ["a", "b", "c"]
        .into_iter()
        .filter(|node| *node != from)
        .collect();
    cluster
        .kubectl(&[&["cordon"], &others[..]].concat())
        .success();
    let drain = Drain::begin(cluster, &from);
    eventually_within(PATIENCE, "the replacement is claimed", || {
        let path = "jsonpath={range .items[*]}{.spec.podName} {.status.phase}{'\\n'}{end}";
        let all = cluster.kubectl(&["get", "migrations", "-o", path]);
        all.success()
            .contains(&format!("{old} Matched"))
            .then_some(())
    });
    caches.ask(&old, &["set", "late", "write"]);
    cluster
        .kubectl(&[&["uncordon"], &others[..]].concat())
        .success();
    drain.end();
    let new = caches.pod_other_than(&old);
    assert_eq!(caches.run_id(&new), run_id);
    assert_eq!(caches.ask(&new, &["get", "late"]), "write");
}

/// The others of a node take no pods while this lives.
struct Alone<'a> {
    cluster: Cluster<'a>,
    others: Vec<&'static str>,
}

impl<'a> Alone<'a> {
    fn with(cluster: Cluster<'a>, node: &str) -> Self {
        let others = ["a", "b", "c"].into_iter().filter(|other| *other != node);
        let others: Vec<&str> = others.collect();
        cluster
            .kubectl(&[&["cordon"], &others[..]].concat())
            .success();
        Self { cluster, others }
    }
}

impl Drop for Alone<'_> {
    fn drop(&mut self) {
        let words = [&["uncordon"], &self.others[..]].concat();
        self.cluster.kubectl(&words).success();
    }
}

/// Waits until the state of a pod waits on its node.
fn waits(cluster: Cluster<'_>, pod: &str) {
    let path = "jsonpath={range .items[*]}{.spec.podName} \
        {.status.transfer.containers[0].phase}{'\\n'}{end}";
    eventually_within(PATIENCE, "its state waits", || {
        let all = cluster.kubectl(&["get", "migrations", "-o", path]);
        let line = format!("{pod} Parked");
        all.success()
            .lines()
            .any(|one| one.trim() == line)
            .then_some(())
    });
}

/// Whether anything waits on a node's disk.
fn keeps_a_state(cluster: Cluster<'_>, node: &str) -> bool {
    let condition = "test -n \"$(find /var/lib/sterna/parked -name 'pages-*' 2>/dev/null)\"";
    cluster.node(node).holds(condition)
}

#[test]
fn a_replacement_that_finds_no_node_for_long_gets_the_state_that_waits_for_it() {
    let Some(cluster) = cluster() else { return };
    let caches = Caches::start(cluster, "patient", 1);
    let old = caches.pod_other_than("");
    let (from, run_id) = (home(cluster, &old), caches.run_id(&old));
    let alone = Alone::with(cluster, &from);
    let drain = cluster.spawn(&["drain", &from, "--ignore-daemonsets"]);
    caches.ask(&old, &["set", "late", "write"]);
    waits(cluster, &old);
    drain.end(PATIENCE).success();
    assert!(keeps_a_state(cluster, &from));
    // It is on disk, whoever is restarted.
    cluster.node(&from).service("restart", "sternad");
    drop(alone);
    let new = caches.pod_other_than(&old);
    cluster.kubectl(&["uncordon", &from]).success();
    assert_ne!(home(cluster, &new), from);
    assert_eq!(caches.run_id(&new), run_id);
    assert_eq!(caches.ask(&new, &["get", "late"]), "write");
    let migration = cluster.migration_of(&old);
    assert_eq!(cluster.field(&migration, ".status.phase"), "Succeeded");
    eventually_within(PATIENCE, "nothing waits any more", || {
        (!keeps_a_state(cluster, &from)).then_some(())
    });
}

#[test]
fn a_replacement_that_a_quota_does_not_allow_yet_gets_the_state_that_waits_for_it() {
    let Some(cluster) = cluster() else { return };
    let caches = Caches::start(cluster, "within-quota", 1);
    let old = caches.pod_other_than("");
    let (from, run_id) = (home(cluster, &old), caches.run_id(&old));
    let quota = ["create", "quota", "no-more", "--hard=count/pods=1"];
    let quota = cluster.made(&quota, "quota/no-more");
    Drain::begin(cluster, &from).end();
    drop(quota);
    let new = caches.pod_other_than(&old);
    assert_eq!(caches.run_id(&new), run_id);
}

#[test]
fn a_state_that_waits_is_forgotten_when_nobody_wants_it_any_more() {
    let Some(cluster) = cluster() else { return };
    let caches = Caches::start(cluster, "given-up", 1);
    let old = caches.pod_other_than("");
    let from = home(cluster, &old);
    let _alone = Alone::with(cluster, &from);
    let drain = cluster.spawn(&["drain", &from, "--ignore-daemonsets"]);
    waits(cluster, &old);
    drain.end(PATIENCE).success();
    assert!(keeps_a_state(cluster, &from));
    cluster
        .kubectl(&["scale", "deployment/given-up", "--replicas=0"])
        .success();
    let migration = cluster.migration_of(&old);
    cluster.kubectl(&["uncordon", &from]).success();
    assert_eq!(cluster.field(&migration, ".status.phase"), "Cancelled");
    eventually_within(PATIENCE, "it is removed", || {
        (!keeps_a_state(cluster, &from)).then_some(())
    });
}

#[test]
fn a_rollout_while_memory_is_copied_calls_the_move_off() {
    let Some(cluster) = cluster() else { return };
    let heavy = Heavy::start(cluster, "overtaken");
    let drain = Drain::begin(cluster, &heavy.from);
    let first = target(cluster, &heavy.old, "");
    let change = ["set", "env", "deployment/overtaken", "COLOUR=blue"];
    cluster.kubectl(&change).success();
    drain.end();
    cluster.rolled_out("deployment/overtaken");
    let migration = cluster.migration_of(&heavy.old);
    assert_eq!(cluster.field(&migration, ".status.phase"), "Cancelled");
    let gone = [heavy.old.clone(), first];
    let new = heavy.caches.pods_other_than(1, &gone).remove(0);
    assert_eq!(heavy.caches.ask(&new, &["dbsize"]), "0");
}

#[test]
fn a_scale_down_while_memory_is_copied_calls_the_move_off() {
    let Some(cluster) = cluster() else { return };
    let heavy = Heavy::start(cluster, "unwanted");
    let drain = Drain::begin(cluster, &heavy.from);
    target(cluster, &heavy.old, "");
    let scale = ["scale", "deployment/unwanted", "--replicas=0"];
    cluster.kubectl(&scale).success();
    drain.end();
    let migration = cluster.migration_of(&heavy.old);
    assert_eq!(cluster.field(&migration, ".status.phase"), "Cancelled");
    eventually_within(PATIENCE, "no pod is left", || {
        let pods = cluster.kubectl(&["get", "pods", "-lapp=unwanted", "-o", "name"]);
        pods.success().is_empty().then_some(())
    });
}

#[test]
fn without_a_controller_a_pod_that_should_have_had_a_state_does_not_start_in_silence() {
    let Some(cluster) = cluster() else { return };
    let caches = Caches::start(cluster, "orphan", 1);
    let old = caches.pod_other_than("");
    let control = cluster.control();
    control.service("stop", "sterna-controller");
    Drain::begin(cluster, &home(cluster, &old)).end();
    let path = "jsonpath={.items[*].message}";
    eventually_within(
        PATIENCE,
        "the replacement says why it does not start",
        || {
            let events = cluster.kubectl(&["get", "events", "-o", path]);
            let said = "ended before it was decided who takes its state";
            events.success().contains(said).then_some(())
        },
    );
    assert!(cluster.pods("app=orphan").is_empty());
    control.service("start", "sterna-controller");
}

#[test]
fn kubectl_sterna_moves_a_pod_and_shows_it() {
    let Some(cluster) = cluster() else { return };
    let caches = Caches::start(cluster, "asked", 1);
    let old = caches.pod_other_than("");
    let (from, run_id) = (home(cluster, &old), caches.run_id(&old));
    cluster.kubectl(&["cordon", &from]).success();
    let moved = cluster.kubectl_sterna(&["migrate", &old]);
    cluster.kubectl(&["uncordon", &from]).success();
    assert!(moved.success().contains("Succeeded: freeze"), "{moved}");
    let new = caches.pod_other_than(&old);
    assert_eq!(caches.run_id(&new), run_id);
    let listed = cluster.kubectl_sterna(&["list"]);
    assert!(listed.success().contains(&old), "{listed}");
    let migration = cluster.migration_of(&old).replace("migration/", "");
    let described = cluster.kubectl_sterna(&["describe", &migration]);
    assert!(described.success().contains(&new), "{described}");
    let doctor = cluster.kubectl_sterna(&["doctor"]);
    assert!(
        doctor.success().contains("nothing is in the way"),
        "{doctor}"
    );

    let from = home(cluster, &new);
    let drained = cluster.kubectl_sterna(&["drain", &from]);
    cluster.kubectl(&["uncordon", &from]).success();
    assert!(
        drained.success().contains("1 of 1 pods have moved"),
        "{drained}"
    );
    let last = caches.pod_other_than(&new);
    assert_eq!(caches.run_id(&last), run_id);
}

#[test]
fn what_cannot_be_asked_for_is_refused_with_the_reason() {
    let Some(cluster) = cluster() else { return };
    let caches = Caches::start(cluster, "steady", 1);
    let pod = caches.pod_other_than("");
    let (node, run_id) = (home(cluster, &pod), caches.run_id(&pod));
    let manifest = r#"{"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "plain"},
        "spec": {"containers": [{"name": "c", "image": "valkey/valkey:9"}]}}"#;
    let _plain = cluster.apply(manifest);
    for (words, reason) in [
        (vec!["migrate", "plain"], "managed containers"),
        (vec!["migrate", "nobody"], "managed containers"),
        (vec!["migrate", &pod, "--to", &node], "already"),
        (vec!["migrate", &pod, "--to", "nowhere"], "no such node"),
    ] {
        let refused = cluster.kubectl_sterna(&words);
        let said = refused.failure();
        assert!(
            said.contains("Failed") && said.contains(reason),
            "{refused}"
        );
    }
    assert_eq!(caches.run_id(&pod), run_id);

    let bad = r#"
apiVersion: apps/v1
kind: Deployment
metadata: { name: bad }
spec:
  selector: { matchLabels: { app: bad } }
  template:
    metadata:
      labels: { app: bad }
      annotations: { sterna.dev/managed-containers: '["nobody"]' }
    spec:
      runtimeClassName: sterna
      terminationGracePeriodSeconds: 0
      containers: [{ name: cache, image: "valkey/valkey:9" }]
"#;
    let _bad = cluster.apply(bad);
    let path = "jsonpath={.items[*].status.conditions[?(@.type=='sterna.dev/Migratable')].message}";
    eventually_within(PATIENCE, "the pod says that it cannot be moved", || {
        let said = cluster.kubectl(&["get", "pods", "-lapp=bad", "-o", path]);
        said.success().contains(r#""nobody""#).then_some(())
    });
}
