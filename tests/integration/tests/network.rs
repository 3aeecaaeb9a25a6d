//! Addresses and connections.

use std::io::{BufRead, BufReader, Write};
use std::net::{TcpListener, TcpStream, UdpSocket};
use std::time::Duration;

use sterna_integration::{Cgroup, Container, Flavour, Http, SharedLab, eventually, migrate};

static LAB: SharedLab = SharedLab::new(5, |lab| {
    lab.up(&["a", "b"], Flavour::Forky, Cgroup::of_machine());
    lab.pair(&["a", "b"]);
    lab.import("a", &["busybox", "python"]);
});

const PATIENCE: Duration = Duration::from_secs(20);

#[test]
fn a_container_takes_its_address_along_and_connections_stay() {
    let Some(lab) = LAB.get() else { return };
    let (a, b) = (lab.node("a"), lab.node("b"));
    let server = Container::new("address", "python")
        .with_address()
        .start(lab, a);
    let mut old = server.http();
    let before = old.number("/", "hits");
    let describe = |node: &sterna_integration::Node| {
        let script = "ip -o -4 address show dev eth0 scope global | tr -s ' ' | cut -d' ' -f2-4
            ip route; cat /sys/class/net/eth0/mtu; ip -o link show eth0 | sed 's/.*ether \\([^ ]*\\).*/\\1/'";
        let words = ["ip", "netns", "exec", "address", "sh", "-c", script];
        node.exec(&words).success().to_owned()
    };
    let home = describe(a);
    migrate(&server, a, b);
    assert_eq!(describe(b), home);
    assert_eq!(old.number("/", "hits"), before + 1);
    // New ones find it too.
    let address = format!("{}:8080", server.address());
    let mut new = Http::connect(&address).expect("it listens");
    assert_eq!(new.number("/", "hits"), before + 2);
    assert!(
        !a.holds("test -e /run/netns/address"),
        "the namespace is still on a"
    );
}

#[test]
fn a_connection_that_a_container_made_stays() {
    let Some(lab) = LAB.get() else { return };
    let (a, b) = (lab.node("a"), lab.node("b"));
    let listener = TcpListener::bind((lab.machine(), 0)).expect("the machine has an address there");
    let port = listener.local_addr().expect("it is bound").port();
    let talk = format!(
        "mkfifo /tmp/in /tmp/out; nc {} {port} </tmp/in >/tmp/out & exec 3>/tmp/in 4</tmp/out
        while read -r word <&4; do echo \"heard $word\" >&3; done",
        lab.machine()
    );
    let _container = Container::shell("caller", &talk)
        .with_address()
        .start(lab, a);
    let (mut stream, _) = listener.accept().expect("it calls");
    stream
        .set_read_timeout(Some(PATIENCE))
        .expect("a time limit");
    let mut answers = BufReader::new(stream.try_clone().expect("a second handle"));
    let mut say = |word: &str| {
        writeln!(stream, "{word}").expect("it is connected");
        let mut answer = String::new();
        answers.read_line(&mut answer).expect("it answers");
        assert_eq!(answer, format!("heard {word}\n"));
    };
    say("one");
    migrate(&_container, a, b);
    say("two");
    migrate(&_container, b, a);
    say("three");
}

#[test]
fn datagrams_reach_a_container_after_it_moved() {
    let Some(lab) = LAB.get() else { return };
    let (a, b) = (lab.node("a"), lab.node("b"));
    let program = "import socket\ns=socket.socket(socket.AF_INET,socket.SOCK_DGRAM)\ns.bind(('',9000))\nn=0\nwhile True:\n  d,p=s.recvfrom(99); n+=1; s.sendto(str(n).encode(),p)";
    let server = Container::new("datagrams", "python")
        .with_address()
        .command(&["python3", "-c", program])
        .start(lab, a);
    let socket = UdpSocket::bind((lab.machine(), 0)).expect("the machine has an address there");
    socket
        .set_read_timeout(Some(Duration::from_millis(500)))
        .expect("a time limit");
    let address = format!("{}:9000", server.address());
    let ask = || {
        eventually("it answers", || {
            socket.send_to(b"?", &address).ok()?;
            let mut answer = [0; 16];
            let (length, _) = socket.recv_from(&mut answer).ok()?;
            std::str::from_utf8(&answer[..length])
                .ok()?
                .parse::<u64>()
                .ok()
        })
    };
    let before = ask();
    migrate(&server, a, b);
    assert!(ask() > before);
}

#[test]
fn on_the_nodes_network_connections_end_and_listeners_come_back() {
    let Some(lab) = LAB.get() else { return };
    let (a, b) = (lab.node("a"), lab.node("b"));
    let server = Container::new("host-network", "python")
        .options(&["--net-host"])
        .start(lab, a);
    let at = |node: &sterna_integration::Node| format!("{}:8080", node.address());
    let mut old = eventually("it serves on a", || Http::connect(&at(a)).ok());
    let before = old.number("/", "hits");
    migrate(&server, a, b);
    // The old connection ends at once, cleanly or not, instead of hanging.
    let begun = std::time::Instant::now();
    old.get("/").expect_err("the connection was to node a");
    assert!(begun.elapsed() < PATIENCE, "the connection hung");
    let mut new = eventually("it serves on b", || Http::connect(&at(b)).ok());
    assert!(new.number("/", "hits") > before);
    TcpStream::connect(at(a)).expect_err("nobody listens on a any more");
}

#[test]
fn a_container_without_a_network_moves() {
    let Some(lab) = LAB.get() else { return };
    let (a, b) = (lab.node("a"), lab.node("b"));
    // ctr gives it a namespace of its own, with nothing in it.
    let script = "i=0; while :; do i=$((i+1)); echo $i; sleep 0.1; done";
    let container = Container::shell("offline", script).start(lab, a);
    migrate(&container, a, b);
    eventually("it counts on", || {
        (container.log(b).lines().count() > 3).then_some(())
    });
}
