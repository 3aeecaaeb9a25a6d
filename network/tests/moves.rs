//! An address goes from one node to another.

#![allow(clippy::unwrap_used, reason = "a test may panic")]

mod support;

use std::time::{Duration, Instant};

use sterna_network as network;

use network::{Attachment, NetworkError, RouteKind};
use support::{Client, connect, container, ip, lab, netns, on, serve};

fn some(text: &str) -> Option<String> {
    Some(text.to_owned())
}

/// Until somebody answers; there is no limit to what a busy machine does.
fn eventually(client: &Client) -> Option<String> {
    (0..20).find_map(|_| client.ask())
}

#[test]
fn an_address_moves_to_another_node_and_clients_do_not_notice_who_answers() {
    lab(|| {
        let old = container("old");
        serve("old", "old");
        let clients = [Client::new("10.9.0.5"), Client::new("fd00:9::5")];
        for client in &clients {
            assert_eq!(eventually(client), some("old"));
        }
        let begun = Instant::now();
        let (description, attachment) = on("a", || network::describe(&old)).unwrap();
        let described = begun.elapsed();
        let new = netns("new");
        let prepared = on("b", || network::prepare(&new, &description, "br0")).unwrap();
        eprintln!(
            "described in {described:?}, prepared in {:?}",
            begun.elapsed() - described
        );
        serve("new", "new");

        // Two have the address now, and only one is heard.
        for _ in 0..3 {
            for client in &clients {
                assert_eq!(client.ask(), some("old"));
            }
            assert_eq!(connect("10.9.0.5"), some("old"));
        }
        on("b", || async {
            let mut switch = prepared.open().await.unwrap();
            let frozen = Instant::now();
            std::thread::scope(|scope| {
                scope.spawn(|| on("a", || network::detach(&attachment)).unwrap());
            });
            let detached = frozen.elapsed();
            for client in &clients {
                assert_eq!(client.ask(), None, "nobody is heard");
            }
            let begun = Instant::now();
            switch.attach().await.unwrap();
            let attached = begun.elapsed();
            switch.announce().await.unwrap();
            let announced = begun.elapsed();
            eprintln!(
                "detached in {detached:?}, attached in {attached:?}, announced after {announced:?}"
            );
            for client in &clients {
                assert_eq!(client.ask(), some("new"), "at the first try");
            }
            tokio::time::sleep(Duration::from_millis(300)).await; // the repetitions
        });
        assert_eq!(connect("10.9.0.5"), some("new"));
        assert_eq!(connect("fd00:9::5"), some("new"));
        on("a", || network::remove(&old)).unwrap();
        assert!(!old.exists());
        assert_eq!(clients[0].ask(), some("new"));
        // And it could move on from there.
        let (again, onward) = on("b", || network::describe(&new)).unwrap();
        assert_eq!(again, description);
        assert_eq!(
            (onward.bridge, onward.host_interface),
            ("br0".into(), prepared.host_interface)
        );
    });
}

#[test]
fn an_address_that_stays_is_heard_again() {
    lab(|| {
        let netns = container("stays");
        serve("stays", "here");
        ip("-n a link set host-stays type bridge_slave hairpin on isolated on");
        let client = Client::new("10.9.0.5");
        assert_eq!(eventually(&client), some("here"));
        let (description, attachment) = on("a", || network::describe(&netns)).unwrap();
        assert!(description.interface.hairpin && description.interface.isolated);
        on("a", || network::detach(&attachment)).unwrap();
        // Another container comes and goes, which makes a bridge look at its ports.
        ip("-n a link add x0 type veth peer name x1");
        ip("-n a link set x1 up");
        ip("-n a link set x0 master br0 up");
        ip("-n a link del x0");
        assert_eq!(client.ask(), None);
        // Neither does its kernel answer for it, nor the node's.
        ip("-n client neighbour flush dev eth0");
        assert_eq!(client.ask(), None);
        let unknown = ip("-n client neighbour show 10.9.0.5");
        assert!(!unknown.contains("lladdr"), "{unknown}");
        let begun = Instant::now();
        on("a", || network::reattach(&attachment)).unwrap();
        eprintln!("reattached in {:?}", begun.elapsed());
        assert_eq!(eventually(&client), some("here"));
        let (after, _) = on("a", || network::describe(&netns)).unwrap();
        assert_eq!(after, description);
    });
}

