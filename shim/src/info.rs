//! `-v`, `-help` and `-info`: what this runtime is.

use std::io::{self, IsTerminal, Read, Write};
use std::process::{Command, Stdio};

use anyhow::Context;
use containerd_shim_protos::types::introspection::{RuntimeInfo, RuntimeVersion};
use protobuf::well_known_types::any::Any;
use protobuf::{Message, MessageField};

use crate::options::Options;

/// Type of what `runc features` prints, as containerd names it.
const FEATURES: &str = "types.containerd.io/opencontainers/runtime-spec/1/features/Features";

/// Most that is read of the options.
const INPUT_LIMIT: u64 = 10 << 20;

/// Prints the version for people.
pub(crate) fn version() -> anyhow::Result<()> {
    writeln!(
        io::stdout(),
        "containerd-shim-sterna-v1:\n  Version:  {}",
        env!("CARGO_PKG_VERSION")
    )
    .context("cannot answer")
}

/// Says to people who runs this.
pub(crate) fn help() -> anyhow::Result<()> {
    writeln!(
        io::stdout(),
        "containerd-shim-sterna-v1: a containerd runtime shim whose containers can move

containerd runs this, nobody else has to:
  ctr run --runtime io.containerd.sterna.v1 IMAGE NAME

By hand: -v says the version, -info describes the runtime (for containerd)."
    )
    .context("cannot answer")
}

/// Prints a description for containerd; standard input may carry options.
pub(crate) fn info() -> anyhow::Result<()> {
    let mut input = Vec::new();
    let stdin = io::stdin();
    if !stdin.is_terminal() {
        stdin
            .lock()
            .take(INPUT_LIMIT)
            .read_to_end(&mut input)
            .context("cannot read standard input")?;
    }
    let sent = Any::parse_from_bytes(&input)
        .ok()
        .filter(|any| !any.type_url.is_empty());
    let options = Options::from_any(sent.as_ref())?;
    let info = RuntimeInfo {
        name: "io.containerd.sterna.v1".to_owned(),
        version: MessageField::some(RuntimeVersion {
            version: env!("CARGO_PKG_VERSION").to_owned(),
            ..Default::default()
        }),
        options: sent.map_or_else(MessageField::none, MessageField::some),
        features: features(&options).map_or_else(MessageField::none, |value| {
            MessageField::some(Any {
                type_url: FEATURES.to_owned(),
                value,
                ..Default::default()
            })
        }),
        ..Default::default()
    };
    io::stdout()
        .write_all(&info.write_to_bytes()?)
        .context("cannot answer")
}

/// What the runtime below says about itself; runtimes that do not know the
/// question say nothing.
fn features(options: &Options) -> Option<Vec<u8>> {
    let output = Command::new(options.program())
        .arg("features")
        .stdin(Stdio::null())
        .stderr(Stdio::null())
        .output()
        .ok()?;
    let json = output.stdout;
    let valid = serde_json::from_slice::<serde::de::IgnoredAny>(&json).is_ok();
    (output.status.success() && valid).then_some(json)
}
