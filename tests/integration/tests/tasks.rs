//! The finer points of what containerd's shim does with a task, on every kind of
//! node. `hack/judge` has containerd's own tests; these are what they leave out.

use std::collections::BTreeSet;
use std::time::Duration;

use sterna_integration::{
    Cgroup, Container, DEADLINE, Events, Flavour, Node, Running, STERNA, SharedLab, eventually,
    runtime, skip,
};

const RUNC: &str = "io.containerd.runc.v2";

static LAB: SharedLab = SharedLab::new(20, |lab| {
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

const IDLE: &str = "while :; do sleep 0.1; done";

fn stopped(container: &Running<'_>, node: &Node) {
    eventually("it stops", || match container.status(node).as_deref() {
        None | Some("STOPPED") => Some(()),
        Some(_) => None,
    });
}

#[test]
fn whoever_waits_for_a_paused_container_waits_until_it_ends() {
    let Some(lab) = LAB.get() else { return };
    for node in lab.nodes() {
        let script = "trap 'exit 5' TERM; while :; do sleep 0.1; done";
        let container = Container::shell("patient", script)
            .options(&["--null-io"])
            .start(lab, node);
        node.ctr(&["task", "pause", "patient"]).success();
        let mut attached = node.spawn(&["ctr", "task", "attach", "patient"]);
        // Answering at once is what would be wrong.
        std::thread::sleep(Duration::from_millis(500));
        assert!(attached.is_running(), "on {}", node.name());
        node.ctr(&["task", "resume", "patient"]).success();
        node.ctr(&["task", "kill", "--signal", "SIGTERM", "patient"])
            .success();
        assert_eq!(attached.end(DEADLINE).code(), 5, "on {}", node.name());
        stopped(&container, node);
    }
}

#[test]
fn the_id_of_an_exec_is_taken_until_the_exec_is_deleted() {
    let Some(lab) = LAB.get() else { return };
    for node in lab.nodes() {
        let container = Container::shell("twice", IDLE).start(lab, node);
        let words = |seconds| {
            [
                "ctr",
                "task",
                "exec",
                "--exec-id",
                "same",
                "twice",
                "sleep",
                seconds,
            ]
        };
        let first = node.spawn(&words("1"));
        eventually("the first runs", || {
            node.ctr(&["task", "ps", "twice"])
                .success()
                .contains("same")
                .then_some(())
        });
        let said = node.exec(&words("0")).failure();
        assert!(said.contains("already exists"), "{said}");
        first.end(DEADLINE).success();
        node.exec(&words("0")).success();
        container.delete(node);
    }
}

#[test]
fn an_exec_in_a_paused_container_is_refused_and_says_so() {
    let Some(lab) = LAB.get() else { return };
    for node in lab.nodes() {
        let container = Container::shell("asleep", IDLE).start(lab, node);
        node.ctr(&["task", "pause", "asleep"]).success();
        let said = container.exec(node, &["true"]).failure();
        assert!(said.contains("cannot exec in a paused state"), "{said}");
        node.ctr(&["task", "resume", "asleep"]).success();
        container.exec(node, &["true"]).success();
        container.delete(node);
    }
}

#[test]
fn a_real_time_signal_reaches_a_container_and_an_exec() {
    let Some(lab) = LAB.get() else { return };
    for node in lab.nodes() {
        // SIGRTMIN+3, as systemd is told to halt, is 37.
        let script = "trap 'exit 3' 37; while :; do sleep 0.1; done";
        let container = Container::shell("prompt", script)
            .options(&["--null-io"])
            .start(lab, node);
        let words = [
            "ctr",
            "task",
            "exec",
            "--exec-id",
            "rt",
            "prompt",
            "sleep",
            "60",
        ];
        let exec = node.spawn(&words);
        let signal = ["task", "kill", "--signal", "RTMIN+3"];
        eventually("the exec takes the signal", || {
            node.ctr(&[&signal[..], &["--exec-id", "rt", "prompt"]].concat())
                .is_success()
                .then_some(())
        });
        assert_eq!(exec.end(DEADLINE).code(), 128 + 37);
        eventually("the container takes the signal", || {
            node.ctr(&[&signal[..], &["prompt"]].concat());
            (container.status(node)? == "STOPPED").then_some(())
        });
        let deleted = node.ctr(&["task", "delete", "prompt"]);
        assert!(deleted.stderr.contains("exit code 3"), "{deleted}");
    }
}

#[test]
fn the_list_of_processes_says_which_exec_one_is() {
    let Some(lab) = LAB.get() else { return };
    for node in lab.nodes() {
        let container = Container::shell("family", IDLE).start(lab, node);
        let words = [
            "ctr",
            "task",
            "exec",
            "--exec-id",
            "cousin",
            "family",
            "sleep",
            "60",
        ];
        let exec = node.spawn(&words);
        let listing = eventually("both are listed", || {
            let listing = node.ctr(&["task", "ps", "family"]).success().to_owned();
            listing.contains("cousin").then_some(listing)
        });
        let pid = container.pid(node).to_string();
        let init = listing
            .lines()
            .find(|line| line.split_whitespace().next() == Some(&pid))
            .unwrap_or_else(|| panic!("no {pid} in {listing}"));
        assert!(!init.contains("cousin"), "{listing}");
        drop(exec);
        container.delete(node);
    }
}

/// All paths of a JSON value that have a value which is not null; numbers in lists
/// do not count, because they depend on what the machine has.
fn fields(value: &serde_json::Value, path: &str, found: &mut BTreeSet<String>) {
    match value {
        serde_json::Value::Object(members) => {
            for (name, member) in members {
                fields(member, &format!("{path}.{name}"), found);
            }
        }
        serde_json::Value::Array(items) => {
            for item in items {
                fields(item, &format!("{path}[]"), found);
            }
        }
        serde_json::Value::Null => {}
        _ => {
            found.insert(path.to_owned());
        }
    }
}

#[test]
fn what_is_counted_is_what_containerds_shim_counts() {
    let Some(lab) = LAB.get() else { return };
    for node in lab.nodes() {
        // Something of everything: processor, memory, reading, writing, processes.
        let script = "while :; do dd if=/dev/zero of=/file bs=1M count=8 conv=fsync 2>/dev/null; cat /file >/dev/null; sleep 0.5; done";
        let start = |runtime: &str, name: &str| {
            let container = Container::shell(name, script)
                .under(runtime)
                .start(lab, node);
            eventually("it has written", || {
                container
                    .exec(node, &["test", "-s", "/file"])
                    .is_success()
                    .then_some(())
            });
            container
        };
        let count = |container: &Running<'_>, found: &mut BTreeSet<String>| {
            let said = node.ctr(&["task", "metrics", "--format", "json", container.name()]);
            let metrics: serde_json::Value =
                serde_json::from_str(said.success()).expect("ctr prints JSON");
            fields(&metrics, "", found);
        };
        let (mut theirs, mut ours) = (BTreeSet::new(), BTreeSet::new());
        let container = start(RUNC, "counted-theirs");
        count(&container, &mut theirs);
        container.delete(node);
        let container = start(STERNA, "counted-ours");
        // What is zero is not printed, and what the kernel does with the pages of a file
        // differs from moment to moment.
        for _ in 0..50 {
            count(&container, &mut ours);
            if theirs.is_subset(&ours) {
                break;
            }
            std::thread::sleep(Duration::from_millis(200));
        }
        container.delete(node);
        // More is fine: the kernel counts time without a controller for it too.
        let missing: Vec<_> = theirs.difference(&ours).collect();
        assert!(missing.is_empty(), "on {}: {missing:?}", node.name());
    }
}

#[test]
fn an_exec_ends_although_a_grandchild_holds_its_output() {
    let Some(lab) = LAB.get() else { return };
    let node = lab.node("a");
    let container = Container::shell("legacy", IDLE).start(lab, node);
    let said = container.exec(node, &["sh", "-c", "sleep 300 & echo said"]);
    assert_eq!(said.success(), "said\n");
    container.delete(node);
}

#[test]
fn a_terminals_output_arrives_whole() {
    let Some(lab) = LAB.get() else { return };
    for node in lab.nodes() {
        // With the first process ends the terminal's session, and with that goes, in the
        // kernel, what nobody has read yet: so that is not at once.
        let output = Container::shell("wide", "seq 1 100000; sleep 2").run_on_terminal(node);
        let text = output.success();
        let lines = text.lines().map(str::trim_end);
        let wrong = lines
            .zip(1..)
            .find(|(line, number)| *line != number.to_string());
        assert_eq!(wrong, None);
        assert_eq!(text.lines().count(), 100_000);
    }
}

#[test]
fn running_out_of_memory_is_told_before_the_end_that_it_causes() {
    let Some(lab) = LAB.get() else { return };
    for node in lab.nodes() {
        if node.cgroup() != Cgroup::of_machine() {
            skip("a cgroup v2 node without controllers has no memory limit");
            continue;
        }
        let mut events = Events::record(node);
        // The shell's variable is the first process's own memory.
        let eat = "x=0123456789abcdef; while :; do x=$x$x; done";
        let _container = Container::shell("glutton", eat)
            .options(&["--memory-limit", "33554432", "--null-io"])
            .start(lab, node);
        let topics = events.until("glutton", "exit");
        assert_eq!(
            topics,
            ["create", "start", "oom", "exit"],
            "on {}",
            node.name()
        );
    }
}

#[test]
fn a_paused_container_survives_a_restart_of_containerd() {
    let Some(lab) = LAB.get() else { return };
    for node in lab.nodes() {
        let container = Container::shell("frozen", IDLE).start(lab, node);
        let pid = container.pid(node);
        node.ctr(&["task", "pause", "frozen"]).success();
        for how in ["stop", "kill"] {
            node.service(how, "containerd");
            node.service("start", "containerd");
            assert_eq!(container.status(node).as_deref(), Some("PAUSED"));
            assert_eq!(container.pid(node), pid);
        }
        node.ctr(&["task", "resume", "frozen"]).success();
        container.exec(node, &["true"]).success();
        container.delete(node);
    }
}

#[test]
fn files_of_an_id_mapped_root_belong_to_the_users_of_the_container() {
    let Some(lab) = LAB.get() else { return };
    if runtime() != STERNA {
        return skip("another runtime is under test");
    }
    // containerd 1.7 changes the owners on disk instead.
    let node = lab.node("a");
    let container = Container::shell("mapped", &format!("echo hello >/mine; {IDLE}"))
        .options(&[
            "--uidmap",
            "0:100000:65536",
            "--gidmap",
            "0:200000:65536",
            "--remap-labels",
        ])
        .start(lab, node);
    let listing = eventually("it has written", || {
        let listing = container.exec(node, &["stat", "-c", "%u:%g", "/mine", "/etc/passwd"]);
        listing.is_success().then_some(listing.stdout)
    });
    assert_eq!(listing, "0:0\n0:0\n");
    let root = format!("/proc/{}/root", container.pid(node));
    let outside = node.exec(&["stat", "-c", "%u:%g", &format!("{root}/mine")]);
    assert_eq!(outside.success(), "100000:200000\n");
    container.delete(node);
    let mounts = node.read("/proc/self/mountinfo");
    assert!(!mounts.contains("/mapped/"), "{mounts}");
}
