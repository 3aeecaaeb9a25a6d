//! A namespace in Rust: pods and Migrations, and what is planned for them.

use super::*;
use serde_json::{Value, json};

const BEFORE: &str = "2026-01-01T00:00:00Z";
const NOW: &str = "2026-01-01T01:00:00Z";

/// A namespace, and the time in it.
struct Scene {
    now: Timestamp,
    pods: Vec<Arc<Pod>>,
    migrations: Vec<Arc<Migration>>,
    owners: BTreeMap<String, OwnerState>,
    nodes: BTreeMap<String, bool>,
}

impl Scene {
    /// A ReplicaSet of one pod `s` on node a.
    fn new() -> Self {
        Self {
            now: NOW.parse().unwrap(),
            pods: vec![Arc::new(pod(
                "s",
                BEFORE,
                json!({"spec": {"nodeName": "a"}}),
            ))],
            migrations: Vec::new(),
            owners: BTreeMap::from([("rs".to_owned(), replica_set(1, "1"))]),
            nodes: BTreeMap::new(),
        }
    }

    /// The same, its pod evicted a moment ago.
    fn evicted() -> Self {
        let mut scene = Self::new();
        scene.pods[0] = evicted("s");
        scene
    }

    fn with(mut self, pod: Pod) -> Self {
        self.pods.push(Arc::new(pod));
        self
    }

    fn and(mut self, migration: Migration) -> Self {
        self.migrations.push(Arc::new(migration));
        self
    }

    fn all(&self) -> Vec<Action> {
        plan(&View {
            now: self.now,
            pods: &self.pods,
            migrations: &self.migrations,
            owners: &self.owners,
            nodes: &self.nodes,
            runtime_classes: &["sterna".to_owned()],
            keep_finished: SignedDuration::from_hours(1),
        })
    }

    /// Without what pods are told.
    fn plan(&self) -> Vec<Action> {
        let told = |action: &Action| {
            matches!(
                action,
                Action::Condition { .. } | Action::Event { .. } | Action::Label { .. }
            )
        };
        self.all()
            .into_iter()
            .filter(|action| !told(action))
            .collect()
    }

    /// The status that the only action writes.
    fn next(&self) -> MigrationStatus {
        let mut actions = self.plan();
        assert_eq!(actions.len(), 1, "{actions:?}");
        match actions.remove(0) {
            Action::Status { status, .. }
            | Action::Claim { status, .. }
            | Action::Release { status, .. } => *status,
            other => panic!("{other:?}"),
        }
    }
}

fn pod(uid: &str, created: &str, change: Value) -> Pod {
    let mut pod = json!({
        "metadata": {
            "name": format!("cart-{uid}"), "uid": uid, "namespace": "shop",
            "creationTimestamp": created,
            "labels": {"pod-template-hash": "5d4f"},
            "annotations": {"sterna.dev/managed-containers": "[\"cache\"]"},
            "ownerReferences": [{"apiVersion": "apps/v1", "kind": "ReplicaSet",
                "name": "cart", "uid": "rs", "controller": true}],
        },
        "spec": {"runtimeClassName": "sterna",
            "containers": [{"name": "cache", "image": "valkey:9"}]},
        "status": {"phase": "Pending"},
    });
    merge(&mut pod, change);
    serde_json::from_value(pod).unwrap()
}

fn evicted(uid: &str) -> Arc<Pod> {
    let change = json!({
        "metadata": {"deletionTimestamp": "2026-01-01T01:00:30Z", "deletionGracePeriodSeconds": 30},
        "spec": {"nodeName": "a"},
        "status": {"phase": "Running", "conditions": [{"type": "DisruptionTarget", "status": "True",
            "reason": "EvictionByEvictionAPI", "lastTransitionTime": NOW}]},
    });
    Arc::new(pod(uid, BEFORE, change))
}

