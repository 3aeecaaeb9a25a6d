//! A part of the destination, or the way to it, fails while memory travels: the
//! source serves on, nothing is lost, the message says who failed when, and the
//! next migration works.

use std::time::Duration;

use sterna_integration::{
    Cgroup, Container, Flavour, Inventory, Lab, Load, Migration, Running, SharedLab, SlowLink,
    eventually, listed, migrate, settled, skip,
};

static LAB: SharedLab = SharedLab::new(3, |lab| {
    lab.up(&["a", "b"], Flavour::Forky, Cgroup::of_machine());
    lab.pair(&["a", "b"]);
    lab.import("a", &["valkey"]);
    lab.import("b", &["valkey"]);
});

/// A Valkey under load on a, and a link to b on which copying it takes seconds.
struct Scene<'lab> {
    lab: &'lab Lab,
    valkey: Running<'lab>,
    load: Load,
    slow: SlowLink,
    before: Inventory,
}

impl<'lab> Scene<'lab> {
    fn set(lab: &'lab Lab, name: &str) -> Option<Self> {
        let Some(slow) = lab.node("b").slow_link("150mbit") else {
            skip("this kernel cannot limit a link (tc, tbf)");
            return None;
        };
        let before = Inventory::of(lab.node("b"));
        let valkey = Container::valkey(name).start(lab, lab.node("a"));
        let load = Load::start(lab, valkey.address(), "64M", "2000/s");
        Some(Self {
            lab,
            valkey,
            load,
            slow,
            before,
        })
    }

    /// Begins to move it to b and returns when memory travels.
    fn under_way(&self, options: &[&str]) -> Migration {
        let (a, b) = (self.lab.node("a"), self.lab.node("b"));
        let mut migration = Migration::start(&self.valkey, a, b, options);
        migration.wait_for_pre_copy();
        // Into the first lap, which takes seconds.
        std::thread::sleep(Duration::from_millis(500));
        migration
    }

    /// The source serves on, b is as before, and then it works.
    #[track_caller]
    fn assert_source_goes_on_and_the_next_migration_works(mut self) {
        let (a, b) = (self.lab.node("a"), self.lab.node("b"));
        self.load.assert_served();
        settled(&self.valkey, a);
        assert_eq!(self.valkey.status(a).as_deref(), Some("RUNNING"));
        self.before.assert_nothing_added(b);
        drop(self.slow);
        migrate(&self.valkey, a, b);
        self.load.assert_served();
        self.load.stop().assert_nothing_lost();
    }
}

#[track_caller]
fn assert_says(said: &str, side: &str, phase: &str) {
    assert!(
        said.contains(&format!("{side} failed in phase {phase}")),
        "the message should name the {side} and the phase {phase}:\n{said}"
    );
    assert!(said.contains("goes on on node a"), "{said}");
}

#[test]
fn the_destinations_shim_is_killed() {
    let Some(lab) = LAB.get() else { return };
    let b = lab.node("b");
    let Some(scene) = Scene::set(lab, "shim-killed") else {
        return;
    };
    let migration = scene.under_way(&[]);
    let shims = b.processes(&["containerd-shim-sterna-v1", "-id shim-killed"]);
    assert_eq!(shims.len(), 1, "{shims:?}");
    b.signal("KILL", shims[0]);
    assert_says(&migration.failure(), "destination shim", "pre-copy");
    scene.assert_source_goes_on_and_the_next_migration_works();
}

#[test]
fn the_destinations_engine_is_killed() {
    let Some(lab) = LAB.get() else { return };
    let b = lab.node("b");
    let Some(scene) = Scene::set(lab, "engine-killed") else {
        return;
    };
    let migration = scene.under_way(&[]);
    let engines = b.processes(&["containerd-shim-sterna-v1 engine"]);
    assert_eq!(engines.len(), 1, "{engines:?}");
    b.signal("KILL", engines[0]);
    assert_says(&migration.failure(), "destination shim", "pre-copy");
    scene.assert_source_goes_on_and_the_next_migration_works();
}

#[test]
fn the_destinations_agent_is_killed() {
    let Some(lab) = LAB.get() else { return };
    let b = lab.node("b");
    let Some(scene) = Scene::set(lab, "agent-killed") else {
        return;
    };
    let migration = scene.under_way(&[]);
    b.service("kill", "sternad");
    assert_says(&migration.failure(), "destination agent", "pre-copy");
    b.service("start", "sternad");
    scene.assert_source_goes_on_and_the_next_migration_works();
}

#[test]
fn the_destinations_containerd_is_killed() {
    let Some(lab) = LAB.get() else { return };
    let b = lab.node("b");
    let Some(scene) = Scene::set(lab, "containerd-killed") else {
        return;
    };
    let migration = scene.under_way(&[]);
    b.service("kill", "containerd");
    assert_says(&migration.failure(), "destination containerd", "pre-copy");
    b.service("start", "containerd");
    scene.assert_source_goes_on_and_the_next_migration_works();
}

