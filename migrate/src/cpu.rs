//! Whether a program that started on one CPU can go on on another.
//!
//! CRIU checks this only if asked to, and then refuses more than it must (it wants
//! equal xsave sizes); runc does not ask. So the rule is ours, and it is checked
//! before anything is touched: a program finds out at its start what the CPU can
//! do, and never asks again.

use std::collections::BTreeSet;

use serde::{Deserialize, Serialize};

/// One component of the extended register state, as CPUID leaf 0xD describes it in
/// the standard format.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct XsaveComponent {
    /// Its bit in XCR0, 2 and above; the x87 and SSE parts lie the same everywhere.
    pub bit: u8,
    /// Where it begins in the save area, in bytes.
    pub offset: u32,
    /// How long it is, in bytes.
    pub size: u32,
}

/// The extended register state of an x86 CPU, as far as the kernel enables it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Xsave {
    /// XCR0: the components that are enabled.
    pub features: u64,
    /// The save area for them, in bytes (leaf 0xD, EBX).
    pub size_bytes: u32,
    /// Where each of them lies.
    pub components: Vec<XsaveComponent>,
}

/// What a CPU lets programs do.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Cpu {
    /// For people.
    pub model: String,
    /// `flags` (x86) or `Features` (arm64) of `/proc/cpuinfo`.
    pub flags: BTreeSet<String>,
    /// None where there is no such thing.
    pub xsave: Option<Xsave>,
}

/// Flags of `/proc/cpuinfo` that no program can depend on, one text for each reason.
/// Everything else counts, also what is not known yet.
const IRRELEVANT: [&str; 5] = [
    // What the kernel says about the machine: clocks, power, counters, topology.
    "acc_power acpi amd_dcm amd_lbr_v2 amd_ppin aperfmperf apic arat arch_capabilities arch_lbr \
     arch_perfmon art bts bus_lock_detect cmp_legacy constant_tsc cpb cpuid cpuid_fault \
     cr8_legacy dca de ds_cpl dtes64 dtherm dts epb epp est extapic extd_apicid hfi ht hw_pstate \
     hwp hwp_act_window hwp_epp hwp_notify hwp_pkg_req ibs ida intel_ppin intel_pt irperf mca \
     mcommit mce monitor msr mtrr nonstop_tsc nonstop_tsc_s3 osvw overflow_recov pat pbe pconfig \
     pdcm pebs perfctr_core perfctr_llc perfctr_nb perfmon_v2 pln ppin proc_feedback pse pse36 \
     ptsc pts rapl rep_good ring3mwait sdbg skinit smca smx splitlock_detect ss succor tce tm tm2 \
     topoext tsc_adjust tsc_deadline_timer tsc_known_freq tsc_reliable vme wdt x2apic xtopology \
     xtpr",
    // Shares of caches and of memory bandwidth.
    "abmc bmec cat_l2 cat_l3 cdp_l2 cdp_l3 cqm cqm_llc cqm_mbm_local cqm_mbm_total cqm_occup_llc \
     mba rdt_a smba",
    // Paging, protection and encryption that only a kernel uses.
    "debug_swap flushbyasid invlpgb invpcid invpcid_single nx pae pcid pge pti rmpquery sev sev_es \
     sev_snp smap sme sme_coherent smep tme umip wbnoinvd xsaves",
    // Mitigations of speculation.
    "amd_ibpb amd_ssbd amd_stibp autoibrs bhi_ctrl btc_no flush_l1d gds_no ibpb ibpb_exit_to_user \
     ibpb_ret ibrs ibrs_enhanced l1tf_pteinv lfence_rdtsc md_clear mfence_rdtsc retpoline \
     retpoline_amd rfds_clear rfds_no rrsba rsb_ctxsw sbpb spec_ctrl srso_no ssbd stibp \
     tsa_l1_no tsa_sq_no unret verw_clear virt_ssbd zen",
    // Running virtual machines, or being one.
    "avic decodeassists ept ept_ad flexpriority hypervisor idle_hlt lbrv npt nrip_save pausefilter \
     pfthreshold svm svm_lock svme_addr_chk tdx_guest tdx_host_platform tpr_shadow tsc_scale \
     v_spec_ctrl v_vmsave_vmload vgif vmcb_clean vmmcall vmx vnmi vpid x2avic",
];

/// What the destination's CPU lacks; empty: nothing.
pub fn missing_flags<'a>(source: &'a Cpu, destination: &Cpu) -> Vec<&'a str> {
    let counts = |flag: &str| {
        let mut irrelevant = IRRELEVANT
            .iter()
            .flat_map(|text| text.split_ascii_whitespace());
        !irrelevant.any(|known| known == flag)
    };
    source
        .flags
        .iter()
        .filter(|flag| !destination.flags.contains(*flag))
        .map(String::as_str)
        .filter(|flag| counts(flag))
        .collect()
}