/// One whose source is `s`; `change` is merged into its status.
fn migration(change: Value) -> Migration {
    let source = pod("s", BEFORE, json!({}));
    let managed = ["cache".to_owned()];
    let mut one = json!({
        "apiVersion": "sterna.dev/v1alpha1", "kind": "Migration",
        "metadata": {"name": "cart-s-s", "uid": "m", "resourceVersion": "7",
            "finalizers": [FINALIZER]},
        "spec": {"podName": "cart-s", "podUid": "s", "trigger": "Eviction"},
        "status": {
            "phase": "Pending", "startedAt": NOW,
            "message": "waits for the pod that replaces it",
            "sourcePod": {"name": "cart-s", "uid": "s", "node": "a"},
            "owner": {"kind": "ReplicaSet", "name": "cart", "uid": "rs"},
            "identity": "5d4f", "containers": managed,
            "specHash": sterna_kube::spec_hash::spec_hash(&source, &managed),
            "replacedLate": false,
            "conditions": [{"type": "SourceGone", "status": "False", "reason": "PodState",
                "message": "", "lastTransitionTime": NOW}],
        },
    });
    merge(&mut one["status"], change);
    serde_json::from_value(one).unwrap()
}

/// As somebody makes one.
fn request(spec: Value) -> Migration {
    serde_json::from_value(json!({
        "apiVersion": "sterna.dev/v1alpha1", "kind": "Migration",
        "metadata": {"name": "mine", "uid": "q", "finalizers": [FINALIZER]},
        "spec": spec,
    }))
    .unwrap()
}

fn replica_set(replicas: i32, revision: &str) -> OwnerState {
    let of = |revision: &str| json!({"deployment.kubernetes.io/revision": revision});
    let set = json!({"metadata": {"annotations": of("1")},
        "spec": {"replicas": replicas, "selector": {}}});
    let deployment = json!({"metadata": {"annotations": of(revision)}});
    OwnerState::ReplicaSet(
        serde_json::from_value(set).unwrap(),
        Some(serde_json::from_value(deployment).unwrap()),
    )
}

fn merge(into: &mut Value, from: Value) {
    match (into, from) {
        (Value::Object(into), Value::Object(from)) => {
            for (key, value) in from {
                merge(into.entry(key).or_insert(Value::Null), value);
            }
        }
        (into, from) => *into = from,
    }
}

fn target() -> Value {
    json!({"phase": "Matched", "targetPod": {"name": "cart-r", "uid": "r", "node": "b"}})
}

fn replacement() -> Pod {
    pod("r", NOW, json!({"spec": {"nodeName": "b"}}))
}

fn transfer(container: Value) -> Value {
    let mut status = target();
    status["transfer"] = json!({"targetUid": "r", "startedAt": NOW, "containers": [container]});
    status
}

#[test]
fn an_evicted_pod_gets_a_migration_and_one_only() {
    let created = Scene::evicted().plan();
    let [Action::Create { name, pod, trigger }] = created.as_slice() else {
        panic!("{created:?}");
    };
    assert_eq!((name.as_str(), pod.uid.as_str()), ("cart-s-s", "s"));
    assert_eq!(*trigger, Trigger::Eviction);
    for existing in [
        migration(json!({})),
        migration(json!({"phase": "Cancelled"})),
    ] {
        let again = Scene::evicted().and(existing).plan();
        let creates = again
            .iter()
            .any(|action| matches!(action, Action::Create { .. }));
        assert!(!creates, "{again:?}");
    }
}

#[test]
fn a_request_that_was_refused_does_not_keep_an_evicted_pod_from_its_migration() {
    let mut refused = request(json!({"podName": "cart-s", "podUid": "s", "targetNode": "c"}));
    refused.status = serde_json::from_value(json!({
        "phase": "Failed", "sourcePod": {"name": "cart-s", "uid": "s"},
    }))
    .ok();
    refused.metadata.finalizers = None;
    let actions = Scene::evicted().and(refused).plan();
    assert!(
        matches!(actions.as_slice(), [Action::Create { .. }]),
        "{actions:?}"
    );
}

#[test]
fn an_evicted_pod_that_cannot_be_moved_is_told_so_by_a_migration_that_failed() {
    let mut scene = Scene::evicted();
    let pod = Arc::make_mut(&mut scene.pods[0]);
    pod.spec.as_mut().unwrap().host_network = Some(true);
    assert!(matches!(scene.plan().as_slice(), [Action::Create { .. }]));
    let mut new = migration(json!({}));
    new.status = None;
    let status = scene.and(new).next();
    assert_eq!(status.phase, Phase::Failed);
    assert_eq!(status.source_pod.unwrap().uid, "s");
}

