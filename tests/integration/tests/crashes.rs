//! Processes die in the freeze and after the commit, where the container stands still
//! on one node and may run on the other: in the end exactly one copy runs, and no
//! answered write is lost.

use sterna_integration::{
    Cgroup, Container, Flavour, Inventory, Lab, Listed, Load, Migration, Moment, Node, Running,
    SharedLab, Victim, eventually, listed, migrate, settled,
};

static LAB: SharedLab = SharedLab::new(9, |lab| {
    lab.up(&["a", "b"], Flavour::Forky, Cgroup::of_machine());
    lab.pair(&["a", "b"]);
    lab.import("a", &["valkey"]);
    lab.import("b", &["valkey", "busybox"]);
    // A node's first container leaves the control groups above its own.
    Container::shell("first", "true")
        .run(lab.node("b"))
        .success();
});

const ENGINE: &[&str] = &["containerd-shim-sterna-v1 engine"];
const AGENT: &[&str] = &["sternad run"];
// What CRIU makes of its command line.
const CRIU: &[&str] = &["criu: restore"];

/// A Valkey under load on a, on its way to b.
struct Scene<'lab> {
    lab: &'lab Lab,
    valkey: Running<'lab>,
    load: Load,
    before: [Inventory; 2],
}

impl<'lab> Scene<'lab> {
    fn set(lab: &'lab Lab, name: &str) -> Self {
        // A test that failed may have left it dead.
        lab.node("b").service("start", "sternad");
        let valkey = Container::valkey(name).start(lab, lab.node("a"));
        let load = Load::start(lab, valkey.address(), "64M", "2000/s");
        let before = ["a", "b"].map(|node| Inventory::of(lab.node(node)));
        Self {
            lab,
            valkey,
            load,
            before,
        }
    }

    /// Begins to move it; the engines of both nodes are there when this returns.
    fn under_way(&self) -> Migration {
        let (a, b) = (self.lab.node("a"), self.lab.node("b"));
        // However slow the machine is, it comes to a switch-over.
        let options = ["--max-blackout", "30s"];
        let mut migration = Migration::start(&self.valkey, a, b, &options);
        migration.wait_for_pre_copy();
        migration
    }

    /// As [`under_way`](Self::under_way), and no task is let go on b: whatever is
    /// killed there after the commit is killed in time.
    fn under_way_to_be_held(&self) -> Migration {
        let b = self.lab.node("b");
        // Where the kernel can: then the first lap takes seconds on any machine.
        let _slow = b.slow_link("100mbit");
        let migration = self.under_way();
        // It stands at the gate.
        Victim::find(b, CRIU).stop();
        migration
    }

    fn here(&self, node: &Node) -> Option<Listed> {
        let mut all = listed(node).into_iter();
        all.find(|listed| listed.id == self.valkey.name())
    }

    /// Waits until it stands still on a because nobody on b can be asked.
    #[track_caller]
    fn assert_undecided(&self) {
        let a = self.lab.node("a");
        let here = eventually("the container is shown as undecided", || {
            self.here(a).filter(|here| here.state == "undecided")
        });
        assert_eq!(here.peer.as_deref(), Some("b"), "{here:?}");
        assert_eq!(self.valkey.status(a).as_deref(), Some("RUNNING"));
    }

    /// It runs on a with all of its data, b is as before, and it can still be moved.
    #[track_caller]
    fn assert_goes_on_at_the_source(mut self) {
        let (a, b) = (self.lab.node("a"), self.lab.node("b"));
        settled(&self.valkey, a);
        self.load.assert_served();
        let [at_a, at_b] = &self.before;
        at_b.assert_nothing_added(b);
        at_a.assert_nothing_added(a);
        assert_eq!(self.valkey.status(a).as_deref(), Some("RUNNING"));
        migrate(&self.valkey, a, b);
        self.load.assert_served();
        self.load.stop().assert_nothing_lost();
    }

