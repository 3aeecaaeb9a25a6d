//! Keeps a container movable: two seccomp rules that refuse what CRIU cannot dump.
//!
//! * `io_uring_setup`, `_enter`, `_register` answer ENOSYS, as on a kernel
//!   without io_uring: libuv, and with it Node.js, uses epoll instead.
//! * `socket(.., .., IPPROTO_MPTCP)` answers EPROTONOSUPPORT: Go's listeners,
//!   which ask for MPTCP since 1.24, use TCP instead.
//!
//! Both programs otherwise run but never dump. The rules are merged into the
//! profile that the spec brings; they take rights away and never give any:
//! what that profile refuses, in whatever way, it still refuses in that way.
//! A spec without a profile (a privileged or unconfined container) gets one that
//! allows everything else.

use serde_json::{Map, Value, json};

/// Annotation that keeps io_uring for one container; it can then not move.
const KEEP_IO_URING: &str = "sterna.dev/keep-io-uring";
/// Annotation that keeps MPTCP for one container.
const KEEP_MPTCP: &str = "sterna.dev/keep-mptcp";

const IO_URING: [&str; 3] = ["io_uring_setup", "io_uring_enter", "io_uring_register"];
const SOCKET: &str = "socket";
/// Protocol number in socket(2)'s third argument (include/uapi/linux/in.h).
const IPPROTO_MPTCP: u64 = 262;
const PROTOCOL_ARGUMENT: u64 = 2;

/// Changes an OCI spec so that the container stays movable; says whether
/// anything changed.
pub(crate) fn keep_movable(spec: &mut Value) -> bool {
    let wish = |name: &str| {
        spec.get("annotations")
            .and_then(|annotations| annotations.get(name))
            .and_then(Value::as_str)
            == Some("true")
    };
    let (keep_io_uring, keep_mptcp) = (wish(KEEP_IO_URING), wish(KEEP_MPTCP));
    if keep_io_uring && keep_mptcp {
        return false;
    }
    let Some(linux) = spec.get_mut("linux").and_then(Value::as_object_mut) else {
        return false;
    };
    let profile = linux.entry("seccomp").or_insert(Value::Null);
    if profile.is_null() {
        *profile = allow_everything();
    }
    let Some(profile) = profile.as_object_mut() else {
        return false;
    };
    let default = profile
        .get("defaultAction")
        .and_then(Value::as_str)
        .unwrap_or_default()
        .to_owned();
    let rules = profile.entry("syscalls").or_insert(Value::Null);
    if rules.is_null() {
        *rules = json!([]);
    }
    let Some(rules) = rules.as_array_mut() else {
        return false;
    };
    let mut changed = false;
    if !keep_io_uring {
        for name in IO_URING {
            changed |= refuse(rules, &default, name);
        }
    }
    if !keep_mptcp {
        changed |= refuse_mptcp(rules, &default);
    }
    changed
}

fn allow_everything() -> Value {
    // libseccomp kills calls of architectures that are not listed, so that the
    // 32-bit ones have to be.
    let architectures = match std::env::consts::ARCH {
        "x86_64" => json!(["SCMP_ARCH_X86_64", "SCMP_ARCH_X86", "SCMP_ARCH_X32"]),
        "aarch64" => json!(["SCMP_ARCH_AARCH64", "SCMP_ARCH_ARM"]),
        _ => json!([]),
    };
    json!({
        "defaultAction": "SCMP_ACT_ALLOW",
        "architectures": architectures,
        "syscalls": [],
    })
}

/// Whether a call with this action takes place. Of SCMP_ACT_TRACE and _NOTIFY
/// a third party decides, whom we do not overrule.
fn allows(action: &str) -> bool {
    matches!(action, "SCMP_ACT_ALLOW" | "SCMP_ACT_LOG")
}

fn action_of(rule: &Value) -> &str {
    rule.get("action").and_then(Value::as_str).unwrap_or("")
}

fn names(rule: &Value, syscall: &str) -> bool {
    rule.get("names")
        .and_then(Value::as_array)
        .is_some_and(|names| names.iter().any(|name| name == syscall))
}

fn arguments(rule: &Value) -> Vec<Value> {
    rule.get("args")
        .and_then(Value::as_array)
        .cloned()
        .unwrap_or_default()
}

/// Takes `syscall` out of every rule that allows it and answers those rules, as
/// if they were about nothing else.
fn take_allowing(rules: &mut Vec<Value>, syscall: &str) -> Vec<Value> {
    let mut taken = Vec::new();
    rules.retain_mut(|rule| {
        if !names(rule, syscall) || !allows(action_of(rule)) {
            return true;
        }
        let mut own = rule.clone();
        own["names"] = json!([syscall]);
        taken.push(own);
        let Some(names) = rule.get_mut("names").and_then(Value::as_array_mut) else {
            return true;
        };
        names.retain(|name| name != syscall);
        !names.is_empty()
    });
    taken
}

