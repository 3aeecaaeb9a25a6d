//! What this node is: its side of a negotiation.

use std::fs;
use std::path::Path;
use std::process::Stdio;
use std::time::Duration;

use anyhow::Context as _;
use migrate::Version;
use migrate::cpu::{Cpu, Xsave};
use migrate::offer::{Facts, PROTOCOL_VERSIONS};

use crate::node::Node;
use crate::probe::Probe;

const RUNC_TIMEOUT: Duration = Duration::from_secs(5);

/// Gathers the facts anew: tools are upgraded while sternad runs.
pub(crate) async fn gather(node: &Node) -> anyhow::Result<Facts> {
    let (probe, runc, containerd) =
        tokio::join!(Probe::ask(), runc_version(), node.containerd.version());
    assemble(node, &probe?, runc, containerd?.parse().ok())
}

/// Facts out of what was found out already.
pub(crate) fn assemble(
    node: &Node,
    probe: &Probe,
    runc: Option<Version>,
    containerd: Option<Version>,
) -> anyhow::Result<Facts> {
    let cpuinfo = read("/proc/cpuinfo")?;
    Ok(Facts {
        node: node.name.to_string(),
        protocol_versions: PROTOCOL_VERSIONS.to_vec(),
        // The kernel and Rust name the architectures that we support alike.
        architecture: std::env::consts::ARCH.to_owned(),
        page_size: rustix::param::page_size() as u64,
        kernel_release: read("/proc/sys/kernel/osrelease")?.trim().to_owned(),
        cgroup_version: cgroup_version(),
        userfaultfd: probe.userfaultfd.as_ref().ok().copied(),
        tracking: probe.no_tracking.is_none(),
        cpu: Cpu {
            xsave: xsave(),
            ..cpu(&cpuinfo)
        },
        criu: probe
            .criu
            .as_ref()
            .ok()
            .and_then(|version| version.parse().ok()),
        runc,
        containerd,
        free_memory_bytes: available_memory(&read("/proc/meminfo")?)
            .context("/proc/meminfo has no MemAvailable")?,
    })
}

fn read(path: &str) -> anyhow::Result<String> {
    fs::read_to_string(path).with_context(|| format!("cannot read {path}"))
}

/// 2 where /sys/fs/cgroup is a cgroup2 file system, as on any current system.
fn cgroup_version() -> u32 {
    if Path::new("/sys/fs/cgroup/cgroup.procs").exists() {
        2
    } else {
        1
    }
}

/// `MemAvailable`, in bytes.
fn available_memory(meminfo: &str) -> Option<u64> {
    let line = meminfo
        .lines()
        .find_map(|line| line.strip_prefix("MemAvailable:"))?;
    let kib: u64 = line.trim().strip_suffix("kB")?.trim().parse().ok()?;
    kib.checked_mul(1024)
}

/// Model and flags of the first processor in /proc/cpuinfo.
fn cpu(cpuinfo: &str) -> Cpu {
    let field = |names: [&str; 2]| {
        cpuinfo
            .lines()
            .filter_map(|line| line.split_once(':'))
            .find(|(name, _)| names.contains(&name.trim()))
            .map(|(_, value)| value.trim())
            .unwrap_or_default()
    };
    Cpu {
        model: field(["model name", "CPU part"]).to_owned(),
        flags: field(["flags", "Features"])
            .split_ascii_whitespace()
            .map(str::to_owned)
            .collect(),
        xsave: None,
    }
}

/// The extended register state by CPUID leaf 0xD (Intel SDM volume 1, 13.2).
#[cfg(target_arch = "x86_64")]
fn xsave() -> Option<Xsave> {
    use std::arch::x86_64::{__cpuid, __cpuid_count};

    use migrate::cpu::XsaveComponent;

    const LEAF: u32 = 0xD;
    // Leaf 1, ECX bit 27: the kernel has switched xsave on.
    if __cpuid(0).eax < LEAF || __cpuid(1).ecx & (1 << 27) == 0 {
        return None;
    }
    let main = __cpuid_count(LEAF, 0);
    let supported = u64::from(main.edx) << 32 | u64::from(main.eax);
    // Reading XCR0 itself is an instruction that safe code has not. EBX is the
    // size of the area for what XCR0 enables, so a component that ends behind it
    // is one that the CPU has and the kernel has not enabled.
    let components: Vec<_> = (2..63)
        .filter(|bit| supported & (1 << bit) != 0)
        .map(|bit| {
            let part = __cpuid_count(LEAF, bit);
            XsaveComponent {
                bit: bit as u8,
                offset: part.ebx,
                size: part.eax,
            }
        })
        .filter(|part| {
            part.offset
                .checked_add(part.size)
                .is_some_and(|end| end <= main.ebx)
        })
        .collect();
    let features = components
        .iter()
        .fold(0b11, |features, part| features | 1 << part.bit);
    Some(Xsave {
        features,
        size_bytes: main.ebx,
        components,
    })
}

#[cfg(not(target_arch = "x86_64"))]
fn xsave() -> Option<Xsave> {
    None
}

/// The runc in PATH, which is the one that the shim uses unless told otherwise.
pub(crate) async fn runc_version() -> Option<Version> {
    let child = tokio::process::Command::new("runc")
        .arg("--version")
        .stdin(Stdio::null())
        .stderr(Stdio::null())
        .kill_on_drop(true)
        .output();
    let output = tokio::time::timeout(RUNC_TIMEOUT, child).await.ok()?.ok()?;
    parse_runc(&String::from_utf8_lossy(&output.stdout))
}

/// The first line is "runc version 1.3.6".
fn parse_runc(output: &str) -> Option<Version> {
    output
        .lines()
        .next()?
        .strip_prefix("runc version ")?
        .trim()
        .parse()
        .ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn memory_versions_and_flags_are_read_as_the_kernel_and_runc_print_them() {
        let meminfo = "MemTotal:       24689764 kB\nMemAvailable:   23891234 kB\n";
        assert_eq!(available_memory(meminfo), Some(23_891_234 * 1024));
        assert_eq!(available_memory("MemTotal: 1 kB\n"), None);
        let runc = "runc version 1.3.6+ds1\ncommit: 1.3.6+ds1-2\nspec: 1.2.1\n";
        assert_eq!(parse_runc(runc), Some(Version::new(1, 3, 6)));
        assert_eq!(parse_runc("crun version 1.8\n"), None);
        let cpu = cpu(
            "processor\t: 0\nmodel name\t: Some CPU @ 2 GHz\nflags\t\t: fpu sse2\n\nflags\t\t: other\n",
        );
        assert_eq!(cpu.model, "Some CPU @ 2 GHz");
        assert_eq!(cpu.flags, ["fpu", "sse2"].map(String::from).into());
    }

    #[test]
    fn this_machines_register_state_is_consistent() {
        let Some(xsave) = xsave() else { return };
        assert!(xsave.size_bytes >= 576, "{xsave:?}");
        assert_eq!(xsave.features & 0b11, 0b11);
        for component in &xsave.components {
            assert!(
                component.size > 0 && component.offset >= 576,
                "{component:?}"
            );
        }
    }
}
