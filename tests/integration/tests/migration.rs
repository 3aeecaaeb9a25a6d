//! Containers move between nodes with everything they hold.

use sterna_integration::{
    Cgroup, Container, Flavour, Inventory, Load, Migration, Node, Running, SharedLab, eventually,
    listed, migrate, settled, skip,
};

static LAB: SharedLab = SharedLab::new(2, |lab| {
    lab.up(&["a", "b"], Flavour::Forky, Cgroup::of_machine());
    lab.pair(&["a", "b"]);
    lab.import("a", &["busybox", "valkey"]);
});

/// Says a number every 50 ms.
const COUNTER: &str = "i=0; while :; do i=$((i+1)); echo $i; sleep 0.05; done";

fn numbers(container: &Running<'_>, node: &Node) -> Vec<u64> {
    container
        .log(node)
        .lines()
        .filter_map(|line| line.parse().ok())
        .collect()
}

#[test]
fn valkey_moves_while_clients_write_and_nothing_is_lost() {
    let Some(lab) = LAB.get() else { return };
    let (a, b) = (lab.node("a"), lab.node("b"));
    let valkey = Container::valkey("valkey").start(lab, a);
    let mut load = Load::start(lab, valkey.address(), "128M", "5000/s");
    let moved = migrate(&valkey, a, b);
    assert!(moved.memory_bytes > 128 << 20, "{moved:?}");
    if moved.tracking == "none" {
        skip("this kernel cannot track writes: everything moved in the freeze");
    } else {
        assert!(moved.laps.len() >= 2, "{moved:?}");
    }
    assert_eq!(valkey.status(a), None);
    assert_eq!(valkey.status(b).as_deref(), Some("RUNNING"));
    load.assert_served();
    load.stop().assert_nothing_lost();
}

#[test]
fn a_container_goes_to_and_fro_ten_times_and_leaves_nothing_behind() {
    let Some(lab) = LAB.get() else { return };
    let (a, b) = (lab.node("a"), lab.node("b"));
    // What is made once and stays is there after the first.
    let first = Container::shell("first", COUNTER)
        .with_address()
        .start(lab, a);
    migrate(&first, a, b);
    migrate(&first, b, a);
    first.delete(a);
    let before = [Inventory::of(a), Inventory::of(b)];

    let valkey = Container::valkey("traveller").start(lab, a);
    let load = Load::start(lab, valkey.address(), "32M", "2000/s");
    let (mut here, mut there) = (a, b);
    for _ in 0..10 {
        migrate(&valkey, here, there);
        (here, there) = (there, here);
    }
    load.stop().assert_nothing_lost();
    assert_eq!(here.name(), "a");

    assert_eq!(valkey.exec(a, &["valkey-cli", "ping"]).success(), "PONG\n");
    assert_eq!(valkey.exec(a, &["sh", "-c", "exit 6"]).code(), 6);
    assert!(
        a.ctr(&["task", "metrics", "traveller"])
            .success()
            .contains("memory")
    );
    a.ctr(&["task", "pause", "traveller"]).success();
    a.ctr(&["task", "resume", "traveller"]).success();
    valkey.delete(a);
    for (node, before) in [a, b].into_iter().zip(before) {
        node.exec(&["ip", "netns", "delete", "traveller"]);
        before.assert_nothing_added(node);
    }
}

#[test]
fn what_a_container_says_goes_on_in_its_log_without_a_gap() {
    let Some(lab) = LAB.get() else { return };
    let (a, b) = (lab.node("a"), lab.node("b"));
    let counter = Container::shell("talker", COUNTER).start(lab, a);
    eventually("it counts", || {
        (numbers(&counter, a).len() > 5).then_some(())
    });
    migrate(&counter, a, b);
    eventually("it counts on", || {
        (numbers(&counter, b).len() > 5).then_some(())
    });
    let mut all = numbers(&counter, a);
    all.extend(numbers(&counter, b));
    let expected: Vec<u64> = (1..=all.len() as u64).collect();
    assert_eq!(all, expected);
}

#[test]
fn a_container_arrives_as_what_it_was() {
    let Some(lab) = LAB.get() else { return };
    let (a, b) = (lab.node("a"), lab.node("b"));
    let container = Container::shell("same", "export PLACE=home; while :; do sleep 1; done")
        .options(&[
            "--label",
            "team=birds",
            "--env",
            "WING=left",
            "--cwd",
            "/tmp",
        ])
        .options(&["--hostname", "nest", "--memory-limit", "67108864"])
        .start(lab, a);
    let describe = |node: &Node| {
        let info = node.ctr(&["container", "info", "same"]);
        let mut info: serde_json::Value =
            serde_json::from_str(info.success()).expect("ctr prints JSON");
        for time in ["CreatedAt", "UpdatedAt"] {
            info.as_object_mut().expect("it is an object").remove(time);
        }
        info
    };
    let home = describe(a);
    migrate(&container, a, b);
    assert_eq!(describe(b), home);
    assert_eq!(container.exec(b, &["hostname"]).success(), "nest\n");
    let inside = "tr '\\0' '\\n' </proc/1/environ | grep WING; readlink /proc/1/cwd";
    assert_eq!(
        container.exec(b, &["sh", "-c", inside]).success(),
        "WING=left\n/tmp\n"
    );
    if Cgroup::of_machine() == Cgroup::V1 {
        let metrics = b.ctr(&["task", "metrics", "same"]);
        assert!(
            metrics.success().contains("67108864"),
            "the limit is missing: {metrics}"
        );
    }
    let listing = a.ctr(&["container", "list", "--quiet"]);
    assert!(
        !listing.success().lines().any(|name| name == "same"),
        "{listing}"
    );
}

