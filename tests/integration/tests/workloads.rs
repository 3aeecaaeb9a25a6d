//! Programs that people run move and go on: many processes, many threads, users
//! that are not root, runtimes that like io_uring and MPTCP.

use sterna_integration::{
    Cgroup, Container, Flavour, Http, Lab, Load, Node, Running, SharedLab, eventually, migrate,
};

static LAB: SharedLab = SharedLab::new(4, |lab| {
    lab.up(&["a", "b"], Flavour::Forky, Cgroup::of_machine());
    lab.pair(&["a", "b"]);
    lab.import(
        "a",
        &["busybox", "valkey", "python", "nginx", "node", "goserver"],
    );
});

/// Moves a server that counts requests and ticks there and back, over one
/// connection. Neither count may start again, and both must go on.
#[track_caller]
fn a_counting_server_moves(lab: &Lab, server: &Running<'_>) {
    let (a, b) = (lab.node("a"), lab.node("b"));
    let mut client = server.http();
    let mut hits = client.number("/", "hits");
    for (from, to) in [(a, b), (b, a)] {
        let ticks = client.number("/", "ticks");
        migrate(server, from, to);
        let now = client.number("/", "hits");
        assert_eq!(now, hits + 2, "on {}", to.name());
        hits = now;
        eventually("it ticks on", || {
            hits += 1;
            (client.number("/", "ticks") > ticks + 10).then_some(())
        });
    }
}

#[test]
fn a_shell_that_forks_all_the_time() {
    let Some(lab) = LAB.get() else { return };
    let (a, b) = (lab.node("a"), lab.node("b"));
    let script = "
        work() { while :; do echo $1 | cat | cat >/dev/null; (exec true) & wait; echo $1; done }
        work one & work two & work three & wait";
    let shell = Container::shell("forks", script).start(lab, a);
    let said =
        |node: &Node, word: &str| shell.log(node).lines().filter(|line| *line == word).count();
    eventually("all work", || (said(a, "three") > 5).then_some(()));
    let (mut here, mut there) = (a, b);
    for _ in 0..4 {
        migrate(&shell, here, there);
        for word in ["one", "two", "three"] {
            let before = said(there, word);
            eventually(&format!("{word} works on"), || {
                (said(there, word) > before + 5).then_some(())
            });
        }
        (here, there) = (there, here);
    }
}

#[test]
fn many_processes_with_pipes_between_them() {
    let Some(lab) = LAB.get() else { return };
    let (a, b) = (lab.node("a"), lab.node("b"));
    let script = "
        for i in $(seq 1 30); do sh -c 'while :; do sleep 1; done' & done
        mkfifo /tmp/there /tmp/back
        cat </tmp/there >/tmp/back &
        exec 3>/tmp/there 4</tmp/back
        i=0; while :; do i=$((i+1)); echo $i >&3; read -r back <&4; echo $back; sleep 0.05; done";
    let container = Container::shell("processes", script).start(lab, a);
    eventually("it counts", || {
        (container.log(a).lines().count() > 5).then_some(())
    });
    migrate(&container, a, b);
    eventually("it counts on", || {
        (container.log(b).lines().count() > 5).then_some(())
    });
    let said = container.log(a) + &container.log(b);
    let numbers: Vec<u64> = said.lines().filter_map(|line| line.parse().ok()).collect();
    assert_eq!(numbers, (1..=numbers.len() as u64).collect::<Vec<_>>());
    let listing = b.ctr(&["task", "ps", "processes"]);
    assert!(listing.success().lines().count() > 30, "{listing}");
}

#[test]
fn a_python_program_with_threads() {
    let Some(lab) = LAB.get() else { return };
    let server = Container::new("python", "python")
        .with_address()
        .start(lab, lab.node("a"));
    a_counting_server_moves(lab, &server);
}

