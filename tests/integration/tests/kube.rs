//! Pods under our runtime in a real Kubernetes cluster: what the kubelet, kubectl and
//! the controllers expect of a container holds.

use std::io::{BufRead, BufReader, Write};
use std::net::TcpStream;
use std::time::Duration;

use sterna_integration::{Cluster, SharedLab, eventually, eventually_within};

static LAB: SharedLab = SharedLab::new(8, |lab| {
    lab.cluster_up(2);
    if let Some(cluster) = lab.cluster() {
        cluster.import(&["valkey", "busybox"]);
    }
});

const VALKEY: &str = "docker.io/valkey/valkey:9";
const BUSYBOX: &str = "docker.io/library/busybox:1";
const PORT: u16 = 6379;
const PROBE: &str =
    r#""readinessProbe": { "exec": { "command": ["valkey-cli", "ping"] }, "periodSeconds": 1 }"#;

const PATIENCE: Duration = Duration::from_secs(120);

fn cluster() -> Option<Cluster<'static>> {
    LAB.get()?.cluster()
}

/// What Valkey in a pod answers.
fn ask(cluster: Cluster<'_>, pod: &str, words: &[&str]) -> String {
    let words = [&["exec", pod, "--", "valkey-cli"], words].concat();
    cluster.kubectl(&words).success().trim().to_owned()
}

fn other(node: &str) -> &'static str {
    if node == "a" { "b" } else { "a" }
}

