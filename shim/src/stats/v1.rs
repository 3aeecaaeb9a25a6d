//! Statistics of version 1 control groups.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use containerd_shim_protos::cgroups::metrics::{
    BlkIOEntry, BlkIOStat, CPUUsage, HugetlbStat, MemoryEntry, MemoryOomControl, MemoryStat,
    Metrics, PidsStat, RdmaEntry, RdmaStat, Throttle,
};
use protobuf::MessageField;

use super::{device, number, page_sizes, parse_number, table, word};

/// Nanoseconds in a tick of cpuacct.stat: USER_HZ is 100 on every architecture
/// that containers run on.
const NANOSECONDS_PER_TICK: u64 = 10_000_000;

pub(super) fn collect(controllers: &BTreeMap<String, PathBuf>) -> Metrics {
    let mut metrics = Metrics::default();
    let directory = |name: &str| controllers.get(name).map(PathBuf::as_path);
    if let Some(path) = directory("pids") {
        metrics.pids = MessageField::some(pids(path));
    }
    if let Some(path) = directory("cpuacct") {
        metrics.cpu.mut_or_insert_default().usage = MessageField::some(usage(path));
    }
    if let Some(path) = directory("cpu") {
        metrics.cpu.mut_or_insert_default().throttling = MessageField::some(throttling(path));
    }
    if let Some(path) = directory("memory") {
        metrics.memory = MessageField::some(memory(path));
        metrics.memory_oom_control = MessageField::some(oom_control(path));
    }
    if let Some(path) = directory("blkio") {
        metrics.blkio = MessageField::some(blkio(path));
    }
    if let Some(path) = directory("hugetlb") {
        metrics.hugetlb = page_sizes(path, ".usage_in_bytes")
            .into_iter()
            .map(|size| hugetlb(path, size))
            .collect();
    }
    if let Some(path) = directory("rdma") {
        metrics.rdma = MessageField::some(RdmaStat {
            current: rdma(&path.join("rdma.current")),
            limit: rdma(&path.join("rdma.max")),
            ..Default::default()
        });
    }
    metrics
}

fn pids(path: &Path) -> PidsStat {
    PidsStat {
        current: number(&path.join("pids.current")),
        // containerd shows no limit as 0 here.
        limit: match number(&path.join("pids.max")) {
            u64::MAX => 0,
            limit => limit,
        },
        ..Default::default()
    }
}

fn usage(path: &Path) -> CPUUsage {
    let mut usage = CPUUsage {
        total: number(&path.join("cpuacct.usage")),
        per_cpu: fs::read_to_string(path.join("cpuacct.usage_percpu"))
            .unwrap_or_default()
            .split_whitespace()
            .map(parse_number)
            .collect(),
        ..Default::default()
    };
    for (key, ticks) in table(&path.join("cpuacct.stat")) {
        match key.as_str() {
            "user" => usage.user = ticks.saturating_mul(NANOSECONDS_PER_TICK),
            "system" => usage.kernel = ticks.saturating_mul(NANOSECONDS_PER_TICK),
            _ => {}
        }
    }
    usage
}

fn throttling(path: &Path) -> Throttle {
    let mut throttle = Throttle::default();
    for (key, value) in table(&path.join("cpu.stat")) {
        match key.as_str() {
            "nr_periods" => throttle.periods = value,
            "nr_throttled" => throttle.throttled_periods = value,
            "throttled_time" => throttle.throttled_time = value,
            _ => {}
        }
    }
    throttle
}

