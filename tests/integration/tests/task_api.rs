//! What the shim answers to requests that containerd would not let through, or that
//! its own clients never make: asked over its socket.

use std::time::Duration;

use containerd_shim_protos::api::{
    ConnectRequest, CreateTaskRequest, DeleteRequest, ExecProcessRequest, KillRequest,
    PauseRequest, PidsRequest, ResizePtyRequest, ResumeRequest, ShutdownRequest, StartRequest,
    StateRequest, StateResponse, StatsRequest, Status, UpdateTaskRequest, WaitRequest,
};
use containerd_shim_protos::protobuf::MessageField;
use containerd_shim_protos::protobuf::well_known_types::any::Any;
use sterna_integration::{
    Cgroup, Container, Flavour, Lab, Node, Running, STERNA, SharedLab, TaskApi, eventually, skip,
};
use ttrpc::proto::Code;

const RUNC: &str = "io.containerd.runc.v2";

static LAB: SharedLab = SharedLab::new(22, |lab| {
    lab.up(&["a"], Flavour::Forky, Cgroup::of_machine());
    lab.up(&["c"], Flavour::Trixie, Cgroup::of_machine());
    lab.import("a", &["busybox"]);
    lab.import("c", &["busybox"]);
    if Cgroup::of_machine() == Cgroup::V1 {
        lab.up(&["b"], Flavour::Forky, Cgroup::V2);
        lab.import("b", &["busybox"]);
    }
});

const IDLE: &str = "while :; do sleep 0.1; done";

