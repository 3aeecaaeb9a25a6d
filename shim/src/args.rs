//! The command line as containerd writes it: Go's flags, then an action.

use std::path::PathBuf;

/// What containerd asks of this process.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Action {
    /// Make sure that a server runs and print its address.
    Start,
    /// Clean up after a server that is gone.
    Delete,
    /// Describe this runtime.
    Info,
    /// Say the version, for people.
    Version,
    /// Say what this is, for people.
    Help,
    /// Be the server; only `Start` runs this.
    Serve,
}

/// One run of this program.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Invocation {
    /// containerd's namespace.
    pub(crate) namespace: String,
    /// Container that this run is about; for a server the first one of its pod.
    pub(crate) id: String,
    /// containerd's gRPC socket.
    pub(crate) address: String,
    /// The containerd program.
    pub(crate) publish_binary: String,
    /// The bundle, where it is not the working directory.
    pub(crate) bundle: Option<PathBuf>,
    /// Log at debug level.
    pub(crate) debug: bool,
    /// What to do.
    pub(crate) action: Action,
}

/// A command line that containerd would not write.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub(crate) enum ArgsError {
    #[error("flag provided but not defined: {0}")]
    UnknownFlag(String),
    #[error("flag needs an argument: {0}")]
    MissingValue(String),
    #[error("unknown action {0:?}")]
    UnknownAction(String),
}

impl Invocation {
    /// Reads the arguments after the program's name. As Go's `flag` does it:
    /// one dash or two, value attached by `=` or following, and the first
    /// argument that is no flag ends them.
    pub(crate) fn parse(args: impl IntoIterator<Item = String>) -> Result<Self, ArgsError> {
        let mut invocation = Self {
            namespace: String::new(),
            id: String::new(),
            address: String::new(),
            publish_binary: String::new(),
            bundle: None,
            debug: false,
            action: Action::Serve,
        };
        let mut args = args.into_iter();
        while let Some(arg) = args.next() {
            let Some(flag) = arg.strip_prefix("--").or_else(|| arg.strip_prefix('-')) else {
                invocation.action = match arg.as_str() {
                    "start" => Action::Start,
                    "delete" => Action::Delete,
                    _ => return Err(ArgsError::UnknownAction(arg)),
                };
                break;
            };
            let (name, attached) = match flag.split_once('=') {
                Some((name, value)) => (name, Some(value.to_owned())),
                None => (flag, None),
            };
            let mut value = || {
                attached
                    .clone()
                    .or_else(|| args.next())
                    .ok_or_else(|| ArgsError::MissingValue(arg.clone()))
            };
            match name {
                "namespace" => invocation.namespace = value()?,
                "id" => invocation.id = value()?,
                "address" => invocation.address = value()?,
                "publish-binary" => invocation.publish_binary = value()?,
                "bundle" => invocation.bundle = Some(PathBuf::from(value()?)),
                "debug" => invocation.debug = attached.as_deref() != Some("false"),
                "v" | "version" => invocation.action = Action::Version,
                "info" => invocation.action = Action::Info,
                "h" | "help" => invocation.action = Action::Help,
                _ => return Err(ArgsError::UnknownFlag(arg)),
            }
        }
        Ok(invocation)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(line: &str) -> Result<Invocation, ArgsError> {
        Invocation::parse(line.split_whitespace().map(str::to_owned))
    }

    #[test]
    fn containerds_start_command_is_understood() {
        let invocation = parse(
            "-namespace k8s.io -address /run/c.sock -publish-binary /usr/bin/containerd \
             -id web -debug start",
        )
        .unwrap();
        assert_eq!(invocation.action, Action::Start);
        assert_eq!(invocation.namespace, "k8s.io");
        assert_eq!(invocation.id, "web");
        assert_eq!(invocation.address, "/run/c.sock");
        assert_eq!(invocation.publish_binary, "/usr/bin/containerd");
        assert!(invocation.debug);
    }

    #[test]
    fn two_dashes_and_attached_values_are_the_same() {
        let invocation = parse("--namespace=a --id=b --bundle=/c --debug=false delete").unwrap();
        assert_eq!(invocation.action, Action::Delete);
        assert_eq!(invocation.namespace, "a");
        assert_eq!(invocation.bundle, Some("/c".into()));
        assert!(!invocation.debug);
    }

    #[test]
    fn version_and_info_are_flags_and_no_action_means_serve() {
        assert_eq!(parse("-v").unwrap().action, Action::Version);
        assert_eq!(parse("-version").unwrap().action, Action::Version);
        assert_eq!(parse("-info").unwrap().action, Action::Info);
        assert_eq!(parse("--help").unwrap().action, Action::Help);
        assert_eq!(parse("-namespace a -id b").unwrap().action, Action::Serve);
    }

    #[test]
    fn what_containerd_would_not_write_is_refused() {
        assert_eq!(
            parse("-nonsense x").unwrap_err(),
            ArgsError::UnknownFlag("-nonsense".into())
        );
        assert_eq!(
            parse("-id").unwrap_err(),
            ArgsError::MissingValue("-id".into())
        );
        assert_eq!(
            parse("-id a restart").unwrap_err(),
            ArgsError::UnknownAction("restart".into())
        );
    }
}
