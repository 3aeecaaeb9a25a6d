//! A network of two nodes and a client, in namespaces of its own:
//!
//! ```text
//!   a: br0 - uplink --\                    /-- eth0 :client
//!                      sw0 (the test's own)
//!   b: br0 - uplink --/
//! ```
//!
//! Nothing outside of them is touched, and they end with the test.

#![allow(clippy::unwrap_used, reason = "a test may panic")]
#![allow(dead_code, reason = "each test file uses a part")]

use std::io::{Read, Write};
use std::net::{IpAddr, SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use nix::mount::{MsFlags, mount};
use nix::sched::{CloneFlags, unshare};

/// Where `ip netns` keeps its names, in the test's own mount namespace.
const NETNS: &str = "/run/netns";

/// Of the echo servers.
const PORT: u16 = 7;

/// Runs `test` in a fresh lab on a thread of its own, or says why it cannot.
pub(crate) fn lab(test: impl FnOnce() + Send) {
    if !nix::unistd::geteuid().is_root() {
        eprintln!("skipped: namespaces need root");
        return;
    }
    if Command::new("ip").arg("-V").output().is_err() {
        eprintln!("skipped: the test network is built with iproute2");
        return;
    }
    std::thread::scope(|scope| {
        let run = || {
            unshare(CloneFlags::CLONE_NEWNET | CloneFlags::CLONE_NEWNS).unwrap();
            let none = None::<&str>;
            mount(none, "/", none, MsFlags::MS_REC | MsFlags::MS_PRIVATE, none).unwrap();
            mount(Some("none"), "/run", Some("tmpfs"), MsFlags::empty(), none).unwrap();
            build();
            test();
        };
        if let Err(panic) = scope.spawn(run).join() {
            std::panic::resume_unwind(panic);
        }
    });
}

fn build() {
    ip("link add sw0 type bridge forward_delay 0 mcast_snooping 0");
    ip("link set sw0 up");
    for node in ["a", "b"] {
        ip(&format!("netns add {node}"));
        ip(&format!(
            "link add to-{node} type veth peer name uplink netns {node}"
        ));
        ip(&format!("link set to-{node} master sw0 up"));
        ip(&format!("-n {node} link set lo up"));
        ip(&format!(
            "-n {node} link add br0 type bridge forward_delay 0 mcast_snooping 0"
        ));
        ip(&format!("-n {node} link set uplink master br0 up"));
        ip(&format!("-n {node} link set br0 up"));
    }
    ip("netns add client");
    ip("link add to-client type veth peer name eth0 netns client");
    ip("link set to-client master sw0 up");
    for address in ["10.9.0.100/24", "fd00:9::100/64 nodad"] {
        ip(&format!("-n client address add {address} dev eth0"));
    }
    ip("-n client link set eth0 up");
}

/// A container's network on node `a`, made as a CNI plugin would.
pub(crate) fn container(name: &str) -> PathBuf {
    ip(&format!("netns add {name}"));
    ip(&format!(
        "-n a link add host-{name} type veth peer name eth0 netns {name}"
    ));
    ip(&format!("-n a link set host-{name} master br0 up"));
    ip(&format!("-n {name} link set lo up"));
    ip(&format!(
        "-n {name} link set eth0 address 02:09:00:00:00:05 mtu 1400"
    ));
    ip(&format!(
        "-n {name} address add 10.9.0.5/24 broadcast + dev eth0"
    ));
    ip(&format!(
        "-n {name} address add fd00:9::5/64 dev eth0 nodad"
    ));
    ip(&format!("-n {name} link set eth0 up"));
    netns(name)
}

pub(crate) fn netns(name: &str) -> PathBuf {
    Path::new(NETNS).join(name)
}

/// Runs `ip` and returns what it says.
pub(crate) fn ip(arguments: &str) -> String {
    run("ip", arguments)
}

pub(crate) fn run(program: &str, arguments: &str) -> String {
    let output = Command::new(program)
        .args(arguments.split_whitespace())
        .output()
        .unwrap();
    let error = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{program} {arguments}: {error}");
    String::from_utf8(output.stdout).unwrap()
}

/// Runs something of ours on a node.
pub(crate) fn on<T: Send, F: Future<Output = T>>(node: &str, work: impl FnOnce() -> F + Send) -> T {
    sys::netns::within(&netns(node), || {
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .unwrap();
        runtime.block_on(work())
    })
    .unwrap()
}

/// Servers in a namespace that answer everything with `tag`.
pub(crate) fn serve(namespace: &str, tag: &'static str) {
    let (udp, tcp) = sys::netns::within(&netns(namespace), || {
        // Dual stack.
        (
            UdpSocket::bind(("::", PORT)).unwrap(),
            TcpListener::bind(("::", PORT)).unwrap(),
        )
    })
    .unwrap();
    std::thread::spawn(move || {
        let mut buffer = [0; 64];
        while let Ok((_, from)) = udp.recv_from(&mut buffer) {
            udp.send_to(tag.as_bytes(), from).ok();
        }
    });
    std::thread::spawn(move || {
        for connection in tcp.incoming() {
            connection.unwrap().write_all(tag.as_bytes()).ok();
        }
    });
}

/// A client with one socket for all its life.
pub(crate) struct Client(UdpSocket);

impl Client {
    pub(crate) fn new(server: &str) -> Self {
        Self::from("client", server)
    }

    pub(crate) fn from(namespace: &str, server: &str) -> Self {
        let server: IpAddr = server.parse().unwrap();
        let any: SocketAddr = if server.is_ipv4() {
            "0.0.0.0:0"
        } else {
            "[::]:0"
        }
        .parse()
        .unwrap();
        let socket =
            sys::netns::within(&netns(namespace), || UdpSocket::bind(any).unwrap()).unwrap();
        socket.connect((server, PORT)).unwrap();
        socket
            .set_read_timeout(Some(Duration::from_millis(150)))
            .unwrap();
        Self(socket)
    }

    /// Who answers, if anybody does.
    pub(crate) fn ask(&self) -> Option<String> {
        let mut buffer = [0; 64];
        self.0.set_nonblocking(true).unwrap();
        while self.0.recv(&mut buffer).is_ok() {} // late answers
        self.0.set_nonblocking(false).unwrap();
        self.0.send(b"who is there?").ok()?;
        let length = self.0.recv(&mut buffer).ok()?;
        Some(String::from_utf8_lossy(&buffer[..length]).into_owned())
    }
}

/// Who answers a new TCP connection from the client.
pub(crate) fn connect(server: &str) -> Option<String> {
    let server = SocketAddr::new(server.parse().unwrap(), PORT);
    sys::netns::within(&netns("client"), || {
        let mut stream = TcpStream::connect_timeout(&server, Duration::from_millis(500)).ok()?;
        let mut answer = String::new();
        stream.read_to_string(&mut answer).ok()?;
        Some(answer)
    })
    .unwrap()
}