/// The test under our shim on both containerds, and under containerd's own.
macro_rules! under_both_shims {
    ($(#[doc = $doc:expr])* $name:ident($lab:ident, $node:ident, $runtime:ident) $body:block) => {
        $(#[doc = $doc])*
        mod $name {
            use super::*;

            fn check($lab: &Lab, $node: &Node, $runtime: &str) $body

            #[test]
            fn under_sterna() {
                let Some(lab) = LAB.get() else { return };
                check(lab, lab.node("a"), STERNA);
            }

            #[test]
            fn under_sterna_on_containerd_1_7() {
                let Some(lab) = LAB.get() else { return };
                check(lab, lab.node("c"), STERNA);
            }

            #[test]
            fn under_containerds_shim() {
                let Some(lab) = LAB.get() else { return };
                check(lab, lab.node("a"), RUNC);
            }
        }
    };
}

fn state_of(api: &TaskApi, exec_id: &str) -> Result<StateResponse, (Code, String)> {
    let request = StateRequest {
        id: api.id(),
        exec_id: exec_id.to_owned(),
        ..Default::default()
    };
    api.ask(|task, context| task.state(context, &request))
}

#[track_caller]
fn status_of(api: &TaskApi, exec_id: &str) -> Status {
    let state = state_of(api, exec_id).unwrap_or_else(|(code, text)| panic!("{code:?}: {text}"));
    state.status.enum_value_or_default()
}

fn code<T>(answer: Result<T, (Code, String)>) -> Option<Code> {
    answer.err().map(|(code, _)| code)
}

/// An exec of a shell script; its output goes to those paths.
fn exec_request(api: &TaskApi, exec_id: &str, script: &str, output: &str) -> ExecProcessRequest {
    let process = serde_json::json!({
        "args": ["sh", "-c", script],
        "cwd": "/",
        "env": ["PATH=/bin:/usr/bin:/sbin:/usr/sbin"],
        "user": { "uid": 0, "gid": 0 },
    });
    ExecProcessRequest {
        id: api.id(),
        exec_id: exec_id.to_owned(),
        stdout: output.to_owned(),
        stderr: output.to_owned(),
        spec: MessageField::some(Any {
            type_url: "types.containerd.io/opencontainers/runtime-spec/1/Process".to_owned(),
            value: process.to_string().into_bytes(),
            ..Default::default()
        }),
        ..Default::default()
    }
}

fn start(api: &TaskApi, exec_id: &str) -> Result<u32, (Code, String)> {
    let request = StartRequest {
        id: api.id(),
        exec_id: exec_id.to_owned(),
        ..Default::default()
    };
    let started = api.ask(|task, context| task.start(context, &request))?;
    Ok(started.pid)
}

fn delete(api: &TaskApi, exec_id: &str) -> Result<u32, (Code, String)> {
    let request = DeleteRequest {
        id: api.id(),
        exec_id: exec_id.to_owned(),
        ..Default::default()
    };
    let deleted = api.ask(|task, context| task.delete(context, &request))?;
    Ok(deleted.exit_status)
}

fn kill(api: &TaskApi, exec_id: &str, signal: u32) -> Result<(), (Code, String)> {
    let request = KillRequest {
        id: api.id(),
        exec_id: exec_id.to_owned(),
        signal,
        ..Default::default()
    };
    api.ask(|task, context| task.kill(context, &request))
        .map(drop)
}

#[track_caller]
fn wait(api: &TaskApi, exec_id: &str) -> u32 {
    let request = WaitRequest {
        id: api.id(),
        exec_id: exec_id.to_owned(),
        ..Default::default()
    };
    api.get(|task, context| task.wait(context, &request))
        .exit_status
}

fn pause(api: &TaskApi) -> PauseRequest {
    PauseRequest {
        id: api.id(),
        ..Default::default()
    }
}

fn resume(api: &TaskApi) -> Result<(), (Code, String)> {
    let request = ResumeRequest {
        id: api.id(),
        ..Default::default()
    };
    api.ask(|task, context| task.resume(context, &request))
        .map(drop)
}

fn started<'lab>(
    lab: &'lab Lab,
    node: &Node,
    runtime: &str,
    name: &str,
) -> (Running<'lab>, TaskApi) {
    let container = Container::shell(name, IDLE).under(runtime).start(lab, node);
    let api = TaskApi::of(&container, node);
    (container, api)
}

under_both_shims!(what_is_not_there_is_not_found(lab, node, runtime) {
    let (container, api) = started(lab, node, runtime, "somebody");
    assert_eq!(code(state_of(&api, "nobody")), Some(Code::NOT_FOUND));
    assert_eq!(code(start(&api, "nobody")), Some(Code::NOT_FOUND));
    assert_eq!(code(kill(&api, "nobody", 9)), Some(Code::NOT_FOUND));
    assert_eq!(code(delete(&api, "nobody")), Some(Code::NOT_FOUND));

    let nobody = || "nobody".to_owned();
    let request = StateRequest { id: nobody(), ..Default::default() };
    assert_eq!(code(api.ask(|task, context| task.state(context, &request))), Some(Code::NOT_FOUND));
    let request = KillRequest { id: nobody(), signal: 9, ..Default::default() };
    assert_eq!(code(api.ask(|task, context| task.kill(context, &request))), Some(Code::NOT_FOUND));
    let request = DeleteRequest { id: nobody(), ..Default::default() };
    assert_eq!(code(api.ask(|task, context| task.delete(context, &request))), Some(Code::NOT_FOUND));
    let request = StatsRequest { id: nobody(), ..Default::default() };
    assert_eq!(code(api.ask(|task, context| task.stats(context, &request))), Some(Code::NOT_FOUND));
    let request = PidsRequest { id: nobody(), ..Default::default() };
    assert_eq!(code(api.ask(|task, context| task.pids(context, &request))), Some(Code::NOT_FOUND));
    let request = WaitRequest { id: nobody(), ..Default::default() };
    assert_eq!(code(api.ask(|task, context| task.wait(context, &request))), Some(Code::NOT_FOUND));
    container.delete(node);
});

under_both_shims!(an_exec_goes_through_its_states_and_no_other_way(lab, node, runtime) {
    let (container, api) = started(lab, node, runtime, "steps");
    let request = exec_request(&api, "step", IDLE, "");
    api.get(|task, context| task.exec(context, &request));
    let again = api.ask(|task, context| task.exec(context, &request));
    assert_eq!(code(again), Some(Code::ALREADY_EXISTS));
    assert_eq!(status_of(&api, "step"), Status::CREATED);
    assert_eq!(code(kill(&api, "step", 9)), Some(Code::FAILED_PRECONDITION), "not started yet");
    let pid = start(&api, "step").expect("it starts");
    assert_eq!(status_of(&api, "step"), Status::RUNNING);
    if runtime == STERNA {
        // containerd's own loses count then, and never tells of the container's end.
        assert_eq!(code(start(&api, "step")), Some(Code::FAILED_PRECONDITION), "it runs already");
    }
    assert!(delete(&api, "step").is_err(), "it runs");
    let request = PidsRequest { id: api.id(), ..Default::default() };
    let pids = api.get(|task, context| task.pids(context, &request)).processes;
    assert!(pids.iter().any(|process| process.pid == pid && process.info.is_some()), "{pids:?}");

    kill(&api, "step", 15).expect("it is killed");
    assert_eq!(wait(&api, "step"), 128 + 15);
    assert_eq!(status_of(&api, "step"), Status::STOPPED);
    assert_eq!(code(kill(&api, "step", 9)), Some(Code::NOT_FOUND), "it is gone");
    assert_eq!(delete(&api, "step"), Ok(128 + 15));
    assert_eq!(code(state_of(&api, "step")), Some(Code::NOT_FOUND));
    container.delete(node);
});

under_both_shims!(the_first_process_goes_through_its_states_and_no_other_way(lab, node, runtime) {
    let (container, api) = started(lab, node, runtime, "path");
    assert_eq!(status_of(&api, ""), Status::RUNNING);
    let shutdown = ShutdownRequest { id: api.id(), ..Default::default() };
    api.get(|task, context| task.shutdown(context, &shutdown));
    let connect = ConnectRequest { id: api.id(), ..Default::default() };
    let connected = api.get(|task, context| task.connect(context, &connect));
    assert_eq!(connected.task_pid, container.pid(node), "the shim serves on");
    assert_eq!(node.processes(&["containerd-shim", "-id path"]), [connected.shim_pid]);

    assert!(start(&api, "").is_err(), "it runs already");
    assert!(resume(&api).is_err(), "it is not paused");
    assert!(delete(&api, "").is_err(), "it runs");
    api.get(|task, context| task.pause(context, &pause(&api)));
    assert_eq!(status_of(&api, ""), Status::PAUSED);
    assert!(api.ask(|task, context| task.pause(context, &pause(&api))).is_err(), "it is paused");
    assert!(delete(&api, "").is_err(), "it is paused");
    let request = exec_request(&api, "frozen", "true", "");
    assert!(api.ask(|task, context| task.exec(context, &request)).is_err(), "it is paused");
    resume(&api).expect("it goes on");
    if runtime == STERNA {
        // containerd's own says Unknown.
        for refused in [code(start(&api, "")), code(resume(&api)), code(delete(&api, ""))] {
            assert_eq!(refused, Some(Code::FAILED_PRECONDITION));
        }
    }

    kill(&api, "", 9).expect("it is killed");
    assert_eq!(wait(&api, ""), 137);
    assert_eq!(status_of(&api, ""), Status::STOPPED);
    // containerd's own asks runc, which knows a moment later.
    eventually("it is gone", || (code(kill(&api, "", 9)) == Some(Code::NOT_FOUND)).then_some(()));
    assert!(start(&api, "").is_err(), "it has ended");
    assert!(api.ask(|task, context| task.pause(context, &pause(&api))).is_err(), "it has ended");
    drop(container);
});

under_both_shims!(one_fifo_takes_both_outputs_of_an_exec(lab, node, runtime) {
    let (container, api) = started(lab, node, runtime, "both");
    node.sh("rm -f /tmp/both; mkfifo /tmp/both").success();
    let reader = node.spawn(&["cat", "/tmp/both"]);
    let script = "for i in 1 2 3 4 5; do seq 1 20000; seq 1 20000 >&2; done";
    let request = exec_request(&api, "speaker", script, "/tmp/both");
    api.get(|task, context| task.exec(context, &request));
    start(&api, "speaker").expect("it starts");
    assert_eq!(wait(&api, "speaker"), 0);
    delete(&api, "speaker").expect("it has ended");
    // The fifo ends for its reader because the shim has let go of it.
    let said = reader.end(sterna_integration::DEADLINE);
    let bytes: usize = (1..=20_000).map(|number: u32| number.to_string().len() + 1).sum();
    assert_eq!(said.success().len(), 10 * bytes);
    node.exec(&["rm", "/tmp/both"]).success();
    container.delete(node);
});

under_both_shims!(a_terminal_takes_the_size_that_it_is_told(lab, node, runtime) {
    let script = "while :; do stty size >/size; sleep 0.1; done";
    let container = Container::shell("sized", script).under(runtime);
    let container = container.start_on_terminal(lab, node);
    let api = TaskApi::of(&container, node);
    let request = ResizePtyRequest { id: api.id(), width: 132, height: 43, ..Default::default() };
    api.get(|task, context| task.resize_pty(context, &request));
    eventually("the program sees it", || {
        (container.exec(node, &["cat", "/size"]).stdout == "43 132\n").then_some(())
    });
    container.delete(node);
    // Without a terminal there is nothing to resize, which is no error.
    let (container, api) = started(lab, node, runtime, "sizeless");
    let request = ResizePtyRequest { id: api.id(), width: 80, height: 25, ..Default::default() };
    api.get(|task, context| task.resize_pty(context, &request));
    container.delete(node);
});

/// `Update` with these limits, which are OCI's.
fn update(api: &TaskApi, resources: &str) -> Result<(), (Code, String)> {
    let request = UpdateTaskRequest {
        id: api.id(),
        resources: MessageField::some(Any {
            type_url: "types.containerd.io/opencontainers/runtime-spec/1/LinuxResources".to_owned(),
            value: resources.as_bytes().to_vec(),
            ..Default::default()
        }),
        ..Default::default()
    };
    api.ask(|task, context| task.update(context, &request))
        .map(drop)
}

under_both_shims!(limits_are_updated_while_it_runs_and_while_it_is_paused(lab, node, runtime) {
    let (container, api) = started(lab, node, runtime, "limited");
    let file = match node.cgroup() {
        Cgroup::V1 => "memory/memory.limit_in_bytes",
        Cgroup::V2 => "memory.max",
    };
    let limit = || {
        let found = format!("/proc/{}/root/sys/fs/cgroup/{file}", container.pid(node));
        let group = node.read(&format!("/proc/{}/cgroup", container.pid(node)));
        // ctr's containers do not see their group: it is looked for from the node.
        let memory = group.lines().find(|line| line.contains(":memory:") || line.starts_with("0::"));
        let path = memory.and_then(|line| line.rsplit(':').next()).unwrap_or_default();
        let (top, name) = file.rsplit_once('/').unwrap_or(("", file));
        let seen = node.exec(&["cat", &format!("/sys/fs/cgroup/{top}{path}/{name}")]);
        assert!(seen.is_success(), "{seen} (and not {found})");
        seen.stdout.trim().to_owned()
    };
    update(&api, r#"{"memory":{"limit":67108864}}"#).expect("it takes a limit");
    assert_eq!(limit(), "67108864");
    api.get(|task, context| task.pause(context, &pause(&api)));
    update(&api, r#"{"memory":{"limit":134217728}}"#).expect("it takes a limit");
    assert_eq!(limit(), "134217728");
    assert_eq!(status_of(&api, ""), Status::PAUSED);
    resume(&api).expect("it goes on");
    let (refused, text) = update(&api, "no JSON").expect_err("that is nonsense");
    if runtime == STERNA {
        assert_eq!(refused, Code::INVALID_ARGUMENT, "{text}");
    }
    container.exec(node, &["true"]).success();
    container.delete(node);
});

#[test]
fn without_controllers_an_update_says_so_and_the_container_goes_on() {
    let Some(lab) = LAB.get() else { return };
    if Cgroup::of_machine() == Cgroup::V2 {
        return skip("all nodes are on cgroup v2 here, with controllers");
    }
    let node = lab.node("b");
    let said = |runtime: &str| {
        let (container, api) = started(lab, node, runtime, "uncontrolled");
        let said = update(&api, r#"{"pids":{"limit":100}}"#);
        assert_eq!(status_of(&api, ""), Status::RUNNING);
        container.exec(node, &["true"]).success();
        container.delete(node);
        said.is_ok()
    };
    assert_eq!(said(STERNA), said(RUNC));
}

#[test]
fn options_of_a_strange_type_are_an_invalid_argument() {
    let Some(lab) = LAB.get() else { return };
    for node in ["a", "c"].map(|name| lab.node(name)) {
        let (container, api) = started(lab, node, STERNA, "proper");
        node.write("/tmp/stranger/config.json", "{}");
        let request = CreateTaskRequest {
            id: "stranger".to_owned(),
            bundle: "/tmp/stranger".to_owned(),
            options: MessageField::some(Any {
                type_url: "containerd.strange.v1.Options".to_owned(),
                ..Default::default()
            }),
            ..Default::default()
        };
        let answer = api.ask(|task, context| task.create(context, &request));
        assert_eq!(code(answer), Some(Code::INVALID_ARGUMENT));
        let request = CreateTaskRequest {
            id: api.id(),
            bundle: state_of(&api, "").expect("it is there").bundle,
            ..Default::default()
        };
        let answer = api.ask(|task, context| task.create(context, &request));
        assert_eq!(code(answer), Some(Code::ALREADY_EXISTS));
        container.exec(node, &["true"]).success();
        container.delete(node);
        node.exec(&["rm", "-r", "/tmp/stranger"]).success();
    }
}

/// A runc before the real one that stops at a word until a file is gone.
struct SlowRunc<'node>(&'node Node);

impl<'node> SlowRunc<'node> {
    fn new(node: &'node Node) -> Self {
        let script = "#!/bin/sh
            case \" $* \" in *\" pause slow\"*) while test -e /tmp/slow; do sleep 0.05; done ;; esac
            exec /usr/sbin/runc \"$@\"";
        node.write("/usr/local/bin/runc", script);
        node.sh("chmod 755 /usr/local/bin/runc; touch /tmp/slow")
            .success();
        Self(node)
    }

    fn go_on(&self) {
        self.0.exec(&["rm", "-f", "/tmp/slow"]).success();
    }
}

impl Drop for SlowRunc<'_> {
    fn drop(&mut self) {
        self.0
            .exec(&["rm", "-f", "/tmp/slow", "/usr/local/bin/runc"]);
    }
}

under_both_shims!(a_request_whose_time_is_up_is_done_all_the_same(lab, node, runtime) {
    let runc = SlowRunc::new(node);
    let (container, api) = started(lab, node, runtime, "slow");
    let late = api.ask_within(Duration::from_millis(300), |task, context| {
        task.pause(context, &pause(&api))
    });
    assert_eq!(code(late), Some(Code::DEADLINE_EXCEEDED));
    if runtime == RUNC {
        // containerd's own kills runc with the request, and is left without a word.
        return;
    }
    // Whoever asks is answered meanwhile.
    assert_eq!(status_of(&api, ""), Status::PAUSING);
    runc.go_on();
    eventually("it is paused", || (status_of(&api, "") == Status::PAUSED).then_some(()));
    resume(&api).expect("it goes on");
    assert_eq!(status_of(&api, ""), Status::RUNNING);
    container.exec(node, &["true"]).success();
    container.delete(node);
});

#[test]
fn while_runc_works_on_one_container_the_others_of_its_pod_are_served() {
    let Some(lab) = LAB.get() else { return };
    let node = lab.node("a");
    let runc = SlowRunc::new(node);
    let group = ["--annotation", "io.containerd.runc.v2.group=slow-pod"];
    let start = |name| {
        let container = Container::shell(name, IDLE).options(&group);
        container.under(STERNA).start(lab, node)
    };
    let (slow, quick) = (start("slow"), start("quick"));
    let api = TaskApi::of(&slow, node);
    let late = api.ask_within(Duration::from_millis(300), |task, context| {
        task.pause(context, &pause(&api))
    });
    assert_eq!(code(late), Some(Code::DEADLINE_EXCEEDED));
    assert_eq!(quick.exec(node, &["echo", "served"]).success(), "served\n");
    node.ctr(&["task", "pause", "quick"]).success();
    node.ctr(&["task", "resume", "quick"]).success();
    quick.delete(node);
    let third = start("third");
    third.delete(node);
    assert_eq!(
        status_of(&api, ""),
        Status::PAUSING,
        "runc has been at it all the time"
    );
    runc.go_on();
    eventually("it is paused", || {
        (status_of(&api, "") == Status::PAUSED).then_some(())
    });
    resume(&api).expect("it goes on");
    slow.delete(node);
}

under_both_shims!(another_user_is_turned_away_from_the_socket(lab, node, runtime) {
    let (container, api) = started(lab, node, runtime, "private");
    let socket = api.socket();
    // As if somebody had opened it for all.
    node.sh(&format!("chmod 666 {socket}; chmod 711 {}", socket.rsplit_once('/').map_or("", |(directory, _)| directory)))
        .success();
    let script = "import socket, sys
peer = socket.socket(socket.AF_UNIX)
peer.settimeout(1)
peer.connect(sys.argv[1])
try: print('turned away' if peer.recv(1) == b'' else 'answered')
except TimeoutError: print('welcome')
except ConnectionResetError: print('turned away')";
    let program = ["python3", "-c", script, socket];
    let nobody = ["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups"];
    let said = node.exec(&[&nobody, &program[..]].concat());
    assert_eq!(said.success(), "turned away\n");
    assert_eq!(node.exec(&program).success(), "welcome\n");
    assert_eq!(status_of(&api, ""), Status::RUNNING);
    container.delete(node);
});