fn refuse(rules: &mut Vec<Value>, default: &str, syscall: &str) -> bool {
    let taken = take_allowing(rules, syscall);
    let denied = rules.iter().any(|rule| names(rule, syscall));
    if denied || (taken.is_empty() && !allows(default)) {
        return !taken.is_empty();
    }
    rules.push(json!({
        "names": [syscall],
        "action": "SCMP_ACT_ERRNO",
        "errnoRet": libc::ENOSYS,
    }));
    true
}

/// Where a rule allows socket(2), it is split by the protocol: libseccomp tests
/// arguments in the order of their numbers, so that a rule about the family
/// would be decided before one about the protocol alone.
fn refuse_mptcp(rules: &mut Vec<Value>, default: &str) -> bool {
    let taken = take_allowing(rules, SOCKET);
    let mut changed = false;
    for rule in &taken {
        let arguments = arguments(rule);
        let about_protocol = arguments
            .iter()
            .any(|argument| argument["index"].as_u64() == Some(PROTOCOL_ARGUMENT));
        if about_protocol {
            // A profile that names the protocols it wants has decided about
            // MPTCP itself.
            rules.push(rule.clone());
            continue;
        }
        let mut others = rule.clone();
        others["args"] = with(&arguments, "SCMP_CMP_NE");
        rules.push(others);
        rules.push(mptcp_refused(with(&arguments, "SCMP_CMP_EQ")));
        changed = true;
    }
    let refused = mptcp_refused(with(&[], "SCMP_CMP_EQ"));
    let decided = rules
        .iter()
        .any(|rule| names(rule, SOCKET) && (arguments(rule).is_empty() || *rule == refused));
    if taken.is_empty() && allows(default) && !decided {
        rules.push(refused);
        changed = true;
    }
    changed
}

fn with(arguments: &[Value], comparison: &str) -> Value {
    let mut arguments = arguments.to_vec();
    arguments.push(json!({
        "index": PROTOCOL_ARGUMENT,
        "value": IPPROTO_MPTCP,
        "op": comparison,
    }));
    Value::Array(arguments)
}

