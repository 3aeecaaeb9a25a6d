//! The chart on nodes that never heard of Sterna: installed, a pod is drained with
//! its memory, upgraded under running pods, and removed without a trace.

use std::time::Duration;

use sterna_integration::{Cluster, Published, SharedLab, eventually, eventually_within};

static LAB: SharedLab = SharedLab::new(13, |lab| {
    lab.bare_cluster_up(3);
    if let Some(cluster) = lab.cluster() {
        cluster.import(&["valkey", "sternad", "controller"]);
    }
});

const NODES: [&str; 3] = ["a", "b", "c"];
const PATIENCE: Duration = Duration::from_secs(120);

/// Everything on a node that the chart could leave: files outside of what the
/// container runtime and the kubelet keep for pods, and containerd's configuration.
const INVENTORY: &str = "find / -xdev \
    \\( -path /var/log -o -path /tmp -o -path /proc -o -path /sys -o -path /run \
        -o -path /var/lib/kubelet -o -path /var/lib/containerd -o -path /var/lib/cni \\) -prune \
    -o -print | sort; ls -d /run/sterna 2>/dev/null || true; cat /etc/containerd/config.toml";

fn helm(cluster: Cluster<'_>, words: &[&str]) -> sterna_integration::Output {
    let chart = ["install/helm/sterna", "--namespace", "sterna-system"];
    let patience = ["--wait", "--timeout=150s"];
    cluster.helm(&[words, &["sterna"], &chart, &patience].concat())
}

fn labelled(cluster: Cluster<'_>) -> usize {
    let nodes = cluster.kubectl(&["get", "nodes", "-lsterna.dev/ready=true", "-o", "name"]);
    nodes.success().lines().count()
}

#[test]
fn the_chart_is_installed_upgraded_under_running_pods_and_removed_without_a_trace() {
    let Some(cluster) = LAB.get().and_then(sterna_integration::Lab::cluster) else {
        return;
    };
    let inventory = || NODES.map(|node| cluster.node(node).sh(INVENTORY).stdout);
    let before = inventory();

    helm(cluster, &["install", "--create-namespace"]).success();
    eventually_within(PATIENCE, "Sterna works on all nodes", || {
        (labelled(cluster) == NODES.len()).then_some(())
    });

    let published = Published::start(cluster);
    published.fill();
    let answers = published.answers();
    let mut writer = published.write();
    let old = published.pod_other_than("");
    cluster.drain(&cluster.field(&format!("pod/{old}"), ".spec.nodeName"));
    let new = published.pod_other_than(&old);
    assert_eq!(published.answers(), answers);
    let migration = cluster.migration_of(&old);
    assert_eq!(cluster.field(&migration, ".status.phase"), "Succeeded");

    // Another sternad on every node.
    helm(cluster, &["upgrade", "--set", "sternad.logLevel=debug"]).success();
    eventually_within(PATIENCE, "Sterna works on all nodes", || {
        (labelled(cluster) == NODES.len()).then_some(())
    });
    writer.goes_on();
    writer.lost_nothing(&published);
    assert_eq!(published.answers(), answers);
    let restarts = ".status.containerStatuses[0].restartCount";
    assert_eq!(cluster.field(&format!("pod/{new}"), restarts), "0");

    let uninstall = [
        "uninstall",
        "sterna",
        "--namespace",
        "sterna-system",
        "--wait",
    ];
    let refused = cluster.helm(&uninstall).failure();
    assert!(!refused.is_empty());
    assert_eq!(labelled(cluster), NODES.len());
    assert_eq!(published.answers(), answers);

    drop(published);
    eventually_within(PATIENCE, "the pods are gone", || {
        let pods = cluster.kubectl(&["get", "pods", "-o", "name"]);
        pods.success().is_empty().then_some(())
    });
    cluster.helm(&uninstall).success();
    assert_eq!(labelled(cluster), 0);
    eventually("nothing of it is left on the nodes", || {
        (inventory() == before).then_some(())
    });
    for kind in [
        "crds",
        "runtimeclasses",
        "clusterroles",
        "clusterrolebindings",
    ] {
        let left = cluster.kubectl(&["get", kind, "-o", "name"]);
        let left = left.success();
        assert!(!left.contains("sterna"), "{left}");
    }
    let kinds = "pods,daemonsets,deployments,secrets,configmaps,leases,jobs,serviceaccounts,roles";
    let left = cluster.kubectl(&["get", kinds, "-n", "sterna-system", "-o", "name"]);
    let left = left.success();
    assert!(!left.contains("sterna"), "{left}");
}
