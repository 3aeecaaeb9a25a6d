//! What a node's agent may conclude for a container that its kubelet creates.

use k8s_openapi::api::core::v1::Pod;

use crate::annotations::MIGRATION;
use crate::claim::has_started;
use crate::owner::{controller, identity};
use crate::{Migration, Owner, Phase, PodSettings, leaving};

/// What is known about the state of a pod that has not started.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Verdict {
    /// It is claimed: its state comes by this Migration.
    Comes {
        /// The Migration's name.
        migration: String,
    },
    /// It is not decided yet: a pod that it may replace is leaving.
    Undecided,
    /// No state comes, and none should.
    Fresh,
    /// State should have come and will not.
    Lost {
        /// Why.
        reason: String,
    },
}

impl Verdict {
    /// Judges `pod` by all `pods` and `migrations` of its namespace that are known.
    ///
    /// What is known may be older than what is decided. That is safe: a state is
    /// sent only to the pod that a Migration names, and to nobody who has started.
    pub fn of<'a>(
        pod: &Pod,
        pods: impl IntoIterator<Item = &'a Pod>,
        migrations: impl IntoIterator<Item = &'a Migration>,
    ) -> Self {
        let migrations: Vec<&Migration> = migrations.into_iter().collect();
        let uid = pod.metadata.uid.as_deref();
        let status = |migration: &'a Migration| migration.status.as_ref();
        let claimed = migrations
            .iter()
            .filter(|migration| {
                let target = status(migration).and_then(|status| status.target_pod.as_ref());
                target.is_some_and(|target| Some(target.uid.as_str()) == uid)
            })
            // One that goes on decides, should there be an older one.
            .min_by_key(|migration| phase(migration).is_final());
        if let Some(migration) = claimed {
            let migration_name = migration.metadata.name.clone().unwrap_or_default();
            return match phase(migration) {
                // A container that ran here once is not restored again.
                Phase::Succeeded | Phase::Cancelled => Self::Fresh,
                Phase::Failed => Self::Lost {
                    reason: status(migration)
                        .and_then(|status| status.message.clone())
                        .unwrap_or_else(|| format!("migration {migration_name} failed")),
                },
                Phase::Pending | Phase::Matched | Phase::Transferring | Phase::Committed => {
                    Self::Comes {
                        migration: migration_name,
                    }
                }
            };
        }

        let owner = controller(pod);
        let Some((owner, kind)) =
            owner.and_then(|owner| Owner::from_kind(&owner.kind).map(|kind| (owner, kind)))
        else {
            return Self::Fresh;
        };
        let managed = match PodSettings::of(pod) {
            Ok(Some(settings)) => settings.managed,
            Ok(None) | Err(_) => return Self::Fresh,
        };
        if has_started(pod, &managed) {
            return Self::Fresh;
        }
        let bears_a_name = pod
            .metadata
            .annotations
            .as_ref()
            .and_then(|all| all.get(MIGRATION))
            .is_some_and(|name| {
                // Not known yet, or not yet told of its target.
                let known = migrations
                    .iter()
                    .find(|migration| migration.metadata.name.as_ref() == Some(name));
                known.is_none_or(|migration| !phase(migration).is_final())
            });
        if bears_a_name {
            return Self::Undecided;
        }

        let who = identity(pod, kind);
        let waits = migrations.iter().any(|migration| {
            status(migration).is_some_and(|status| {
                !status.phase.is_final()
                    && status.target_pod.is_none()
                    && status.owner.as_ref().is_some_and(|of| of.uid == owner.uid)
                    && status.identity.as_ref() == Some(&who)
            })
        });
        let leaves = !undecided(pod, pods, migrations.iter().copied()).is_empty();
        if waits || leaves {
            Self::Undecided
        } else {
            Self::Fresh
        }
    }
}

/// Those of `pods` that leave, that `pod` may replace, and of whose state nobody has
/// said yet who takes it. One of them that ends like this has lost its state.
pub fn undecided<'a>(
    pod: &Pod,
    pods: impl IntoIterator<Item = &'a Pod>,
    migrations: impl IntoIterator<Item = &'a Migration>,
) -> Vec<&'a Pod> {
    let owner = controller(pod);
    let Some((owner, kind)) =
        owner.and_then(|owner| Owner::from_kind(&owner.kind).map(|kind| (owner, kind)))
    else {
        return Vec::new();
    };
    let migrations: Vec<&Migration> = migrations.into_iter().collect();
    let who = identity(pod, kind);
    pods.into_iter()
        .filter(|other| {
            leaving::cause(other).is_some()
                && other.metadata.uid != pod.metadata.uid
                && controller(other).is_some_and(|of| of.uid == owner.uid)
                && identity(other, kind) == who
                && !decided(other, &migrations)
        })
        .collect()
}

