//! Settings of a network namespace: those that somebody changed.
//!
//! A runtime applies the settings of a container's specification
//! (`net.ipv4.ip_unprivileged_port_start`, `net.core.somaxconn`) when it starts
//! the first process. A restore starts none, so that they travel with the network.

use std::collections::BTreeMap;
use std::fs;
use std::io;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;

use nix::sched::{CloneFlags, unshare};

use crate::error::NetworkError;

const ROOT: &str = "/proc/sys/net";

/// Longest value that is carried, in bytes. Lists of reserved ports get long.
const MAX_VALUE_BYTES: usize = 4096;

/// Most settings that are taken from a peer. There are about a thousand.
const MAX_SETTINGS: usize = 2048;

/// Not carried: a secret key that the kernel rolls for each namespace, what
/// follows from the interface (its MTU, how its addresses are made), and what is
/// a command rather than a setting.
const LEFT_OUT: [&str; 5] = [
    "tcp_fastopen_key",
    "mtu",
    "addr_gen_mode",
    "stable_secret",
    "flush",
];

/// Settings by their path below `/proc/sys/net`.
pub(crate) type Settings = BTreeMap<String, String>;

/// All settings of the calling thread's namespace that a program could change:
/// general ones and those of the interface `name`.
fn read(name: &str) -> io::Result<Settings> {
    let mut settings = Settings::new();
    read_below(Path::new(ROOT), "", name, &mut settings)?;
    Ok(settings)
}

fn read_below(dir: &Path, path: &str, name: &str, settings: &mut Settings) -> io::Result<()> {
    for entry in fs::read_dir(dir)? {
        let entry = entry?;
        let file = entry.file_name().to_string_lossy().into_owned();
        let below = if path.is_empty() {
            file.clone()
        } else {
            format!("{path}/{file}")
        };
        if entry.file_type()?.is_dir() {
            // Of neighbours there are no defaults here to compare with.
            let of_interface = path.ends_with("/conf");
            if file != "neigh"
                && (!of_interface || [name, "all", "default"].contains(&file.as_str()))
            {
                read_below(&entry.path(), &below, name, settings)?;
            }
            continue;
        }
        // What is the same for all namespaces is read-only here.
        let writable = entry.metadata()?.permissions().mode() & 0o200 != 0;
        if !writable || LEFT_OUT.contains(&file.as_str()) {
            continue;
        }
        // Some cannot be read, or hold nothing yet.
        if let Ok(value) = fs::read_to_string(entry.path())
            && value.len() <= MAX_VALUE_BYTES
        {
            settings.insert(below, value.trim_end().to_owned());
        }
    }
    Ok(())
}

/// In the namespace of the calling thread: settings that differ from those of a
/// namespace that was just made.
pub(crate) fn changed(name: &str) -> io::Result<Settings> {
    let mut settings = read(name)?;
    let fresh = std::thread::scope(|scope| {
        let reader = scope.spawn(|| {
            unshare(CloneFlags::CLONE_NEWNET)?;
            read(name)
        });
        reader
            .join()
            .unwrap_or_else(|panic| std::panic::resume_unwind(panic))
    })?;
    // The fresh one has no such interface: it would start with the defaults.
    let usual = |setting: &str| {
        let default = setting.replace(&format!("/{name}/"), "/default/");
        fresh.get(setting).or_else(|| fresh.get(&default)).cloned()
    };
    settings.retain(|setting, value| usual(setting).as_ref() != Some(value));
    Ok(settings)
}

/// Refuses what is not a setting, or not of this interface. The kernel refuses
/// values.
pub(crate) fn validate(settings: &Settings) -> Result<(), NetworkError> {
    let plain = |byte: u8| byte.is_ascii_alphanumeric() || b"_-./@".contains(&byte);
    let is_setting = |path: &str| {
        path.bytes().all(plain)
            && path.split('/').count() > 1
            && path.split('/').all(|part| !["", ".", ".."].contains(&part))
    };
    let printable = |value: &str| value.len() <= MAX_VALUE_BYTES && !value.contains('\0');
    if settings.len() <= MAX_SETTINGS
        && settings
            .iter()
            .all(|(path, value)| is_setting(path) && printable(value))
    {
        Ok(())
    } else {
        Err(NetworkError::Invalid {
            reason: "a setting that a network does not have",
        })
    }
}

/// Applies settings to the namespace of the calling thread.
pub(crate) fn apply(settings: &Settings) -> Result<(), NetworkError> {
    // Some change others: forwarding those of all interfaces, `all` those of
    // each.
    let rank = |path: &str| match path {
        "ipv4/ip_forward" => 0,
        _ if path.contains("/all/") => 1,
        _ if path.contains("/default/") => 2,
        _ => 3,
    };
    let mut ordered: Vec<_> = settings.iter().collect();
    ordered.sort_by_key(|(path, _)| rank(path));
    for (path, value) in ordered {
        let file = Path::new(ROOT).join(path);
        fs::write(&file, value).map_err(NetworkError::kernel("set", path))?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn settings(path: &str, value: &str) -> Settings {
        [(path.to_owned(), value.to_owned())].into()
    }

    #[test]
    fn only_settings_of_a_network_are_accepted() {
        validate(&settings("ipv4/conf/eth0.7/rp_filter", "2")).unwrap();
        validate(&settings("core/somaxconn", "4096")).unwrap();
        for path in [
            "../kernel/core_pattern",
            "ipv4/../../kernel/x",
            "/etc/passwd",
            "ipv4",
            "",
            "ipv4//x",
            "a/b c",
        ] {
            validate(&settings(path, "1")).unwrap_err();
        }
        validate(&settings("core/somaxconn", "1\0")).unwrap_err();
        validate(&settings("core/somaxconn", &"1".repeat(4097))).unwrap_err();
        let many = (0..2049)
            .map(|n| (format!("ipv4/n{n}"), String::new()))
            .collect();
        validate(&many).unwrap_err();
    }
}
