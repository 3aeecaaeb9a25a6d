//! Checkpoints as containerd knows them: `ctr task checkpoint`, `ctr container
//! checkpoint` and `ctr container restore`, under our shim and under containerd's
//! own, and from the one to the other.

use sterna_integration::{
    Cgroup, Container, DEADLINE, Flavour, Lab, Moment, Node, Running, STERNA, SharedLab, Victim,
    eventually,
};

const RUNC: &str = "io.containerd.runc.v2";

static LAB: SharedLab = SharedLab::new(1, |lab| {
    lab.up(&["a"], Flavour::Forky, Cgroup::of_machine());
    lab.up(&["c"], Flavour::Trixie, Cgroup::of_machine());
    lab.import("a", &["busybox", "valkey"]);
    lab.import("c", &["busybox"]);
});

/// Counts in a shell variable, which only a checkpoint brings back, and leaves a
/// file in the writable layer.
const COUNTER: &str =
    "echo kept >/layer; i=0; while :; do i=$((i+1)); echo $i >/dev/shm/count; sleep 0.1; done";

fn count(container: &Running<'_>, node: &Node) -> u64 {
    let text = container.exec(node, &["cat", "/dev/shm/count"]).stdout;
    text.trim().parse().unwrap_or(0)
}

#[track_caller]
fn counted_past(container: &Running<'_>, node: &Node, limit: u64) -> u64 {
    eventually(&format!("{} counts past {limit}", container.name()), || {
        let now = count(container, node);
        (now > limit).then_some(now)
    })
}

/// A checkpoint image of a running container, with its layer, and a container
/// restored from it.
fn checkpoint_and_restore(lab: &Lab, node: &Node, runtime: &str, in_between: impl Fn()) {
    let original = Container::shell("original", COUNTER)
        .under(runtime)
        .start(lab, node);
    let before = counted_past(&original, node, 10);
    let reference = "localhost/checkpoint:1";
    node.ctr(&[
        "container",
        "checkpoint",
        "--rw",
        "--task",
        "--image",
        "original",
        reference,
    ])
    .success();
    counted_past(&original, node, before);
    original.delete(node);
    in_between();

    let restored = Running::expected(lab, "restored");
    node.ctr(&[
        "container",
        "restore",
        "--rw",
        "--live",
        "restored",
        reference,
    ])
    .success();
    let first = counted_past(&restored, node, before);
    counted_past(&restored, node, first);
    assert_eq!(restored.exec(node, &["cat", "/layer"]).success(), "kept\n");
    restored.delete(node);
    node.ctr(&["images", "delete", reference]).success();
}

#[test]
fn a_checkpoint_restores_under_sterna_on_containerd_2() {
    let Some(lab) = LAB.get() else { return };
    checkpoint_and_restore(lab, lab.node("a"), STERNA, || {});
}

#[test]
fn a_checkpoint_restores_under_sterna_on_containerd_1_7() {
    let Some(lab) = LAB.get() else { return };
    checkpoint_and_restore(lab, lab.node("c"), STERNA, || {});
}

#[test]
fn a_checkpoint_restores_under_containerds_own_shim_so_the_test_is_fair() {
    let Some(lab) = LAB.get() else { return };
    checkpoint_and_restore(lab, lab.node("a"), RUNC, || {});
}

/// A checkpoint made by one shim, restored under the other. containerd takes the
/// runtime's name from the checkpoint and finds the program by the name, so the
/// program behind a name is changed in between.
fn change_shims(lab: &Lab, node: &Node, from: &str, to: &str) {
    let become_shim = |program: &str| {
        let link = "ln -sfn $(command -v \"$1\") /usr/local/bin/containerd-shim-either-v2";
        node.exec(&["sh", "-ec", link, "sh", program]).success();
    };
    become_shim(from);
    checkpoint_and_restore(lab, node, "io.containerd.either.v2", || become_shim(to));
}

#[test]
fn what_containerds_shim_has_checkpointed_ours_restores() {
    let Some(lab) = LAB.get() else { return };
    for node in ["a", "c"] {
        change_shims(
            lab,
            lab.node(node),
            "containerd-shim-runc-v2",
            "containerd-shim-sterna-v1",
        );
    }
}

#[test]
fn what_our_shim_has_checkpointed_containerds_restores() {
    let Some(lab) = LAB.get() else { return };
    for node in ["a", "c"] {
        change_shims(
            lab,
            lab.node(node),
            "containerd-shim-sterna-v1",
            "containerd-shim-runc-v2",
        );
    }
}

#[test]
fn a_checkpoint_can_be_written_to_a_directory_and_end_the_container() {
    let Some(lab) = LAB.get() else { return };
    let node = lab.node("a");
    let container = Container::shell("directory", COUNTER).start(lab, node);
    counted_past(&container, node, 3);
    let words = [
        "task",
        "checkpoint",
        "--exit",
        "--image-path",
        "/tmp/checkpoint",
        "directory",
    ];
    node.ctr(&words).success();
    eventually("it ends", || match container.status(node).as_deref() {
        None | Some("STOPPED") => Some(()),
        Some(_) => None,
    });
    node.sh("test -s /tmp/checkpoint/inventory.img && rm -r /tmp/checkpoint")
        .success();
}

#[test]
fn a_container_that_pauses_for_its_checkpoint_stays_paused() {
    let Some(lab) = LAB.get() else { return };
    let node = lab.node("a");
    let container = Container::shell("still", COUNTER).start(lab, node);
    counted_past(&container, node, 3);
    node.ctr(&["task", "pause", "still"]).success();
    node.ctr(&["task", "checkpoint", "--image-path", "/tmp/still", "still"])
        .success();
    assert_eq!(container.status(node).as_deref(), Some("PAUSED"));
    node.ctr(&["task", "resume", "still"]).success();
    let now = count(&container, node);
    counted_past(&container, node, now);
    node.sh("rm -r /tmp/still").success();
}

