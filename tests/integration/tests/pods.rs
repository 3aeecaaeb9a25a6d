//! The state of one pod's container arrives in a container of another pod, which
//! somebody else made: here ctr, in the place of a kubelet.

use std::time::Duration;

use sterna_integration::{
    Background, Cgroup, Container, DEADLINE, Flavour, Node, Running, SharedLab, eventually, settled,
};

static LAB: SharedLab = SharedLab::new(9, |lab| {
    lab.up(&["a", "b"], Flavour::Forky, Cgroup::of_machine());
    lab.pair(&["a", "b"]);
    lab.import("a", &["busybox"]);
    lab.import("b", &["busybox"]);
});

/// Counts in memory, and says the number every 50 ms.
const COUNTER: &str = "i=0; while :; do i=$((i+1)); echo $i; sleep 0.05; done";

/// Longer than any of these migrations takes.
const PATIENCE: Duration = Duration::from_secs(120);

/// The container `cache` of a pod, with what containerd's CRI says of it.
fn of_pod(id: &str, uid: &str, script: &str, more: &[&str]) -> Container {
    let mut options = Vec::new();
    for annotation in [
        "io.kubernetes.cri.container-type=container",
        "io.kubernetes.cri.container-name=cache",
        "io.kubernetes.cri.sandbox-namespace=shop",
        &format!("io.kubernetes.cri.sandbox-name=pod-{id}"),
        &format!("io.kubernetes.cri.sandbox-uid={uid}"),
        r#"sterna.dev/managed-containers=["cache"]"#,
    ]
    .iter()
    .chain(more)
    {
        options.extend(["--annotation".to_owned(), (*annotation).to_owned()]);
    }
    let options: Vec<&str> = options.iter().map(String::as_str).collect();
    Container::shell(id, script).options(&options)
}

fn send(source: &Running<'_>, from: &Node, to: &Node, uid: &str) -> Background {
    let words = ["sterna", "migrate", source.name(), "--to", to.name()];
    let sending = from.spawn(&[&words[..], &["--into-pod", uid]].concat());
    eventually("the other node waits for the container", || {
        let log = to.log_tail("sternad");
        let pod = format!("pod-{}", source.name());
        log.lines()
            .any(|line| line.contains("accepted") && line.contains(&pod))
            .then_some(())
    });
    sending
}

fn numbers(container: &Running<'_>, node: &Node) -> Vec<u64> {
    let log = container.log(node);
    log.lines().filter_map(|line| line.parse().ok()).collect()
}

#[track_caller]
fn counts(container: &Running<'_>, node: &Node) {
    let before = numbers(container, node).len();
    eventually("it counts", || {
        (numbers(container, node).len() > before + 3).then_some(())
    });
}

/// A UTS namespace with a name, as pods have one; lives as long as the value.
fn named(node: &Node, name: &str) -> (Background, String) {
    let script = format!("hostname {name}; echo $$; exec sleep 3600");
    let mut holder = node.spawn(&["unshare", "--uts", "sh", "-c", &script]);
    let pid = holder.line(DEADLINE, |line| !line.is_empty());
    let pid = pid.expect("the namespace has a process");
    (holder, format!("uts:/proc/{pid}/ns/uts"))
}

#[test]
fn a_replacement_has_the_memory_and_files_of_its_source_and_its_own_name() {
    let Some(lab) = LAB.get() else { return };
    let (a, b) = (lab.node("a"), lab.node("b"));
    let (_cart_1, uts_1) = named(a, "cart-1");
    let (_cart_2, uts_2) = named(b, "cart-2");
    let script = format!("echo kept >/root/file; {COUNTER}");
    let source = of_pod("cache-1", "u-1", &script, &[])
        .options(&["--with-ns", &uts_1])
        .start(lab, a);
    counts(&source, a);

    let sending = send(&source, a, b, "u-2");
    let replacement = of_pod("cache-2", "u-2", &script, &[])
        .options(&["--with-ns", &uts_2])
        .start(lab, b);
    sending.end(PATIENCE).success();
    settled(&replacement, b);
    counts(&replacement, b);
    let mut all = numbers(&source, a);
    all.extend(numbers(&replacement, b));
    let expected: Vec<u64> = (1..=all.len() as u64).collect();
    assert_eq!(all, expected);

    let said = |words: &[&str]| replacement.exec(b, words).success().to_owned();
    assert_eq!(said(&["cat", "/root/file"]), "kept\n");
    assert_eq!(said(&["hostname"]), "cart-2\n");
    // Its kubelet removes it.
    assert_eq!(source.status(a).as_deref(), Some("STOPPED"));
    replacement.delete(b);
}

