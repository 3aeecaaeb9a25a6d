//! What cannot be done is refused with a reason and a code, and touches nothing.

use std::io::{Read, Write};
use std::net::TcpStream;
use std::time::Duration;

use sterna_integration::{
    Cgroup, Container, Flavour, Inventory, Lab, Load, Migration, Running, SharedLab, TicketThief,
    eventually, migrate, settled, skip,
};

static LAB: SharedLab = SharedLab::new(7, |lab| {
    lab.up(&["a", "b"], Flavour::Forky, Cgroup::of_machine());
    lab.pair(&["a", "b"]);
    lab.import("a", &["busybox", "valkey", "python", "goserver"]);
});

/// sterna's exit codes.
const FAILED: i32 = 1;
const USAGE: i32 = 2;
const REFUSED: i32 = 3;

const COUNTER: &str = "i=0; while :; do i=$((i+1)); echo $i; sleep 0.05; done";

/// Tries to move a container, which must not work, must leave it running and
/// must leave nothing on b; returns the exit code and what was said.
#[track_caller]
fn is_not_moved(lab: &Lab, container: &Running<'_>, options: &[&str]) -> (i32, String) {
    let (a, b) = (lab.node("a"), lab.node("b"));
    let before = Inventory::of(b);
    let pid = container.pid(a);
    let (code, said) = Migration::start(container, a, b, options).ended();
    assert_ne!(code, 0, "{said}");
    assert_eq!(settled(container, a).pid, pid, "{said}");
    assert!(container.exec(a, &["true"]).is_success(), "{said}");
    before.assert_nothing_added(b);
    (code, said)
}

#[test]
fn a_container_that_is_not_there() {
    let Some(lab) = LAB.get() else { return };
    let output = lab.node("a").sterna(&["migrate", "nobody", "--to", "b"]);
    assert_eq!(output.code(), REFUSED, "{output}");
    assert!(output.stderr.contains("nobody"), "{output}");
}

#[test]
fn a_container_of_another_runtime() {
    let Some(lab) = LAB.get() else { return };
    let a = lab.node("a");
    let _container = Container::shell("foreign", COUNTER)
        .under("io.containerd.runc.v2")
        .start(lab, a);
    let output = a.sterna(&["migrate", "foreign", "--to", "b"]);
    assert_eq!(output.code(), REFUSED, "{output}");
    assert!(output.stderr.contains("foreign"), "{output}");
}

#[test]
fn a_node_that_is_not_there_and_the_node_itself() {
    let Some(lab) = LAB.get() else { return };
    let a = lab.node("a");
    let container = Container::shell("homebody", COUNTER).start(lab, a);
    for (node, word) in [
        ("nowhere", "nowhere"),
        ("a", "already"),
        ("Not A Name", "Not A Name"),
    ] {
        let output = a.sterna(&["migrate", "homebody", "--to", node]);
        assert!(
            [FAILED, USAGE, REFUSED].contains(&output.code()),
            "{output}"
        );
        assert!(output.stderr.contains(word), "{output}");
    }
    settled(&container, a);
}

#[test]
fn a_node_without_an_agent_is_named() {
    let Some(lab) = LAB.get() else { return };
    let (a, b) = (lab.node("a"), lab.node("b"));
    let container = Container::shell("waiting", COUNTER).start(lab, a);
    b.service("stop", "sternad");
    let output = a.sterna(&["migrate", "waiting", "--to", "b"]);
    b.service("start", "sternad");
    assert_eq!(output.code(), FAILED, "{output}");
    assert!(output.stderr.contains("destination agent"), "{output}");
    migrate(&container, a, b);
}

#[test]
fn a_node_of_another_authority() {
    let Some(lab) = LAB.get() else { return };
    let (a, b) = (lab.node("a"), lab.node("b"));
    let container = Container::shell("distrusted", COUNTER).start(lab, a);
    b.sh("mv /etc/sterna/pki /etc/sterna/pki.away; sternad init-ca; sternad enroll b")
        .success();
    b.service("restart", "sternad");
    let (_, said) = is_not_moved(lab, &container, &[]);
    b.sh("rm -r /etc/sterna/pki; mv /etc/sterna/pki.away /etc/sterna/pki")
        .success();
    b.service("restart", "sternad");
    assert!(said.to_lowercase().contains("certificate"), "{said}");
    migrate(&container, a, b);
}