#[test]
fn everything_about_a_network_is_made_again() {
    lab(|| {
        let old = container("old");
        let old_ip = |arguments: &str| ip(&format!("-n old {arguments}"));
        old_ip("address add 10.9.0.6/24 dev eth0");
        old_ip("address add 10.77.0.1 peer 10.77.0.2/32 dev eth0 scope link");
        old_ip("address add fd00:a::7/128 dev eth0 nodad noprefixroute");
        old_ip("address add fd00:b::7/64 dev eth0 nodad valid_lft 5000 preferred_lft 4000");
        old_ip("route add default via 10.9.0.1 metric 100 mtu 1300 advmss 1200");
        old_ip("route add 10.200.0.0/16 dev eth0 scope link src 10.9.0.6");
        old_ip("route add 10.201.0.0/16 via 10.44.0.1 dev eth0 onlink");
        old_ip("route add blackhole 10.202.0.0/16");
        old_ip("-6 route add default via fd00:9::1");
        old_ip("-6 route add unreachable fd00:c::/64");
        old_ip("neighbour add 10.9.0.1 lladdr 02:00:00:00:00:01 dev eth0 nud permanent");
        let set = |setting: &str, value: &str| {
            sys::netns::within(&old, || {
                std::fs::write(format!("/proc/sys/net/{setting}"), value)
            })
            .unwrap()
            .unwrap();
        };
        let settings = [
            ("core/somaxconn", "777"),
            ("ipv4/conf/all/rp_filter", "2"),
            ("ipv4/conf/eth0/rp_filter", "1"),
            ("ipv4/ip_local_port_range", "20000\t30000"),
            ("ipv4/ip_unprivileged_port_start", "0"),
            ("ipv6/conf/eth0/accept_ra", "0"),
        ];
        settings
            .iter()
            .for_each(|(setting, value)| set(setting, value));
        let (description, _) = on("a", || network::describe(&old)).unwrap();
        let described: Vec<_> = description
            .settings
            .iter()
            .map(|(setting, value)| (setting.as_str(), value.as_str()))
            .collect();
        assert_eq!(described, settings);
        assert_eq!(description.interface.mac, [2, 9, 0, 0, 0, 5]);
        assert_eq!(
            (
                description.interface.name.as_str(),
                description.interface.mtu
            ),
            ("eth0", 1400)
        );
        assert_eq!(description.addresses.len(), 7, "with the one on the link");
        assert_eq!(description.routes.len(), 6);
        assert!(
            description
                .routes
                .iter()
                .any(|route| route.kind == RouteKind::Blackhole)
        );
        let permanent = description
            .neighbours
            .iter()
            .filter(|known| known.permanent);
        assert_eq!(permanent.count(), 1);

        let new = netns("new");
        let prepared = on("b", || network::prepare(&new, &description, "br0")).unwrap();
        on("b", || network::attach(&prepared)).unwrap();
        let (mut again, onward) = on("b", || network::describe(&new)).unwrap();
        for address in &mut again.addresses {
            // Time has passed.
            if let Some((valid, preferred)) = &mut address.lifetime {
                assert!(*valid <= 5000 && *valid > 4900 && *preferred <= 4000);
            }
        }
        let timeless = |mut description: network::Description| {
            description.addresses.iter_mut().for_each(|address| {
                address.lifetime = address.lifetime.map(|_| (0, 0));
            });
            description.addresses[3..].sort_by_key(|address| address.address);
            description
        };
        assert_eq!(timeless(again), timeless(description));
        // A second opinion.
        let show = |namespace: &str, what: &str| {
            let shown = ip(&format!("-n {namespace} {what}"));
            let mut lines: Vec<_> = shown.lines().map(str::trim).map(str::to_owned).collect();
            lines.sort();
            lines
        };
        for what in [
            "route show",
            "-6 route show",
            "neighbour show nud permanent",
        ] {
            let without_times = |lines: Vec<String>| -> Vec<String> {
                lines
                    .iter()
                    .map(|line| line.split(" expires").next().unwrap().to_owned())
                    .collect()
            };
            assert_eq!(
                without_times(show("old", what)),
                without_times(show("new", what))
            );
        }
        let addresses = ip("-n new address show");
        assert!(
            !addresses.contains("tentative") && addresses.contains("brd 10.9.0.255"),
            "{addresses}"
        );
        assert!(addresses.contains("127.0.0.1/8"), "lo is up: {addresses}");
        assert!(
            !ip(&format!("-n b address show dev {}", onward.host_interface)).contains("inet"),
            "the node's end has no address"
        );
    });
}

