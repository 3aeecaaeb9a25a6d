//! What a container wrote into its own file system arrives with it.

use sterna_integration::{
    Cgroup, Container, Flavour, Node, Running, SharedLab, eventually, migrate,
};

static LAB: SharedLab = SharedLab::new(6, |lab| {
    lab.up(&["a", "b"], Flavour::Forky, Cgroup::of_machine());
    lab.pair(&["a", "b"]);
    lab.import("a", &["busybox", "python"]);
});

/// Everything there is to say about the files of a directory tree.
const DESCRIBE: &str = include_str!("../programs/describe_files.py");

/// What a program can do to its file system, and a shell cannot.
const CHANGE: &str = include_str!("../programs/change_files.py");

/// Appends, overwrites, renames, makes and removes, and says whether everything is
/// as it believes.
const CHURN: &str = include_str!("../programs/churn_files.py");

fn describe(container: &Running<'_>, node: &Node) -> Vec<String> {
    let listing = container.exec(node, &["python3", "-c", DESCRIBE, "/"]);
    listing.success().lines().map(str::to_owned).collect()
}

#[track_caller]
fn assert_same(home: &[String], now: &[String]) {
    let missing: Vec<_> = home.iter().filter(|line| !now.contains(line)).collect();
    let added: Vec<_> = now.iter().filter(|line| !home.contains(line)).collect();
    assert!(
        missing.is_empty() && added.is_empty(),
        "at home, not on the other node:\n{missing:#?}\non the other node, not at home:\n{added:#?}"
    );
}

#[test]
fn every_kind_of_file_arrives_as_it_was() {
    let Some(lab) = LAB.get() else { return };
    let (a, b) = (lab.node("a"), lab.node("b"));
    let wait = "import time\nwhile True: time.sleep(1)";
    let container = Container::new("files", "python")
        .command(&["python3", "-c", wait])
        .start(lab, a);
    container.exec(a, &["python3", "-c", CHANGE]).success();
    let home = describe(&container, a);
    assert!(
        home.iter()
            .any(|line| line.starts_with("'data/sparse'") && line.contains(" sparse"))
    );
    migrate(&container, a, b);
    assert_same(&home, &describe(&container, b));
    // And back: what arrived is as good as what was written.
    migrate(&container, b, a);
    assert_same(&home, &describe(&container, a));
    assert!(
        !container
            .exec(a, &["test", "-e", "/etc/passwd"])
            .is_success()
    );
}

#[test]
fn files_that_change_while_the_container_moves_arrive_as_they_are_in_the_end() {
    let Some(lab) = LAB.get() else { return };
    let (a, b) = (lab.node("a"), lab.node("b"));
    let container = Container::new("churn", "python")
        .command(&["python3", "-c", CHURN])
        .start(lab, a);
    let (mut here, mut there) = (a, b);
    for _ in 0..4 {
        let checked = |node: &Node| container.log(node).matches("same").count();
        eventually("it has looked", || (checked(here) > 3).then_some(()));
        migrate(&container, here, there);
        let before = checked(there);
        eventually("it looks again", || {
            (checked(there) > before + 3).then_some(())
        });
        assert!(
            !container.log(there).contains("DIFFERENT"),
            "files are not what was written"
        );
        (here, there) = (there, here);
    }
    let numbers = container.exec(here, &["cat", "/churn.log"]);
    let numbers = numbers
        .success()
        .lines()
        .map(|line| line.parse().unwrap_or(0));
    assert!(
        numbers.zip(1_u64..).all(|(found, wanted)| found == wanted),
        "a line of the log is missing"
    );
}

#[test]
fn a_file_that_is_open_and_deleted_arrives() {
    let Some(lab) = LAB.get() else { return };
    let (a, b) = (lab.node("a"), lab.node("b"));
    let script = "exec 3<>/tmp/gone; echo kept >&3; rm /tmp/gone
        i=0; while :; do i=$((i+1)); echo $i; cat /proc/1/fd/3; sleep 0.1; done";
    let container = Container::shell("deleted", script).start(lab, a);
    eventually("it runs", || {
        container.log(a).contains("kept").then_some(())
    });
    migrate(&container, a, b);
    eventually("the file is still there", || {
        container.log(b).contains("kept").then_some(())
    });
    assert!(!container.exec(b, &["test", "-e", "/tmp/gone"]).is_success());
}

#[test]
fn what_is_in_memory_file_systems_arrives() {
    let Some(lab) = LAB.get() else { return };
    let (a, b) = (lab.node("a"), lab.node("b"));
    let script = "mkdir /dev/shm/d; head -c 3000000 /dev/urandom >/dev/shm/d/random
        md5sum /dev/shm/d/random >/dev/shm/sum; while :; do sleep 1; done";
    let container = Container::shell("memory", script).start(lab, a);
    eventually("it is written", || {
        container
            .exec(a, &["test", "-s", "/dev/shm/sum"])
            .is_success()
            .then_some(())
    });
    migrate(&container, a, b);
    assert!(
        container
            .exec(b, &["md5sum", "-c", "/dev/shm/sum"])
            .success()
            .contains("OK")
    );
}

#[test]
fn a_container_whose_file_system_is_read_only_moves() {
    let Some(lab) = LAB.get() else { return };
    let (a, b) = (lab.node("a"), lab.node("b"));
    let script = "i=0; while :; do i=$((i+1)); echo $i; sleep 0.1; done";
    let container = Container::shell("readonly", script)
        .options(&["--read-only"])
        .start(lab, a);
    migrate(&container, a, b);
    eventually("it counts on", || {
        (container.log(b).lines().count() > 3).then_some(())
    });
    container.exec(b, &["touch", "/file"]).failure();
}