#[test]
fn a_destination_without_room() {
    let Some(lab) = LAB.get() else { return };
    let (a, b) = (lab.node("a"), lab.node("b"));
    let valkey = Container::valkey("roomy").start(lab, a);
    let load = Load::start(lab, valkey.address(), "64M", "1000/s");
    let config = b.read("/etc/sterna/sternad.toml");
    b.write(
        "/etc/sterna/sternad.toml",
        &format!("{config}\n[limits]\nmemory_bytes = 16777216\n"),
    );
    b.service("restart", "sternad");
    let (code, said) = is_not_moved(lab, &valkey, &[]);
    b.write("/etc/sterna/sternad.toml", &config);
    b.service("restart", "sternad");
    assert_eq!(code, REFUSED, "{said}");
    assert!(said.contains("memory"), "{said}");
    migrate(&valkey, a, b);
    load.stop().assert_nothing_lost();
}

#[test]
fn a_bind_mount_that_the_destination_lacks() {
    let Some(lab) = LAB.get() else { return };
    let (a, b) = (lab.node("a"), lab.node("b"));
    a.sh("mkdir -p /srv/only-here").success();
    let container = Container::shell("bound", COUNTER)
        .options(&[
            "--mount",
            "type=bind,src=/srv/only-here,dst=/data,options=rbind:rw",
        ])
        .start(lab, a);
    let (code, said) = is_not_moved(lab, &container, &[]);
    assert_eq!(code, REFUSED, "{said}");
    assert!(said.contains("/srv/only-here"), "{said}");
    let doctor = a.sterna(&["doctor", "bound", "--to", "b"]);
    assert_eq!(doctor.code(), 1, "{doctor}");
    assert!(doctor.stdout.contains("/srv/only-here"), "{doctor}");
    // Where it is there, it is no reason.
    b.sh("mkdir -p /srv/only-here").success();
    migrate(&container, a, b);
}

#[test]
fn a_destination_without_a_bridge() {
    let Some(lab) = LAB.get() else { return };
    let (a, b) = (lab.node("a"), lab.node("b"));
    let container = Container::shell("addressed", COUNTER)
        .with_address()
        .start(lab, a);
    let config = b.read("/etc/sterna/sternad.toml");
    b.write("/etc/sterna/sternad.toml", "");
    b.service("restart", "sternad");
    let (code, said) = is_not_moved(lab, &container, &[]);
    b.write("/etc/sterna/sternad.toml", &config);
    b.service("restart", "sternad");
    assert_eq!(code, REFUSED, "{said}");
    assert!(said.contains("bridge"), "{said}");
    migrate(&container, a, b);
}

#[test]
fn a_destination_without_criu() {
    let Some(lab) = LAB.get() else { return };
    let (a, b) = (lab.node("a"), lab.node("b"));
    let container = Container::shell("helpless", COUNTER).start(lab, a);
    b.sh("mv /usr/sbin/criu /usr/sbin/criu.away").success();
    let (code, said) = is_not_moved(lab, &container, &[]);
    b.sh("mv /usr/sbin/criu.away /usr/sbin/criu").success();
    assert_eq!(code, REFUSED, "{said}");
    assert!(said.to_lowercase().contains("criu"), "{said}");
    migrate(&container, a, b);
}

