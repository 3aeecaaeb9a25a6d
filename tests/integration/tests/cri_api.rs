//! The CRI's own interface, gRPC, asked as a kubelet asks it: on containerd 2 and
//! 1.7, under our shim and under containerd's own. `cri.rs` goes through crictl.

use std::time::Duration;

use k8s_cri::v1::{
    CheckpointContainerRequest, ContainerEventType, ContainerFilter, ContainerState,
    ContainerStatsRequest, IdMapping, LinuxContainerResources, ListContainersRequest,
    NamespaceMode, NamespaceOption, PodSandboxStatsRequest, ReopenContainerLogRequest, UInt64Value,
    UpdateContainerResourcesRequest, UserNamespace,
};
use sterna_integration::{
    Cgroup, CriApi, Flavour, Inventory, RUNC_HANDLER, STERNA_HANDLER, SandboxContainer, SharedLab,
    eventually, skip,
};
use tonic::Code;

static LAB: SharedLab = SharedLab::new(11, |lab| {
    lab.up(&["a"], Flavour::Forky, Cgroup::of_machine());
    lab.up(&["c"], Flavour::Trixie, Cgroup::of_machine());
    for node in ["a", "c"] {
        lab.import_for_pods(node, &["pause", "busybox"]);
    }
});

/// The test under our shim on both containerds, and under containerd's own.
macro_rules! under_every_handler {
    ($(#[doc = $doc:expr])* $name:ident($api:ident) $body:block) => {
        $(#[doc = $doc])*
        mod $name {
            use super::*;

            fn check($api: &CriApi<'_>) $body

            #[test]
            fn under_sterna() {
                let Some(lab) = LAB.get() else { return };
                check(&CriApi::new(lab.node("a"), STERNA_HANDLER));
            }

            #[test]
            fn under_sterna_on_containerd_1_7() {
                let Some(lab) = LAB.get() else { return };
                check(&CriApi::new(lab.node("c"), STERNA_HANDLER));
            }

            #[test]
            fn under_containerds_shim() {
                let Some(lab) = LAB.get() else { return };
                check(&CriApi::new(lab.node("a"), RUNC_HANDLER));
            }
        }
    };
}

/// Says a number every tenth of a second until it is told to end.
const TICKER: &str = "trap 'exit 0' TERM; i=0; while :; do i=$((i+1)); echo $i; sleep 0.1; done";

/// The last number of a [`TICKER`].
fn count(container: &SandboxContainer<'_>) -> u64 {
    let output = container.output();
    let last = output.lines().last();
    last.and_then(|line| line.parse().ok()).unwrap_or(0)
}

fn counts_on(container: &SandboxContainer<'_>) {
    let before = count(container);
    eventually("it counts on", || (count(container) > before).then_some(()));
}

/// What `seq 1 LAST` says.
fn numbers(last: u32) -> String {
    (1..=last).map(|number| format!("{number}\n")).collect()
}

fn value(number: Option<UInt64Value>) -> u64 {
    number.map_or(0, |number| number.value)
}

under_every_handler!(a_pod_with_two_containers_is_what_its_status_says(api) {
    let pod = api.pod("two");
    let stays = pod.start("stays", TICKER);
    let ends = pod.start("ends", "echo bye; exit 3");
    let never = pod.create("never", TICKER);
    assert_eq!(ends.end(), (3, "Error".to_owned()));
    counts_on(&stays);
    let states = || {
        let filter = ContainerFilter { pod_sandbox_id: pod.id().to_owned(), ..Default::default() };
        let request = ListContainersRequest { filter: Some(filter) };
        let list = api.get(async |mut cri| cri.list_containers(request).await);
        let mut states: Vec<_> = list.containers.iter().map(|container| {
            let metadata = container.metadata.clone().unwrap_or_default();
            (metadata.name, container.state())
        }).collect();
        states.sort();
        states
    };
    use ContainerState::{ContainerCreated, ContainerExited, ContainerRunning};
    assert_eq!(states(), [
        ("ends".to_owned(), ContainerExited),
        ("never".to_owned(), ContainerCreated),
        ("stays".to_owned(), ContainerRunning),
    ]);
    let status = pod.status().expect("the pod is known").status.unwrap_or_default();
    assert_eq!(status.metadata.unwrap_or_default().name, "two");
    assert_eq!(status.runtime_handler, api.handler());
    let said = ends.status();
    assert!(said.created_at < said.finished_at, "{said:?}");
    assert_eq!(ends.output(), "bye\n");
    drop(never);

    pod.stop();
    assert!(!pod.is_ready());
    assert_eq!(stays.end().0, 137, "what still runs has no grace period");
    pod.remove();
    assert_eq!(pod.status().err().map(|status| status.code()), Some(Code::NotFound));
});

under_every_handler!(a_command_has_two_outputs_an_exit_code_and_so_much_time(api) {
    let pod = api.pod("exec");
    let container = pod.start("main", TICKER);
    let script = "echo out; echo err >&2; exit 5";
    let answer = container.exec(&["sh", "-c", script], 30).expect("it runs");
    assert_eq!((answer.stdout, answer.stderr, answer.exit_code), (b"out\n".to_vec(), b"err\n".to_vec(), 5));

    let much = container.exec(&["seq", "1", "200000"], 60).expect("it runs");
    assert_eq!(much.exit_code, 0);
    assert!(much.stdout == numbers(200_000).as_bytes(), "{} bytes", much.stdout.len());

    let late = container.exec(&["sleep", "4321"], 1).expect_err("it is too slow");
    assert_eq!(late.code(), Code::DeadlineExceeded, "{late}");
    eventually("it is ended", || {
        api.node().processes(&["sleep 4321"]).is_empty().then_some(())
    });
    let missing = container.exec(&["/no/such/program"], 30).expect_err("there is no such program");
    assert!(missing.message().contains("/no/such/program"), "{missing}");

    assert_eq!(container.said(&["echo", "still here"]), "still here\n");
    container.stop(Duration::from_secs(20));
    let gone = container.exec(&["true"], 30).expect_err("it has ended");
    assert!(gone.message().contains("CONTAINER_EXITED"), "{gone}");
});

under_every_handler!(a_log_that_is_rotated_under_a_fast_writer_loses_nothing(api) {
    let pod = api.pod("rotated");
    // Long lines too, which the format breaks into parts.
    let script = "for n in 1 2 3 4 5 6 7 8 9 10; do seq 1 20000; seq -s ' ' 1 20000; sleep 0.1; done";
    let container = pod.start("main", script);
    let mut files = Vec::new();
    for number in 1..=4 {
        let old = format!("{}.{number}", container.log_path());
        eventually("there is something to move away", || {
            api.node().holds(&format!("test -s {}", container.log_path())).then_some(())
        });
        api.node().exec(&["mv", container.log_path(), &old]).success();
        let request = ReopenContainerLogRequest { container_id: container.id().to_owned() };
        api.get(async |mut cri| cri.reopen_container_log(request).await);
        files.push(old);
    }
    assert_eq!(container.end().0, 0);
    files.push(container.log_path().to_owned());
    let line = numbers(20_000).trim_end().replace('\n', " ") + "\n";
    let expected = (numbers(20_000) + &line).repeat(10);
    let files: Vec<&str> = files.iter().map(String::as_str).collect();
    // The end may be told before the last of it is in the file.
    eventually("everything is in the log", || {
        (container.output_in(&files).len() >= expected.len()).then_some(())
    });
    assert!(container.output_in(&files) == expected, "the log has other bytes");
});

under_every_handler!(what_is_written_while_containerd_is_away_is_in_the_log_afterwards(api) {
    let pod = api.pod("away");
    // More than all pipes hold together.
    let script = "echo ready; until test -e /go; do sleep 0.05; done; seq 1 100000; touch /done; sleep 1000";
    for how in ["stop", "kill"] {
        let container = pod.start(&format!("main-{how}"), script);
        eventually("it is ready", || (container.output() == "ready\n").then_some(()));
        // The first is the shell; what it forks looks like it until it is something else.
        let pid = api.node().processes(&["until test -e /go"]).into_iter().min();
        let root = format!("/proc/{}/root", pid.expect("it runs"));
        api.node().service(how, "containerd");
        api.node().exec(&["touch", &format!("{root}/go")]).success();
        // Its pipes are full by then, and it waits.
        std::thread::sleep(Duration::from_millis(500));
        assert!(!api.node().holds(&format!("test -e {root}/done")), "after {how}");
        api.node().service("start", "containerd");
        let expected = format!("ready\n{}", numbers(100_000));
        eventually("everything is in the log", || {
            (container.output().len() >= expected.len()).then_some(())
        });
        assert!(container.output() == expected, "after {how} the log has other bytes");
        container.stop(Duration::ZERO);
    }
});

under_every_handler!(a_restart_in_the_middle_of_writing_loses_at_most_what_containerd_had_in_hand(api) {
    let pod = api.pod("writing");
    // containerd reads ahead; what it has read and not written it takes with it.
    let script = "i=0; while test $i -lt 300; do i=$((i+1)); seq 1 1000 | sed \"s/^/$i /\"; sleep 0.01; done";
    let container = pod.start("main", script);
    eventually("it writes", || (container.output().len() > 10_000).then_some(()));
    for how in ["kill", "stop"] {
        api.node().service(how, "containerd");
        api.node().service("start", "containerd");
    }
    assert_eq!(container.end().0, 0);
    eventually("the last line is in the log", || {
        container.output().ends_with("\n300 1000\n").then_some(())
    });
    let output = container.output();
    let whole = output.lines().filter_map(|line| {
        let (block, number) = line.split_once(' ')?;
        Some((block.parse::<u32>().ok()?, number.parse::<u32>().ok()?))
    });
    let lines: Vec<(u32, u32)> = whole.collect();
    let lost = 300 * 1000 - lines.len();
    // Two restarts, each with a buffer and a pipe's worth of lines of six bytes or more.
    assert!(lost <= 2 * (128 << 10) / 6, "{lost} lines are lost");
    println!("{lost} lines of 300000 went with containerd");
});

under_every_handler!(limits_can_be_changed_and_use_be_asked_for(api) {
    let pod = api.pod("limits");
    let container = pod.start_with("main", TICKER, |config| {
        let linux = config.linux.get_or_insert_default();
        linux.resources = Some(LinuxContainerResources {
            memory_limit_in_bytes: 64 << 20,
            ..Default::default()
        });
    });
    let (memory, quota) = match api.node().cgroup() {
        Cgroup::V1 => ("memory/memory.limit_in_bytes", "cpu/cpu.cfs_quota_us"),
        Cgroup::V2 => ("memory.max", "cpu.max"),
    };
    let read = |file: &str| container.said(&["cat", &format!("/sys/fs/cgroup/{file}")]);
    assert_eq!(read(memory).trim(), (64 << 20).to_string());
    let request = UpdateContainerResourcesRequest {
        container_id: container.id().to_owned(),
        linux: Some(LinuxContainerResources {
            memory_limit_in_bytes: 96 << 20,
            cpu_quota: 50_000,
            cpu_period: 100_000,
            ..Default::default()
        }),
        ..Default::default()
    };
    api.get(async |mut cri| cri.update_container_resources(request).await);
    assert_eq!(read(memory).trim(), (96 << 20).to_string());
    assert!(read(quota).starts_with("50000"));
    let said = container.status().resources.and_then(|resources| resources.linux);
    assert_eq!(said.map(|linux| linux.memory_limit_in_bytes), Some(96 << 20));

    eventually("it has used something", || {
        let request = ContainerStatsRequest { container_id: container.id().to_owned() };
        let answer = api.get(async |mut cri| cri.container_stats(request).await);
        let stats = answer.stats.expect("there are stats in the answer");
        let cpu = value(stats.cpu.and_then(|cpu| cpu.usage_core_nano_seconds));
        let memory = value(stats.memory.and_then(|memory| memory.working_set_bytes));
        (cpu > 0 && memory > 0).then_some(())
    });
    let request = PodSandboxStatsRequest { pod_sandbox_id: pod.id().to_owned() };
    let answer = api.get(async |mut cri| cri.pod_sandbox_stats(request).await);
    let linux = answer.stats.and_then(|stats| stats.linux).expect("there are stats of Linux");
    assert_eq!(linux.containers.len(), 1);
    // The sandbox's own process, the shell and at times its sleep.
    assert!(value(linux.process.and_then(|process| process.process_count)) >= 2);
});

under_every_handler!(events_tell_of_each_step_once_and_in_order(api) {
    let events = api.events();
    let pod = api.pod("events");
    let container = pod.start("main", TICKER);
    container.stop(Duration::from_secs(20));
    pod.stop();
    pod.remove();
    use ContainerEventType::{
        ContainerCreatedEvent, ContainerDeletedEvent, ContainerStartedEvent, ContainerStoppedEvent,
    };
    let steps =
        [ContainerCreatedEvent, ContainerStartedEvent, ContainerStoppedEvent, ContainerDeletedEvent];
    for id in [container.id(), pod.id()] {
        assert_eq!(events.until(id, ContainerDeletedEvent), steps, "{id}");
    }
});

under_every_handler!(after_a_restart_of_containerd_everything_is_as_it_was(api) {
    let pod = api.pod("restart");
    let runs = pod.start("runs", TICKER);
    let ended = pod.start("ended", "exit 6");
    let created = pod.create("created", TICKER);
    assert_eq!(ended.end().0, 6);
    for how in ["stop", "kill"] {
        api.node().service(how, "containerd");
        api.node().service("start", "containerd");
        assert!(pod.is_ready(), "after {how}");
        assert_eq!(runs.status().state(), ContainerState::ContainerRunning, "after {how}");
        assert_eq!(ended.end(), (6, "Error".to_owned()), "after {how}");
        assert_eq!(created.status().state(), ContainerState::ContainerCreated, "after {how}");
        assert_eq!(runs.said(&["echo", "still here"]), "still here\n", "after {how}");
        counts_on(&runs);
    }
    created.start();
    counts_on(&created);
    runs.stop(Duration::from_secs(20));
    assert_eq!(runs.end().0, 0);
});

under_every_handler!(a_container_has_its_grace_period_and_no_more(api) {
    let pod = api.pod("grace");
    let ready = |container: &SandboxContainer<'_>| {
        eventually("its trap is set", || (container.output() == "ready\n").then_some(()));
    };
    let polite = pod.start("polite", "trap 'echo bye; exit 9' TERM; echo ready; while :; do sleep 0.1; done");
    let deaf = pod.start("deaf", "trap '' TERM; echo ready; while :; do sleep 0.1; done");
    let killed = pod.start("killed", "trap 'exit 9' TERM; echo ready; while :; do sleep 0.1; done");
    [&polite, &deaf, &killed].into_iter().for_each(ready);
    polite.stop(Duration::from_secs(20));
    assert_eq!(polite.end().0, 9);
    assert_eq!(polite.output(), "ready\nbye\n");
    deaf.stop(Duration::from_secs(1));
    assert_eq!(deaf.end().0, 137);
    killed.stop(Duration::ZERO);
    assert_eq!(killed.end().0, 137);
    // As often as one likes.
    killed.stop(Duration::from_secs(1));
});

under_every_handler!(a_checkpoint_is_an_archive_and_the_container_goes_on(api) {
    let pod = api.pod("checkpoint");
    let container = pod.start("main", TICKER);
    counts_on(&container);
    let archive = "/var/log/pods/checkpoint/archive.tar";
    let request = CheckpointContainerRequest {
        container_id: container.id().to_owned(),
        location: archive.to_owned(),
        timeout: 60,
    };
    let made = api.ask(async |mut cri| cri.checkpoint_container(request).await);
    if api.node().flavour() == Flavour::Trixie {
        assert_eq!(made.err().map(|status| status.code()), Some(Code::Unimplemented));
        return;
    }
    made.expect("a checkpoint is made");
    let listing = api.node().exec(&["tar", "-tf", archive]);
    for member in ["checkpoint/inventory.img", "spec.dump", "config.dump", "status.dump", "rootfs-diff.tar"] {
        assert!(listing.success().lines().any(|line| line.ends_with(member)), "no {member}: {listing}");
    }
    assert_eq!(container.status().state(), ContainerState::ContainerRunning);
    counts_on(&container);
});

under_every_handler!(root_of_a_pod_can_be_somebody_else_outside(api) {
    if api.node().flavour() == Flavour::Trixie {
        skip("containerd 1.7 with runc 1.1 has no pods with user namespaces");
        return;
    }
    let mapped = || {
        let ids = vec![IdMapping { host_id: 300_000, container_id: 0, length: 65_536 }];
        Some(NamespaceOption {
            pid: NamespaceMode::Container.into(),
            userns_options: Some(UserNamespace {
                mode: NamespaceMode::Pod.into(),
                uids: ids.clone(),
                gids: ids,
            }),
            ..Default::default()
        })
    };
    let pod = api.pod_with("mapped", |config| {
        let security = config.linux.get_or_insert_default().security_context.get_or_insert_default();
        security.namespace_options = mapped();
    });
    let container = pod.start_with("main", TICKER, |config| {
        let security = config.linux.get_or_insert_default().security_context.get_or_insert_default();
        security.namespace_options = mapped();
    });
    assert_eq!(container.said(&["id", "-u"]), "0\n");
    let map = container.said(&["cat", "/proc/self/uid_map"]);
    assert_eq!(map.split_whitespace().collect::<Vec<_>>(), ["0", "300000", "65536"]);
    counts_on(&container);
});

under_every_handler!(nothing_is_left_of_a_removed_pod(api) {
    let round = || {
        let pod = api.pod("guest");
        pod.start("short", "exit 2").end();
        pod.start("long", TICKER).said(&["true"]);
        pod.create("never-started", TICKER);
        pod.stop();
        pod.remove();
    };
    // Some things are made once and stay.
    round();
    let before = Inventory::of(api.node());
    round();
    before.assert_nothing_added(api.node());
});
