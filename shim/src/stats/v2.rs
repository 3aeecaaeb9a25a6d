//! Statistics of a version 2 control group.

use std::fs;
use std::path::Path;

use containerd_shim_protos::cgroups_v2::metrics::{
    CPUStat, HugeTlbStat, IOEntry, IOStat, MemoryEvents, MemoryStat, Metrics, PSIData, PSIStats,
    PidsStat, RdmaEntry, RdmaStat,
};
use protobuf::MessageField;

use super::{device, number, page_sizes, parse_number, table, word};

pub(super) fn collect(path: &Path) -> Metrics {
    Metrics {
        pids: MessageField::some(PidsStat {
            current: number(&path.join("pids.current")),
            limit: number(&path.join("pids.max")),
            ..Default::default()
        }),
        cpu: MessageField::some(cpu(path)),
        memory: MessageField::some(memory(path)),
        memory_events: MessageField::some(memory_events(path)),
        io: MessageField::some(io(path)),
        rdma: MessageField::some(RdmaStat {
            current: rdma(&path.join("rdma.current")),
            limit: rdma(&path.join("rdma.max")),
            ..Default::default()
        }),
        hugetlb: page_sizes(path, ".current")
            .into_iter()
            .map(|size| hugetlb(path, size))
            .collect(),
        ..Default::default()
    }
}

fn cpu(path: &Path) -> CPUStat {
    let mut stat = CPUStat {
        psi: pressure(&path.join("cpu.pressure")),
        ..Default::default()
    };
    for (key, value) in table(&path.join("cpu.stat")) {
        match key.as_str() {
            "usage_usec" => stat.usage_usec = value,
            "user_usec" => stat.user_usec = value,
            "system_usec" => stat.system_usec = value,
            "nr_periods" => stat.nr_periods = value,
            "nr_throttled" => stat.nr_throttled = value,
            "throttled_usec" => stat.throttled_usec = value,
            "nr_bursts" => stat.nr_bursts = value,
            "burst_usec" => stat.burst_usec = value,
            _ => {}
        }
    }
    stat
}

fn memory(path: &Path) -> MemoryStat {
    let mut stat = MemoryStat {
        usage: number(&path.join("memory.current")),
        usage_limit: number(&path.join("memory.max")),
        max_usage: number(&path.join("memory.peak")),
        swap_usage: number(&path.join("memory.swap.current")),
        swap_limit: number(&path.join("memory.swap.max")),
        swap_max_usage: number(&path.join("memory.swap.peak")),
        psi: pressure(&path.join("memory.pressure")),
        ..Default::default()
    };
    for (key, value) in table(&path.join("memory.stat")) {
        match key.as_str() {
            "anon" => stat.anon = value,
            "file" => stat.file = value,
            "kernel_stack" => stat.kernel_stack = value,
            "slab" => stat.slab = value,
            "sock" => stat.sock = value,
            "shmem" => stat.shmem = value,
            "file_mapped" => stat.file_mapped = value,
            "file_dirty" => stat.file_dirty = value,
            "file_writeback" => stat.file_writeback = value,
            "anon_thp" => stat.anon_thp = value,
            "inactive_anon" => stat.inactive_anon = value,
            "active_anon" => stat.active_anon = value,
            "inactive_file" => stat.inactive_file = value,
            "active_file" => stat.active_file = value,
            "unevictable" => stat.unevictable = value,
            "slab_reclaimable" => stat.slab_reclaimable = value,
            "slab_unreclaimable" => stat.slab_unreclaimable = value,
            "pgfault" => stat.pgfault = value,
            "pgmajfault" => stat.pgmajfault = value,
            // Newer kernels count these for anonymous memory and files apart.
            "workingset_refault" | "workingset_refault_anon" | "workingset_refault_file" => {
                stat.workingset_refault += value;
            }
            "workingset_activate" | "workingset_activate_anon" | "workingset_activate_file" => {
                stat.workingset_activate += value;
            }
            "workingset_nodereclaim" => stat.workingset_nodereclaim = value,
            "pgrefill" => stat.pgrefill = value,
            "pgscan" => stat.pgscan = value,
            "pgsteal" => stat.pgsteal = value,
            "pgactivate" => stat.pgactivate = value,
            "pgdeactivate" => stat.pgdeactivate = value,
            "pglazyfree" => stat.pglazyfree = value,
            "pglazyfreed" => stat.pglazyfreed = value,
            "thp_fault_alloc" => stat.thp_fault_alloc = value,
            "thp_collapse_alloc" => stat.thp_collapse_alloc = value,
            _ => {}
        }
    }
    stat
}