#[test]
fn nodes_get_ready_and_offer_the_runtime() {
    let Some(cluster) = cluster() else { return };
    for node in ["node/a", "node/b"] {
        let ready = ".status.conditions[?(@.type=='Ready')].status";
        assert_eq!(cluster.field(node, ready), "True");
        let handlers = ".status.runtimeHandlers[?(@.name=='sterna')].features";
        let features = cluster.field(node, handlers);
        assert!(
            features.contains(r#""recursiveReadOnlyMounts":true"#)
                && features.contains(r#""userNamespaces":true"#),
            "containerd takes our shim for less than runc's: {features:?}"
        );
    }
}

#[test]
fn a_deployment_answers_by_the_name_of_its_service_on_every_node() {
    let Some(cluster) = cluster() else { return };
    let deployment = cluster.deploy("names", VALKEY, PORT, PROBE);
    let pod = deployment.pod();
    let shims = |name: &str| cluster.node(name).processes(&["containerd-shim-sterna-v1"]);
    let home = cluster.field(&format!("pod/{pod}"), ".spec.nodeName");
    assert!(!shims(&home).is_empty(), "our shim does not run on {home}");
    for (count, node) in (1..).zip(["a", "b"]) {
        let client = ["valkey-cli", "-h", "names", "incr", "hits"];
        let said = cluster.run_on(node, &format!("client-{node}"), VALKEY, &client);
        assert_eq!(said.trim(), count.to_string());
    }
}

#[test]
fn exec_logs_and_port_forward_reach_a_pod() {
    let Some(cluster) = cluster() else { return };
    let deployment = cluster.deploy("reach", VALKEY, PORT, PROBE);
    let pod = deployment.pod();
    assert_eq!(ask(cluster, &pod, &["set", "key", "value"]), "OK");
    let failure = cluster.kubectl(&["exec", &pod, "--", "sh", "-c", "exit 7"]);
    assert_eq!(failure.code(), 7);
    let echo = cluster.kubectl_with(&["exec", "-i", &pod, "--", "cat"], "there and back");
    assert_eq!(echo.success(), "there and back");
    let said = cluster.kubectl(&["logs", &pod]);
    assert!(said.success().contains("Ready to accept connections"));

    let mut forward = cluster.spawn(&["port-forward", &pod, "--address=127.0.0.1", ":6379"]);
    let line = forward.line(PATIENCE, |line| line.starts_with("Forwarding from"));
    let line = line.expect("kubectl forwards a port");
    let address = line.split_whitespace().nth(2).expect("it says from where");
    let mut stream = TcpStream::connect(address).expect("it listens");
    stream
        .set_read_timeout(Some(PATIENCE))
        .expect("a time limit");
    stream.write_all(b"GET key\r\n").expect("it is connected");
    let mut lines = BufReader::new(stream).lines();
    let mut answer = || lines.next().expect("a line").expect("it is connected");
    assert_eq!([answer(), answer()], ["$5", "value"]);
}

#[test]
fn a_drain_without_controllers_of_ours_evicts_as_usual() {
    let Some(cluster) = cluster() else { return };
    let deployment = cluster.deploy("drained", VALKEY, PORT, PROBE);
    let old = deployment.pod();
    let home = cluster.field(&format!("pod/{old}"), ".spec.nodeName");
    ask(cluster, &old, &["set", "key", "value"]);
    let drain = ["drain", &home, "--ignore-daemonsets", "--timeout=120s"];
    let drained = cluster.kubectl(&drain);
    cluster.kubectl(&["uncordon", &home]).success();
    assert!(
        drained.success().contains(&format!("pod/{old} evicted")),
        "{drained}"
    );
    let new = deployment.pod_other_than(&old);
    let node = cluster.field(&format!("pod/{new}"), ".spec.nodeName");
    assert_eq!(node, other(&home));
    assert_eq!(ask(cluster, &new, &["dbsize"]), "0");
    let left = format!("pod/{old}");
    eventually("the old pod is gone", || {
        (!cluster.kubectl(&["get", &left]).is_success()).then_some(())
    });
}

#[test]
fn restarts_of_containerd_and_the_kubelet_leave_pods_running() {
    let Some(cluster) = cluster() else { return };
    let deployment = cluster.deploy("steady", VALKEY, PORT, PROBE);
    let pod = deployment.pod();
    let object = format!("pod/{pod}");
    let home = cluster.node(&cluster.field(&object, ".spec.nodeName"));
    let container = |field: &str| {
        let path = format!(".status.containerStatuses[0].{field}");
        cluster.field(&object, &path)
    };
    let before = container("containerID");
    ask(cluster, &pod, &["set", "key", "value"]);
    for service in ["containerd", "kubelet"] {
        home.service("restart", service);
        eventually_within(PATIENCE, "the kubelet knows the pod again", || {
            let words = ["exec", &pod, "--", "valkey-cli", "get", "key"];
            let answer = cluster.kubectl(&words);
            answer.is_success().then_some(answer.stdout)
        });
        assert_eq!(ask(cluster, &pod, &["get", "key"]), "value");
    }
    assert_eq!(container("containerID"), before);
    assert_eq!(container("restartCount"), "0");
}

#[test]
fn a_container_that_uses_too_much_memory_is_reported_as_killed_for_it() {
    let Some(cluster) = cluster() else { return };
    let hog = r#""command": ["tail", "-c", "1000000000", "/dev/zero"],
        "resources": { "limits": { "memory": "32Mi" } }"#;
    let _deployment = cluster.deploy("hog", BUSYBOX, PORT, hog);
    let path = "jsonpath={.items[*].status.containerStatuses[*].lastState.terminated.reason}";
    eventually_within(PATIENCE, "the container is killed for memory", || {
        let pods = cluster.kubectl(&["get", "pods", "-lapp=hog", "-o", path]);
        pods.success().contains("OOMKilled").then_some(())
    });
}

#[test]
fn a_pod_is_given_other_resources_while_it_runs() {
    let Some(cluster) = cluster() else { return };
    let container =
        format!(r#"{PROBE}, "resources": {{ "requests": {{ "cpu": "100m", "memory": "32Mi" }} }}"#);
    let deployment = cluster.deploy("resized", VALKEY, PORT, &container);
    let pod = deployment.pod();
    let object = format!("pod/{pod}");
    let patch = r#"{"spec": {"containers": [{"name": "main", "resources": {"requests": {"cpu": "1m", "memory": "0"}}}]}}"#;
    let words = [
        "patch",
        &object,
        "--subresource",
        "resize",
        "--patch",
        patch,
    ];
    cluster.kubectl(&words).success();
    let given = ".status.containerStatuses[0].resources.requests.cpu";
    eventually_within(PATIENCE, "the kubelet has resized it", || {
        (cluster.field(&object, given) == "1m").then_some(())
    });
    assert_eq!(
        cluster.field(&object, ".status.containerStatuses[0].restartCount"),
        "0"
    );
}