#[test]
fn the_sources_containerd_is_restarted_and_the_container_moves_all_the_same() {
    let Some(lab) = LAB.get() else { return };
    let (a, b) = (lab.node("a"), lab.node("b"));
    let Some(mut scene) = Scene::set(lab, "source-restart") else {
        return;
    };
    let migration = scene.under_way(&["--max-blackout", "2s"]);
    a.service("kill", "containerd");
    a.service("start", "containerd");
    assert_eq!(scene.valkey.status(a).as_deref(), Some("RUNNING"));
    migration.success();
    settled(&scene.valkey, b);
    scene.load.assert_served();
    scene.load.stop().assert_nothing_lost();
}

#[test]
fn the_link_is_cut() {
    let Some(lab) = LAB.get() else { return };
    let b = lab.node("b");
    let Some(scene) = Scene::set(lab, "cut-off") else {
        return;
    };
    let migration = scene.under_way(&[]);
    b.link("down");
    let said = migration.failure();
    b.link("up");
    assert_says(&said, "link", "pre-copy");
    scene.assert_source_goes_on_and_the_next_migration_works();
}

#[test]
fn the_sources_engine_is_killed() {
    let Some(lab) = LAB.get() else { return };
    let a = lab.node("a");
    let Some(scene) = Scene::set(lab, "sender-killed") else {
        return;
    };
    let migration = scene.under_way(&[]);
    let engines = a.processes(&["containerd-shim-sterna-v1 engine"]);
    assert_eq!(engines.len(), 1, "{engines:?}");
    a.signal("KILL", engines[0]);
    assert_says(&migration.failure(), "source shim", "pre-copy");
    scene.assert_source_goes_on_and_the_next_migration_works();
}

#[test]
fn the_sources_agent_is_killed() {
    let Some(lab) = LAB.get() else { return };
    let a = lab.node("a");
    let Some(scene) = Scene::set(lab, "orphaned") else {
        return;
    };
    let migration = scene.under_way(&[]);
    a.service("kill", "sternad");
    migration.failure();
    a.service("start", "sternad");
    // Without its agent a migration comes to an end of its own, one or the other.
    eventually("the container is in one place, and settled", || {
        let mut states = [a, lab.node("b")].into_iter().flat_map(listed);
        let one = states.find(|listed| listed.id == "orphaned")?;
        (states.all(|listed| listed.id != "orphaned") && one.state == "running").then_some(())
    });
    let mut scene = scene;
    scene.load.assert_served();
    drop(scene.slow);
    scene.load.stop().assert_nothing_lost();
}

/// Everything has arrived and is committed, and then the restore fails: the source
/// gets the container back, with everything.
#[test]
fn a_restore_that_fails_hands_the_container_back() {
    let Some(lab) = LAB.get() else { return };
    let (a, b) = (lab.node("a"), lab.node("b"));
    let Some(scene) = Scene::set(lab, "handed-back") else {
        return;
    };
    let migration = scene.under_way(&["--max-blackout", "10s"]);
    // CRIU stands at its gate, in the container's control group, and will find that
    // it can make no process.
    b.sh("for group in /sys/fs/cgroup/pids /sys/fs/cgroup; do
           limit=$group/default/handed-back/pids.max
           [ ! -e $limit ] || echo 1 >$limit
         done")
        .success();
    let said = migration.failure();
    assert!(
        said.contains("node a"),
        "where the container is should be said:\n{said}"
    );
    settled(&scene.valkey, a);
    scene.assert_source_goes_on_and_the_next_migration_works();
}

#[test]
fn a_runc_that_does_not_start_is_found_before_the_freeze() {
    let Some(lab) = LAB.get() else { return };
    let (a, b) = (lab.node("a"), lab.node("b"));
    let Some(scene) = Scene::set(lab, "no-runc") else {
        return;
    };
    let runc = b
        .sh("readlink -f \"$(command -v runc)\"")
        .success()
        .trim()
        .to_owned();
    b.sh(&format!("mv {runc} {runc}.away")).success();
    b.write(
        &runc,
        &format!(
            "#!/bin/sh\ncase \" $* \" in *' restore '*) echo 'no restore today' >&2; exit 1 ;; esac\nexec {runc}.away \"$@\"\n"
        ),
    );
    b.sh(&format!("chmod 755 {runc}")).success();
    let said = Migration::start(&scene.valkey, a, b, &[]).failure();
    b.sh(&format!("mv {runc}.away {runc}")).success();
    assert_says(&said, "destination shim", "prepare");
    scene.assert_source_goes_on_and_the_next_migration_works();
}