#[test]
fn a_pod_that_stays_or_is_deleted_by_hand_gets_none() {
    assert_eq!(Scene::new().plan(), []);
    let mut scene = Scene::new();
    let deleted = json!({"metadata": {"deletionTimestamp": NOW}, "spec": {"nodeName": "a"}});
    scene.pods[0] = Arc::new(pod("s", BEFORE, deleted));
    assert_eq!(scene.plan(), []);
}

#[test]
fn a_new_migration_is_told_all_about_its_source() {
    let mut new = migration(json!({}));
    new.status = None;
    let status = Scene::evicted().and(new).next();
    assert_eq!(status.phase, Phase::Pending);
    assert_eq!(status.source_pod.unwrap().node.as_deref(), Some("a"));
    assert_eq!(status.containers, ["cache"]);
    assert_eq!(status.identity.as_deref(), Some("5d4f"));
}

#[test]
fn the_replacement_is_claimed_as_soon_as_it_is_there() {
    let actions = Scene::evicted()
        .with(replacement())
        .and(migration(json!({})))
        .plan();
    let [
        Action::Claim {
            target,
            version,
            status,
            ..
        },
    ] = actions.as_slice()
    else {
        panic!("{actions:?}");
    };
    assert_eq!((target.uid.as_str(), version.as_deref()), ("r", Some("7")));
    assert_eq!(status.phase, Phase::Matched);
}

#[test]
fn the_targets_node_is_told_once_it_has_one() {
    let unbound = json!({"phase": "Matched", "targetPod": {"name": "cart-r", "uid": "r"}});
    let status = Scene::evicted()
        .with(replacement())
        .and(migration(unbound))
        .next();
    assert_eq!(status.target_pod.unwrap().node.as_deref(), Some("b"));
}

#[test]
fn what_the_sources_node_tells_decides_the_phase() {
    for (container, phase) in [
        (
            json!({"name": "cache", "phase": "Copying"}),
            Phase::Transferring,
        ),
        (
            json!({"name": "cache", "phase": "Committed"}),
            Phase::Committed,
        ),
        (
            json!({"name": "cache", "phase": "Finished", "result": "Succeeded"}),
            Phase::Succeeded,
        ),
        (
            json!({"name": "cache", "phase": "Finished", "result": "Failed"}),
            Phase::Failed,
        ),
    ] {
        let moved = migration(transfer(container.clone()));
        let status = Scene::evicted().with(replacement()).and(moved).next();
        assert_eq!(status.phase, phase, "{container}");
        assert_eq!(status.finished_at.is_some(), phase.is_final());
    }
}

#[test]
fn a_rollout_or_a_scale_down_calls_it_off_before_the_commit_and_not_after() {
    for owner in [replica_set(1, "2"), replica_set(0, "1"), OwnerState::Gone] {
        let scene = |container| {
            let moved = migration(transfer(container));
            let mut scene = Scene::evicted().with(replacement()).and(moved);
            scene.owners.insert("rs".to_owned(), owner.clone());
            scene
        };
        let status = scene(json!({"name": "cache", "phase": "Copying"})).next();
        assert_eq!(status.phase, Phase::Cancelled, "{owner:?}");
        let status = scene(json!({"name": "cache", "phase": "Committed"})).next();
        assert_eq!(status.phase, Phase::Committed, "{owner:?}");
    }
}

#[test]
fn a_target_that_is_gone_is_given_up_for_another() {
    let scene = Scene::evicted().and(migration(target()));
    let actions = scene.plan();
    let [Action::Release { target, status, .. }] = actions.as_slice() else {
        panic!("{actions:?}");
    };
    assert_eq!((target.uid.as_str(), status.phase), ("r", Phase::Pending));
    assert_eq!(status.target_pod, None);
}

#[test]
fn three_that_leave_together_get_three_and_the_one_that_is_not_wanted_none() {
    let three = |replicas| {
        let mut scene = Scene::evicted();
        scene.pods.extend([evicted("t"), evicted("u")]);
        scene
            .owners
            .insert("rs".to_owned(), replica_set(replicas, "1"));
        for uid in ["s", "t", "u"] {
            let mut one = migration(json!({"sourcePod": {"name": uid, "uid": uid}}));
            one.metadata.name = Some(format!("m-{uid}"));
            scene.migrations.push(Arc::new(one));
        }
        scene
            .with(pod("r1", NOW, json!({})))
            .with(pod("r2", NOW, json!({})))
    };
    let count = |scene: &Scene| {
        let (mut claims, mut cancels) = (Vec::new(), 0);
        for action in scene.plan() {
            match action {
                Action::Claim { target, .. } => claims.push(target.uid),
                Action::Status { status, .. } if status.phase == Phase::Cancelled => cancels += 1,
                other => panic!("{other:?}"),
            }
        }
        (claims, cancels)
    };
    let both = vec!["r1".to_owned(), "r2".to_owned()];
    assert_eq!(count(&three(3)), (both.clone(), 0));
    assert_eq!(count(&three(2)), (both, 1));
}

