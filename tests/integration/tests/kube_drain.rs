//! A pod that is drained from its node arrives on another with its memory; one that
//! nobody wants any more, or that was deleted, does not.

use std::collections::BTreeSet;
use std::time::Duration;

use sterna_integration::{Caches, Cluster, Published, SharedLab, eventually, eventually_within};

static LAB: SharedLab = SharedLab::new(12, |lab| {
    lab.cluster_up(3);
    if let Some(cluster) = lab.cluster() {
        cluster.import(&["valkey", "busybox"]);
        cluster.sterna();
    }
});

const PATIENCE: Duration = Duration::from_secs(120);

fn cluster() -> Option<Cluster<'static>> {
    LAB.get()?.cluster()
}

fn home(cluster: Cluster<'_>, pod: &str) -> String {
    cluster.field(&format!("pod/{pod}"), ".spec.nodeName")
}

#[test]
fn architects_published_manifest_is_drained_and_answers_the_same_from_another_node() {
    let Some(cluster) = cluster() else { return };
    let published = Published::start(cluster);
    let old = published.pod_other_than("");
    let (from, client) = (home(cluster, &old), home(cluster, "client"));
    published.fill();
    let before = published.answers();
    let mut writer = published.write();

    cluster.drain(&from);
    cluster.rolled_out("deployment/valkey");
    let new = published.pod_other_than(&old);
    assert_ne!(home(cluster, &new), from);
    assert_ne!(home(cluster, &new), client);
    assert_eq!(published.answers(), before);
    writer.goes_on();
    writer.lost_nothing(&published);

    let migration = cluster.migration_of(&old);
    assert_eq!(cluster.field(&migration, ".status.phase"), "Succeeded");
    assert_eq!(cluster.field(&migration, ".status.targetPod.name"), new);
    let condition = ".status.conditions[?(@.type=='sterna.dev/Migrated')].status";
    let object = format!("pod/{new}");
    eventually("the pod says that it was migrated", || {
        (cluster.field(&object, condition) == "True").then_some(())
    });
    let label = r".metadata.labels.status\.architect\.loopholelabs\.io/valkey";
    eventually("the pod says that its container runs", || {
        (cluster.field(&object, label) == "RUNNING").then_some(())
    });
}

fn has_no_migration(cluster: Cluster<'_>, pod: &str) -> bool {
    let path = "jsonpath={.items[*].spec.podName}";
    let all = cluster.kubectl(&["get", "migrations", "-o", path]);
    !all.success().split_whitespace().any(|name| name == pod)
}

#[test]
fn three_replicas_that_are_drained_together_keep_each_its_own_memory() {
    let Some(cluster) = cluster() else { return };
    let caches = Caches::start_on(cluster, "a", "three", 3);
    let old = caches.pods_other_than(3, &[]);
    for pod in &old {
        assert_eq!(home(cluster, pod), "a");
        caches.ask(pod, &["set", "owner", pod]);
    }
    cluster.drain("a");
    let new = caches.pods_other_than(3, &old);
    let kept = new.iter().map(|pod| caches.ask(pod, &["get", "owner"]));
    let kept: BTreeSet<String> = kept.collect();
    assert_eq!(kept, BTreeSet::from_iter(old.clone()));
    for pod in &old {
        let migration = cluster.migration_of(pod);
        assert_eq!(cluster.field(&migration, ".status.phase"), "Succeeded");
    }
}

#[test]
fn a_pod_that_is_deleted_by_hand_is_replaced_by_an_empty_one() {
    let Some(cluster) = cluster() else { return };
    let caches = Caches::start(cluster, "deleted", 1);
    let old = caches.pod_other_than("");
    caches.ask(&old, &["set", "key", "value"]);
    cluster.kubectl(&["delete", "pod", &old]).success();
    let new = caches.pod_other_than(&old);
    assert_eq!(caches.ask(&new, &["dbsize"]), "0");
    assert!(has_no_migration(cluster, &old));
}

#[test]
fn a_rollout_to_a_new_template_carries_no_memory_over() {
    let Some(cluster) = cluster() else { return };
    let caches = Caches::start(cluster, "rolled", 1);
    let old = caches.pod_other_than("");
    caches.ask(&old, &["set", "key", "value"]);
    let change = ["set", "env", "deployment/rolled", "COLOUR=blue"];
    cluster.kubectl(&change).success();
    cluster.rolled_out("deployment/rolled");
    let new = caches.pod_other_than(&old);
    assert_eq!(caches.ask(&new, &["dbsize"]), "0");
    assert!(has_no_migration(cluster, &old));
}