#[test]
fn the_image_travels_once() {
    let Some(lab) = LAB.get() else { return };
    let (a, b) = (lab.node("a"), lab.node("b"));
    // An image that no other test brings to b.
    lab.import("a", &["goserver"]);
    let server = Container::new("image", "goserver")
        .with_address()
        .start(lab, a);
    assert!(migrate(&server, a, b).image_copied_bytes > 0);
    assert_eq!(migrate(&server, b, a).image_copied_bytes, 0);
    assert_eq!(migrate(&server, a, b).image_copied_bytes, 0);
}

#[test]
fn the_end_of_a_container_that_has_moved_is_noticed() {
    let Some(lab) = LAB.get() else { return };
    let (a, b) = (lab.node("a"), lab.node("b"));
    let script = "trap 'exit 9' TERM; echo ready; while :; do sleep 0.1; done";
    let container = Container::shell("mortal", script).start(lab, a);
    eventually("the shell has set its trap", || {
        container.log(a).contains("ready").then_some(())
    });
    migrate(&container, a, b);
    b.ctr(&["task", "kill", "--signal", "SIGTERM", "mortal"])
        .success();
    eventually("it stops", || {
        (container.status(b)? == "STOPPED").then_some(())
    });
    let deleted = b.ctr(&["task", "delete", "mortal"]);
    assert!(
        deleted.is_success() && deleted.stderr.contains("exit code 9"),
        "{deleted}"
    );
    b.ctr(&["container", "delete", "mortal"]).success();
}

#[test]
fn several_containers_move_at_the_same_time() {
    let Some(lab) = LAB.get() else { return };
    let (a, b) = (lab.node("a"), lab.node("b"));
    let there = Container::shell("there", COUNTER).start(lab, a);
    migrate(&there, a, b);
    let one = Container::shell("one", COUNTER).start(lab, a);
    let two = Container::shell("two", COUNTER).start(lab, a);
    let moves = [
        Migration::start(&one, a, b, &[]),
        Migration::start(&two, a, b, &[]),
        Migration::start(&there, b, a, &[]),
    ];
    for migration in moves {
        migration.success();
    }
    settled(&one, b);
    settled(&two, b);
    settled(&there, a);
}

#[test]
fn containerd_may_be_restarted_after_a_container_arrived() {
    let Some(lab) = LAB.get() else { return };
    let (a, b) = (lab.node("a"), lab.node("b"));
    let container = Container::shell("adopted", COUNTER).start(lab, a);
    migrate(&container, a, b);
    b.service("restart", "containerd");
    assert_eq!(container.status(b).as_deref(), Some("RUNNING"));
    assert_eq!(container.exec(b, &["echo", "here"]).success(), "here\n");
    migrate(&container, b, a);
    a.service("restart", "containerd");
    container.delete(a);
}

#[test]
fn sternad_may_be_restarted_while_containers_run() {
    let Some(lab) = LAB.get() else { return };
    let (a, b) = (lab.node("a"), lab.node("b"));
    let container = Container::shell("agentless", COUNTER).start(lab, a);
    for node in [a, b] {
        node.service("kill", "sternad");
        node.service("start", "sternad");
    }
    assert!(
        listed(a)
            .iter()
            .any(|listed| listed.id == "agentless" && listed.state == "running")
    );
    migrate(&container, a, b);
}

#[test]
fn a_migration_that_is_cancelled_leaves_the_container_where_it_was() {
    let Some(lab) = LAB.get() else { return };
    let (a, b) = (lab.node("a"), lab.node("b"));
    let valkey = Container::valkey("cancelled").start(lab, a);
    let mut load = Load::start(lab, valkey.address(), "64M", "1000/s");
    let before = Inventory::of(b);
    let Some(slow) = b.slow_link("100mbit") else {
        return skip("this kernel cannot limit a link (tc, tbf)");
    };
    let mut migration = Migration::start(&valkey, a, b, &[]);
    migration.wait_for_pre_copy();
    a.sterna(&["cancel", "cancelled"]).success();
    let (code, said) = migration.ended();
    assert_eq!(code, 4, "{said}");
    drop(slow);
    load.assert_served();
    assert_eq!(valkey.status(a).as_deref(), Some("RUNNING"));
    before.assert_nothing_added(b);
    migrate(&valkey, a, b);
    load.stop().assert_nothing_lost();
}

#[test]
fn a_migration_that_misses_its_deadline_leaves_the_container_where_it_was() {
    let Some(lab) = LAB.get() else { return };
    let (a, b) = (lab.node("a"), lab.node("b"));
    let valkey = Container::valkey("late").start(lab, a);
    let mut load = Load::start(lab, valkey.address(), "64M", "1000/s");
    let Some(slow) = b.slow_link("50mbit") else {
        return skip("this kernel cannot limit a link (tc, tbf)");
    };
    let migration = Migration::start(&valkey, a, b, &["--deadline", "3s"]);
    let said = migration.failure();
    assert!(
        said.contains("pre-copy") && said.contains("goes on on node a"),
        "{said}"
    );
    drop(slow);
    load.assert_served();
    migrate(&valkey, a, b);
    load.stop().assert_nothing_lost();
}

#[test]
fn a_blackout_that_cannot_be_kept_is_not_begun() {
    let Some(lab) = LAB.get() else { return };
    let (a, b) = (lab.node("a"), lab.node("b"));
    let container = Container::shell("impatient", COUNTER).start(lab, a);
    let migration = Migration::start(&container, a, b, &["--max-blackout", "1ms"]);
    let said = migration.failure();
    assert!(said.contains("1ms"), "{said}");
    let seen = numbers(&container, a).len();
    eventually("it counts on", || {
        (numbers(&container, a).len() > seen).then_some(())
    });
}