/// Both nodes are on one machine, so the other CPU is one whose /proc/cpuinfo
/// lacks something: that is where sternad looks.
#[test]
fn a_destination_with_another_cpu() {
    let Some(lab) = LAB.get() else { return };
    let (a, b) = (lab.node("a"), lab.node("b"));
    let container = Container::shell("picky", COUNTER).start(lab, a);
    b.sh("sed 's/ sse2 / /; s/ asimd / /' /proc/cpuinfo >/tmp/cpuinfo
        mount --bind /tmp/cpuinfo /proc/cpuinfo")
        .success();
    let (code, said) = is_not_moved(lab, &container, &[]);
    let doctor = a.sterna(&["doctor", "picky", "--to", "b"]);
    b.sh("umount /proc/cpuinfo; rm /tmp/cpuinfo").success();
    assert_eq!(code, REFUSED, "{said}");
    assert!(said.contains("sse2") || said.contains("asimd"), "{said}");
    assert_eq!(doctor.code(), 1, "{doctor}");
    assert!(doctor.stdout.contains("CPU"), "{doctor}");
    migrate(&container, a, b);
}

/// Whoever has a ticket, its secret and even the source's certificate begins no
/// second migration with it, neither beside the first nor after it.
#[test]
fn a_ticket_that_is_used_twice() {
    let Some(lab) = LAB.get() else { return };
    let (a, b) = (lab.node("a"), lab.node("b"));
    let Some(slow) = b.slow_link("100mbit") else {
        return skip("this kernel cannot limit a link (tc, tbf)");
    };
    a.sh("sternad enroll stranger --out /root/stranger")
        .success();
    let valkey = Container::valkey("robbed").start(lab, a);
    let load = Load::start(lab, valkey.address(), "64M", "1000/s");
    let thief = TicketThief::lurk(b, "robbed");
    let mut migration = Migration::start(&valkey, a, b, &["--max-blackout", "2s"]);
    let ticket = thief.catch();
    migration.wait_for_begin();
    let (own, stranger) = ("/etc/sterna/pki", "/root/stranger");
    let second = ticket.present(a, own).unwrap_err();
    assert!(second.contains("same ticket"), "{second}");
    let guess = ticket.with_wrong_secret().present(a, own).unwrap_err();
    assert!(guess.contains("does not carry the ticket"), "{guess}");
    // Refused in the handshake, or right after it.
    ticket.present(a, stranger).unwrap_err();
    drop(slow);
    migration.success();
    settled(&valkey, b);
    // By the receiver, if it is still there, or by the agent. One that ends at this
    // moment takes the connection with it.
    let late = eventually("somebody answers", || {
        let said = ticket.present(a, own).unwrap_err();
        (!said.contains("connection")).then_some(said)
    });
    assert!(
        late == "it runs here" || late.contains("engine of this migration is gone"),
        "{late}"
    );
    a.sh("rm -r /root/stranger").success();
    load.stop().assert_nothing_lost();
}

#[test]
fn a_name_that_is_taken_on_the_destination() {
    let Some(lab) = LAB.get() else { return };
    let (a, b) = (lab.node("a"), lab.node("b"));
    lab.import("b", &["busybox"]);
    let mine = Container::shell("twin", COUNTER).start(lab, a);
    let theirs = Container::shell("twin", COUNTER).start(lab, b);
    let pid = theirs.pid(b);
    let (_, said) = is_not_moved(lab, &mine, &[]);
    assert!(said.contains("twin"), "{said}");
    assert_eq!(
        theirs.pid(b),
        pid,
        "the other node's own container was touched"
    );
}

#[test]
fn a_paused_container() {
    let Some(lab) = LAB.get() else { return };
    let a = lab.node("a");
    let container = Container::shell("dormant", COUNTER).start(lab, a);
    a.ctr(&["task", "pause", "dormant"]).success();
    let output = a.sterna(&["migrate", "dormant", "--to", "b"]);
    assert_eq!(output.code(), REFUSED, "{output}");
    assert!(output.stderr.contains("paused"), "{output}");
    a.ctr(&["task", "resume", "dormant"]).success();
    migrate(&container, a, lab.node("b"));
}

#[test]
fn a_container_that_is_on_its_way_already() {
    let Some(lab) = LAB.get() else { return };
    let (a, b) = (lab.node("a"), lab.node("b"));
    let Some(slow) = b.slow_link("100mbit") else {
        return skip("this kernel cannot limit a link (tc, tbf)");
    };
    let valkey = Container::valkey("twice").start(lab, a);
    let load = Load::start(lab, valkey.address(), "64M", "0/s");
    let mut first = Migration::start(&valkey, a, b, &["--max-blackout", "2s"]);
    first.wait_for_pre_copy();
    let second = a.sterna(&["migrate", "twice", "--to", "b"]);
    assert_eq!(second.code(), REFUSED, "{second}");
    assert!(second.stderr.contains("already"), "{second}");
    drop(slow);
    first.success();
    drop(load);
}

/// A socket of a family that CRIU does not know: found out while it runs, or at
/// the latest in the freeze, and it runs on.
#[test]
fn something_that_criu_cannot_dump() {
    let Some(lab) = LAB.get() else { return };
    let a = lab.node("a");
    let program = "
import socket, time
for family in (socket.AF_VSOCK, socket.AF_ALG, socket.AF_TIPC, socket.AF_CAN):
    try: s = socket.socket(family, socket.SOCK_STREAM if family != socket.AF_ALG else socket.SOCK_SEQPACKET); print('has one', flush=True); break
    except OSError: pass
else: print('has none', flush=True)
while True: time.sleep(1)";
    let container = Container::new("stubborn", "python")
        .command(&["python3", "-c", program])
        .start(lab, a);
    eventually("it has tried", || {
        container.log(a).contains("has ").then_some(())
    });
    if container.log(a).contains("has none") {
        return skip("this kernel has no socket that CRIU cannot dump");
    }
    let (_, said) = is_not_moved(lab, &container, &[]);
    assert!(
        said.to_lowercase().contains("socket"),
        "the reason is missing: {said}"
    );
}

/// Talks to sternad's port without being anyone.
#[test]
fn strangers_on_the_port_disturb_nobody() {
    let Some(lab) = LAB.get() else { return };
    let (a, b) = (lab.node("a"), lab.node("b"));
    let container = Container::shell("undisturbed", COUNTER).start(lab, a);
    let address = format!("{}:7443", b.address());
    let connect = || {
        let stream = TcpStream::connect(&address).expect("the port is open");
        stream
            .set_read_timeout(Some(Duration::from_secs(20)))
            .expect("a time limit");
        stream
    };
    // A client hello that names a ticket nobody has given out, cut off before
    // its end in one case.
    let hello = client_hello("00000000-0000-4000-8000-000000000000.ticket.sterna");
    let garbage: [&[u8]; 6] = [
        b"GET / HTTP/1.1\r\nHost: b\r\n\r\n",
        &[0x16, 0x03, 0x01, 0xff, 0xff, 0x01, 0x00],
        &[0xff; 70_000],
        b"\0",
        &hello,
        &hello[..40],
    ];
    for bytes in garbage {
        let mut stream = connect();
        // It may hang up before it has read everything.
        drop(stream.write_all(bytes));
        drop(stream.shutdown(std::net::Shutdown::Write));
        let mut answer = Vec::new();
        drop(stream.read_to_end(&mut answer));
        assert!(
            answer.len() < 100,
            "a stranger was told {} bytes",
            answer.len()
        );
    }
    // Some that say nothing and stay.
    let _silent: Vec<_> = (0..20).map(|_| connect()).collect();
    migrate(&container, a, b);
    migrate(&container, b, a);
}

/// The smallest TLS client hello with a server name.
fn client_hello(name: &str) -> Vec<u8> {
    let two = |length: usize| u16::try_from(length).expect("it is short").to_be_bytes();
    let mut names = vec![0];
    names.extend(two(name.len()));
    names.extend(name.as_bytes());
    let mut extension = vec![0, 0];
    extension.extend(two(names.len() + 2));
    extension.extend(two(names.len()));
    extension.extend(names);
    let mut body = vec![3, 3];
    body.extend([7; 32]); // random
    body.push(0); // no session
    body.extend([0, 2, 0x13, 0x01]); // one cipher
    body.extend([1, 0]); // no compression
    body.extend(two(extension.len()));
    body.extend(extension);
    let mut handshake = vec![1, 0];
    handshake.extend(two(body.len()));
    handshake.extend(body);
    let mut record = vec![0x16, 3, 1];
    record.extend(two(handshake.len()));
    record.extend(handshake);
    record
}

#[test]
fn an_agent_that_does_not_run_is_said_to() {
    let Some(lab) = LAB.get() else { return };
    let a = lab.node("a");
    a.service("stop", "sternad");
    let output = a.sterna(&["ps"]);
    a.service("start", "sternad");
    assert_eq!(output.code(), 5, "{output}");
    assert!(output.stderr.contains("sternad"), "{output}");
}
