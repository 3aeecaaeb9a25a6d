//! Does what was planned.

use std::sync::Arc;
use std::time::Duration;

use k8s_openapi::api::core::v1::{ObjectReference, Pod};
use kube::api::{
    Api, DeleteParams, EvictParams, ObjectMeta, Patch, PatchParams, PostParams, Preconditions,
};
use kube::runtime::events::{Event, EventType, Recorder, Reporter};
use kube::{Client, Resource as _};
use serde_json::{Value, json};
use sterna_kube::annotations::{CANCELLED, MIGRATION};
use sterna_kube::{
    CONTROLLER, Migration, MigrationSpec, MigrationStatus, Phase, PodRef, Trigger, leaving,
};

use crate::metrics::Metrics;
use crate::plan::{Action, COLD_START, FINALIZER};

/// For one request.
const TIMEOUT: Duration = Duration::from_secs(10);

/// How an action went.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Done {
    Yes,
    /// What it was decided on was old.
    Old,
    /// It could not be done.
    No,
}

pub(crate) struct Actor {
    namespace: String,
    pods: Api<Pod>,
    migrations: Api<Migration>,
    recorder: Recorder,
    metrics: Arc<Metrics>,
}

impl Actor {
    pub(crate) fn new(client: Client, namespace: &str, metrics: Arc<Metrics>) -> Self {
        let reporter = Reporter {
            controller: CONTROLLER.to_owned(),
            instance: None,
        };
        Self {
            namespace: namespace.to_owned(),
            pods: Api::namespaced(client.clone(), namespace),
            migrations: Api::namespaced(client.clone(), namespace),
            recorder: Recorder::new(client, reporter),
            metrics,
        }
    }

    pub(crate) async fn act(&self, action: &Action, migrations: &[Arc<Migration>]) -> Done {
        let acted = tokio::time::timeout(TIMEOUT, self.try_act(action, migrations)).await;
        match acted {
            Ok(Ok(done)) => done,
            Ok(Err(kube::Error::Api(status))) if status.code == 409 || status.code == 404 => {
                tracing::debug!(
                    namespace = self.namespace,
                    ?action,
                    reason = status.message,
                    "old"
                );
                Done::Old
            }
            Ok(Err(error)) => {
                tracing::warn!(namespace = self.namespace, ?action, %error, "could not be done");
                self.metrics.error("action");
                Done::No
            }
            Err(_) => {
                tracing::warn!(namespace = self.namespace, ?action, "no answer in time");
                self.metrics.error("timeout");
                Done::No
            }
        }
    }

    async fn try_act(
        &self,
        action: &Action,
        migrations: &[Arc<Migration>],
    ) -> Result<Done, kube::Error> {
        match action {
            Action::Create { name, pod, trigger } => self.create(name, pod, *trigger).await,
            Action::Status {
                migration,
                version,
                was,
                trigger,
                status,
            } => {
                self.status(migration, version.as_deref(), status).await?;
                if *was != Some(status.phase) {
                    self.changed(migration, *trigger, status, migrations).await;
                }
                Ok(Done::Yes)
            }
            Action::Claim {
                migration,
                version,
                target,
                status,
            } => {
                if !self.claim(migration, target).await? {
                    return Ok(Done::Old);
                }
                self.status(migration, version.as_deref(), status).await?;
                tracing::info!(
                    namespace = self.namespace,
                    migration,
                    target = target.name,
                    "matched"
                );
                Ok(Done::Yes)
            }
            Action::Release {
                migration,
                version,
                target,
                status,
            } => {
                let pod = self.pods.get_opt(&target.name).await?;
                let is_there = pod.is_some_and(|pod| {
                    pod.metadata.uid.as_ref() == Some(&target.uid) && !leaving::is_ending(&pod)
                });
                if is_there {
                    return Ok(Done::Old);
                }
                self.status(migration, version.as_deref(), status).await?;
                Ok(Done::Yes)
            }
            Action::Evict { pod } => self.evict(pod).await,
            Action::MarkCancelled { pod } => {
                let patch =
                    json!({"metadata": {"uid": pod.uid, "annotations": {CANCELLED: "true"}}});
                self.merge_pod(pod, patch).await
            }
            Action::Hold { migration } => self.finalizer(migration, true, migrations).await,
            Action::LetGo { migration } => self.finalizer(migration, false, migrations).await,
            Action::Forget { migration } => {
                self.migrations
                    .delete(migration, &DeleteParams::default())
                    .await?;
                Ok(Done::Yes)
            }
            Action::Label { pod, labels } => {
                let patch = json!({"metadata": {"uid": pod.uid, "labels": labels}});
                self.merge_pod(pod, patch).await
            }
            Action::Condition {
                pod,
                condition,
                holds,
                reason,
                message,
            } => {
                self.condition(pod, condition, *holds, reason, message)
                    .await
            }
            Action::Event {
                pod,
                warning,
                reason,
                note,
            } => {
                if *reason == COLD_START {
                    self.metrics.cold_start();
                }
                self.tell(&self.pod_reference(pod), *warning, reason, note)
                    .await;
                Ok(Done::Yes)
            }
        }
    }