#[test]
fn what_is_prepared_is_heard_by_nobody_and_hears_nobody() {
    lab(|| {
        let old = container("old");
        let (description, _) = on("a", || network::describe(&old)).unwrap();
        // The node itself is a neighbour, a router even, and its end of the pair is up.
        ip("-n b address add 10.9.0.2/24 dev br0");
        ip("-n b address add fd00:9::2/64 dev br0 nodad");
        let forward = || std::fs::write("/proc/sys/net/ipv4/ip_forward", "1").unwrap();
        sys::netns::within(&netns("b"), forward).unwrap();
        serve("b", "node");
        let new = netns("new");
        let prepared = on("b", || network::prepare(&new, &description, "br0")).unwrap();
        for node in ["10.9.0.2", "fd00:9::2"] {
            let inside = Client::from("new", node);
            assert_eq!(inside.ask(), None);
            assert!(!ip(&format!("-n new neighbour show {node}")).contains("lladdr"));
        }
        // And once it is attached it is like everybody else.
        on("b", || network::attach(&prepared)).unwrap();
        for node in ["10.9.0.2", "fd00:9::2"] {
            assert_eq!(eventually(&Client::from("new", node)), some("node"));
        }
    });
}

#[test]
fn an_interface_without_ipv6_stays_without() {
    lab(|| {
        let old = container("old");
        sys::netns::within(&old, || {
            std::fs::write("/proc/sys/net/ipv6/conf/eth0/disable_ipv6", "1").unwrap();
        })
        .unwrap();
        let (description, _) = on("a", || network::describe(&old)).unwrap();
        assert!(!description.interface.ipv6);
        assert_eq!(description.addresses.len(), 1);
        let new = netns("new");
        on("b", || network::prepare(&new, &description, "br0")).unwrap();
        assert!(!ip("-n new address show eth0").contains("inet6"));
    });
}

#[test]
fn a_preparation_that_fails_leaves_nothing_behind() {
    lab(|| {
        let old = container("old");
        let (description, _) = on("a", || network::describe(&old)).unwrap();
        let links = || ip("-n b -brief link show").lines().count();
        let before = links();
        let path = netns("new");

        let mut broken = description.clone();
        broken.routes.push(network::Route {
            destination: "10.8.0.0".parse().unwrap(),
            prefix: 16,
            kind: RouteKind::Unicast,
            gateway: Some("192.168.1.1".parse().unwrap()), // not on any of its links
            onlink: false,
            source: None,
            scope: 0,
            protocol: 3,
            tos: 0,
            priority: None,
            mtu: None,
            advmss: None,
        });
        let error = on("b", || network::prepare(&path, &broken, "br0")).unwrap_err();
        assert!(matches!(error, NetworkError::Kernel { .. }), "{error:?}");
        assert_eq!(error.to_string(), "cannot configure 10.8.0.0/16");
        assert!(!path.exists());
        assert_eq!(links(), before);

        for (bridge, reason) in [
            ("no-such", "there is none"),
            ("uplink", "it is not a bridge"),
        ] {
            let error = on("b", || network::prepare(&path, &description, bridge)).unwrap_err();
            assert_eq!(
                error.to_string(),
                format!("cannot use bridge {bridge}: {reason}")
            );
            assert!(!path.exists());
        }
        std::fs::write(&path, "").unwrap();
        let error = on("b", || network::prepare(&path, &description, "br0")).unwrap_err();
        assert!(matches!(error, NetworkError::Exists { .. }));
        assert!(path.exists(), "what was there before stays");
        assert_eq!(links(), before);
    });
}

#[test]
fn a_namespace_is_removed_with_its_interfaces_and_removed_again() {
    lab(|| {
        let old = container("old");
        let (description, _) = on("a", || network::describe(&old)).unwrap();
        // Also where `ip netns` was never used: the directory is made.
        let path = "/run/made/here/new".as_ref();
        let prepared = on("b", || network::prepare(path, &description, "br0")).unwrap();
        let there = || ip("-n b -brief link show").contains(&prepared.host_interface);
        assert!(there());
        assert!(prepared.host_interface.len() <= 15);
        on("b", || network::remove(path)).unwrap();
        assert!(!there());
        assert!(!path.exists());
        on("b", || network::remove(path)).unwrap();
        // A name that was left without its namespace.
        std::fs::write(path, "").unwrap();
        on("b", || network::remove(path)).unwrap();
        assert!(!path.exists());
    });
}

