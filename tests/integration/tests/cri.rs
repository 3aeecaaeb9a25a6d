//! Pods over containerd's CRI, as a kubelet makes them: what works under containerd's
//! shim works under ours, on containerd 2 and 1.7.

use std::time::Duration;

use serde_json::{Value, json};
use sterna_integration::{
    Cgroup, Cri, DEADLINE, Flavour, Inventory, PodContainer, RUNC_HANDLER, STERNA_HANDLER,
    SharedLab, eventually, skip,
};

static LAB: SharedLab = SharedLab::new(10, |lab| {
    lab.up(&["a"], Flavour::Forky, Cgroup::of_machine());
    // Who asks it about the containers that are managed.
    lab.pair(&["a"]);
    lab.up(&["c"], Flavour::Trixie, Cgroup::of_machine());
    for node in ["a", "c"] {
        lab.import_for_pods(node, &["pause", "busybox"]);
        lab.bring_crictl(node);
    }
});

/// The CRI of a node; none where tests on nodes are not wanted or have no crictl.
fn cri(node: &str, handler: &'static str) -> Option<Cri<'static>> {
    let node = LAB.get()?.node(node);
    if !node.holds("command -v crictl") {
        skip("crictl is built with Go, which is missing or too old here");
        return None;
    }
    Some(Cri::new(node, handler))
}

/// The test under our shim on both containerds, and under containerd's own.
macro_rules! under_every_handler {
    ($(#[doc = $doc:expr])* $name:ident($cri:ident) $body:block) => {
        $(#[doc = $doc])*
        mod $name {
            use super::*;

            fn check($cri: Cri<'_>) $body

            #[test]
            fn under_sterna() {
                cri("a", STERNA_HANDLER).map(check);
            }

            #[test]
            fn under_sterna_on_containerd_1_7() {
                cri("c", STERNA_HANDLER).map(check);
            }

            #[test]
            fn under_containerds_shim() {
                cri("a", RUNC_HANDLER).map(check);
            }
        }
    };
}

/// Says a number every tenth of a second until it is told to end.
const TICKER: &str = "trap 'exit 0' TERM; i=0; while :; do i=$((i+1)); echo $i; sleep 0.1; done";

/// Serves one page on port 8000.
const SERVER: &str =
    "mkdir -p /srv/www; echo hello >/srv/www/index.html; exec httpd -f -p 8000 -h /srv/www";

/// The last number of a [`TICKER`].
fn count(container: &PodContainer<'_>) -> u64 {
    let log = container.log();
    log.last().and_then(|line| line.parse().ok()).unwrap_or(0)
}

fn counts_on(container: &PodContainer<'_>) {
    let before = count(container);
    eventually("it counts on", || (count(container) > before).then_some(()));
}

/// An `int64` of protobuf's JSON.
fn number(value: &Value) -> i64 {
    let text = value.as_str().and_then(|text| text.parse().ok());
    text.or_else(|| value.as_i64()).unwrap_or(0)
}

/// What a node holds on which there were pods: some things are made once and stay.
fn with_nothing_left(cri: Cri<'_>) -> Inventory {
    let pod = cri.pod("first");
    pod.start("main", "true").end();
    pod.remove();
    Inventory::of(cri.node())
}

fn shims(cri: Cri<'_>, pod: &str) -> Vec<u32> {
    cri.node().processes(&["containerd-shim", pod])
}

under_every_handler!(containers_of_a_pod_share_a_shim_and_a_network(cri) {
    let pod = cri.pod("shared");
    let server = pod.start("server", SERVER);
    let client = pod.start("client", TICKER);
    let third = pod.start("third", TICKER);
    eventually("the server answers", || {
        let page = client.try_exec(&["wget", "-q", "-O", "-", "http://127.0.0.1:8000/"]);
        (page.stdout.trim_end() == "hello").then_some(())
    });
    let shims = shims(cri, pod.id());
    assert_eq!(shims.len(), 1);
    let program = cri.node().exec(&["readlink", &format!("/proc/{}/exe", shims[0])]);
    assert_eq!(program.success().contains("sterna"), cri.handler() == STERNA_HANDLER, "{program}");
    assert_eq!(client.exec(&["hostname"]), "shared");
    for container in [&server, &client, &third] {
        assert!(container.is_running());
    }
    third.stop(Duration::from_secs(10));
    counts_on(&client);
    assert!(pod.is_ready());
});

under_every_handler!(init_containers_run_one_after_the_other_before_the_main_one(cri) {
    let directory = "/var/lib/sterna-test-volume";
    cri.node().sh(&format!("rm -rf {directory}; mkdir {directory}")).success();
    let pod = cri.pod("init");
    let shared = |config: &mut Value| {
        config["mounts"] = json!([{ "host_path": directory, "container_path": "/shared" }]);
    };
    for name in ["first", "second"] {
        let init = pod.start_with(name, &format!("sleep 0.3; echo {name} >>/shared/order"), shared);
        assert_eq!(init.end(), (0, "Completed".into()));
    }
    let main = pod.start_with("main", "cat /shared/order; sleep 1000", shared);
    eventually("the main container sees what the others did", || {
        (main.log() == ["first", "second"]).then_some(())
    });
    assert_eq!(pod.start("failed", "exit 3").end(), (3, "Error".into()));
});

under_every_handler!(commands_run_in_a_container_and_end_in_time_or_are_ended(cri) {
    let pod = cri.pod("exec");
    let container = pod.start("main", TICKER);
    assert_eq!(container.exec(&["echo", "hello"]), "hello");
    let failed = container.try_exec(&["sh", "-c", "echo no >&2; exit 5"]).failure();
    assert!(failed.contains("exited with 5: no"), "{failed}");
    let late = cri.crictl(&["exec", "--sync", "--timeout", "1", container.id(), "sleep", "4321"]);
    assert!(late.failure().contains("timeout 1s exceeded"), "{late}");
    eventually("it is ended", || {
        // The words are crictl's as well, which is gone.
        cri.node().processes(&["sleep 4321"]).is_empty().then_some(())
    });
    let missing = container.try_exec(&["/no/such/program"]).failure();
    assert!(missing.contains("/no/such/program"), "{missing}");
    // Many at once, as with probes.
    let script = "p=; for i in 1 2 3 4 5 6 7 8; do crictl exec --sync \"$1\" echo $i & p=\"$p $!\"; done
        for p in $p; do wait $p; done";
    let said = cri.node().exec(&["sh", "-euc", script, "sh", container.id()]);
    let mut numbers: Vec<_> = said.success().split_whitespace().collect();
    numbers.sort_unstable();
    assert_eq!(numbers, ["1", "2", "3", "4", "5", "6", "7", "8"]);
});

under_every_handler!(a_streamed_command_takes_input_and_hands_on_its_exit_code(cri) {
    let pod = cri.pod("streaming");
    let container = pod.start("main", TICKER);
    let words = ["crictl", "exec", "-i", container.id(), "cat"];
    let said = cri.node().exec_with(&words, b"through the stream\n");
    assert_eq!(said.success(), "through the stream\n");
    let failed = cri.crictl(&["exec", container.id(), "sh", "-c", "echo no >&2; exit 7"]).failure();
    assert!(failed.contains("no\n") && failed.contains("exit code 7"), "{failed}");
});

under_every_handler!(attach_talks_to_the_first_process(cri) {
    let pod = cri.pod("attach");
    let script = "while read -r line; do echo \"heard $line\"; done";
    let container = pod.start_with("main", script, |config| config["stdin"] = true.into());
    let mut attached = cri.node().spawn(&["crictl", "attach", "-i", container.id()]);
    for word in ["one", "two"] {
        attached.say(word);
        attached.line(DEADLINE, |line| line == format!("heard {word}")).expect("it answers");
    }
    // Whoever looks on does not take from the log.
    assert_eq!(container.log(), ["heard one", "heard two"]);
});

under_every_handler!(port_forward_reaches_into_the_pod(cri) {
    let pod = cri.pod("forward");
    pod.start("main", SERVER);
    let mut forward = cri.node().spawn(&["crictl", "port-forward", pod.id(), "18000:8000"]);
    forward.line(DEADLINE, |line| line.contains("Forwarding from")).expect("it listens");
    eventually("the page comes through", || {
        let page = cri.node().exec(&["busybox", "wget", "-q", "-O", "-", "http://127.0.0.1:18000/"]);
        (page.stdout == "hello\n").then_some(())
    });
});

under_every_handler!(a_log_that_was_moved_away_is_begun_anew(cri) {
    let pod = cri.pod("rotation");
    let container = pod.start("main", TICKER);
    eventually("it says something", || (count(&container) > 2).then_some(()));
    let old = format!("{}.1", container.log_path());
    cri.node().exec(&["mv", container.log_path(), &old]).success();
    cri.crictl(&["logs", "--reopen", container.id()]).success();
    eventually("the new log has lines", || (count(&container) > 2).then_some(()));
    // Not a line is lost or doubled.
    let lines = [container.log_at(&old), container.log()].concat();
    let numbers: Vec<u64> = lines.iter().filter_map(|line| line.parse().ok()).collect();
    let expected: Vec<u64> = (1..=numbers.len() as u64).collect();
    assert_eq!(numbers, expected);
});

under_every_handler!(limits_of_a_running_container_can_be_changed(cri) {
    let pod = cri.pod("update");
    let container = pod.start_with("main", TICKER, |config| {
        config["linux"]["resources"] = json!({ "memory_limit_in_bytes": 64 << 20, "cpu_shares": 512 });
    });
    let (memory, quota) = match cri.node().cgroup() {
        Cgroup::V1 => ("memory/memory.limit_in_bytes", "cpu/cpu.cfs_quota_us"),
        Cgroup::V2 => ("memory.max", "cpu.max"),
    };
    let read = |file: &str| container.exec(&["cat", &format!("/sys/fs/cgroup/{file}")]);
    assert_eq!(read(memory), (64 << 20).to_string());
    let limit = (128 << 20).to_string();
    let words = ["update", "--memory", &limit, "--cpu-quota", "50000", "--cpu-period", "100000"];
    cri.crictl(&[&words, &[container.id()][..]].concat()).success();
    assert_eq!(read(memory), limit);
    assert!(read(quota).starts_with("50000"));
    let said = &container.status()["resources"]["linux"];
    assert_eq!(number(&said["memoryLimitInBytes"]), 128 << 20, "{said}");
    assert_eq!(number(&said["cpuQuota"]), 50_000, "{said}");
    counts_on(&container);
});

under_every_handler!(what_a_container_uses_can_be_asked_for(cri) {
    let pod = cri.pod("stats");
    let container = pod.start("main", TICKER);
    eventually("there is CPU time and memory in the stats", || {
        let answer = cri.json(&["stats", "--output", "json", "--id", container.id()]);
        let stats = &answer["stats"][0];
        assert_eq!(stats["attributes"]["id"], container.id(), "{answer}");
        let cpu = number(&stats["cpu"]["usageCoreNanoSeconds"]["value"]);
        let memory = number(&stats["memory"]["workingSetBytes"]["value"]);
        (cpu > 0 && memory > 0).then_some(())
    });
    let answer = cri.json(&["statsp", "--output", "json", "--id", pod.id()]);
    let linux = &answer["stats"][0]["linux"];
    assert_eq!(linux["containers"].as_array().map(Vec::len), Some(1), "{answer}");
    assert!(number(&linux["process"]["processCount"]["value"]) >= 2, "{answer}");
});

under_every_handler!(root_of_a_pod_with_user_namespaces_is_somebody_else_outside(cri) {
    if cri.node().flavour() == Flavour::Trixie {
        skip("containerd 1.7 with runc 1.1 has no pods with user namespaces");
        return;
    }
    let range = json!([{ "host_id": 200_000, "container_id": 0, "length": 65_536 }]);
    let mapped = |config: &mut Value| {
        config["linux"]["security_context"]["namespace_options"]["userns_options"] =
            json!({ "mode": 0, "uids": range, "gids": range });
    };
    let pod = cri.pod_with("userns", mapped);
    let container = pod.start_with("main", TICKER, mapped);
    assert_eq!(container.exec(&["id", "-u"]), "0");
    let map = container.exec(&["cat", "/proc/self/uid_map"]);
    assert_eq!(map.split_whitespace().collect::<Vec<_>>(), ["0", "200000", "65536"]);
    // The image's files are root's inside, and what root makes is the mapped user's.
    assert_eq!(container.exec(&["stat", "-c", "%u", "/usr/bin/busybox"]), "0");
    container.exec(&["touch", "/tmp/made"]);
    let made = format!("/proc/{}/root/tmp/made", container.pid());
    assert_eq!(cri.node().exec(&["stat", "-c", "%u", &made]).success(), "200000\n");
    counts_on(&container);
});

under_every_handler!(a_running_pod_survives_a_restart_of_containerd(cri) {
    let pod = cri.pod("restart");
    let container = pod.start("main", TICKER);
    let other = pod.start("other", TICKER);
    eventually("it counts", || (count(&container) > 2).then_some(()));
    let pid = container.pid();
    for how in ["stop", "kill"] {
        cri.node().service(how, "containerd");
        cri.node().service("start", "containerd");
        assert!(container.is_running(), "after {how}");
        assert_eq!(container.pid(), pid, "after {how}");
        assert!(pod.is_ready(), "after {how}");
        assert_eq!(container.exec(&["echo", "still here"]), "still here");
        counts_on(&container);
        counts_on(&other);
    }
    container.stop(Duration::from_secs(20));
    assert_eq!(container.end().0, 0);
    // One more that starts in a pod of before.
    counts_on(&pod.start("late", TICKER));
    pod.remove();
});

under_every_handler!(an_end_while_containerd_is_away_is_not_missed(cri) {
    let pod = cri.pod("orphan");
    let container = pod.start("main", "sleep 1; exit 4");
    let stays = pod.start("stays", TICKER);
    cri.node().service("stop", "containerd");
    std::thread::sleep(Duration::from_millis(1500));
    cri.node().service("start", "containerd");
    assert_ne!(container.end().0, 0);
    counts_on(&stays);
});

under_every_handler!(nothing_is_left_of_a_pod_that_was_removed(cri) {
    let before = with_nothing_left(cri);
    for number in 0..2 {
        let pod = cri.pod(&format!("guest-{number}"));
        pod.start("short", "exit 2").end();
        pod.start("long", TICKER).exec(&["true"]);
        pod.create("never-started", TICKER);
        pod.remove();
    }
    before.assert_nothing_added(cri.node());
});

under_every_handler!(a_checkpoint_over_the_cri_leaves_the_container_running(cri) {
    if cri.node().flavour() == Flavour::Trixie {
        skip("containerd 1.7 has no checkpoints over the CRI");
        return;
    }
    let pod = cri.pod("checkpoint");
    let container = pod.start("main", TICKER);
    eventually("it counts", || (count(&container) > 2).then_some(()));
    let pid = container.pid();
    let archive = "/var/log/pods/checkpoint/archive.tar";
    cri.crictl(&["checkpoint", "--export", archive, container.id()]).success();
    let listing = cri.node().exec(&["tar", "-tf", archive]);
    for member in ["checkpoint/inventory.img", "spec.dump", "config.dump", "rootfs-diff.tar"] {
        assert!(listing.success().lines().any(|line| line.ends_with(member)), "no {member}: {listing}");
    }
    assert_eq!(container.pid(), pid);
    counts_on(&container);
});

under_every_handler!(a_container_that_ran_out_of_memory_ended_as_oom_killed(cri) {
    let pod = cri.pod("hungry");
    let container = pod.start_with("main", "exec dd if=/dev/zero of=/dev/null bs=64M", |config| {
        let limit = 20 << 20;
        config["linux"]["resources"] =
            json!({ "memory_limit_in_bytes": limit, "memory_swap_limit_in_bytes": limit });
    });
    // containerd may hear of the reason a moment after the end.
    eventually("containerd knows why", || {
        (container.end() == (137, "OOMKilled".into())).then_some(())
    });
});

under_every_handler!(a_container_that_does_not_listen_is_killed_after_its_grace_period(cri) {
    let pod = cri.pod("grace");
    let polite = pod.start("polite", "trap 'exit 9' TERM; echo ready; while :; do sleep 0.1; done");
    let deaf = pod.start("deaf", "trap '' TERM; echo ready; while :; do sleep 0.1; done");
    for container in [&polite, &deaf] {
        eventually("its trap is set", || (container.log() == ["ready"]).then_some(()));
    }
    polite.stop(Duration::from_secs(20));
    assert_eq!(polite.end().0, 9);
    deaf.stop(Duration::from_secs(1));
    assert_eq!(deaf.end().0, 137);
});

under_every_handler!(a_container_is_started_again_in_its_pod(cri) {
    let pod = cri.pod("again");
    for attempt in 0..3 {
        let script = format!("echo attempt {attempt}; exit 1");
        let container = pod.start_with("main", &script, |config| {
            config["metadata"]["attempt"] = attempt.into();
            config["log_path"] = format!("main-{attempt}.log").into();
        });
        assert_eq!(container.end().0, 1);
        assert_eq!(container.log(), [format!("attempt {attempt}")]);
        cri.crictl(&["rm", container.id()]).success();
    }
    assert!(pod.is_ready());
    assert_eq!(shims(cri, pod.id()).len(), 1);
});

under_every_handler!(containers_of_a_pod_can_share_their_processes(cri) {
    let share = |config: &mut Value| {
        config["linux"]["security_context"]["namespace_options"] = json!({ "pid": 0 });
    };
    let pod = cri.pod_with("processes", share);
    let one = pod.start_with("one", "exec sleep 5432", share);
    let two = pod.start_with("two", TICKER, share);
    eventually("one sees the other", || two.exec(&["ps"]).contains("sleep 5432").then_some(()));
    one.stop(Duration::ZERO);
    assert_eq!(one.end().0, 137);
    counts_on(&two);
});

under_every_handler!(a_pod_whose_shim_died_is_not_ready_and_can_be_removed(cri) {
    let before = with_nothing_left(cri);
    let pod = cri.pod("headless");
    let container = pod.start("main", TICKER);
    for shim in shims(cri, pod.id()) {
        cri.node().signal("KILL", shim);
    }
    eventually("the pod is not ready", || (!pod.is_ready()).then_some(()));
    assert_ne!(container.end().0, 0);
    pod.remove();
    // containerd's own leaves the control groups of the containers.
    if cri.handler() == STERNA_HANDLER {
        before.assert_nothing_added(cri.node());
    }
});

#[test]
fn annotations_of_a_pod_reach_the_shim() {
    let Some(cri) = cri("a", STERNA_HANDLER) else {
        return;
    };
    let filters = |name: &str, annotations: Value| {
        let pod = cri.pod_with(name, |config| config["annotations"] = annotations);
        let container = pod.start("main", TICKER);
        container.exec(&["grep", "Seccomp_filters", "/proc/1/status"])
    };
    // A managed container without a profile has a filter for what cannot be moved, unless
    // its pod keeps that. One that is not managed has what it asked for.
    let managed = r#"["main"]"#;
    let keep = json!({
        "sterna.dev/managed-containers": managed,
        "sterna.dev/keep-io-uring": "true",
        "sterna.dev/keep-mptcp": "true",
    });
    let movable = json!({ "sterna.dev/managed-containers": managed });
    for (name, annotations, count) in [
        ("kept", keep, 0),
        ("movable", movable, 1),
        ("plain", json!({}), 0),
    ] {
        let expected = format!("Seccomp_filters:\t{count}");
        assert_eq!(filters(name, annotations), expected, "of the pod {name}");
    }
}

#[test]
fn the_handler_offers_what_containerds_offers() {
    let Some(cri) = cri("a", STERNA_HANDLER) else {
        return;
    };
    let info = cri.json(&["info"]);
    let features = |name: &str| {
        let handlers = info["runtimeHandlers"].as_array().into_iter().flatten();
        let mut named = handlers.filter(|handler| handler["name"] == name);
        let handler = named
            .next()
            .unwrap_or_else(|| panic!("no handler {name}: {info}"));
        handler["features"].clone()
    };
    assert_eq!(features(STERNA_HANDLER), features(RUNC_HANDLER));
    assert_eq!(features(STERNA_HANDLER)["user_namespaces"], true);
}
