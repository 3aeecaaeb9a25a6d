//! The shim as a process: how it starts, what it leaves alone, how it ends.

use sterna_integration::{
    Cgroup, Container, Flavour, Node, Running, STERNA, SharedLab, eventually, runtime, skip,
};

static LAB: SharedLab = SharedLab::new(21, |lab| {
    lab.up(&["a"], Flavour::Forky, Cgroup::of_machine());
    lab.up(&["c"], Flavour::Trixie, Cgroup::of_machine());
    lab.import("a", &["busybox"]);
    lab.import("c", &["busybox"]);
});

const IDLE: &str = "while :; do sleep 0.1; done";

/// The one shim that serves the container.
#[track_caller]
fn shim_of(container: &Running<'_>, node: &Node) -> u32 {
    let name = format!("-id {}", container.name());
    let shims = node.processes(&["containerd-shim", &name]);
    assert_eq!(shims.len(), 1, "{shims:?}");
    shims[0]
}

/// Runs `start` as containerd does, in a bundle of its own, with this for its
/// standard input; `then` is a script that finds the answer in ./answer.
fn start_by_hand(node: &Node, input: &str, then: &str) -> String {
    let script = format!(
        "rm -rf /tmp/bundles; mkdir -p /tmp/bundles/hand; cd /tmp/bundles/hand; echo '{{}}' >config.json
        export TTRPC_ADDRESS=/run/containerd/containerd.sock.ttrpc
        start() {{
            printf '{input}' | containerd-shim-sterna-v1 -namespace test -address /run/containerd/containerd.sock \\
                -publish-binary /usr/bin/containerd -id hand start
        }}
        servers() {{ pgrep -f 'sterna-v[1] -namespace test -id hand' || true; }}
        finish() {{ for pid in $(servers); do kill $pid; done; }}
        trap finish EXIT
        start >answer 2>errors
        test ! -s errors
        {then}"
    );
    node.sh(&script).success().to_owned()
}

#[test]
fn start_answers_where_the_server_is_and_says_nothing_else() {
    let Some(lab) = LAB.get() else { return };
    for node in lab.nodes() {
        let said = start_by_hand(
            node,
            "",
            "cat answer; echo; cat address; echo; servers | wc -l",
        );
        let lines: Vec<&str> = said.lines().collect();
        let answer: serde_json::Value = serde_json::from_str(lines[0]).expect("it is JSON");
        assert_eq!(answer["version"], 2);
        assert_eq!(answer["protocol"], "ttrpc");
        assert_eq!(answer["address"], lines[1]);
        assert_eq!(lines[2].trim(), "1");
    }
}

#[test]
fn the_parameters_of_containerd_2_3_are_answered_in_its_own_form() {
    let Some(lab) = LAB.get() else { return };
    // instance_id, namespace and socket_dir of BootstrapParams.
    let input = r"\012\004hand\022\004testJ\016/run/elsewhere";
    let then = "ls /run/elsewhere; head -c 2 answer | od -An -tu1; grep -ao 'unix:///run/elsewhere/[0-9a-f]*' answer";
    let said = start_by_hand(lab.node("a"), input, then);
    let lines: Vec<&str> = said.lines().map(str::trim).collect();
    // BootstrapResult begins with its first field, the version: 2.
    assert_eq!(lines[1].split_whitespace().collect::<Vec<_>>(), ["8", "2"]);
    assert_eq!(lines[2], format!("unix:///run/elsewhere/{}", lines[0]));
}

#[test]
fn starts_at_the_same_time_agree_on_one_server() {
    let Some(lab) = LAB.get() else { return };
    let then = "for i in 1 2 3 4 5 6; do start >answer.$i & done; wait
        for i in 1 2 3 4 5 6; do cmp answer answer.$i; done; servers | wc -l";
    let said = start_by_hand(lab.node("a"), "", then);
    assert_eq!(said.trim(), "1");
}

#[test]
fn the_socket_is_for_its_user_alone_and_gone_after_sigterm() {
    let Some(lab) = LAB.get() else { return };
    let then = "socket=$(sed s,unix://,, address); stat -c %a ${socket%/*} $socket
        finish; for i in $(seq 100); do test -e $socket || break; sleep 0.1; done; test ! -e $socket";
    let said = start_by_hand(lab.node("a"), "", then);
    // The directory is as whoever came first made it: containerd's shim takes 600.
    assert!(
        ["700\n600\n", "600\n600\n"].contains(&said.as_str()),
        "{said}"
    );
}

#[test]
fn core_scheduling_is_asked_for_and_the_containers_have_it() {
    let Some(lab) = LAB.get() else { return };
    let node = lab.node("a");
    // The cookie of a process, which only says whether it has one.
    if !node.holds("command -v coresched") {
        return skip("coresched, which shows core scheduling, is not installed");
    }
    let then = "finish; export SCHED_CORE=1; start >answer; coresched get --source $(servers)";
    let said = start_by_hand(node, "", then);
    assert!(!said.contains("0x0"), "{said}");
}

#[test]
fn the_shim_is_the_parent_of_its_containers_and_goes_before_containerd() {
    let Some(lab) = LAB.get() else { return };
    for node in lab.nodes() {
        let container = Container::shell("child", IDLE).start(lab, node);
        let shim = shim_of(&container, node);
        let parent = node.exec(&["ps", "-o", "ppid=", "-p", &container.pid(node).to_string()]);
        assert_eq!(parent.success().trim(), shim.to_string());
        let score = |pid: u32| -> i32 {
            let text = node.read(&format!("/proc/{pid}/oom_score_adj"));
            text.trim().parse().expect("it is a number")
        };
        let containerd = node.processes(&["containerd --config"])[0];
        assert_eq!(score(shim), score(containerd) + 1);
        container.delete(node);
    }
}

#[test]
fn sigusr1_has_it_say_what_it_knows() {
    let Some(lab) = LAB.get() else { return };
    for node in lab.nodes() {
        let container = Container::shell("talkative", IDLE).start(lab, node);
        let shim = shim_of(&container, node);
        node.signal("USR1", shim);
        eventually("it is in containerd's log", || {
            let log = node.log_tail("containerd");
            (log.contains("state of the shim") && log.contains("talkative")).then_some(())
        });
        assert_eq!(shim_of(&container, node), shim);
        container.exec(node, &["true"]).success();
        container.delete(node);
    }
}

#[test]
fn it_serves_under_the_name_of_containerds_shim() {
    let Some(lab) = LAB.get() else { return };
    if runtime() != STERNA {
        return skip("another runtime is under test");
    }
    for node in lab.nodes() {
        let link = "/usr/local/bin/containerd-shim-runc-v2";
        node.exec(&[
            "ln",
            "-s",
            "/opt/sterna/bin/containerd-shim-sterna-v1",
            link,
        ])
        .success();
        // It remembers where it found a shim.
        node.service("restart", "containerd");
        let container = Container::shell("alias", IDLE)
            .under("io.containerd.runc.v2")
            .start(lab, node);
        let program = node.exec(&[
            "readlink",
            &format!("/proc/{}/exe", shim_of(&container, node)),
        ]);
        assert!(program.success().contains("sterna"), "{program}");
        container.exec(node, &["true"]).success();
        container.delete(node);
        node.exec(&["rm", link]).success();
        node.service("restart", "containerd");
    }
}
