//! One refusal per test, and all of them together.

use super::*;
use crate::cpu::Xsave;

const GIB: u64 = 1 << 30;

fn node(name: &str) -> Facts {
    Facts {
        node: name.into(),
        protocol_versions: vec![2, 1],
        architecture: "x86_64".into(),
        page_size: 4096,
        kernel_release: "6.18.44".into(),
        cgroup_version: 2,
        userfaultfd: Some(0x1ffff),
        tracking: true,
        cpu: Cpu {
            model: "test".into(),
            flags: ["avx2", "sse2"].map(String::from).into(),
            xsave: Some(Xsave {
                features: 7,
                size_bytes: 832,
                components: Vec::new(),
            }),
        },
        criu: Some(Version::new(4, 2, 1)),
        runc: Some(Version::new(1, 3, 6)),
        containerd: Some(Version::new(2, 1, 9)),
        free_memory_bytes: 4 * GIB,
    }
}

fn needs() -> Needs {
    Needs {
        namespace: "default".into(),
        id: "web".into(),
        memory_bytes: GIB,
        image: Some(ImageNeed {
            name: "valkey:9".into(),
            digest: "sha256:0123".into(),
            sendable: true,
        }),
        bind_sources: vec!["/data".into()],
        namespace_paths: Vec::new(),
        devices: Vec::new(),
    }
}

fn found() -> Found {
    Found {
        image_present: true,
        ..Found::default()
    }
}

/// The only refusal there is.
fn refused(source: &Facts, needs: &Needs, local: &Facts, found: &Found) -> (RefusalCode, String) {
    let mut refusals = negotiate(source, needs, local, found).unwrap_err();
    assert_eq!(refusals.len(), 1, "{refusals:?}");
    let refusal = refusals.remove(0);
    assert_eq!(refusal.to_string(), refusal.sentence);
    // A sentence that says what differs and, behind a semicolon, what to do.
    assert!(refusal.sentence.contains("; "), "{refusal}");
    (refusal.code, refusal.sentence)
}

fn refused_between(source: Facts, local: Facts) -> (RefusalCode, String) {
    refused(&source, &needs(), &local, &found())
}

fn refused_for(found: Found) -> (RefusalCode, String) {
    refused(&node("a"), &needs(), &node("b"), &found)
}

#[test]
fn two_equal_nodes_agree_on_the_newest_version_and_room() {
    assert_eq!(
        negotiate(&node("a"), &needs(), &node("b"), &found()),
        Ok(Agreement {
            protocol_version: 2,
            precopy: true,
            staging_limit_bytes: memory_room(GIB),
            send_image: false,
        })
    );
}

#[test]
fn a_source_that_is_one_version_behind_is_spoken_to_in_its_own() {
    let mut old = node("a");
    old.protocol_versions = vec![1];
    let agreement = negotiate(&old, &needs(), &node("b"), &found()).unwrap();
    assert_eq!(agreement.protocol_version, 1);
}

#[test]
fn a_source_that_cannot_track_writes_moves_by_stop_and_copy() {
    let mut blind = node("a");
    blind.tracking = false;
    assert!(
        !negotiate(&blind, &needs(), &node("b"), &found())
            .unwrap()
            .precopy
    );
}

#[test]
fn an_image_that_is_not_there_is_sent() {
    let agreement = negotiate(&node("a"), &needs(), &node("b"), &Found::default()).unwrap();
    assert!(agreement.send_image);
    let bare = Needs {
        image: None,
        ..needs()
    };
    let agreement = negotiate(&node("a"), &bare, &node("b"), &Found::default()).unwrap();
    assert!(!agreement.send_image);
}

#[test]
fn a_newer_destination_is_fine() {
    let mut newer = node("b");
    newer.criu = Some(Version::new(4, 3, 0));
    newer.cpu.flags.insert("avx512f".into());
    newer.kernel_release = "7.0.0".into();
    assert!(negotiate(&node("a"), &needs(), &newer, &found()).is_ok());
}