#[test]
fn the_end_of_the_sources_pod_leaves_its_node_time_for_a_last_word() {
    let mut scene = Scene::evicted()
        .with(replacement())
        .and(migration(target()));
    scene.pods.remove(0);
    let status = scene.next();
    assert_eq!(status.phase, Phase::Matched);
    scene.migrations[0] = Arc::new(migration(serde_json::to_value(status).unwrap()));
    scene.now += SignedDuration::from_secs(60);
    assert_eq!(scene.next().phase, Phase::Failed);
}

/// Its source's pod is gone, and its state waits on node a.
fn parked() -> Migration {
    let mut parked = migration(transfer(json!({"name": "cache", "phase": "Parked"})));
    let status = parked.status.as_mut().unwrap();
    status.phase = Phase::Pending;
    status.target_pod = None;
    status.transfer.as_mut().unwrap().target_uid = None;
    parked
}

#[test]
fn what_is_parked_waits_for_its_target_as_long_as_its_node_keeps_it() {
    let mut scene = Scene::evicted().and(parked());
    scene.pods.remove(0);
    scene.now += SignedDuration::from_hours(20);
    let status = scene.next();
    assert_eq!(status.phase, Phase::Pending);
    assert!(status.message.as_ref().unwrap().contains("waits on node a"));
    let mut removed = serde_json::to_value(&status).unwrap();
    removed["transfer"]["containers"][0] = json!({"name": "cache", "phase": "Finished",
        "result": "Failed", "reason": "it was removed"});
    scene.migrations[0] = Arc::new(migration(removed));
    assert_eq!(scene.next().phase, Phase::Failed);
}

#[test]
fn what_is_parked_is_claimed_by_the_pod_that_comes_and_by_the_next_if_that_goes() {
    let mut scene = Scene::evicted().and(parked()).with(replacement());
    scene.pods.remove(0);
    let actions = scene.plan();
    let [Action::Claim { target, status, .. }] = &actions[..] else {
        panic!("{actions:?}");
    };
    assert_eq!(target.uid, "r");
    scene.migrations[0] = Arc::new(migration(serde_json::to_value(status).unwrap()));
    assert_eq!(scene.next().phase, Phase::Transferring);
    // An attempt began to bring it there.
    let mut begun = serde_json::to_value(status).unwrap();
    begun["transfer"]["targetUid"] = json!("r");
    scene.migrations[0] = Arc::new(migration(begun));
    scene.pods.clear();
    scene.now += SignedDuration::from_mins(5);
    let actions = scene.plan();
    let [Action::Release { status, .. }] = &actions[..] else {
        panic!("{actions:?}");
    };
    assert_eq!(status.phase, Phase::Pending);
}

#[test]
fn what_is_parked_is_called_off_when_nobody_wants_it() {
    let mut scene = Scene::evicted().and(parked());
    scene.pods.remove(0);
    scene.owners.insert("rs".to_owned(), replica_set(0, "1"));
    assert_eq!(scene.next().phase, Phase::Cancelled);
    scene.owners.insert("rs".to_owned(), OwnerState::Gone);
    assert_eq!(scene.next().phase, Phase::Cancelled);
}

#[test]
fn a_target_that_runs_without_the_state_that_waits_does_not_get_it_later() {
    let started = json!({"status": {"phase": "Running", "containerStatuses": [
        {"name": "cache", "ready": true, "restartCount": 0, "image": "", "imageID": "",
            "state": {"running": {}}}]}});
    let mut waits = parked();
    waits.status.as_mut().unwrap().target_pod = Some(PodRef {
        name: "r".into(),
        uid: "r".into(),
        node: Some("b".into()),
    });
    let mut scene = Scene::evicted().and(waits).with(pod("r", NOW, started));
    scene.pods.remove(0);
    let status = scene.next();
    assert_eq!(status.phase, Phase::Transferring);
    scene.migrations[0] = Arc::new(migration(serde_json::to_value(status).unwrap()));
    scene.now += SignedDuration::from_mins(3);
    assert_eq!(scene.next().phase, Phase::Failed);
}