#[test]
fn a_container_that_leaves_does_not_hear_that_it_should_end() {
    let Some(lab) = LAB.get() else { return };
    let (a, b) = (lab.node("a"), lab.node("b"));
    let script = format!("trap 'echo 0; exit 3' TERM; {COUNTER}");
    let source = of_pod("held-1", "u-3", &script, &[]).start(lab, a);
    let sending = send(&source, a, b, "u-4");
    let kill = a.spawn(&["ctr", "task", "kill", "--signal", "SIGTERM", "held-1"]);
    counts(&source, a);

    let replacement = of_pod("held-2", "u-4", &script, &[]).start(lab, b);
    sending.end(PATIENCE).success();
    kill.end(PATIENCE);
    counts(&replacement, b);
    assert!(!numbers(&source, a).contains(&0));
    assert!(!numbers(&replacement, b).contains(&0));
}

#[test]
fn a_container_that_stays_after_all_is_told_to_end() {
    let Some(lab) = LAB.get() else { return };
    let (a, b) = (lab.node("a"), lab.node("b"));
    let script = format!("trap 'echo 0; exit 3' TERM; {COUNTER}");
    let source = of_pod("stays", "u-5", &script, &[]).start(lab, a);
    let sending = send(&source, a, b, "u-6");
    let kill = a.spawn(&["ctr", "task", "kill", "--signal", "SIGTERM", "stays"]);
    counts(&source, a);
    a.sterna(&["cancel", "stays"]).success();
    assert_eq!(sending.end(PATIENCE).code(), 4);
    kill.end(PATIENCE).success();
    eventually("it ends", || numbers(&source, a).contains(&0).then_some(()));

    // Without a migration, at once.
    let source = of_pod("told", "u-7", &script, &[]).start(lab, a);
    counts(&source, a);
    a.ctr(&["task", "kill", "--signal", "SIGTERM", "told"])
        .success();
    eventually("it ends", || numbers(&source, a).contains(&0).then_some(()));
}

#[test]
fn a_container_whose_state_does_not_come_starts_from_nothing_only_where_it_may() {
    let Some(lab) = LAB.get() else { return };
    let (a, b) = (lab.node("a"), lab.node("b"));
    let source = of_pod("lost-1", "u-8", COUNTER, &[]).start(lab, a);
    let sending = send(&source, a, b, "u-9");
    a.sterna(&["cancel", "lost-1"]).success();
    sending.end(PATIENCE);
    counts(&source, a);

    let replacement = Running::expected(lab, "lost-2");
    let start = of_pod("lost-2", "u-9", COUNTER, &[]).run(b);
    assert!(!start.is_success(), "{start}");
    assert!(start.stderr.contains("did not arrive"), "{start}");
    assert!(start.stderr.contains("gave up"), "{start}");
    drop(replacement);
    let cold = "sterna.dev/on-restore-failure=cold-start";
    let replacement = of_pod("lost-3", "u-9", COUNTER, &[cold]).start(lab, b);
    counts(&replacement, b);
    assert_eq!(numbers(&replacement, b).first(), Some(&1));

    // The one whose state was not lost goes where it is sent next.
    let sending = send(&source, a, b, "u-10");
    let replacement = of_pod("lost-4", "u-10", COUNTER, &[]).start(lab, b);
    sending.end(PATIENCE).success();
    counts(&replacement, b);
}

#[test]
fn a_managed_container_does_not_start_where_nobody_knows_whether_it_has_a_state() {
    let Some(lab) = LAB.get() else { return };
    let b = lab.node("b");
    b.service("stop", "sternad");
    let start = of_pod("alone", "u-11", COUNTER, &[]).run(b);
    b.service("start", "sternad");
    assert!(!start.is_success(), "{start}");
    assert!(start.stderr.contains("sternad cannot say"), "{start}");
    drop(Running::expected(lab, "alone"));
    eventually("sternad is back", || {
        b.sterna(&["ps"]).is_success().then_some(())
    });
    let fresh = of_pod("alone-2", "u-11", COUNTER, &[]).start(lab, b);
    counts(&fresh, b);
}

/// Directories of a node where its kubelet would have put the emptyDirs of a pod, the
/// second in memory; gone with the value.
struct Volumes<'lab> {
    node: &'lab Node,
    uid: &'static str,
}

impl<'lab> Volumes<'lab> {
    fn make(node: &'lab Node, uid: &'static str, memory: &str) -> Self {
        let volumes = Self { node, uid };
        let (disk, fast) = (volumes.path("disk"), volumes.path("fast"));
        let script = format!(
            "mkdir -p {disk} {fast} && mount -t tmpfs -o size={memory} tmpfs {fast} && chmod 0777 {disk} {fast}"
        );
        node.sh(&script).success();
        volumes
    }

