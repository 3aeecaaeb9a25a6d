//! What a container writes arrives byte by byte, whoever is restarted or dies
//! meanwhile. (Through the CRI's logs: `cri_api.rs`.)

use std::time::Duration;

use sterna_integration::{
    Background, Cgroup, Container, DEADLINE, Flavour, Inventory, Lab, Node, Running, SharedLab,
    eventually, eventually_within,
};

static LAB: SharedLab = SharedLab::new(12, |lab| {
    lab.up(&["a"], Flavour::Forky, Cgroup::of_machine());
    lab.up(&["c"], Flavour::Trixie, Cgroup::of_machine());
    lab.import("a", &["busybox"]);
    lab.import("c", &["busybox"]);
});

/// Writes as fast as it can, for some seconds, and ends.
const WRITER: &str =
    "n=0; while test $n -lt 100; do n=$((n+1)); seq 1 3000; sleep 0.03; done; echo end";

fn written() -> String {
    let block: String = (1..=3000)
        .map(|number: u32| format!("{number}\n"))
        .collect();
    block.repeat(100) + "end\n"
}

/// Kills containerd and stops it, each once some bytes more are there.
fn restart_twice(node: &Node, size: impl Fn() -> usize) {
    for how in ["kill", "stop"] {
        let before = size();
        eventually("it writes", || (size() > before).then_some(()));
        node.service(how, "containerd");
        let before = size();
        eventually("it writes on without containerd", || {
            (size() > before).then_some(())
        });
        node.service("start", "containerd");
    }
}

#[track_caller]
fn assert_whole(name: &str, node: &Node, output: &str) {
    let expected = written();
    let differs = output
        .bytes()
        .zip(expected.bytes())
        .position(|(ours, theirs)| ours != theirs);
    assert!(
        output == expected,
        "{name} on {}: {} bytes instead of {}, other from byte {differs:?} on",
        node.name(),
        output.len(),
        expected.len()
    );
}

fn stopped(container: &Running<'_>, node: &Node) {
    let patience = Duration::from_secs(90);
    eventually_within(patience, "it stops", || {
        match container.status(node).as_deref() {
            None | Some("STOPPED") => Some(()),
            Some(_) => None,
        }
    });
}

/// The bytes of a file of a node as the machine sees it, which is quicker.
fn size_of(node: &Node, path: &str) -> impl Fn() -> usize {
    let path = node.root().join(path);
    move || std::fs::metadata(&path).map_or(0, |found| usize::try_from(found.len()).unwrap_or(0))
}

/// A logger that, as loggers do, ends with its input and not when it is told to, which
/// it is when the task is deleted.
fn install_logger(node: &Node, body: &str) {
    node.write(
        "/usr/local/bin/logger",
        &format!("#!/bin/sh\ntrap '' TERM\nexec 5>&-\n{body}\n"),
    );
    node.sh("chmod +x /usr/local/bin/logger; rm -f /var/log/logged")
        .success();
}

/// Starts a [`WRITER`] whose output waits in a fifo. It does not write before ctr,
/// which reads along at first, has ended.
fn start_on_fifo<'lab>(lab: &'lab Lab, node: &Node, name: &str) -> Running<'lab> {
    node.exec(&["rm", "-rf", "/tmp/fifos", "/var/log/read"]);
    let script = format!("until test -e /go; do sleep 0.05; done; {WRITER}");
    let container = Container::shell(name, &script)
        .options(&["--fifo-dir", "/tmp/fifos", "--log-uri", ""])
        .start(lab, node);
    container.exec(node, &["touch", "/go"]).success();
    container
}

/// Copies the fifo to /var/log/read until it ends.
fn read_fifo(node: &Node, name: &str) -> Background {
    let script = "exec cat \"$(find /tmp/fifos -name \"$1-stdout\")\" >/var/log/read";
    node.spawn(&["sh", "-c", script, "sh", name])
}

#[test]
fn a_file_has_every_byte_although_containerd_was_restarted() {
    let Some(lab) = LAB.get() else { return };
    for node in lab.nodes() {
        node.exec(&["rm", "-f", "/var/log/filed.log"]);
        let container = Container::shell("filed", WRITER).start(lab, node);
        restart_twice(node, size_of(node, "var/log/filed.log"));
        stopped(&container, node);
        assert_whole("the file", node, &container.log(node));
    }
}