    /// It runs on b with all of its data, and nothing of it is left on a.
    #[track_caller]
    fn assert_goes_on_at_the_destination(mut self) {
        let (a, b) = (self.lab.node("a"), self.lab.node("b"));
        settled(&self.valkey, b);
        self.load.assert_served();
        let [at_a, _] = &self.before;
        at_a.assert_nothing_added(a);
        assert!(self.here(a).is_none(), "{:?}", listed(a));
        self.load.stop().assert_nothing_lost();
    }
}

#[test]
fn the_sources_engine_dies_in_the_freeze() {
    let Some(lab) = LAB.get() else { return };
    let scene = Scene::set(lab, "frozen");
    let dump = Moment::of_dump(lab.node("a"));
    let migration = scene.under_way();
    let engine = Victim::find(lab.node("a"), ENGINE);
    dump.wait();
    engine.kill();
    let said = migration.failure();
    assert!(said.contains("source shim failed"), "{said}");
    scene.assert_goes_on_at_the_source();
}

#[test]
fn the_sources_engine_dies_after_the_commit_and_the_container_runs_there() {
    let Some(lab) = LAB.get() else { return };
    let scene = Scene::set(lab, "unheard");
    let decision = Moment::of_decision(lab.node("b"));
    let migration = scene.under_way();
    let engine = Victim::find(lab.node("a"), ENGINE);
    decision.wait();
    engine.kill();
    migration.success();
    scene.assert_goes_on_at_the_destination();
}

#[test]
fn both_engines_die_after_the_commit() {
    let Some(lab) = LAB.get() else { return };
    let scene = Scene::set(lab, "both-engines");
    let commit = Moment::of_commit(lab.node("a"));
    let migration = scene.under_way_to_be_held();
    let engines = ["a", "b"].map(|node| Victim::find(lab.node(node), ENGINE));
    commit.wait();
    for engine in engines {
        engine.kill();
    }
    let said = migration.failure();
    assert!(said.contains("goes on on node a"), "{said}");
    scene.assert_goes_on_at_the_source();
}

#[test]
fn the_destinations_engine_and_agent_die_before_the_tasks_are_let_go() {
    let Some(lab) = LAB.get() else { return };
    let (a, b) = (lab.node("a"), lab.node("b"));
    let scene = Scene::set(lab, "not-let-go");
    let commit = Moment::of_commit(a);
    let migration = scene.under_way_to_be_held();
    let victims = [ENGINE, AGENT].map(|words| Victim::find(b, words));
    commit.wait();
    for victim in victims {
        victim.kill();
    }
    scene.assert_undecided();
    b.service("start", "sternad");
    let said = migration.failure();
    assert!(said.contains("goes on on node a"), "{said}");
    scene.assert_goes_on_at_the_source();
}

#[test]
fn an_undecided_container_survives_its_agent_and_its_engine() {
    let Some(lab) = LAB.get() else { return };
    let (a, b) = (lab.node("a"), lab.node("b"));
    let scene = Scene::set(lab, "undecided");
    let commit = Moment::of_commit(a);
    let migration = scene.under_way_to_be_held();
    let victims = [ENGINE, AGENT].map(|words| Victim::find(b, words));
    commit.wait();
    for victim in victims {
        victim.kill();
    }
    scene.assert_undecided();
    a.service("kill", "sternad");
    migration.failure();
    Victim::find(a, ENGINE).kill();
    a.service("start", "sternad");
    scene.assert_undecided();
    b.service("start", "sternad");
    scene.assert_goes_on_at_the_source();
}

#[test]
fn an_operator_decides_about_an_undecided_container() {
    let Some(lab) = LAB.get() else { return };
    let (a, b) = (lab.node("a"), lab.node("b"));
    let scene = Scene::set(lab, "released");
    let release = |verdict| a.sterna(&["release", "released", verdict]);
    let refused = release("--handed-back").failure();
    assert!(refused.contains("not undecided"), "{refused}");
    let commit = Moment::of_commit(a);
    let migration = scene.under_way_to_be_held();
    let victims = [ENGINE, AGENT].map(|words| Victim::find(b, words));
    commit.wait();
    for victim in victims {
        victim.kill();
    }
    scene.assert_undecided();
    let said = release("--handed-back");
    assert!(said.success().contains("goes on here"), "{said}");
    let said = migration.failure();
    assert!(said.contains("goes on on node a"), "{said}");
    settled(&scene.valkey, a);
    b.service("start", "sternad");
    scene.assert_goes_on_at_the_source();
}

