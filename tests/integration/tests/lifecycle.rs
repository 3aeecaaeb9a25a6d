//! The shim does what containerd's own does: on containerd 2 and 1.7, on control
//! groups of both versions.

use std::time::Duration;

use sterna_integration::{
    Cgroup, Container, DEADLINE, Events, Flavour, Inventory, Lab, Node, SharedLab, eventually,
    runtime, skip,
};

static LAB: SharedLab = SharedLab::new(0, |lab| {
    let machine = Cgroup::of_machine();
    lab.up(&["a"], Flavour::Forky, machine);
    lab.up(&["c"], Flavour::Trixie, machine);
    lab.import("a", &["busybox"]);
    lab.import("c", &["busybox"]);
    if machine == Cgroup::V1 {
        lab.up(&["b"], Flavour::Forky, Cgroup::V2);
        lab.import("b", &["busybox"]);
    }
});

/// The test, once on each kind of node.
macro_rules! on_every_node {
    ($(#[doc = $doc:expr])* $name:ident($lab:ident, $node:ident) $body:block) => {
        $(#[doc = $doc])*
        mod $name {
            use super::*;

            fn check($lab: &Lab, $node: &Node) $body

            #[test]
            fn on_containerd_2() {
                let Some(lab) = LAB.get() else { return };
                check(lab, lab.node("a"));
            }

            #[test]
            fn on_containerd_1_7() {
                let Some(lab) = LAB.get() else { return };
                check(lab, lab.node("c"));
            }

            #[test]
            fn on_cgroup_v2_without_controllers() {
                let Some(lab) = LAB.get() else { return };
                match Cgroup::of_machine() {
                    Cgroup::V1 => check(lab, lab.node("b")),
                    Cgroup::V2 => skip("all nodes are on cgroup v2 here, with controllers"),
                }
            }
        }
    };
}

const TICKER: &str = "i=0; while :; do i=$((i+1)); echo $i >/tmp/count; sleep 0.1; done";

fn count(container: &sterna_integration::Running<'_>, node: &Node) -> u64 {
    let text = container
        .exec(node, &["cat", "/tmp/count"])
        .success()
        .trim()
        .to_owned();
    text.parse().unwrap_or(0)
}

on_every_node!(a_container_says_something_and_its_exit_code_arrives(_lab, node) {
    let output = Container::shell("exit-code", "echo out; echo err >&2; exit 7").run(node);
    assert_eq!(output.code(), 7, "{output}");
    assert_eq!(output.stdout, "out\n", "{output}");
    assert!(output.stderr.contains("err"), "{output}");
});

on_every_node!(standard_input_reaches_a_container_and_its_end_too(_lab, node) {
    let mut container = Container::shell("stdin", "cat; echo end").spawn(node);
    container.say("one");
    container.line(DEADLINE, |line| line == "one").expect("cat says it back");
    container.say("two");
    let output = container.end(DEADLINE);
    assert_eq!(output.success(), "one\ntwo\nend\n");
});

on_every_node!(a_megabyte_of_output_arrives_whole(_lab, node) {
    let output = Container::shell("flood", "seq 1 200000 | head -c 1048576").run(node);
    assert_eq!(output.success().len(), 1 << 20);
    assert!(output.stdout.starts_with("1\n2\n3\n"));
});

on_every_node!(a_terminal_is_one(_lab, node) {
    let output = Container::shell("terminal", "tty; stty size; exit 3").run_on_terminal(node);
    assert_eq!(output.code(), 3, "{output}");
    assert!(output.stdout.contains("/dev/"), "{output}");
});

on_every_node!(a_program_that_does_not_exist_is_an_error_that_names_it(_lab, node) {
    let before = Inventory::of(node);
    let output = Container::new("missing", "busybox").command(&["/no/such/program"]).run(node);
    assert!(output.failure().contains("/no/such/program"), "{output}");
    before.assert_nothing_added(node);
});

on_every_node!(commands_run_in_a_container_with_their_own_exit_codes(lab, node) {
    let container = Container::shell("exec", TICKER).start(lab, node);
    assert_eq!(container.exec(node, &["echo", "hello"]).success(), "hello\n");
    assert_eq!(container.exec(node, &["sh", "-c", "exit 5"]).code(), 5);
    let input = node.exec_with(
        &["ctr", "task", "exec", "--exec-id", "with-input", "exec", "cat"],
        b"through\n",
    );
    assert_eq!(input.success(), "through\n");
    let listing = node.ctr(&["task", "ps", "exec"]);
    assert!(listing.success().lines().count() >= 2, "{listing}");
});

on_every_node!(many_commands_at_once_all_end(lab, node) {
    let _container = Container::shell("crowd", TICKER).start(lab, node);
    let script = "for i in $(seq 1 12); do ctr task exec --exec-id e$i crowd sh -c \"exit $i\" & p=\"${p:-} $!\"; done
        total=0; for p in $p; do rc=0; wait $p || rc=$?; total=$((total + rc)); done; echo $total";
    assert_eq!(node.sh(script).success().trim(), "78");
});

on_every_node!(a_signal_ends_a_container_and_the_status_says_which(lab, node) {
    let script = "trap 'exit 9' TERM; while :; do sleep 0.1; done";
    let container = Container::shell("signal", script).start(lab, node);
    eventually("the shell has set its trap", || {
        node.ctr(&["task", "kill", "--signal", "SIGTERM", container.name()]);
        (container.status(node)? == "STOPPED").then_some(())
    });
    let deleted = node.ctr(&["task", "delete", container.name()]);
    assert!(deleted.success().is_empty() && deleted.stderr.contains("exit code 9"), "{deleted}");

    let container = Container::shell("killed", TICKER).start(lab, node);
    node.ctr(&["task", "kill", "--signal", "SIGKILL", container.name()]).success();
    eventually("it stops", || (container.status(node)? == "STOPPED").then_some(()));
    let deleted = node.ctr(&["task", "delete", container.name()]);
    assert!(deleted.is_success() && deleted.stderr.contains("exit code 137"), "{deleted}");
});

on_every_node!(a_running_container_is_not_deleted(lab, node) {
    let container = Container::shell("alive", TICKER).start(lab, node);
    node.ctr(&["task", "delete", container.name()]).failure();
    assert_eq!(container.status(node).as_deref(), Some("RUNNING"));
    container.delete(node);
});

on_every_node!(a_paused_container_stands_still_until_it_is_resumed(lab, node) {
    let container = Container::shell("pause", TICKER).start(lab, node);
    eventually("it counts", || (count(&container, node) > 2).then_some(()));
    let file = format!("/proc/{}/root/tmp/count", container.pid(node));
    node.ctr(&["task", "pause", container.name()]).success();
    assert_eq!(container.status(node).as_deref(), Some("PAUSED"));
    let paused = node.read(&file);
    std::thread::sleep(Duration::from_millis(400));
    assert_eq!(node.read(&file), paused);
    container.exec(node, &["true"]).failure();
    node.ctr(&["task", "resume", container.name()]).success();
    assert_eq!(container.status(node).as_deref(), Some("RUNNING"));
    eventually("it counts on", || (node.read(&file) != paused).then_some(()));
    container.delete(node);
});

on_every_node!(a_container_can_be_measured(lab, node) {
    let container = Container::shell("stats", TICKER).start(lab, node);
    let metrics = node.ctr(&["task", "metrics", container.name()]);
    let said = metrics.success();
    if node.cgroup() == Cgroup::of_machine() {
        let memory = said.lines().find(|line| line.contains("memory.usage"));
        let usage: u64 = memory
            .and_then(|line| line.split_whitespace().last()?.parse().ok())
            .unwrap_or_else(|| panic!("no memory.usage in {said}"));
        assert!(usage > 0, "{said}");
    }
});

on_every_node!(events_come_in_their_order(lab, node) {
    let mut events = Events::record(node);
    let container = Container::shell("events", TICKER).start(lab, node);
    container.exec(node, &["true"]).success();
    // The end of a command reaches ctr and the events on different ways.
    events.until("events", "exit");
    node.ctr(&["task", "pause", "events"]).success();
    node.ctr(&["task", "resume", "events"]).success();
    container.delete(node);
    let topics = events.until("events", "delete");
    assert_eq!(
        topics,
        ["create", "start", "exec-added", "exec-started", "exit", "paused", "resumed", "exit", "delete"]
    );
});

on_every_node!(a_container_survives_a_restart_of_containerd(lab, node) {
    let container = Container::shell("restart", TICKER).start(lab, node);
    let pid = container.pid(node);
    eventually("it counts", || (count(&container, node) > 2).then_some(()));
    for how in ["stop", "kill"] {
        node.service(how, "containerd");
        node.service("start", "containerd");
        assert_eq!(container.status(node).as_deref(), Some("RUNNING"), "after {how}");
        assert_eq!(container.pid(node), pid, "after {how}");
        let before = count(&container, node);
        eventually("it counts on", || (count(&container, node) > before).then_some(()));
    }
    container.delete(node);
});

on_every_node!(an_end_during_a_restart_of_containerd_is_noticed(lab, node) {
    let container = Container::shell("orphan", "sleep 1; exit 4").start(lab, node);
    node.service("stop", "containerd");
    std::thread::sleep(Duration::from_millis(1500));
    node.service("start", "containerd");
    eventually("it is seen to have stopped", || match container.status(node).as_deref() {
        None | Some("STOPPED") => Some(()),
        Some(_) => None,
    });
});

on_every_node!(a_dead_shim_is_cleaned_up_after(lab, node) {
    let before = Inventory::of(node);
    let container = Container::shell("headless", TICKER).start(lab, node);
    let pid = container.pid(node);
    let shims = node.processes(&["containerd-shim", "-id headless"]);
    assert_eq!(shims.len(), 1, "{shims:?}");
    node.signal("KILL", shims[0]);
    eventually("its processes are gone", || (!node.holds(&format!("test -e /proc/{pid}"))).then_some(()));
    eventually("containerd forgets its task", || match container.status(node).as_deref() {
        None | Some("STOPPED" | "UNKNOWN") => Some(()),
        Some(_) => None,
    });
    drop(container);
    before.assert_nothing_added(node);
});

on_every_node!(a_log_file_takes_what_a_container_says(lab, node) {
    let script = "echo out; echo err >&2; while :; do sleep 1; done";
    let container = Container::shell("log", script).start(lab, node);
    eventually("both lines are in the log", || {
        let log = container.log(node);
        (log.contains("out\n") && log.contains("err\n")).then_some(())
    });
});

on_every_node!(a_logger_program_takes_what_a_container_says(lab, node) {
    node.write(
        "/usr/local/bin/test-logger",
        "#!/bin/sh\nexec 5>&-\n(cat <&3; echo \"end of $CONTAINER_ID\") >/var/log/test-logger.log\n",
    );
    node.sh("chmod +x /usr/local/bin/test-logger; rm -f /var/log/test-logger.log").success();
    let container = Container::shell("logger", "echo through the logger; sleep 0.2")
        .options(&["--log-uri", "binary:///usr/local/bin/test-logger"])
        .start(lab, node);
    eventually("it stops", || (container.status(node)? == "STOPPED").then_some(()));
    node.ctr(&["task", "delete", container.name()]).success();
    eventually("the logger has written everything", || {
        let log = node.exec(&["cat", "/var/log/test-logger.log"]).stdout;
        (log == "through the logger\nend of logger\n").then_some(())
    });
});

on_every_node!(containers_of_one_pod_share_a_shim(lab, node) {
    let group = ["--annotation", "io.containerd.runc.v2.group=pod"];
    if node.flavour() == Flavour::Trixie && !node.ctr(&["run", "--help"]).stdout.contains("--annotation") {
        skip("ctr of containerd 1.7 cannot set annotations");
        return;
    }
    let first = Container::shell("pod-one", TICKER).options(&group).start(lab, node);
    let second = Container::shell("pod-two", TICKER).options(&group).start(lab, node);
    let shims = || node.processes(&["containerd-shim", "-id pod-"]).len();
    assert_eq!(shims(), 1);
    first.delete(node);
    assert_eq!(second.exec(node, &["echo", "still here"]).success(), "still here\n");
    second.delete(node);
    eventually("the shim ends with its last container", || {
        (shims() == 0).then_some(())
    });
});

on_every_node!(a_container_out_of_memory_is_reported(lab, node) {
    if node.cgroup() != Cgroup::of_machine() {
        skip("a cgroup v2 node without controllers has no memory limit");
        return;
    }
    let mut events = Events::record(node);
    let eat = "head -c 200000000 /dev/zero | tail -c 190000000 >/dev/null; while :; do sleep 1; done";
    let _container = Container::shell("hungry", eat)
        .options(&["--memory-limit", "33554432"])
        .start(lab, node);
    events.until("hungry", "oom");
});

on_every_node!(nothing_is_left_over_after_containers_came_and_went(lab, node) {
    // Whatever is made once and stays is there after the first.
    Container::shell("first", "true").run(node).success();
    let before = Inventory::of(node);
    for number in 0..5 {
        Container::shell("guest", &format!("exit {number}")).run(node);
        let container = Container::shell("resident", TICKER).start(lab, node);
        container.exec(node, &["true"]).success();
        container.delete(node);
    }
    before.assert_nothing_added(node);
});

#[test]
fn the_shim_says_its_version_and_what_its_runc_can_do() {
    let Some(lab) = LAB.get() else { return };
    if runtime() != sterna_integration::STERNA {
        skip("another runtime is under test");
        return;
    }
    let node = lab.node("a");
    let version = node.exec(&["containerd-shim-sterna-v1", "-v"]);
    assert!(
        version.success().contains(env!("CARGO_PKG_VERSION")),
        "{version}"
    );
    let described = node.ctr(&["plugins", "inspect-runtime", "--runtime", &runtime()]);
    let described: serde_json::Value =
        serde_json::from_str(described.success()).expect("ctr prints JSON");
    let version = described["Version"]["Version"].as_str().unwrap_or_default();
    assert_eq!(version, env!("CARGO_PKG_VERSION"), "{described}");
    let hooks = described["Features"]["hooks"]
        .as_array()
        .map_or(0, Vec::len);
    assert!(hooks > 0, "runc's features are missing: {described}");
}