#[test]
fn a_logger_gets_every_byte_although_containerd_was_restarted() {
    let Some(lab) = LAB.get() else { return };
    for node in lab.nodes() {
        install_logger(node, "exec cat <&3 >/var/log/logged");
        let container = Container::shell("logged", WRITER)
            .options(&["--log-uri", "binary:///usr/local/bin/logger"])
            .start(lab, node);
        restart_twice(node, size_of(node, "var/log/logged"));
        stopped(&container, node);
        node.ctr(&["task", "delete", "logged"]);
        assert_whole("the logger", node, &node.read("/var/log/logged"));
    }
}

#[test]
fn a_fifo_gives_its_reader_every_byte_although_containerd_was_restarted() {
    let Some(lab) = LAB.get() else { return };
    for node in lab.nodes() {
        let container = start_on_fifo(lab, node, "piped");
        let reader = read_fifo(node, "piped");
        restart_twice(node, size_of(node, "var/log/read"));
        stopped(&container, node);
        node.ctr(&["task", "delete", "piped"]);
        reader.end(DEADLINE).success();
        assert_whole("the fifo", node, &node.read("/var/log/read"));
        node.exec(&["rm", "-rf", "/tmp/fifos"]).success();
    }
}

#[test]
fn a_container_that_nobody_listens_to_waits_and_then_goes_on() {
    let Some(lab) = LAB.get() else { return };
    for node in lab.nodes() {
        let container = start_on_fifo(lab, node, "unheard");
        std::thread::sleep(Duration::from_secs(2));
        node.service("kill", "containerd");
        node.service("start", "containerd");
        assert_eq!(container.status(node).as_deref(), Some("RUNNING"));
        let reader = read_fifo(node, "unheard");
        stopped(&container, node);
        node.ctr(&["task", "delete", "unheard"]);
        reader.end(DEADLINE).success();
        assert_whole("the fifo", node, &node.read("/var/log/read"));
        node.exec(&["rm", "-rf", "/tmp/fifos"]).success();
    }
}

#[test]
fn a_container_outlives_its_logger() {
    let Some(lab) = LAB.get() else { return };
    for node in lab.nodes() {
        let before = Inventory::of(node);
        install_logger(node, "head -c 1000 <&3 >/var/log/logged");
        // What it cannot write any more is its own affair; its end is not.
        let script = "trap '' PIPE; seq 1 200000; while test ! -e /go; do sleep 0.05; done; exit 4";
        let container = Container::shell("bereft", script)
            .options(&["--log-uri", "binary:///usr/local/bin/logger"])
            .start(lab, node);
        eventually("the logger has ended", || {
            node.processes(&["/usr/local/bin/logger"])
                .is_empty()
                .then_some(())
        });
        assert_eq!(container.status(node).as_deref(), Some("RUNNING"));
        container.exec(node, &["touch", "/go"]).success();
        stopped(&container, node);
        let deleted = node.ctr(&["task", "delete", "bereft"]);
        assert!(
            deleted.stderr.contains("exit code 4"),
            "on {}: {deleted}",
            node.name()
        );
        assert_eq!(node.read("/var/log/logged").len(), 1000);
        drop(container);
        before.assert_nothing_added(node);
    }
}

#[test]
fn a_logger_that_is_slow_gets_everything() {
    let Some(lab) = LAB.get() else { return };
    for node in lab.nodes() {
        install_logger(
            node,
            "sleep 1; cat <&3 >/var/log/logged; sleep 1; echo last >>/var/log/logged",
        );
        let container = Container::shell("patient", "seq 1 200000")
            .options(&["--log-uri", "binary:///usr/local/bin/logger"])
            .start(lab, node);
        stopped(&container, node);
        node.ctr(&["task", "delete", "patient"]).success();
        let expected: String = (1..=200_000)
            .map(|number: u32| format!("{number}\n"))
            .collect();
        eventually("the logger is done", || {
            let logged = node.read("/var/log/logged");
            (logged.len() > expected.len()).then_some(())
        });
        assert!(
            node.read("/var/log/logged") == expected + "last\n",
            "on {}",
            node.name()
        );
    }
}