/// runc ends only when it is told to, so that the destination says nothing while its
/// link is pulled.
#[test]
fn the_destinations_engine_and_agent_die_after_the_tasks_were_let_go() {
    let Some(lab) = LAB.get() else { return };
    let b = lab.node("b");
    let scene = Scene::set(lab, "let-go");
    let decision = Moment::of_decision(b);
    let slow = SlowRunc::of(b);
    let migration = scene.under_way();
    decision.wait();
    b.link("down");
    slow.end();
    eventually("it has settled on b", || {
        scene.here(b).filter(|here| here.state == "running")
    });
    let victims = [ENGINE, AGENT].map(|words| Victim::find(b, words));
    for victim in victims {
        victim.kill();
    }
    // Not before: what the engine had said would still come through.
    scene.assert_undecided();
    b.link("up");
    b.service("start", "sternad");
    migration.success();
    scene.assert_goes_on_at_the_destination();
}

/// Whoever knows that it runs there needs not wait until the link is back.
#[test]
fn an_operator_ends_what_is_left_of_a_container_that_runs_elsewhere() {
    let Some(lab) = LAB.get() else { return };
    let (a, b) = (lab.node("a"), lab.node("b"));
    let scene = Scene::set(lab, "ended");
    let decision = Moment::of_decision(b);
    let slow = SlowRunc::of(b);
    let migration = scene.under_way();
    decision.wait();
    b.link("down");
    slow.end();
    eventually("it has settled on b", || {
        scene.here(b).filter(|here| here.state == "running")
    });
    scene.assert_undecided();
    let released = a.sterna(&["release", "ended", "--gone"]);
    let said = released.success();
    assert!(said.contains("ended is ended here"), "{said}");
    migration.success();
    eventually("nothing is left of it on a", || {
        scene.here(a).is_none().then_some(())
    });
    b.link("up");
    scene.assert_goes_on_at_the_destination();
}

/// What its clients may have seen there must not be undone by an older copy.
#[test]
fn what_was_let_go_and_lost_does_not_come_back() {
    let Some(lab) = LAB.get() else { return };
    let (a, b) = (lab.node("a"), lab.node("b"));
    let scene = Scene::set(lab, "lost");
    let decision = Moment::of_decision(b);
    let slow = SlowRunc::of(b);
    let migration = scene.under_way();
    let engine = Victim::find(b, ENGINE);
    decision.wait();
    engine.kill();
    migration.ended();
    drop(slow);
    for node in [a, b] {
        eventually("it is gone", || scene.here(node).is_none().then_some(()));
    }
    assert_eq!(scene.valkey.status(a), None);
}

/// A runc that restores as ever and then does not end.
struct SlowRunc<'node> {
    node: &'node Node,
    program: String,
}

impl<'node> SlowRunc<'node> {
    fn of(node: &'node Node) -> Self {
        let program = node.sh("readlink -f \"$(command -v runc)\"");
        let program = program.success().trim().to_owned();
        let script = format!(
            "#!/bin/sh\ncase \" $* \" in *' restore '*)\n  {program}.real \"$@\" || exit\n  \
             until [ -e /run/restore-may-end ]; do sleep 0.05; done\n  exit ;;\nesac\n\
             exec {program}.real \"$@\"\n"
        );
        node.sh(&format!("mv {program} {program}.real")).success();
        node.write(&program, &script);
        node.sh(&format!("chmod 755 {program}")).success();
        Self { node, program }
    }

    fn end(&self) {
        self.node.sh(": >/run/restore-may-end").success();
    }
}

impl Drop for SlowRunc<'_> {
    fn drop(&mut self) {
        let program = &self.program;
        let script = format!("rm -f /run/restore-may-end; mv {program}.real {program}");
        self.node.sh(&script);
    }
}