fn memory(path: &Path) -> MemoryStat {
    let mut stat = MemoryStat {
        usage: memory_entry(path, "memory"),
        swap: memory_entry(path, "memory.memsw"),
        kernel: memory_entry(path, "memory.kmem"),
        kernel_tcp: memory_entry(path, "memory.kmem.tcp"),
        ..Default::default()
    };
    for (key, value) in table(&path.join("memory.stat")) {
        let field = match key.as_str() {
            "cache" => &mut stat.cache,
            "rss" => &mut stat.rss,
            "rss_huge" => &mut stat.rss_huge,
            "mapped_file" => &mut stat.mapped_file,
            "dirty" => &mut stat.dirty,
            "writeback" => &mut stat.writeback,
            "pgpgin" => &mut stat.pg_pg_in,
            "pgpgout" => &mut stat.pg_pg_out,
            "pgfault" => &mut stat.pg_fault,
            "pgmajfault" => &mut stat.pg_maj_fault,
            "inactive_anon" => &mut stat.inactive_anon,
            "active_anon" => &mut stat.active_anon,
            "inactive_file" => &mut stat.inactive_file,
            "active_file" => &mut stat.active_file,
            "unevictable" => &mut stat.unevictable,
            "hierarchical_memory_limit" => &mut stat.hierarchical_memory_limit,
            "hierarchical_memsw_limit" => &mut stat.hierarchical_swap_limit,
            "total_cache" => &mut stat.total_cache,
            "total_rss" => &mut stat.total_rss,
            "total_rss_huge" => &mut stat.total_rss_huge,
            "total_mapped_file" => &mut stat.total_mapped_file,
            "total_dirty" => &mut stat.total_dirty,
            "total_writeback" => &mut stat.total_writeback,
            "total_pgpgin" => &mut stat.total_pg_pg_in,
            "total_pgpgout" => &mut stat.total_pg_pg_out,
            "total_pgfault" => &mut stat.total_pg_fault,
            "total_pgmajfault" => &mut stat.total_pg_maj_fault,
            "total_inactive_anon" => &mut stat.total_inactive_anon,
            "total_active_anon" => &mut stat.total_active_anon,
            "total_inactive_file" => &mut stat.total_inactive_file,
            "total_active_file" => &mut stat.total_active_file,
            "total_unevictable" => &mut stat.total_unevictable,
            _ => continue,
        };
        *field = value;
    }
    stat
}

/// Nothing where the kernel does not account for it.
fn memory_entry(path: &Path, name: &str) -> MessageField<MemoryEntry> {
    let file = |suffix: &str| path.join(format!("{name}.{suffix}"));
    if !file("usage_in_bytes").exists() {
        return MessageField::none();
    }
    MessageField::some(MemoryEntry {
        limit: number(&file("limit_in_bytes")),
        usage: number(&file("usage_in_bytes")),
        max: number(&file("max_usage_in_bytes")),
        failcnt: number(&file("failcnt")),
        ..Default::default()
    })
}

fn oom_control(path: &Path) -> MemoryOomControl {
    let mut control = MemoryOomControl::default();
    for (key, value) in table(&path.join("memory.oom_control")) {
        match key.as_str() {
            "oom_kill_disable" => control.oom_kill_disable = value,
            "under_oom" => control.under_oom = value,
            "oom_kill" => control.oom_kill = value,
            _ => {}
        }
    }
    control
}

fn blkio(path: &Path) -> BlkIOStat {
    let entries = |name: &str| {
        // What BFQ counts is under its name; else the throttling layer counts.
        [format!("blkio.bfq.{name}"), format!("blkio.{name}")]
            .iter()
            .map(|file| fs::read_to_string(path.join(file)).unwrap_or_default())
            .map(|text| blkio_entries(&text))
            .find(|entries| !entries.is_empty())
            .unwrap_or_default()
    };
    let throttled = |name: &str| {
        let text = fs::read_to_string(path.join(format!("blkio.throttle.{name}")));
        blkio_entries(&text.unwrap_or_default())
    };
    let or_throttled = |name: &str| match entries(name) {
        found if found.is_empty() => throttled(name),
        found => found,
    };
    BlkIOStat {
        io_service_bytes_recursive: or_throttled("io_service_bytes_recursive"),
        io_serviced_recursive: or_throttled("io_serviced_recursive"),
        io_queued_recursive: entries("io_queued_recursive"),
        io_service_time_recursive: entries("io_service_time_recursive"),
        io_wait_time_recursive: entries("io_wait_time_recursive"),
        io_merged_recursive: entries("io_merged_recursive"),
        io_time_recursive: entries("time_recursive"),
        sectors_recursive: entries("sectors_recursive"),
        ..Default::default()
    }
}

