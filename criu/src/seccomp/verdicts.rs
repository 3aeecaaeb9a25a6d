//! What a seccomp filter can answer to system calls of native code.
//!
//! A filter only jumps forward. So all ways through it are followed, with what is
//! known of the accumulator as a range: the architecture is ours, the number is
//! one of ours, everything else may be anything. That leaves out what libseccomp
//! adds to every filter: to kill whoever makes calls of another architecture.

use std::collections::{BTreeSet, HashSet};
use std::ops::RangeInclusive;

/// `AUDIT_ARCH_*` of linux/audit.h: ELF machine, 64 bit, little endian.
#[cfg(target_arch = "x86_64")]
const NATIVE_ARCH: u32 = 62 | 0x8000_0000 | 0x4000_0000;
#[cfg(target_arch = "aarch64")]
const NATIVE_ARCH: u32 = 183 | 0x8000_0000 | 0x4000_0000;

/// Numbers of native calls: below the bit that marks those of x32.
pub(super) const NUMBERS: RangeInclusive<u32> = 0..=0x3fff_ffff;

const ANYTHING: RangeInclusive<u32> = 0..=u32::MAX;

/// Offsets in `struct seccomp_data`.
const OFFSET_NR: u32 = 0;
const OFFSET_ARCH: u32 = 4;

/// What a filter answers.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Verdict {
    /// The call takes place.
    Runs,
    /// It fails.
    Refused,
    /// What else there is, in libseccomp's words.
    Other(&'static str),
}

impl Verdict {
    fn of(value: u32) -> Self {
        match value & libc::SECCOMP_RET_ACTION_FULL {
            libc::SECCOMP_RET_ALLOW | libc::SECCOMP_RET_LOG => Self::Runs,
            libc::SECCOMP_RET_ERRNO => Self::Refused,
            libc::SECCOMP_RET_KILL_THREAD => Self::Other("killing the thread"),
            libc::SECCOMP_RET_KILL_PROCESS => Self::Other("killing the process"),
            libc::SECCOMP_RET_TRAP => Self::Other("a signal"),
            libc::SECCOMP_RET_TRACE => Self::Other("asking a tracer"),
            libc::SECCOMP_RET_USER_NOTIF => Self::Other("asking a supervisor"),
            _ => Self::Other("an action that is not known"),
        }
    }
}

/// All that the program can answer to a call with one of these numbers.
pub(super) fn of(program: &[[u8; 8]], numbers: &RangeInclusive<u32>) -> BTreeSet<Verdict> {
    const COMPUTED: Verdict = Verdict::Other("an action that it computes");
    let mut found = BTreeSet::new();
    let mut seen = HashSet::new();
    let mut open = vec![(0_usize, ANYTHING)];
    while let Some((index, accumulator)) = open.pop() {
        if !seen.insert((index, accumulator.clone())) {
            continue;
        }
        let Some(&[code, code_high, jt, jf, k0, k1, k2, k3]) = program.get(index) else {
            // The kernel does not install such a program.
            found.insert(COMPUTED);
            continue;
        };
        let code = u32::from(u16::from_ne_bytes([code, code_high]));
        let k = u32::from_ne_bytes([k0, k1, k2, k3]);
        let next = index + 1;
        match code & 7 {
            libc::BPF_RET => {
                let constant = code == libc::BPF_RET | libc::BPF_K;
                found.insert(if constant { Verdict::of(k) } else { COMPUTED });
            }
            libc::BPF_JMP if code & 0xf0 == libc::BPF_JA => {
                open.push((next + k as usize, accumulator));
            }
            libc::BPF_JMP => {
                let decided = match code & libc::BPF_X {
                    0 => compare(code & 0xf0, &accumulator, k),
                    _ => None,
                };
                if decided != Some(false) {
                    open.push((next + usize::from(jt), accumulator.clone()));
                }
                if decided != Some(true) {
                    open.push((next + usize::from(jf), accumulator));
                }
            }
            libc::BPF_LD => {
                let loaded = match (code, k) {
                    (ABSOLUTE_WORD, OFFSET_NR) => numbers.clone(),
                    (ABSOLUTE_WORD, OFFSET_ARCH) => NATIVE_ARCH..=NATIVE_ARCH,
                    _ => ANYTHING,
                };
                open.push((next, loaded));
            }
            // These leave the accumulator alone.
            libc::BPF_LDX | libc::BPF_ST | libc::BPF_STX => open.push((next, accumulator)),
            _ => open.push((next, ANYTHING)),
        }
    }
    found
}

const ABSOLUTE_WORD: u32 = libc::BPF_LD | libc::BPF_W | libc::BPF_ABS;

