//! `migrate` and `cancel`: one pod.

use anyhow::{Context as _, ensure};
use clap::Args;
use kube::api::{DeleteParams, ObjectMeta, PostParams};
use sterna_kube::{Migration, MigrationSpec, Phase, Trigger};

use crate::cluster::{Cluster, timed};
use crate::follow::follow;

/// What `migrate` can be told.
#[derive(Debug, Args)]
pub(crate) struct Arguments {
    /// The pod.
    pod: String,
    /// The node it would rather go to; where it goes is the scheduler's word.
    #[arg(long, value_name = "NODE")]
    to: Option<String>,
    /// Give up after so many seconds.
    #[arg(long, value_name = "SECONDS")]
    deadline: Option<u32>,
    /// Switch over when the pause is expected to be shorter.
    #[arg(long, value_name = "MILLISECONDS")]
    max_blackout: Option<u32>,
    /// Do not wait for its end.
    #[arg(long)]
    no_wait: bool,
}

pub(crate) async fn run(cluster: &Cluster, arguments: &Arguments) -> anyhow::Result<bool> {
    let spec = MigrationSpec {
        pod_name: arguments.pod.clone(),
        pod_uid: None,
        target_node: arguments.to.clone(),
        deadline_seconds: arguments.deadline,
        max_blackout_milliseconds: arguments.max_blackout,
        trigger: Trigger::Request,
    };
    let name = create(cluster, spec).await?;
    if arguments.no_wait {
        println!("migration/{name} created");
        return Ok(true);
    }
    follow(cluster, &name).await
}

/// Makes a Migration and returns its name.
pub(crate) async fn create(cluster: &Cluster, spec: MigrationSpec) -> anyhow::Result<String> {
    let prefix: String = spec.pod_name.chars().take(240).collect();
    let mut migration = Migration::new("", spec);
    migration.metadata = ObjectMeta {
        generate_name: Some(format!("{prefix}-")),
        ..ObjectMeta::default()
    };
    let migrations = cluster.migrations();
    let made = timed(migrations.create(&PostParams::default(), &migration)).await;
    let made = made.context("make a Migration")?;
    Ok(made.metadata.name.unwrap_or_default())
}

pub(crate) async fn cancel(cluster: &Cluster, name: &str) -> anyhow::Result<bool> {
    let migrations = cluster.migrations();
    let migration = timed(migrations.get(name)).await?;
    let phase = migration
        .status
        .map(|status| status.phase)
        .unwrap_or_default();
    ensure!(!phase.is_final(), "migration {name} is over: {phase:?}");
    ensure!(
        phase != Phase::Committed,
        "migration {name} is past its commit: only its replacement may run"
    );
    timed(migrations.delete(name, &DeleteParams::default())).await?;
    println!("migration/{name} is called off");
    Ok(true)
}