/// Why register state saved on one CPU does not fit another.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum XsaveMismatch {
    /// The destination has no extended register state at all.
    #[error("the destination has no xsave")]
    Absent,
    /// Components that the source has enabled are not there.
    #[error("the destination does not enable register components {0:#x}")]
    Components(u64),
    /// A component lies elsewhere in the save area.
    #[error("register component {0} lies elsewhere in the save area")]
    Layout(u8),
    /// The areas differ in size and it is not known how they are laid out.
    #[error("the save areas are {source_bytes} and {destination_bytes} bytes long")]
    Size {
        /// On the source.
        source_bytes: u32,
        /// On the destination.
        destination_bytes: u32,
    },
}

/// Whether state saved on `source` can be loaded on `destination`: every component
/// is there, and lies where it lay. More components on the destination do not
/// matter: they are in their initial state.
///
/// # Errors
///
/// The first [`XsaveMismatch`].
pub fn check_xsave(source: &Cpu, destination: &Cpu) -> Result<(), XsaveMismatch> {
    let Some(ours) = &source.xsave else {
        return Ok(());
    };
    let theirs = destination.xsave.as_ref().ok_or(XsaveMismatch::Absent)?;
    let missing = ours.features & !theirs.features;
    if missing != 0 {
        return Err(XsaveMismatch::Components(missing));
    }
    if ours.components.is_empty() || theirs.components.is_empty() {
        // Without the layouts, equal areas are the only ones that surely match.
        return match (ours.features, ours.size_bytes) == (theirs.features, theirs.size_bytes) {
            true => Ok(()),
            false => Err(XsaveMismatch::Size {
                source_bytes: ours.size_bytes,
                destination_bytes: theirs.size_bytes,
            }),
        };
    }
    match ours
        .components
        .iter()
        .find(|component| !theirs.components.contains(component))
    {
        None => Ok(()),
        Some(moved) => Err(XsaveMismatch::Layout(moved.bit)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn cpu(flags: &[&str], xsave: Option<Xsave>) -> Cpu {
        Cpu {
            model: "test".into(),
            flags: flags.iter().map(|flag| flag.to_string()).collect(),
            xsave,
        }
    }

    fn component(bit: u8, offset: u32, size: u32) -> XsaveComponent {
        XsaveComponent { bit, offset, size }
    }

    /// AVX alone.
    fn avx() -> Xsave {
        Xsave {
            features: 0b111,
            size_bytes: 832,
            components: vec![component(2, 576, 256)],
        }
    }

    /// AVX and the three parts of AVX-512.
    fn avx512() -> Xsave {
        Xsave {
            features: 0b1110_0111,
            size_bytes: 2432,
            components: vec![
                component(2, 576, 256),
                component(5, 832, 64),
                component(6, 896, 512),
                component(7, 1408, 1024),
            ],
        }
    }

    fn check(source: Option<Xsave>, destination: Option<Xsave>) -> Result<(), XsaveMismatch> {
        check_xsave(&cpu(&[], source), &cpu(&[], destination))
    }

    #[test]
    fn a_destination_may_have_more_flags_but_not_fewer() {
        let (small, large) = (cpu(&["sse2"], None), cpu(&["avx512f", "sse2"], None));
        assert!(missing_flags(&small, &large).is_empty());
        assert_eq!(missing_flags(&large, &small), ["avx512f"]);
    }

    #[test]
    fn flags_that_no_program_sees_do_not_count() {
        let machine = cpu(&["constant_tsc", "hypervisor", "ibrs", "sse2", "vmx"], None);
        assert!(missing_flags(&machine, &cpu(&["sse2"], None)).is_empty());
        // What nobody has heard of yet may be an instruction.
        let newer = cpu(&["avx4096"], None);
        assert_eq!(missing_flags(&newer, &cpu(&[], None)), ["avx4096"]);
    }

    #[test]
    fn the_same_or_more_register_components_are_fine() {
        assert_eq!(check(None, None), Ok(()));
        assert_eq!(check(None, Some(avx())), Ok(()));
        assert_eq!(check(Some(avx()), Some(avx())), Ok(()));
        assert_eq!(check(Some(avx()), Some(avx512())), Ok(()));
    }

    #[test]
    fn missing_register_components_are_named() {
        assert_eq!(check(Some(avx()), None), Err(XsaveMismatch::Absent));
        assert_eq!(
            check(Some(avx512()), Some(avx())),
            Err(XsaveMismatch::Components(0b1110_0000))
        );
    }

    #[test]
    fn a_component_that_lies_elsewhere_does_not_fit() {
        // Protection keys lie behind AVX-512, or behind AVX where there is none.
        let with_keys = |mut xsave: Xsave, offset| {
            xsave.features |= 1 << 9;
            xsave.size_bytes = offset + 8;
            xsave.components.push(component(9, offset, 8));
            xsave
        };
        assert_eq!(
            check(Some(with_keys(avx(), 832)), Some(with_keys(avx512(), 2432))),
            Err(XsaveMismatch::Layout(9))
        );
    }

    #[test]
    fn without_layouts_only_equal_areas_fit() {
        let bare = |xsave: Xsave| {
            Some(Xsave {
                components: Vec::new(),
                ..xsave
            })
        };
        assert_eq!(check(bare(avx()), Some(avx())), Ok(()));
        assert_eq!(
            check(bare(avx()), bare(avx512())),
            Err(XsaveMismatch::Size {
                source_bytes: 832,
                destination_bytes: 2432
            })
        );
    }
}