    fn path(&self, name: &str) -> String {
        let Self { uid, .. } = self;
        format!("/var/lib/kubelet/pods/{uid}/volumes/kubernetes.io~empty-dir/{name}")
    }

    fn container(&self, id: &str, script: &str) -> Container {
        let mount = |name: &str| {
            let source = self.path(name);
            format!("type=bind,src={source},dst=/{name},options=rbind:rw")
        };
        let (disk, fast) = (mount("disk"), mount("fast"));
        of_pod(id, self.uid, script, &[]).options(&["--mount", &disk, "--mount", &fast])
    }

    fn lists(&self, name: &str) -> Vec<String> {
        let listed = self.node.exec(&["ls", "-A", &self.path(name)]);
        listed.success().lines().map(str::to_owned).collect()
    }
}

impl Drop for Volumes<'_> {
    fn drop(&mut self) {
        let fast = self.path("fast");
        let script = format!(
            "umount -l {fast}; rm -rf /var/lib/kubelet/pods/{}",
            self.uid
        );
        self.node.sh(&script);
    }
}

/// Counts on standard output and in a file that stays open, and makes and removes
/// others meanwhile.
const KEEPER: &str = "exec 3>>/disk/log
    mkdir /disk/seen; head -c 3000000 /dev/urandom >/fast/random; md5sum /fast/random >/fast/sum
    i=0; while :; do i=$((i+1)); echo $i >&3; echo $i
    echo $i >/disk/seen/$i; rm -f /disk/seen/$((i-3)); echo $i >/fast/last; sleep 0.05; done";

#[test]
fn what_is_in_a_pods_emptydirs_comes_with_its_container() {
    let Some(lab) = LAB.get() else { return };
    let (a, b) = (lab.node("a"), lab.node("b"));
    let (from, to) = (
        Volumes::make(a, "u-20", "16m"),
        Volumes::make(b, "u-21", "16m"),
    );
    let source = from.container("volumes-1", KEEPER).start(lab, a);
    counts(&source, a);
    // As an init container of the replacement, or one beside it, may have left.
    b.write(&format!("{}/theirs", to.path("disk")), "theirs");
    b.write(&format!("{}/log", to.path("disk")), "of before");

    let sending = send(&source, a, b, "u-21");
    let replacement = to.container("volumes-2", KEEPER).start(lab, b);
    sending.end(PATIENCE).success();
    settled(&replacement, b);
    counts(&replacement, b);
    let sum = replacement.exec(b, &["md5sum", "-c", "/fast/sum"]);
    assert!(sum.success().contains("OK"), "{sum}");
    let log = b.read(&format!("{}/log", to.path("disk")));
    let counted: Vec<u64> = log.lines().filter_map(|line| line.parse().ok()).collect();
    let expected: Vec<u64> = (1..=counted.len() as u64).collect();
    assert_eq!(counted, expected, "each number is written once");
    let before = numbers(&source, a).len();
    assert!(counted.len() > before + 3, "the open file is written on");

    // What was removed at home is not there either, and what is not ours is.
    let seen = to.lists("disk/seen").len();
    assert!(seen <= 4, "{seen} files are left");
    assert_eq!(to.lists("disk"), ["log", "seen", "theirs"]);
    assert_eq!(to.lists("fast"), ["last", "random", "sum"]);
    let mode = b.exec(&["stat", "-c", "%a", &to.path("disk")]);
    assert_eq!(mode.success(), "777\n");
    replacement.delete(b);
}

#[test]
fn volumes_that_are_too_small_there_leave_the_container_where_it_is_and_stay_as_they_were() {
    let Some(lab) = LAB.get() else { return };
    let (a, b) = (lab.node("a"), lab.node("b"));
    let (from, to) = (
        Volumes::make(a, "u-22", "16m"),
        Volumes::make(b, "u-23", "1m"),
    );
    let source = from.container("large-1", KEEPER).start(lab, a);
    counts(&source, a);
    b.write(&format!("{}/theirs", to.path("disk")), "theirs");

    let sending = send(&source, a, b, "u-23");
    let replacement = Running::expected(lab, "large-2");
    let start = to.container("large-2", KEEPER).run(b);
    assert!(!start.is_success(), "{start}");
    assert!(start.stderr.contains("No space left"), "{start}");
    let sent = sending.end(PATIENCE);
    assert!(!sent.is_success(), "{sent}");
    drop(replacement);
    counts(&source, a);
    eventually("nothing is left of it", || {
        (to.lists("disk") == ["theirs"] && to.lists("fast").is_empty()).then_some(())
    });
}