#[test]
fn deleting_a_migration_calls_it_off_and_then_lets_it_go() {
    let deleted = |change| {
        let mut one = migration(change);
        one.metadata.deletion_timestamp = Some(
            k8s_openapi::apimachinery::pkg::apis::meta::v1::Time(NOW.parse().unwrap()),
        );
        Scene::evicted().with(replacement()).and(one)
    };
    assert_eq!(deleted(target()).next().phase, Phase::Cancelled);
    let mut cancelled = target();
    cancelled["phase"] = json!("Cancelled");
    let actions = deleted(cancelled).plan();
    assert!(
        matches!(&actions[0], Action::MarkCancelled { pod } if pod.uid == "s"),
        "{actions:?}"
    );
    assert!(matches!(&actions[1], Action::LetGo { .. }), "{actions:?}");
    // What is committed goes on.
    let committed = deleted(transfer(json!({"name": "cache", "phase": "Committed"})));
    assert_eq!(committed.next().phase, Phase::Committed);
}

#[test]
fn a_success_that_was_not_known_when_it_was_called_off_counts() {
    let mut late = transfer(json!({"name": "cache", "phase": "Finished", "result": "Succeeded"}));
    late["phase"] = json!("Cancelled");
    let status = Scene::evicted()
        .with(replacement())
        .and(migration(late))
        .next();
    assert_eq!(status.phase, Phase::Succeeded);
}

#[test]
fn a_pod_that_is_asked_to_move_is_evicted_and_has_no_target_before() {
    let actions = Scene::new()
        .and(request(json!({"podName": "cart-s"})))
        .plan();
    assert!(
        matches!(&actions[0], Action::Evict { pod } if pod.uid == "s"),
        "{actions:?}"
    );
    assert!(matches!(&actions[1], Action::Status { .. }), "{actions:?}");
    assert_eq!(actions.len(), 2);
}

#[test]
fn a_request_that_cannot_be_met_is_refused_with_the_reason() {
    for (spec, why) in [
        (json!({"podName": "nobody"}), "no pod nobody"),
        (
            json!({"podName": "cart-s", "podUid": "other"}),
            "no pod cart-s",
        ),
        (
            json!({"podName": "cart-s", "targetNode": "a"}),
            "on node a already",
        ),
        (
            json!({"podName": "cart-s", "targetNode": "c"}),
            "does not work on node c",
        ),
    ] {
        let mut scene = Scene::new().and(request(spec.clone()));
        scene.nodes.insert("c".to_owned(), false);
        let status = scene.next();
        assert_eq!(status.phase, Phase::Failed, "{spec}");
        let message = status.message.unwrap();
        assert!(message.contains(why), "{spec}: {message}");
    }
}

#[test]
fn a_pod_that_moves_already_is_not_moved_twice() {
    let scene = Scene::evicted()
        .and(migration(json!({})))
        .and(request(json!({"podName": "cart-s"})));
    let refused = scene.plan().into_iter().find_map(|action| match action {
        Action::Status { status, .. } if status.phase == Phase::Failed => status.message,
        _ => None,
    });
    assert!(refused.unwrap().contains("cart-s-s moves it already"));
}

#[test]
fn a_pod_is_told_whether_it_can_be_moved() {
    let told = |change: Value| {
        let mut scene = Scene::new();
        scene.pods[0] = Arc::new(pod("s", BEFORE, change));
        scene.all().into_iter().find_map(|action| match action {
            Action::Condition { holds, reason, .. } => Some((holds, reason)),
            _ => None,
        })
    };
    assert_eq!(told(json!({})), Some((true, "Ready")));
    for (change, reason) in [
        (
            json!({"spec": {"runtimeClassName": "gvisor"}}),
            "OtherRuntimeClass",
        ),
        (json!({"spec": {"hostNetwork": true}}), "HostNetwork"),
        (json!({"spec": {"hostPID": true}}), "HostNamespace"),
        (
            json!({"metadata": {"ownerReferences": []}}),
            "NoReplacement",
        ),
        (
            json!({"metadata": {"annotations": {"sterna.dev/managed-containers": "cache"}}}),
            "InvalidAnnotation",
        ),
    ] {
        assert_eq!(told(change.clone()), Some((false, reason)), "{change}");
    }
}