#[test]
fn what_was_scaled_down_is_forgotten() {
    let Some(cluster) = cluster() else { return };
    let caches = Caches::start(cluster, "scaled", 1);
    let old = caches.pod_other_than("");
    caches.ask(&old, &["set", "key", "value"]);
    for replicas in ["--replicas=0", "--replicas=1"] {
        let scale = ["scale", "deployment/scaled", replicas];
        cluster.kubectl(&scale).success();
    }
    let new = caches.pod_other_than(&old);
    assert_eq!(caches.ask(&new, &["dbsize"]), "0");
    assert!(has_no_migration(cluster, &old));
}

/// Drains a Job that counts, and says where it began again.
fn count_through_a_drain(cluster: Cluster<'_>, name: &str, replacement: &str) {
    let job = format!(
        r#"
apiVersion: batch/v1
kind: Job
metadata: {{ name: {name} }}
spec:
  podReplacementPolicy: {replacement}
  template:
    metadata:
      labels: {{ app: {name} }}
      annotations: {{ sterna.dev/managed-containers: '["count"]' }}
    spec:
      runtimeClassName: sterna
      restartPolicy: Never
      terminationGracePeriodSeconds: 5
      containers:
        - name: count
          image: busybox:1
          command: [sh, -c, 'i=0; until [ -e /enough ]; do i=$((i+1)); echo $i; sleep 0.05; done']
"#
    );
    let _objects = cluster.apply(&job);
    let selector = format!("app={name}");
    let old = cluster.pod_other_than(&selector, "");
    let numbers = |pod: &str| -> Vec<u64> {
        let said = cluster.kubectl(&["logs", pod]);
        let lines = said.stdout.lines();
        lines.filter_map(|line| line.parse().ok()).collect()
    };
    eventually_within(PATIENCE, "it counts", || {
        (numbers(&old).len() > 20).then_some(())
    });
    let counted = numbers(&old).len() as u64;
    cluster.drain(&home(cluster, &old));
    let new = cluster.pod_other_than(&selector, &old);
    let first = eventually_within(PATIENCE, "it counts again", || {
        numbers(&new).first().copied()
    });
    assert!(first > counted, "it begins with {first} after {counted}");
    cluster
        .kubectl(&["exec", &new, "--", "touch", "/enough"])
        .success();
    let object = format!("job/{name}");
    eventually_within(PATIENCE, "the Job is complete", || {
        (cluster.field(&object, ".status.succeeded") == "1").then_some(())
    });
    let all = numbers(&new);
    let expected: Vec<u64> = (first..first + all.len() as u64).collect();
    assert_eq!(all, expected);
}

#[test]
fn a_job_that_is_drained_goes_on_counting_and_completes() {
    let Some(cluster) = cluster() else { return };
    count_through_a_drain(cluster, "count", "TerminatingOrFailed");
}

#[test]
fn a_job_that_replaces_only_what_has_failed_goes_on_counting_and_completes() {
    let Some(cluster) = cluster() else { return };
    count_through_a_drain(cluster, "count-late", "Failed");
}

#[test]
fn a_stateful_sets_pod_that_is_drained_comes_back_elsewhere_with_its_memory() {
    let Some(cluster) = cluster() else { return };
    let set = r#"
apiVersion: apps/v1
kind: StatefulSet
metadata: { name: ordered }
spec:
  serviceName: ordered
  selector: { matchLabels: { app: ordered } }
  template:
    metadata:
      labels: { app: ordered }
      annotations: { sterna.dev/managed-containers: '["cache"]' }
    spec:
      runtimeClassName: sterna
      terminationGracePeriodSeconds: 5
      containers: [{ name: cache, image: "valkey/valkey:9" }]
"#;
    let _objects = cluster.apply(set);
    cluster.rolled_out("statefulset/ordered");
    let pod = "pod/ordered-0";
    let ask = |words: &[&str]| -> String {
        let words = [&["exec", "ordered-0", "--"], words].concat();
        cluster.kubectl(&words).success().trim().to_owned()
    };
    let run_id = || -> String {
        let server = ask(&["valkey-cli", "info", "server"]);
        let line = server.lines().find(|line| line.starts_with("run_id:"));
        line.expect("Valkey has a run id").to_owned()
    };
    let migratable = ".status.conditions[?(@.type=='sterna.dev/Migratable')].status";
    eventually("the pod says that it can be moved", || {
        (cluster.field(pod, migratable) == "True").then_some(())
    });
    ask(&["valkey-cli", "set", "key", "value"]);
    ask(&["sh", "-c", "echo written >/data/file"]);
    let (uid, from) = (
        cluster.field(pod, ".metadata.uid"),
        home(cluster, "ordered-0"),
    );
    let (was, address) = (run_id(), cluster.field(pod, ".status.podIP"));

    cluster.drain(&from);
    eventually_within(PATIENCE, "another pod of that name is ready", || {
        let ready = !cluster.pods("app=ordered").is_empty();
        (ready && cluster.field(pod, ".metadata.uid") != uid).then_some(())
    });
    assert_ne!(home(cluster, "ordered-0"), from);
    assert_ne!(cluster.field(pod, ".status.podIP"), address);
    assert_eq!(run_id(), was, "it is the same process");
    assert_eq!(ask(&["valkey-cli", "get", "key"]), "value");
    assert_eq!(ask(&["hostname"]), "ordered-0");
    assert_eq!(ask(&["cat", "/data/file"]), "written");
    let migration = cluster.migration_of("ordered-0");
    assert_eq!(cluster.field(&migration, ".status.phase"), "Succeeded");
    eventually_within(PATIENCE, "nothing waits on the node any more", || {
        cluster
            .node(&from)
            .holds("test -z \"$(find /var/lib/sterna/parked -type f)\"")
            .then_some(())
    });
}