/// Whether it is settled who takes a leaving pod's state, or that nobody does.
fn decided(pod: &Pod, migrations: &[&Migration]) -> bool {
    migrations.iter().any(|migration| {
        migration.status.as_ref().is_some_and(|status| {
            let source = status.source_pod.as_ref();
            source.is_some_and(|source| Some(&source.uid) == pod.metadata.uid.as_ref())
                && (status.target_pod.is_some() || status.phase.is_final())
        })
    })
}

fn phase(migration: &Migration) -> Phase {
    migration
        .status
        .as_ref()
        .map(|status| status.phase)
        .unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::claim::tests::{NEW, OLD, replica};
    use serde_json::{Value, json};

    fn leaving_pod(uid: &str) -> Pod {
        let change = json!({
            "metadata": {"deletionTimestamp": NEW},
            "status": {"phase": "Running", "conditions": [
                {"type": "DisruptionTarget", "status": "True", "reason": "EvictionByEvictionAPI"}]},
        });
        replica(uid, OLD, change)
    }

    fn migration(source: &str, target: Option<&str>, phase: &str) -> Migration {
        serde_json::from_value(json!({
            "apiVersion": "sterna.dev/v1alpha1", "kind": "Migration",
            "metadata": {"name": format!("m-{source}")},
            "spec": {"podName": source},
            "status": {
                "phase": phase, "message": "the link broke",
                "owner": {"kind": "ReplicaSet", "name": "cart-5d4f", "uid": "rs"},
                "identity": "5d4f",
                "sourcePod": {"name": source, "uid": source, "node": "a"},
                "targetPod": target.map(|uid| json!({"name": uid, "uid": uid})),
            },
        }))
        .unwrap()
    }

    fn judge(change: Value, others: &[Pod], migrations: &[Migration]) -> Verdict {
        Verdict::of(&replica("r", NEW, change), others, migrations)
    }

    #[test]
    fn a_pod_that_replaces_nobody_starts_at_once() {
        assert_eq!(judge(json!({}), &[], &[]), Verdict::Fresh);
        let stays = replica("other", OLD, json!({}));
        assert_eq!(judge(json!({}), &[stays], &[]), Verdict::Fresh);
    }

    #[test]
    fn while_a_pod_it_may_replace_leaves_nothing_is_decided() {
        let leaves = [leaving_pod("s")];
        assert_eq!(judge(json!({}), &leaves, &[]), Verdict::Undecided);
        let pending = migration("s", None, "Pending");
        assert_eq!(
            judge(json!({}), &leaves, std::slice::from_ref(&pending)),
            Verdict::Undecided
        );
        // A StatefulSet's is gone before its replacement is there.
        assert_eq!(judge(json!({}), &[], &[pending]), Verdict::Undecided);
        let claimed = json!({"metadata": {"annotations": {MIGRATION: "m-s"}}});
        assert_eq!(judge(claimed, &[], &[]), Verdict::Undecided);
    }

    #[test]
    fn the_migration_that_names_it_decides() {
        for (phase, is) in [
            (
                "Matched",
                Verdict::Comes {
                    migration: "m-s".to_owned(),
                },
            ),
            (
                "Transferring",
                Verdict::Comes {
                    migration: "m-s".to_owned(),
                },
            ),
            (
                "Committed",
                Verdict::Comes {
                    migration: "m-s".to_owned(),
                },
            ),
            ("Succeeded", Verdict::Fresh),
            ("Cancelled", Verdict::Fresh),
            (
                "Failed",
                Verdict::Lost {
                    reason: "the link broke".to_owned(),
                },
            ),
        ] {
            let migrations = [migration("s", Some("r"), phase)];
            assert_eq!(
                judge(json!({}), &[leaving_pod("s")], &migrations),
                is,
                "{phase}"
            );
        }
    }

    #[test]
    fn one_that_goes_on_decides_over_one_that_is_over() {
        let migrations = [
            migration("s", Some("r"), "Cancelled"),
            migration("t", Some("r"), "Matched"),
        ];
        let comes = Verdict::Comes {
            migration: "m-t".to_owned(),
        };
        assert_eq!(judge(json!({}), &[], &migrations), comes);
    }

    #[test]
    fn a_pod_is_fresh_once_all_who_leave_have_another() {
        let leaves = [leaving_pod("s"), leaving_pod("t")];
        let one = [migration("s", Some("r1"), "Matched")];
        assert_eq!(judge(json!({}), &leaves, &one), Verdict::Undecided);
        let both = [
            migration("s", Some("r1"), "Matched"),
            migration("t", None, "Cancelled"),
        ];
        assert_eq!(judge(json!({}), &leaves, &both), Verdict::Fresh);
    }

    #[test]
    fn a_container_that_ran_here_is_not_restored_again() {
        let ran = json!({"status": {"containerStatuses": [{"name": "cache", "ready": false,
            "restartCount": 1, "image": "", "imageID": "", "state": {"waiting": {}}}]}});
        assert_eq!(judge(ran, &[leaving_pod("s")], &[]), Verdict::Fresh);
    }
}