#[test]
fn a_running_managed_container_has_its_labels_and_a_stopped_one_none() {
    let container = |state: Value| {
        json!({"status": {"containerStatuses": [{"name": "cache",
        "ready": true, "restartCount": 0, "image": "", "imageID": "", "state": state}]}})
    };
    let labels = |pod: Pod| {
        let mut scene = Scene::new();
        scene.pods[0] = Arc::new(pod);
        scene.all().into_iter().find_map(|action| match action {
            Action::Label { labels, .. } => Some(labels),
            _ => None,
        })
    };
    let set = labels(pod("s", BEFORE, container(json!({"running": {}})))).unwrap();
    let running = Some("RUNNING".to_owned());
    assert_eq!(set.get("status.sterna.dev/cache"), Some(&running));
    assert_eq!(
        set.get("status.architect.loopholelabs.io/cache"),
        Some(&running)
    );
    let mut stopped = container(json!({"waiting": {}}));
    stopped["metadata"] = json!({"labels": {"status.sterna.dev/cache": "RUNNING"}});
    let removed = labels(pod("s", BEFORE, stopped)).unwrap();
    assert_eq!(removed.get("status.sterna.dev/cache"), Some(&None));
}

#[test]
fn a_pod_that_started_from_nothing_instead_says_so() {
    let change = json!({
        "metadata": {"annotations": {"sterna.dev/on-restore-failure": "cold-start",
            "sterna.dev/migration": "cart-s-s"}},
        "status": {"containerStatuses": [{"name": "cache", "ready": true, "restartCount": 0,
            "image": "", "imageID": "", "state": {"running": {}}}]},
    });
    let mut failed = target();
    failed["phase"] = json!("Failed");
    let scene = Scene::evicted()
        .with(pod("r", NOW, change))
        .and(migration(failed));
    let event = scene.all().into_iter().find_map(|action| match action {
        Action::Event {
            reason, warning, ..
        } => Some((reason, warning)),
        _ => None,
    });
    assert_eq!(event, Some((COLD_START, true)));
}

#[test]
fn a_migration_says_whether_the_pod_is_replaced_only_once_it_is_gone() {
    let fresh = || {
        let mut fresh = migration(json!({}));
        fresh.status = None;
        fresh
    };
    let job = |policy| {
        let job = json!({"spec": {"podReplacementPolicy": policy, "template": {}}});
        OwnerState::Job(serde_json::from_value(job).unwrap())
    };
    for (owner, late) in [
        (replica_set(1, "1"), Some(false)),
        (job("Failed"), Some(true)),
        (job("TerminatingOrFailed"), Some(false)),
    ] {
        let mut scene = Scene::evicted().and(fresh());
        scene.owners.insert("rs".to_owned(), owner);
        assert_eq!(scene.next().replaced_late, late);
    }
    let mut scene = Scene::evicted().and(fresh());
    scene.owners.clear();
    assert_eq!(scene.next().replaced_late, None);
}

#[test]
fn a_pod_that_came_too_late_for_a_state_that_is_lost_says_so_once() {
    let lost = migration(json!({"phase": "Failed", "message": "its pod ended",
        "finishedAt": BEFORE, "specHash": "x", "targetPod": null}));
    let started = json!({"status": {"phase": "Running", "containerStatuses": [
        {"name": "cache", "ready": true, "restartCount": 0, "image": "", "imageID": "",
            "state": {"running": {}}}]}});
    let mut scene = Scene::new().and(lost).with(pod("r", NOW, started));
    let said = |scene: &Scene| {
        let all = scene.all();
        let cold = |action: &&Action| matches!(action, Action::Event { reason, .. } if *reason == COLD_START);
        all.iter().filter(cold).count()
    };
    assert_eq!(said(&scene), 0, "an hour later it is another matter");
    let created = "2026-01-01T00:05:00Z";
    let started = serde_json::to_value(&*scene.pods.pop().unwrap()).unwrap();
    scene = scene.with(pod(
        "r",
        created,
        json!({"status": started["status"].clone()}),
    ));
    assert_eq!(said(&scene), 1);
}