/// Lines of `8:0 Read 123` or `8:0 123`; the sum at the end has no device.
fn blkio_entries(text: &str) -> Vec<BlkIOEntry> {
    text.lines()
        .filter_map(|line| {
            let words: Vec<&str> = line.split_whitespace().collect();
            let (major, minor) = device(words.first()?)?;
            let (op, value) = match words[1..] {
                [op, value] => (op, value),
                [value] => ("", value),
                _ => return None,
            };
            Some(BlkIOEntry {
                op: op.to_owned(),
                device: device_name(major, minor),
                major,
                minor,
                value: parse_number(value),
                ..Default::default()
            })
        })
        .collect()
}

fn device_name(major: u64, minor: u64) -> String {
    let events = fs::read_to_string(format!("/sys/dev/block/{major}:{minor}/uevent"));
    events
        .unwrap_or_default()
        .lines()
        .find_map(|line| line.strip_prefix("DEVNAME="))
        .map(|name| format!("/dev/{name}"))
        .unwrap_or_default()
}

fn hugetlb(path: &Path, size: String) -> HugetlbStat {
    let file = |suffix: &str| path.join(format!("hugetlb.{size}.{suffix}"));
    HugetlbStat {
        usage: number(&file("usage_in_bytes")),
        max: number(&file("max_usage_in_bytes")),
        failcnt: number(&file("failcnt")),
        pagesize: size,
        ..Default::default()
    }
}

fn rdma(file: &Path) -> Vec<RdmaEntry> {
    let text = fs::read_to_string(file).unwrap_or_default();
    let count = |words, key| {
        word(words, key).map_or(0, |value| {
            u32::try_from(parse_number(value)).unwrap_or(u32::MAX)
        })
    };
    text.lines()
        .filter_map(|line| {
            let (device, words) = line.split_once(' ')?;
            Some(RdmaEntry {
                device: device.to_owned(),
                hca_handles: count(words, "hca_handle"),
                hca_objects: count(words, "hca_object"),
                ..Default::default()
            })
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_controllers_are_read_from_their_files() {
        let dir = tempfile::tempdir().unwrap();
        for (file, text) in [
            ("pids.current", "3\n"),
            ("pids.max", "max\n"),
            ("cpuacct.usage", "100\n"),
            ("cpuacct.usage_percpu", "60 40 \n"),
            ("cpuacct.stat", "user 2\nsystem 1\n"),
            (
                "cpu.stat",
                "nr_periods 5\nnr_throttled 4\nthrottled_time 3\n",
            ),
            ("memory.usage_in_bytes", "4096\n"),
            ("memory.limit_in_bytes", "8192\n"),
            (
                "memory.stat",
                "cache 1\nrss 2\ntotal_rss 3\nhierarchical_memsw_limit 9\n",
            ),
            (
                "memory.oom_control",
                "oom_kill_disable 0\nunder_oom 1\noom_kill 2\n",
            ),
            (
                "blkio.throttle.io_service_bytes_recursive",
                "8:0 Read 5\n8:0 Total 5\nTotal 5\n",
            ),
        ] {
            fs::write(dir.path().join(file), text).unwrap();
        }
        let controllers = ["pids", "cpu", "cpuacct", "memory", "blkio"]
            .map(|name| (name.to_owned(), dir.path().to_owned()))
            .into();
        let metrics = collect(&controllers);
        assert_eq!((metrics.pids.current, metrics.pids.limit), (3, 0));
        assert_eq!(metrics.cpu.usage.total, 100);
        assert_eq!(metrics.cpu.usage.per_cpu, [60, 40]);
        assert_eq!(metrics.cpu.usage.user, 20_000_000);
        assert_eq!(metrics.cpu.throttling.throttled_time, 3);
        assert_eq!(metrics.memory.usage.limit, 8192);
        assert!(metrics.memory.swap.is_none());
        assert_eq!(metrics.memory.total_rss, 3);
        assert_eq!(metrics.memory_oom_control.oom_kill, 2);
        let entries = &metrics.blkio.io_service_bytes_recursive;
        assert_eq!(entries.len(), 2);
        assert_eq!((entries[0].op.as_str(), entries[0].value), ("Read", 5));
        assert!(metrics.rdma.is_none());
    }
}