fn nft(namespace: &str, commands: &str) -> bool {
    let nft = || std::process::Command::new("nft").arg(commands).status();
    sys::netns::within(&netns(namespace), nft)
        .unwrap()
        .is_ok_and(|status| status.success())
}

fn has_vlan_filtering() -> bool {
    let tried = std::process::Command::new("ip")
        .args("link set sw0 type bridge vlan_filtering 1".split(' '))
        .status();
    tried.unwrap().success()
}

#[test]
fn networks_that_do_not_move_are_refused_with_a_reason() {
    lab(|| {
        let reason = |netns: &std::path::Path| match on("a", || network::describe(netns)) {
            Err(NetworkError::NotMovable { reason }) => reason,
            other => panic!("{other:?}"),
        };
        assert_eq!(reason(&netns("a")), "it is the node's own");
        ip("netns add empty");
        assert_eq!(reason(&netns("empty")), "it has no interface");
        ip("-n empty link add d0 type bridge");
        ip("-n empty link set d0 up");
        assert_eq!(
            reason(&netns("empty")),
            "d0 is not a veth interface but bridge"
        );
        // The client's peer is in the test's own namespace, not in a's.
        assert_eq!(
            reason(&netns("client")),
            "the other end of eth0 is not in the node's network"
        );
        let c = container("c");
        on("a", || network::describe(&c)).unwrap();
        let refused = |change: &str, undo: &str, expected: &str| {
            ip(change);
            assert_eq!(reason(&c), expected);
            ip(undo);
            on("a", || network::describe(&c)).unwrap();
        };
        refused(
            "-n a link set host-c nomaster",
            "-n a link set host-c master br0",
            "host-c is not on a bridge",
        );
        refused(
            "-n a link set br0 type bridge stp_state 1",
            "-n a link set br0 type bridge stp_state 0",
            "bridge br0 runs a spanning tree, which keeps a new port closed for long",
        );
        if has_vlan_filtering() {
            refused(
                "-n a link set br0 type bridge vlan_filtering 1",
                "-n a link set br0 type bridge vlan_filtering 0",
                "bridge br0 filters VLANs, which are not carried",
            );
        } else {
            eprintln!("skipped: this kernel's bridges do not filter VLANs");
        }
        refused(
            "-n c rule add from 10.9.0.5 table 7",
            "-n c rule del from 10.9.0.5 table 7",
            "it has routing rules",
        );
        refused(
            "-n c route add 10.7.0.0/16 dev eth0 table 7",
            "-n c route del 10.7.0.0/16 dev eth0 table 7",
            "it has a routing table of its own",
        );
        refused(
            "-n c link add e1 type veth peer name e2",
            "-n c link del e1",
            "it has more than one interface",
        );
        if nft(
            "c",
            "add table inet CRIU-7; add chain inet CRIU-7 in; add rule inet CRIU-7 in drop",
        ) {
            on("a", || network::describe(&c)).unwrap();
            nft("c", "add table ip guard; add chain ip guard in");
            on("a", || network::describe(&c)).unwrap();
            nft("c", "add rule ip guard in drop");
            assert_eq!(reason(&c), "it filters packets (table guard)");
            nft("c", "delete table ip guard");
        } else {
            eprintln!("skipped: there is no nft here");
        }
        ip("-n c link set eth0 down");
        assert_eq!(reason(&c), "eth0 is down");
        let missing = on("a", || network::describe("/run/netns/missing".as_ref())).unwrap_err();
        assert_eq!(missing.to_string(), "cannot open /run/netns/missing");
    });
}

#[test]
fn a_port_that_is_gone_is_an_error() {
    lab(|| {
        let attachment = Attachment {
            netns: netns("x"),
            host_interface: "gone".into(),
            bridge: "br0".into(),
        };
        let error = on("a", || network::detach(&attachment)).unwrap_err();
        assert_eq!(error.to_string(), "cannot detach gone");
    });
}