#[test]
fn an_nginx_whose_workers_are_not_root() {
    let Some(lab) = LAB.get() else { return };
    let (a, b) = (lab.node("a"), lab.node("b"));
    let nginx = Container::new("nginx", "nginx")
        .with_address()
        .start(lab, a);
    let mut client = nginx.http();
    let requests = |client: &mut Http| {
        let status = client.get("/status").expect("nginx answers");
        let counts = status.lines().nth(2).unwrap_or_default().split_whitespace();
        counts
            .last()
            .and_then(|count| count.parse::<u64>().ok())
            .expect("a count of requests")
    };
    let before = requests(&mut client);
    for (from, to) in [(a, b), (b, a)] {
        migrate(&nginx, from, to);
        assert_eq!(client.get("/").expect("nginx answers"), "served by nginx\n");
        let workers = nginx.exec(to, &["sh", "-c", "grep -h ^Uid: /proc/[0-9]*/status"]);
        let workers = workers
            .success()
            .lines()
            .filter(|line| line.contains("\t33\t"))
            .count();
        assert_eq!(workers, 2);
        // A large answer, in pieces.
        assert_eq!(client.get("/8M").expect("nginx answers").len(), 8 << 20);
    }
    assert!(requests(&mut client) > before);
}

#[test]
fn a_node_js_server() {
    let Some(lab) = LAB.get() else { return };
    let server = Container::new("node-js", "node")
        .with_address()
        .options(&["--seccomp"])
        .start(lab, lab.node("a"));
    a_counting_server_moves(lab, &server);
}

#[test]
fn a_go_server() {
    let Some(lab) = LAB.get() else { return };
    let server = Container::new("go", "goserver")
        .with_address()
        .options(&["--seccomp"])
        .start(lab, lab.node("a"));
    a_counting_server_moves(lab, &server);
}

#[test]
fn a_valkey_that_is_not_root() {
    let Some(lab) = LAB.get() else { return };
    let (a, b) = (lab.node("a"), lab.node("b"));
    let valkey = Container::valkey("uid-999")
        .options(&["--user", "999:999"])
        .start(lab, a);
    let load = Load::start(lab, valkey.address(), "32M", "2000/s");
    migrate(&valkey, a, b);
    migrate(&valkey, b, a);
    assert_eq!(
        valkey
            .exec(a, &["sh", "-c", "grep ^Uid: /proc/1/status | cut -f2"])
            .success(),
        "999\n"
    );
    load.stop().assert_nothing_lost();
}

#[test]
fn a_valkey_under_a_profile_of_system_calls() {
    let Some(lab) = LAB.get() else { return };
    let (a, b) = (lab.node("a"), lab.node("b"));
    let valkey = Container::valkey("profile")
        .options(&["--seccomp", "--user", "999:999"])
        .start(lab, a);
    let load = Load::start(lab, valkey.address(), "32M", "2000/s");
    migrate(&valkey, a, b);
    assert_eq!(
        valkey
            .exec(b, &["sh", "-c", "grep ^Seccomp: /proc/1/status | cut -f2"])
            .success(),
        "2\n"
    );
    load.stop().assert_nothing_lost();
}

#[test]
fn a_process_that_uses_a_terminal() {
    let Some(lab) = LAB.get() else { return };
    let (a, b) = (lab.node("a"), lab.node("b"));
    let script =
        "tty >/tmp/tty; i=0; while :; do i=$((i+1)); echo $i; echo $i >/tmp/i; sleep 0.1; done";
    let shell = Container::shell("tty", script).start_on_terminal(lab, a);
    let count = |node: &Node| -> u64 {
        shell
            .exec(node, &["cat", "/tmp/i"])
            .stdout
            .trim()
            .parse()
            .unwrap_or(0)
    };
    eventually("it counts", || (count(a) > 5).then_some(()));
    migrate(&shell, a, b);
    eventually("it counts on", || (count(b) > 10).then_some(()));
    assert!(
        shell
            .exec(b, &["cat", "/tmp/tty"])
            .success()
            .starts_with("/dev/")
    );
}
