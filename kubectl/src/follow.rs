//! Watches Migrations until they are over.

use std::time::Duration;

use sterna_kube::{Migration, MigrationStatus, Phase};

use crate::cluster::{Cluster, timed};
use crate::list::longest;

const LOOK_PAUSE: Duration = Duration::from_millis(300);

/// Follows one to its end and says on a line what changes; whether it succeeded.
pub(crate) async fn follow(cluster: &Cluster, name: &str) -> anyhow::Result<bool> {
    let mut said = String::new();
    loop {
        let Some(migration) = timed(cluster.migrations().get_opt(name)).await? else {
            println!("{name}: deleted");
            return Ok(false);
        };
        let status = migration.status.clone().unwrap_or_default();
        let line = line(&migration, &status);
        if line != said {
            println!("{line}");
            said = line;
        }
        if status.phase.is_final() {
            return Ok(status.phase == Phase::Succeeded);
        }
        tokio::time::sleep(LOOK_PAUSE).await;
    }
}

fn line(migration: &Migration, status: &MigrationStatus) -> String {
    let to = status.target_pod.as_ref().map(|target| {
        let node = target.node.as_deref().unwrap_or("no node yet");
        format!(" -> {} on {node}", target.name)
    });
    let to = to.unwrap_or_default();
    let why = match status.phase {
        Phase::Succeeded => format!(
            "freeze {}, blackout {}",
            longest(status, |container| container.freeze_milliseconds),
            longest(status, |container| container.blackout_milliseconds)
        ),
        _ => status.message.clone().unwrap_or_default(),
    };
    let why = match why.is_empty() {
        true => why,
        false => format!(": {why}"),
    };
    let pod = &migration.spec.pod_name;
    format!("{pod}{to}: {:?}{why}", status.phase)
}
