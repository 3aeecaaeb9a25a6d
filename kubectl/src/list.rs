//! `list`: Migrations on a line each.

use clap::Args;
use jiff::Timestamp;
use kube::Api;
use kube::api::ListParams;
use sterna_kube::{Migration, MigrationStatus};

use crate::cluster::{self, Cluster};
use crate::table;

/// What `list` can be told.
#[derive(Debug, Args)]
pub(crate) struct Arguments {
    /// In all namespaces.
    #[arg(short = 'A', long)]
    all_namespaces: bool,
}

pub(crate) async fn run(cluster: &Cluster, arguments: &Arguments) -> anyhow::Result<()> {
    let migrations = match arguments.all_namespaces {
        true => Api::all(cluster.client.clone()),
        false => cluster.migrations(),
    };
    let mut all = cluster::list(&migrations, &ListParams::default()).await?;
    if all.is_empty() {
        eprintln!("no Migrations");
        return Ok(());
    }
    all.sort_by_key(|migration| migration.metadata.creation_timestamp.clone().map(|at| at.0));
    let rows: Vec<Vec<String>> = all.iter().map(row).collect();
    let titles = [
        "NAMESPACE",
        "NAME",
        "POD",
        "FROM",
        "TO",
        "PHASE",
        "FREEZE",
        "BLACKOUT",
        "SENT",
        "AGE",
    ];
    table::print(&titles, &rows);
    Ok(())
}

fn row(migration: &Migration) -> Vec<String> {
    let metadata = &migration.metadata;
    let default = MigrationStatus::default();
    let status = migration.status.as_ref().unwrap_or(&default);
    let node = |pod: &Option<sterna_kube::PodRef>| {
        let node = pod.as_ref().and_then(|pod| pod.node.clone());
        node.unwrap_or_else(|| "-".to_owned())
    };
    let age = metadata.creation_timestamp.as_ref().map(|created| {
        let age = Timestamp::now().duration_since(created.0);
        whole(age.as_secs())
    });
    vec![
        metadata.namespace.clone().unwrap_or_default(),
        metadata.name.clone().unwrap_or_default(),
        migration.spec.pod_name.clone(),
        node(&status.source_pod),
        node(&status.target_pod),
        format!("{:?}", status.phase),
        longest(status, |container| container.freeze_milliseconds),
        longest(status, |container| container.blackout_milliseconds),
        sent(status).map_or_else(|| "-".to_owned(), bytes),
        age.unwrap_or_default(),
    ]
}

/// Of all its containers.
pub(crate) fn longest(
    status: &MigrationStatus,
    time: fn(&sterna_kube::ContainerTransfer) -> Option<u64>,
) -> String {
    let containers = status
        .transfer
        .iter()
        .flat_map(|transfer| &transfer.containers);
    match containers.filter_map(time).max() {
        Some(milliseconds) => format!("{milliseconds} ms"),
        None => "-".to_owned(),
    }
}

fn sent(status: &MigrationStatus) -> Option<u64> {
    let containers = status
        .transfer
        .iter()
        .flat_map(|transfer| &transfer.containers);
    containers
        .filter_map(|container| container.sent_bytes)
        .reduce(|a, b| a + b)
}

/// A number of bytes as people say it.
pub(crate) fn bytes(count: u64) -> String {
    const UNITS: [&str; 4] = ["KiB", "MiB", "GiB", "TiB"];
    let mut whole = count;
    let mut unit = "B";
    let mut tenths = 0;
    for next in UNITS {
        if whole < 1024 {
            break;
        }
        tenths = whole % 1024 * 10 / 1024;
        whole /= 1024;
        unit = next;
    }
    match whole < 10 && unit != "B" {
        true => format!("{whole}.{tenths} {unit}"),
        false => format!("{whole} {unit}"),
    }
}

/// A time as kubectl says it.
fn whole(seconds: i64) -> String {
    match seconds {
        ..120 => format!("{seconds}s"),
        120..7200 => format!("{}m", seconds / 60),
        7200..172_800 => format!("{}h", seconds / 3600),
        _ => format!("{}d", seconds / 86400),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_and_times_are_short() {
        for (count, text) in [
            (0, "0 B"),
            (1023, "1023 B"),
            (1536, "1.5 KiB"),
            (300 << 20, "300 MiB"),
        ] {
            assert_eq!(bytes(count), text);
        }
        assert_eq!((whole(90).as_str(), whole(7199).as_str()), ("90s", "119m"));
    }
}