    async fn create(
        &self,
        name: &str,
        pod: &PodRef,
        trigger: Trigger,
    ) -> Result<Done, kube::Error> {
        let spec = MigrationSpec {
            pod_name: pod.name.clone(),
            pod_uid: Some(pod.uid.clone()),
            target_node: None,
            deadline_seconds: None,
            max_blackout_milliseconds: None,
            trigger,
        };
        let mut migration = Migration::new(name, spec);
        migration.metadata = ObjectMeta {
            name: Some(name.to_owned()),
            finalizers: Some(vec![FINALIZER.to_owned()]),
            ..ObjectMeta::default()
        };
        let params = PostParams {
            field_manager: Some(CONTROLLER.to_owned()),
            ..PostParams::default()
        };
        self.migrations.create(&params, &migration).await?;
        tracing::info!(
            namespace = self.namespace,
            migration = name,
            ?trigger,
            "pod leaves"
        );
        Ok(Done::Yes)
    }

    /// Writes our part of a status, if `version` is still the newest.
    async fn status(
        &self,
        name: &str,
        version: Option<&str>,
        status: &MigrationStatus,
    ) -> Result<(), kube::Error> {
        let status = MigrationStatus {
            transfer: None, // the agent's
            ..status.clone()
        };
        let apply = json!({
            "apiVersion": Migration::api_version(&()),
            "kind": Migration::kind(&()),
            "metadata": {"name": name, "resourceVersion": version},
            "status": status,
        });
        let params = PatchParams::apply(CONTROLLER).force();
        self.migrations
            .patch_status(name, &params, &Patch::Apply(apply))
            .await?;
        Ok(())
    }

    /// Marks a pod as the one that this Migration claims, unless another has it.
    ///
    /// The mark is what makes the claim exclusive: it is set against the version of
    /// the pod on which it was seen to be free.
    async fn claim(&self, migration: &str, target: &PodRef) -> Result<bool, kube::Error> {
        loop {
            let pod = self.pods.get(&target.name).await?;
            let mark = pod
                .metadata
                .annotations
                .as_ref()
                .and_then(|all| all.get(MIGRATION));
            let is_free = mark.is_none_or(|name| name == migration);
            if pod.metadata.uid.as_ref() != Some(&target.uid) || !is_free {
                return Ok(false);
            }
            if mark.is_some() {
                return Ok(true);
            }
            let patch = json!({"metadata": {
                "resourceVersion": pod.metadata.resource_version,
                "annotations": {MIGRATION: migration},
            }});
            match self
                .pods
                .patch(&target.name, &PatchParams::default(), &Patch::Merge(patch))
                .await
            {
                Ok(_) => return Ok(true),
                // A new pod changes often while it is scheduled and set up; the caller
                // has a time limit.
                Err(kube::Error::Api(status)) if status.code == 409 => (),
                Err(error) => return Err(error),
            }
        }
    }

    async fn evict(&self, pod: &PodRef) -> Result<Done, kube::Error> {
        let params = EvictParams {
            delete_options: Some(DeleteParams {
                preconditions: Some(Preconditions {
                    uid: Some(pod.uid.clone()),
                    resource_version: None,
                }),
                ..DeleteParams::default()
            }),
            ..EvictParams::default()
        };
        match self.pods.evict(&pod.name, &params).await {
            Ok(_) => Ok(Done::Yes),
            // A disruption budget; it is tried again.
            Err(kube::Error::Api(status)) if status.code == 429 => {
                let note = format!("cannot be evicted yet: {}", status.message);
                self.tell(&self.pod_reference(pod), true, "EvictionRefused", &note)
                    .await;
                Ok(Done::No)
            }
            Err(error) => Err(error),
        }
    }

    async fn merge_pod(&self, pod: &PodRef, patch: Value) -> Result<Done, kube::Error> {
        self.pods
            .patch(&pod.name, &PatchParams::default(), &Patch::Merge(patch))
            .await?;
        Ok(Done::Yes)
    }