/// How a comparison comes out; `None` when it may go either way.
fn compare(test: u32, accumulator: &RangeInclusive<u32>, k: u32) -> Option<bool> {
    let (least, most) = (*accumulator.start(), *accumulator.end());
    match test {
        libc::BPF_JEQ if least == most => Some(least == k),
        libc::BPF_JEQ if !accumulator.contains(&k) => Some(false),
        libc::BPF_JGT if least > k => Some(true),
        libc::BPF_JGT if most <= k => Some(false),
        libc::BPF_JGE if least >= k => Some(true),
        libc::BPF_JGE if most < k => Some(false),
        libc::BPF_JSET if least == most => Some(least & k != 0),
        _ => None,
    }
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;

    pub(in crate::seccomp) fn statement(code: u32, jt: u8, jf: u8, k: u32) -> [u8; 8] {
        let [c0, c1] = (code as u16).to_ne_bytes();
        let [k0, k1, k2, k3] = k.to_ne_bytes();
        [c0, c1, jt, jf, k0, k1, k2, k3]
    }

    fn load(offset: u32) -> [u8; 8] {
        statement(ABSOLUTE_WORD, 0, 0, offset)
    }

    fn jump(test: u32, k: u32, jt: u8, jf: u8) -> [u8; 8] {
        statement(libc::BPF_JMP | test | libc::BPF_K, jt, jf, k)
    }

    pub(in crate::seccomp) fn answer(value: u32) -> [u8; 8] {
        statement(libc::BPF_RET | libc::BPF_K, 0, 0, value)
    }

    /// As libseccomp makes them: other architectures and x32 are killed, one call
    /// gets `action` for one argument, all others `default`.
    pub(in crate::seccomp) fn profile(number: u32, action: u32, default: u32) -> Vec<[u8; 8]> {
        vec![
            load(OFFSET_ARCH),
            jump(libc::BPF_JEQ, NATIVE_ARCH, 0, 7),
            load(OFFSET_NR),
            jump(libc::BPF_JGE, 0x4000_0000, 5, 0),
            jump(libc::BPF_JEQ, number, 0, 3),
            load(16),
            jump(libc::BPF_JEQ, 5, 0, 1),
            answer(action),
            answer(default),
            answer(libc::SECCOMP_RET_KILL_THREAD),
        ]
    }

    fn list(program: &[[u8; 8]], numbers: RangeInclusive<u32>) -> Vec<Verdict> {
        of(program, &numbers).into_iter().collect()
    }

    #[test]
    fn only_what_native_calls_can_reach_counts() {
        let errno = libc::SECCOMP_RET_ERRNO | 38;
        let program = profile(7, errno, libc::SECCOMP_RET_ALLOW);
        assert_eq!(list(&program, NUMBERS), [Verdict::Runs, Verdict::Refused]);
        assert_eq!(list(&program, 8..=8), [Verdict::Runs]);
        assert_eq!(list(&program, 7..=7), [Verdict::Runs, Verdict::Refused]);
        let x32 = list(&program, 0x4000_0001..=0x4000_0001);
        assert_eq!(x32, [Verdict::Other("killing the thread")]);
    }

    #[test]
    fn every_action_that_is_neither_to_run_nor_to_refuse_is_found() {
        for action in [
            libc::SECCOMP_RET_KILL_PROCESS,
            libc::SECCOMP_RET_KILL_THREAD,
            libc::SECCOMP_RET_TRAP,
            libc::SECCOMP_RET_TRACE | 3,
            libc::SECCOMP_RET_USER_NOTIF,
            0x1234_0000,
        ] {
            let rule = profile(7, action, libc::SECCOMP_RET_ALLOW);
            let default = profile(7, libc::SECCOMP_RET_LOG, action);
            for program in [rule, default] {
                let found = list(&program, NUMBERS);
                assert!(
                    matches!(found[..], [Verdict::Runs, Verdict::Other(_)]),
                    "{found:?}"
                );
            }
        }
    }

    #[test]
    fn what_a_program_computes_is_not_guessed() {
        let computed = [load(16), statement(libc::BPF_RET | 0x10, 0, 0, 0)];
        assert!(matches!(list(&computed, NUMBERS)[..], [Verdict::Other(_)]));
        // Arithmetic on the architecture: both ways are taken.
        let masked = [
            load(OFFSET_ARCH),
            statement(libc::BPF_ALU | libc::BPF_AND | libc::BPF_K, 0, 0, 1),
            jump(libc::BPF_JEQ, 0, 0, 1),
            answer(libc::SECCOMP_RET_ALLOW),
            answer(libc::SECCOMP_RET_ERRNO),
        ];
        assert_eq!(list(&masked, NUMBERS), [Verdict::Runs, Verdict::Refused]);
        let endless = [load(OFFSET_NR)];
        assert!(matches!(list(&endless, NUMBERS)[..], [Verdict::Other(_)]));
    }
}