fn mptcp_refused(arguments: Value) -> Value {
    let mut rule = Map::new();
    rule.insert("names".into(), json!([SOCKET]));
    rule.insert("action".into(), json!("SCMP_ACT_ERRNO"));
    rule.insert("errnoRet".into(), json!(libc::EPROTONOSUPPORT));
    rule.insert("args".into(), arguments);
    Value::Object(rule)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn spec(seccomp: Value) -> Value {
        json!({"annotations": {}, "linux": {"seccomp": seccomp}})
    }

    fn rules(spec: &Value) -> &Vec<Value> {
        spec["linux"]["seccomp"]["syscalls"].as_array().unwrap()
    }

    /// What the profile says to a call, by libseccomp's rules for profiles as
    /// simple as those in these tests: a rule with arguments before one without.
    fn decide(spec: &Value, syscall: &str, args: [u64; 3]) -> (String, Option<u64>) {
        let seccomp = &spec["linux"]["seccomp"];
        let matching = |rule: &&Value| {
            names(rule, syscall)
                && arguments(rule).iter().all(|argument| {
                    let index = usize::try_from(argument["index"].as_u64().unwrap()).unwrap();
                    let value = argument["value"].as_u64().unwrap();
                    match argument["op"].as_str().unwrap() {
                        "SCMP_CMP_EQ" => args[index] == value,
                        "SCMP_CMP_NE" => args[index] != value,
                        other => panic!("{other}"),
                    }
                })
        };
        let found: Vec<_> = rules(spec).iter().filter(matching).collect();
        let actions: std::collections::BTreeSet<_> =
            found.iter().map(|rule| action_of(rule)).collect();
        assert!(actions.len() <= 1, "rules contradict each other: {found:?}");
        match found.first() {
            Some(rule) => (action_of(rule).to_owned(), rule["errnoRet"].as_u64()),
            None => (
                seccomp["defaultAction"].as_str().unwrap().to_owned(),
                seccomp["defaultErrnoRet"].as_u64(),
            ),
        }
    }

    const TCP: [u64; 3] = [2, 1, 6];
    const MPTCP: [u64; 3] = [2, 1, 262];
    const VSOCK: [u64; 3] = [40, 1, 0];
    const VSOCK_MPTCP: [u64; 3] = [40, 1, 262];

    fn allowed() -> (String, Option<u64>) {
        ("SCMP_ACT_ALLOW".to_owned(), None)
    }

    fn errno(number: i32) -> (String, Option<u64>) {
        (
            "SCMP_ACT_ERRNO".to_owned(),
            Some(u64::try_from(number).unwrap()),
        )
    }

    #[test]
    fn a_spec_without_a_profile_gets_one_with_two_rules() {
        for mut spec in [json!({"linux": {}}), spec(Value::Null)] {
            assert!(keep_movable(&mut spec));
            assert_eq!(decide(&spec, "io_uring_setup", [0; 3]), errno(libc::ENOSYS));
            assert_eq!(decide(&spec, "socket", MPTCP), errno(libc::EPROTONOSUPPORT));
            assert_eq!(decide(&spec, "socket", TCP), allowed());
            assert_eq!(decide(&spec, "reboot", [0; 3]), allowed());
        }
    }

    #[test]
    fn a_second_time_changes_nothing() {
        let mut spec = spec(Value::Null);
        keep_movable(&mut spec);
        let once = spec.clone();
        keep_movable(&mut spec);
        assert_eq!(spec, once);
    }

    #[test]
    fn a_profile_that_lists_what_it_allows_stays_as_strict_for_everything_else() {
        // As containerd's default profile has it: no vsock, io_uring not listed.
        let mut spec = spec(json!({
            "defaultAction": "SCMP_ACT_ERRNO",
            "defaultErrnoRet": 1,
            "syscalls": [
                {"names": ["read", "socketpair"], "action": "SCMP_ACT_ALLOW"},
                {"names": ["socket"], "action": "SCMP_ACT_ALLOW",
                 "args": [{"index": 0, "value": 40, "op": "SCMP_CMP_NE"}]},
            ],
        }));
        assert!(keep_movable(&mut spec));
        assert_eq!(decide(&spec, "socket", TCP), allowed());
        assert_eq!(decide(&spec, "socket", MPTCP), errno(libc::EPROTONOSUPPORT));
        assert_eq!(decide(&spec, "socket", VSOCK), errno(1));
        assert_eq!(decide(&spec, "socket", VSOCK_MPTCP), errno(1));
        assert_eq!(decide(&spec, "io_uring_setup", [0; 3]), errno(1));
        assert_eq!(decide(&spec, "read", [0; 3]), allowed());
        assert_eq!(decide(&spec, "socketpair", [0; 3]), allowed());
    }

    #[test]
    fn a_profile_that_allows_io_uring_no_longer_does() {
        let mut spec = spec(json!({
            "defaultAction": "SCMP_ACT_KILL_PROCESS",
            "syscalls": [{"names": ["io_uring_setup", "socket", "read"], "action": "SCMP_ACT_LOG"}],
        }));
        assert!(keep_movable(&mut spec));
        assert_eq!(decide(&spec, "io_uring_setup", [0; 3]), errno(libc::ENOSYS));
        // Not listed before: still killed, not merely refused.
        assert_eq!(
            decide(&spec, "io_uring_enter", [0; 3]).0,
            "SCMP_ACT_KILL_PROCESS"
        );
        assert_eq!(decide(&spec, "socket", TCP).0, "SCMP_ACT_LOG");
        assert_eq!(decide(&spec, "socket", MPTCP), errno(libc::EPROTONOSUPPORT));
        assert_eq!(decide(&spec, "read", [0; 3]).0, "SCMP_ACT_LOG");
    }

    #[test]
    fn what_a_profile_denies_or_hands_to_a_third_party_is_left_alone() {
        for action in ["SCMP_ACT_KILL_PROCESS", "SCMP_ACT_TRAP", "SCMP_ACT_NOTIFY"] {
            let mut spec = spec(json!({
                "defaultAction": "SCMP_ACT_ALLOW",
                "syscalls": [{"names": ["io_uring_setup", "socket"], "action": action}],
            }));
            keep_movable(&mut spec);
            assert_eq!(decide(&spec, "io_uring_setup", [0; 3]).0, action);
            assert_eq!(decide(&spec, "socket", MPTCP).0, action);
            assert_eq!(decide(&spec, "io_uring_enter", [0; 3]), errno(libc::ENOSYS));
        }
    }

    #[test]
    fn annotations_keep_either_or_both() {
        for (annotation, io_uring, mptcp) in
            [(KEEP_IO_URING, true, false), (KEEP_MPTCP, false, true)]
        {
            let mut spec = json!({"annotations": {annotation: "true"}, "linux": {}});
            assert!(keep_movable(&mut spec));
            assert_eq!(
                decide(&spec, "io_uring_setup", [0; 3]) == allowed(),
                io_uring
            );
            assert_eq!(decide(&spec, "socket", MPTCP) == allowed(), mptcp);
        }
        let mut spec = json!({
            "annotations": {KEEP_IO_URING: "true", KEEP_MPTCP: "true"},
            "linux": {},
        });
        let before = spec.clone();
        assert!(!keep_movable(&mut spec));
        assert_eq!(spec, before);
    }

    #[test]
    fn a_spec_of_another_system_is_left_alone() {
        let mut spec = json!({"windows": {}});
        assert!(!keep_movable(&mut spec));
    }
}