fn memory_events(path: &Path) -> MemoryEvents {
    let mut events = MemoryEvents::default();
    for (key, value) in table(&path.join("memory.events")) {
        match key.as_str() {
            "low" => events.low = value,
            "high" => events.high = value,
            "max" => events.max = value,
            "oom" => events.oom = value,
            "oom_kill" => events.oom_kill = value,
            "oom_group_kill" => events.oom_group_kill = value,
            _ => {}
        }
    }
    events
}

fn io(path: &Path) -> IOStat {
    let text = fs::read_to_string(path.join("io.stat")).unwrap_or_default();
    IOStat {
        usage: text.lines().filter_map(io_entry).collect(),
        psi: pressure(&path.join("io.pressure")),
        ..Default::default()
    }
}

/// `8:0 rbytes=1 wbytes=2 rios=3 wios=4 ...`
fn io_entry(line: &str) -> Option<IOEntry> {
    let (numbers, counts) = line.split_once(' ')?;
    let (major, minor) = device(numbers)?;
    let count = |key| word(counts, key).map_or(0, parse_number);
    Some(IOEntry {
        major,
        minor,
        rbytes: count("rbytes"),
        wbytes: count("wbytes"),
        rios: count("rios"),
        wios: count("wios"),
        ..Default::default()
    })
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

fn hugetlb(path: &Path, size: String) -> HugeTlbStat {
    let file = |suffix: &str| path.join(format!("hugetlb.{size}.{suffix}"));
    let failures = table(&file("events"))
        .into_iter()
        .find(|(key, _)| key == "max")
        .map_or(0, |(_, value)| value);
    HugeTlbStat {
        current: number(&file("current")),
        max: number(&file("max")),
        failcnt: failures,
        pagesize: size,
        ..Default::default()
    }
}

/// Nothing where the kernel does not measure pressure.
fn pressure(file: &Path) -> MessageField<PSIStats> {
    match fs::read_to_string(file) {
        Ok(text) if !text.is_empty() => MessageField::some(parse_pressure(&text)),
        _ => MessageField::none(),
    }
}

/// Lines of `some avg10=0.12 avg60=0.03 avg300=0.00 total=123`.
fn parse_pressure(text: &str) -> PSIStats {
    let line = |kind: &str| {
        let words = text.lines().find_map(|line| line.strip_prefix(kind));
        words.map_or_else(MessageField::none, |words| {
            let average = |key| {
                word(words, key)
                    .and_then(|value| value.parse().ok())
                    .unwrap_or(0.0)
            };
            MessageField::some(PSIData {
                avg10: average("avg10"),
                avg60: average("avg60"),
                avg300: average("avg300"),
                total: word(words, "total").map_or(0, parse_number),
                ..Default::default()
            })
        })
    };
    PSIStats {
        some: line("some "),
        full: line("full "),
        ..Default::default()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_group_is_read_from_its_files() {
        let dir = tempfile::tempdir().unwrap();
        for (file, text) in [
            ("pids.current", "3\n"),
            ("pids.max", "max\n"),
            (
                "cpu.stat",
                "usage_usec 10\nuser_usec 7\nsystem_usec 3\nnr_periods 1\n",
            ),
            (
                "cpu.pressure",
                "some avg10=1.50 avg60=0.00 avg300=0.00 total=9\nfull avg10=0.00 avg60=0.00 avg300=0.25 total=2\n",
            ),
            ("memory.current", "4096\n"),
            ("memory.max", "8192\n"),
            (
                "memory.stat",
                "anon 100\nworkingset_refault_anon 1\nworkingset_refault_file 2\n",
            ),
            ("memory.events", "low 0\noom 2\noom_kill 1\n"),
            ("io.stat", "8:0 rbytes=1 wbytes=2 rios=3 wios=4 dbytes=0\n"),
            ("hugetlb.2MB.current", "0\n"),
            ("hugetlb.2MB.max", "max\n"),
            ("hugetlb.2MB.events", "max 5\n"),
        ] {
            fs::write(dir.path().join(file), text).unwrap();
        }
        let metrics = collect(dir.path());
        assert_eq!(metrics.pids.current, 3);
        assert_eq!(metrics.pids.limit, u64::MAX);
        assert_eq!(metrics.cpu.user_usec, 7);
        assert_eq!(metrics.cpu.psi.some.total, 9);
        assert!((metrics.cpu.psi.full.avg300 - 0.25).abs() < f64::EPSILON);
        assert_eq!(metrics.memory.usage_limit, 8192);
        assert_eq!(metrics.memory.workingset_refault, 3);
        assert!(metrics.memory.psi.is_none());
        assert_eq!(metrics.memory_events.oom_kill, 1);
        assert_eq!(metrics.io.usage[0].wios, 4);
        assert_eq!(metrics.hugetlb[0].failcnt, 5);
    }
}