    /// Sets or removes ours, and leaves those of others.
    async fn finalizer(
        &self,
        migration: &str,
        set: bool,
        migrations: &[Arc<Migration>],
    ) -> Result<Done, kube::Error> {
        let object = migrations
            .iter()
            .find(|one| one.metadata.name.as_deref() == Some(migration));
        let Some(object) = object else {
            return Ok(Done::Old);
        };
        let mut finalizers = object.metadata.finalizers.clone().unwrap_or_default();
        finalizers.retain(|one| one != FINALIZER);
        if set {
            finalizers.push(FINALIZER.to_owned());
        }
        let patch = json!({"metadata": {
            "resourceVersion": object.metadata.resource_version,
            "finalizers": finalizers,
        }});
        self.migrations
            .patch(migration, &PatchParams::default(), &Patch::Merge(patch))
            .await?;
        Ok(Done::Yes)
    }

    async fn condition(
        &self,
        pod: &PodRef,
        condition: &str,
        holds: bool,
        reason: &str,
        message: &str,
    ) -> Result<Done, kube::Error> {
        // A strategic merge: conditions are merged by type, the kubelet's stay.
        let patch = json!({
            "metadata": {"uid": pod.uid},
            "status": {"conditions": [{
                "type": condition,
                "status": if holds { "True" } else { "False" },
                "reason": reason,
                "message": message,
                "lastTransitionTime": jiff::Timestamp::now().strftime("%Y-%m-%dT%H:%M:%SZ").to_string(),
            }]},
        });
        self.pods
            .patch_status(&pod.name, &PatchParams::default(), &Patch::Strategic(patch))
            .await?;
        Ok(Done::Yes)
    }

    /// A Migration's phase changed: an Event on its source, on itself, and metrics.
    async fn changed(
        &self,
        name: &str,
        trigger: Trigger,
        status: &MigrationStatus,
        migrations: &[Arc<Migration>],
    ) {
        let message = status.message.as_deref().unwrap_or_default();
        tracing::info!(namespace = self.namespace, migration = name, phase = ?status.phase, message, "migration");
        let (warning, reason) = match status.phase {
            Phase::Pending | Phase::Matched | Phase::Committed => return,
            Phase::Transferring => (false, "MigrationStarted"),
            Phase::Succeeded => (false, "MigrationSucceeded"),
            Phase::Failed => (true, "MigrationFailed"),
            Phase::Cancelled => (true, "MigrationCancelled"),
        };
        if status.phase.is_final() {
            self.metrics.over(trigger, status);
        }
        let target = status.target_pod.as_ref();
        let to = target.map(|target| {
            let node = target.node.as_deref().unwrap_or("no node yet");
            format!("to pod {} on {node}", target.name)
        });
        let note = [
            Some(format!("migration {name}")),
            to,
            Some(message.to_owned()),
        ];
        let note = note
            .into_iter()
            .flatten()
            .filter(|part| !part.is_empty())
            .collect::<Vec<_>>()
            .join(", ");
        let object = migrations
            .iter()
            .find(|one| one.metadata.name.as_deref() == Some(name));
        if let Some(object) = object {
            self.tell(&object.object_ref(&()), warning, reason, &note)
                .await;
        }
        if let Some(source) = &status.source_pod {
            self.tell(&self.pod_reference(source), warning, reason, &note)
                .await;
        }
    }

    fn pod_reference(&self, pod: &PodRef) -> ObjectReference {
        ObjectReference {
            api_version: Some("v1".to_owned()),
            kind: Some("Pod".to_owned()),
            name: Some(pod.name.clone()),
            namespace: Some(self.namespace.clone()),
            uid: Some(pod.uid.clone()),
            ..ObjectReference::default()
        }
    }

    /// An Event. It is told once; what it tells of stands in an object too.
    async fn tell(&self, about: &ObjectReference, warning: bool, reason: &str, note: &str) {
        let event = Event {
            type_: if warning {
                EventType::Warning
            } else {
                EventType::Normal
            },
            reason: reason.to_owned(),
            // At most 1 kB, in the API.
            note: Some(note.chars().take(1000).collect()),
            action: "Migrate".to_owned(),
            secondary: None,
        };
        if let Err(error) = self.recorder.publish(&event, about).await {
            tracing::warn!(namespace = self.namespace, reason, %error, "tell an Event");
            self.metrics.error("event");
        }
    }
}
