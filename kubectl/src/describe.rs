//! `describe`: all about one Migration.

use anyhow::Context as _;
use sterna_kube::{ContainerTransfer, PodRef};

use crate::cluster::{Cluster, timed};
use crate::list::bytes;

pub(crate) async fn run(cluster: &Cluster, name: &str) -> anyhow::Result<()> {
    let migration = timed(cluster.migrations().get(name))
        .await
        .with_context(|| format!("Migration {name} of namespace {}", cluster.namespace))?;
    let spec = &migration.spec;
    let status = migration.status.unwrap_or_default();
    let pod = |pod: &Option<PodRef>| {
        let pod = pod.as_ref()?;
        let node = pod.node.as_deref().unwrap_or("no node yet");
        Some(format!("{} on {node}", pod.name))
    };
    line("Migration", format!("{}/{name}", cluster.namespace));
    line("Trigger", format!("{:?}", spec.trigger));
    line(
        "Pod",
        pod(&status.source_pod).unwrap_or_else(|| spec.pod_name.clone()),
    );
    line(
        "Replacement",
        pod(&status.target_pod).unwrap_or_else(|| "none yet".to_owned()),
    );
    if let Some(owner) = &status.owner {
        line("Owner", format!("{} {}", owner.kind, owner.name));
    }
    line("Phase", format!("{:?}", status.phase));
    if let Some(message) = &status.message {
        line("Message", message);
    }
    for (title, time) in [("Begun", &status.started_at), ("Over", &status.finished_at)] {
        if let Some(time) = time {
            line(title, time.0);
        }
    }
    for container in status
        .transfer
        .iter()
        .flat_map(|transfer| &transfer.containers)
    {
        println!("Container {}", container.name);
        describe(container);
    }
    Ok(())
}

fn describe(container: &ContainerTransfer) {
    let milliseconds = |time: u64| format!("{time} ms");
    let result = container.result.map(|result| format!("{result:?}"));
    let result = result.unwrap_or_else(|| format!("{:?}", container.phase));
    for (title, value) in [
        ("Result", Some(result)),
        ("Reason", container.reason.clone()),
        ("Memory", container.memory_bytes.map(bytes)),
        ("Sent", container.sent_bytes.map(bytes)),
        ("Laps", container.laps.map(|laps| laps.to_string())),
        ("Freeze", container.freeze_milliseconds.map(milliseconds)),
        (
            "Blackout",
            container.blackout_milliseconds.map(milliseconds),
        ),
    ] {
        if let Some(value) = value {
            line(&format!("  {title}"), value);
        }
    }
}

fn line(title: &str, value: impl std::fmt::Display) {
    println!("{title:<14}{value}");
}