#[test]
fn what_cannot_be_dumped_says_why_and_goes_on() {
    let Some(lab) = LAB.get() else { return };
    let node = lab.node("a");
    // A connection that is established: a plain checkpoint does not take those.
    let valkey = Container::valkey("connected").start(lab, node);
    let address = format!("{}:6379", valkey.address());
    let _connection = eventually("Valkey accepts", || {
        std::net::TcpStream::connect(&address).ok()
    });
    let said = node
        .ctr(&[
            "task",
            "checkpoint",
            "--image-path",
            "/tmp/connected",
            "connected",
        ])
        .failure();
    assert!(
        said.contains("tcp-established"),
        "the reason is missing: {said}"
    );
    assert_eq!(valkey.status(node).as_deref(), Some("RUNNING"));
    assert_eq!(
        valkey.exec(node, &["valkey-cli", "ping"]).success(),
        "PONG\n"
    );
    node.sh("rm -rf /tmp/connected").success();
}

#[test]
fn without_criu_containers_run_and_a_checkpoint_says_what_is_missing() {
    let Some(lab) = LAB.get() else { return };
    let node = lab.node("a");
    node.sh("mv /usr/sbin/criu /usr/sbin/criu.away").success();
    let container = Container::shell("modest", COUNTER).start(lab, node);
    counted_past(&container, node, 3);
    let checkpoint = node.ctr(&[
        "task",
        "checkpoint",
        "--image-path",
        "/tmp/modest",
        "modest",
    ]);
    node.sh("mv /usr/sbin/criu.away /usr/sbin/criu; rm -rf /tmp/modest")
        .success();
    let said = checkpoint.failure().to_lowercase();
    assert!(said.contains("criu"), "{said}");
    let now = count(&container, node);
    counted_past(&container, node, now);
    container.delete(node);
}

#[test]
fn a_valkey_comes_back_with_its_keys() {
    let Some(lab) = LAB.get() else { return };
    let node = lab.node("a");
    let command = ["valkey-server", "--save", "", "--protected-mode", "no"];
    let valkey = Container::new("keys", "valkey")
        .command(&command)
        .start(lab, node);
    eventually("it answers", || {
        valkey
            .exec(node, &["valkey-cli", "set", "bird", "tern"])
            .is_success()
            .then_some(())
    });
    let reference = "localhost/keys:1";
    node.ctr(&[
        "container",
        "checkpoint",
        "--rw",
        "--task",
        "--image",
        "keys",
        reference,
    ])
    .success();
    valkey.delete(node);
    let restored = Running::expected(lab, "keys-again");
    node.ctr(&[
        "container",
        "restore",
        "--rw",
        "--live",
        "keys-again",
        reference,
    ])
    .success();
    // ctr gives it a new network namespace whose loopback is down.
    let pid = restored.pid(node).to_string();
    node.exec(&[
        "nsenter", "--net", "--target", &pid, "ip", "link", "set", "lo", "up",
    ])
    .success();
    assert_eq!(
        restored
            .exec(node, &["valkey-cli", "get", "bird"])
            .success(),
        "tern\n"
    );
    restored.delete(node);
}

#[test]
fn a_restart_of_containerd_in_the_middle_of_a_checkpoint_does_not_tear_it() {
    let Some(lab) = LAB.get() else { return };
    // containerd 1.7 takes no directory for a runtime that is not called runc.
    let node = lab.node("a");
    node.exec(&["rm", "-rf", "/tmp/torn", "/tmp/whole"])
        .success();
    // So much memory that the dump takes a while.
    let hold = "(head -c 300000000 /dev/zero; sleep 100000) | tail -c 300000000 &";
    let container = Container::shell("torn", &format!("{hold} {COUNTER}")).start(lab, node);
    eventually("the memory is there", || {
        let held = node.processes(&["tail -c 300000000"]);
        let status = node
            .exec(&["cat", &format!("/proc/{}/status", held.last()?)])
            .stdout;
        let line = status.lines().find(|line| line.starts_with("VmRSS:"))?;
        let size: u64 = line.split_whitespace().nth(1)?.parse().ok()?;
        (size > 250_000).then_some(())
    });
    let words = [
        "ctr",
        "task",
        "checkpoint",
        "--image-path",
        "/tmp/torn",
        "torn",
    ];
    let dump = Moment::of_dump_into(node, "/tmp/torn");
    let asking = node.spawn(&words);
    dump.wait();
    let criu = Victim::find(node, &["criu: dump"]);
    criu.stop();
    assert!(
        !node.holds("test -e /tmp/torn/inventory.img"),
        "the dump was too quick"
    );
    node.service("kill", "containerd");
    node.service("start", "containerd");
    asking.end(DEADLINE).failure();
    // Who asked has paused it, and was not there any more to resume it.
    assert_eq!(container.status(node).as_deref(), Some("PAUSED"));
    criu.go_on();
    eventually("the dump is complete", || {
        node.holds("test -s /tmp/torn/inventory.img").then_some(())
    });
    eventually("it can be resumed", || {
        node.ctr(&["task", "resume", "torn"])
            .is_success()
            .then_some(())
    });
    let now = count(&container, node);
    counted_past(&container, node, now);
    node.ctr(&["task", "checkpoint", "--image-path", "/tmp/whole", "torn"])
        .success();
    let now = count(&container, node);
    counted_past(&container, node, now);
    container.delete(node);
    node.exec(&["rm", "-r", "/tmp/torn", "/tmp/whole"])
        .success();
}