#[test]
fn a_container_does_not_move_to_the_node_it_is_on() {
    let (code, sentence) = refused_between(node("a"), node("a"));
    assert_eq!(code, RefusalCode::SameNode);
    assert!(sentence.contains(r#"node "a""#), "{sentence}");
}

#[test]
fn nodes_without_a_common_protocol_version_are_told_both_lists() {
    let mut old = node("b");
    old.protocol_versions = vec![0];
    let (code, sentence) = refused_between(node("a"), old);
    assert_eq!(code, RefusalCode::ProtocolVersion);
    assert!(
        sentence.contains("[2, 1]") && sentence.contains("[0]"),
        "{sentence}"
    );
}

#[test]
fn zero_is_no_protocol_version() {
    assert_eq!(common_version(&[0], &[0]), None);
    assert_eq!(common_version(&[], &[1]), None);
    assert_eq!(common_version(&[3, 2], &[2, 1]), Some(2));
    assert_eq!(
        common_version(PROTOCOL_VERSIONS, PROTOCOL_VERSIONS),
        Some(1)
    );
}

#[test]
fn another_architecture_is_refused_without_a_list_of_its_flags() {
    let mut arm = node("b");
    arm.architecture = "aarch64".into();
    arm.cpu.flags = ["asimd".to_string()].into();
    arm.cpu.xsave = None;
    let (code, sentence) = refused_between(node("a"), arm);
    assert_eq!(code, RefusalCode::Architecture);
    assert!(sentence.contains("aarch64"), "{sentence}");
}

#[test]
fn another_page_size_is_refused() {
    let mut large = node("b");
    large.page_size = 65536;
    let (code, sentence) = refused_between(node("a"), large);
    assert_eq!(code, RefusalCode::PageSize);
    assert!(
        sentence.contains("4096") && sentence.contains("65536"),
        "{sentence}"
    );
}

#[test]
fn the_other_cgroup_version_is_refused() {
    let mut old = node("b");
    old.cgroup_version = 1;
    let (code, sentence) = refused_between(node("a"), old);
    assert_eq!(code, RefusalCode::CgroupVersion);
    assert!(sentence.contains("cgroup v2"), "{sentence}");
}

#[test]
fn a_kernel_that_cannot_restore_lazily_is_refused_with_the_features_it_lacks() {
    let mut old = node("b");
    old.userfaultfd = Some(0x1ffff & !(1 << 6));
    let (code, sentence) = refused_between(node("a"), old);
    assert_eq!(code, RefusalCode::Userfaultfd);
    assert!(sentence.contains("EVENT_UNMAP"), "{sentence}");
    assert!(!sentence.contains("EVENT_FORK"), "{sentence}");

    let mut none = node("b");
    none.userfaultfd = None;
    let (code, sentence) = refused_between(node("a"), none);
    assert_eq!(code, RefusalCode::Userfaultfd);
    assert!(sentence.contains("EVENT_FORK"), "{sentence}");
}

#[test]
fn the_sources_kernel_need_not_restore() {
    let mut plain = node("a");
    plain.userfaultfd = None;
    plain.tracking = false;
    assert!(negotiate(&plain, &needs(), &node("b"), &found()).is_ok());
}

#[test]
fn a_cpu_without_an_instruction_set_is_refused_by_name() {
    let mut small = node("b");
    small.cpu.flags.remove("avx2");
    let (code, sentence) = refused_between(node("a"), small);
    assert_eq!(code, RefusalCode::CpuFlags);
    assert!(sentence.contains("may use: avx2;"), "{sentence}");
}

#[test]
fn a_cpu_that_saves_registers_differently_is_refused() {
    let mut other = node("b");
    other.cpu.xsave.as_mut().unwrap().size_bytes = 2696;
    let (code, sentence) = refused_between(node("a"), other);
    assert_eq!(code, RefusalCode::CpuRegisters);
    assert!(sentence.contains("832 and 2696"), "{sentence}");
}

#[test]
fn a_node_without_criu_is_named_whichever_it_is() {
    for (from, to) in [("a", "b"), ("b", "a")] {
        let (mut source, mut local) = (node(from), node(to));
        let bare = if from == "b" { &mut source } else { &mut local };
        bare.criu = None;
        let (code, sentence) = refused_between(source, local);
        assert_eq!(code, RefusalCode::CriuMissing);
        assert!(sentence.contains(r#"node "b""#), "{sentence}");
        assert!(sentence.contains("4.1.1"), "{sentence}");
    }
}

#[test]
fn a_criu_that_current_kernels_break_is_refused() {
    let (mut source, mut local) = (node("a"), node("b"));
    source.criu = Some(Version::new(4, 1, 0));
    local.criu = Some(Version::new(4, 1, 1));
    let (code, sentence) = refused_between(source, local);
    assert_eq!(code, RefusalCode::CriuTooOld);
    assert!(sentence.contains(r#"node "a" is 4.1.0"#), "{sentence}");
}

#[test]
fn images_of_a_newer_criu_are_not_restored_by_an_older_one() {
    let mut local = node("b");
    local.criu = Some(Version::new(4, 1, 1));
    let (code, sentence) = refused_between(node("a"), local);
    assert_eq!(code, RefusalCode::CriuOlderThanSource);
    assert!(
        sentence.contains("4.1.1") && sentence.contains("4.2.1"),
        "{sentence}"
    );

    let mut source = node("a");
    source.criu = Some(Version::new(4, 1, 1));
    assert!(negotiate(&source, &needs(), &node("b"), &found()).is_ok());
}

#[test]
fn a_destination_without_runc_or_with_an_old_one_is_refused() {
    let mut bare = node("b");
    bare.runc = None;
    assert_eq!(refused_between(node("a"), bare).0, RefusalCode::RuncMissing);

    let mut old = node("b");
    old.runc = Some(Version::new(1, 0, 3));
    let (code, sentence) = refused_between(node("a"), old);
    assert_eq!(code, RefusalCode::RuncTooOld);
    assert!(sentence.contains("1.0.3"), "{sentence}");
}

#[test]
fn a_destination_without_room_is_told_how_much_is_missing() {
    let mut full = node("b");
    full.free_memory_bytes = memory_room(GIB) - 1;
    let (code, sentence) = refused_between(node("a"), full.clone());
    assert_eq!(code, RefusalCode::Memory);
    // 1024 MiB, a tenth more, and 64.
    assert!(sentence.contains("needs 1191 MiB"), "{sentence}");

    full.free_memory_bytes += 1;
    assert!(negotiate(&node("a"), &needs(), &full, &found()).is_ok());
}

#[test]
fn a_size_that_no_machine_has_is_refused_and_does_not_overflow() {
    let huge = Needs {
        memory_bytes: u64::MAX,
        ..needs()
    };
    let (code, _) = refused(&node("a"), &huge, &node("b"), &found());
    assert_eq!(code, RefusalCode::Memory);
}

#[test]
fn a_container_that_exists_there_is_not_overwritten() {
    let (code, sentence) = refused_for(Found {
        container_exists: true,
        ..found()
    });
    assert_eq!(code, RefusalCode::ContainerExists);
    assert!(sentence.contains(r#""web""#), "{sentence}");
}

#[test]
fn an_image_that_is_neither_there_nor_sendable_is_refused() {
    let mut needs = needs();
    needs.image.as_mut().unwrap().sendable = false;
    assert!(negotiate(&node("a"), &needs, &node("b"), &found()).is_ok());
    let (code, sentence) = refused(&node("a"), &needs, &node("b"), &Found::default());
    assert_eq!(code, RefusalCode::ImageMissing);
    assert!(sentence.contains("valkey:9"), "{sentence}");
}

#[test]
fn missing_bind_mount_sources_are_all_listed() {
    let (code, sentence) = refused_for(Found {
        missing_bind_sources: vec!["/data".into(), "/etc/app".into()],
        ..found()
    });
    assert_eq!(code, RefusalCode::BindSourceMissing);
    assert!(sentence.contains(r#""/data", "/etc/app""#), "{sentence}");
}

#[test]
fn missing_namespaces_are_refused() {
    let (code, sentence) = refused_for(Found {
        missing_namespace_paths: vec!["/run/netns/x".into()],
        ..found()
    });
    assert_eq!(code, RefusalCode::NamespaceMissing);
    assert!(sentence.contains("/run/netns/x"), "{sentence}");
}

#[test]
fn missing_devices_are_refused() {
    let (code, sentence) = refused_for(Found {
        missing_devices: vec!["/dev/fuse".into()],
        ..found()
    });
    assert_eq!(code, RefusalCode::DeviceMissing);
    assert!(sentence.contains("/dev/fuse"), "{sentence}");
}

#[test]
fn all_reasons_come_at_once_and_in_order() {
    let mut local = node("b");
    local.protocol_versions = vec![9];
    local.page_size = 16384;
    local.cgroup_version = 1;
    local.userfaultfd = None;
    local.cpu.flags.clear();
    local.cpu.xsave = None;
    local.criu = Some(Version::new(3, 17, 0));
    local.runc = None;
    local.free_memory_bytes = 0;
    let mut needs = needs();
    needs.image.as_mut().unwrap().sendable = false;
    let found = Found {
        container_exists: true,
        image_present: false,
        missing_bind_sources: vec!["/data".into()],
        missing_namespace_paths: vec!["/run/netns/x".into()],
        missing_devices: vec!["/dev/fuse".into()],
    };
    let refusals = negotiate(&node("a"), &needs, &local, &found).unwrap_err();
    let codes: Vec<RefusalCode> = refusals.iter().map(|refusal| refusal.code).collect();
    assert_eq!(
        codes,
        [
            RefusalCode::ProtocolVersion,
            RefusalCode::PageSize,
            RefusalCode::CgroupVersion,
            RefusalCode::Userfaultfd,
            RefusalCode::CpuFlags,
            RefusalCode::CpuRegisters,
            RefusalCode::CriuTooOld,
            RefusalCode::CriuOlderThanSource,
            RefusalCode::RuncMissing,
            RefusalCode::Memory,
            RefusalCode::ContainerExists,
            RefusalCode::ImageMissing,
            RefusalCode::BindSourceMissing,
            RefusalCode::NamespaceMissing,
            RefusalCode::DeviceMissing,
        ]
    );
    assert!(codes.is_sorted());
}

#[test]
fn what_a_peer_sends_cannot_steer_a_terminal() {
    let mut odd = node("a\u{1b}[2J");
    odd.architecture = "x\r\n86".into();
    let (_, sentence) = refused_between(odd, node("b"));
    assert!(!sentence.contains(char::is_control), "{sentence:?}");
}

#[test]
fn codes_are_stable_words() {
    let json = serde_json::to_string(&RefusalCode::CriuOlderThanSource).unwrap();
    assert_eq!(json, r#""criu-older-than-source""#);
}

#[test]
fn facts_and_needs_travel_as_they_are() {
    let text = serde_json::to_string(&node("a")).unwrap();
    assert_eq!(serde_json::from_str::<Facts>(&text).unwrap(), node("a"));
    let text = serde_json::to_string(&needs()).unwrap();
    assert_eq!(serde_json::from_str::<Needs>(&text).unwrap(), needs());
}