#[test]
fn what_a_pod_keeps_in_its_emptydirs_is_drained_with_it() {
    let Some(cluster) = cluster() else { return };
    let deployment = r#"
apiVersion: apps/v1
kind: Deployment
metadata: { name: keeper }
spec:
  selector: { matchLabels: { app: keeper } }
  template:
    metadata:
      labels: { app: keeper }
      annotations: { sterna.dev/managed-containers: '["keeper"]' }
    spec:
      runtimeClassName: sterna
      terminationGracePeriodSeconds: 5
      volumes:
        - { name: disk, emptyDir: {} }
        - { name: fast, emptyDir: { medium: Memory, sizeLimit: 32Mi } }
      initContainers:
        - name: fill
          image: busybox:1
          command: [sh, -c, 'echo anew >/disk/log; echo anew >/disk/made']
          volumeMounts: [{ name: disk, mountPath: /disk }]
      containers:
        - name: keeper
          image: busybox:1
          command:
            - sh
            - -c
            - >-
              exec 3>/disk/log; echo kept >/disk/made; echo deep >/deep/file;
              head -c 3000000 /dev/urandom >/fast/random; md5sum /fast/random >/fast/sum;
              i=0; while :; do i=$((i+1)); echo $i >&3; sleep 0.05; done
          volumeMounts:
            - { name: disk, mountPath: /disk }
            - { name: disk, mountPath: /deep, subPath: below/deep }
            - { name: fast, mountPath: /fast }
        - name: reader
          image: busybox:1
          command: [sleep, '3600']
          volumeMounts: [{ name: disk, mountPath: /disk }]
"#;
    let _objects = cluster.apply(deployment);
    let old = cluster.pod_other_than("app=keeper", "");
    let read = |pod: &str, container: &str, words: &[&str]| {
        let exec = [&["exec", pod, "-c", container, "--"], words].concat();
        cluster.kubectl(&exec).success().to_owned()
    };
    let counted = |pod: &str| -> Vec<u64> {
        let log = read(pod, "reader", &["cat", "/disk/log"]);
        log.lines().map(|line| line.parse().unwrap_or(0)).collect()
    };
    eventually_within(PATIENCE, "it counts", || {
        (counted(&old).len() > 20).then_some(())
    });
    let (before, sum) = (
        counted(&old).len(),
        read(&old, "keeper", &["cat", "/fast/sum"]),
    );
    cluster.drain(&home(cluster, &old));

    let new = cluster.pod_other_than("app=keeper", &old);
    let migration = cluster.migration_of(&old);
    assert_eq!(cluster.field(&migration, ".status.phase"), "Succeeded");
    let arrived = counted(&new).len();
    assert!(arrived > before);
    eventually("the open file is written on", || {
        (counted(&new).len() > arrived + 3).then_some(())
    });
    let all = counted(&new);
    let expected: Vec<u64> = (1..=all.len() as u64).collect();
    assert_eq!(all, expected);
    assert_eq!(read(&new, "keeper", &["cat", "/fast/sum"]), sum);
    assert_eq!(read(&new, "keeper", &["md5sum", "/fast/random"]), sum);
    assert_eq!(read(&new, "keeper", &["cat", "/deep/file"]), "deep\n");
    assert_eq!(read(&new, "reader", &["cat", "/disk/made"]), "kept\n");
    let listed = read(&new, "reader", &["ls", "-A", "/disk"]);
    assert_eq!(listed.lines().collect::<Vec<_>>(), ["below", "log", "made"]);
}
