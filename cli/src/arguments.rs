//! The command line.

use std::path::PathBuf;
use std::time::Duration;

use clap::{Args, Parser, Subcommand};

const EXIT_CODES: &str = "\
Exit codes:
  0  done
  1  failed; of a migration, the message says where the container is
  2  the command line makes no sense
  3  refused before anything was touched
  4  cancelled, the container stays
  5  sternad does not answer";

/// Moves running containers between nodes.
#[derive(Debug, Parser)]
#[command(version, arg_required_else_help = true, after_help = EXIT_CODES)]
pub(crate) struct Arguments {
    /// containerd namespace; only needed where a name is in several.
    #[arg(
        short,
        long,
        global = true,
        env = "CONTAINERD_NAMESPACE",
        value_name = "NS"
    )]
    pub(crate) namespace: Option<String>,
    /// sternad's socket.
    #[arg(long, global = true, hide = true, value_name = "PATH")]
    pub(crate) socket: Option<PathBuf>,
    #[command(subcommand)]
    pub(crate) command: Command,
}

#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// List the containers under Sterna on this node.
    #[command(
        visible_alias = "ls",
        after_help = "\
States:
  created, running, paused, stopped   as containerd has them
  checkpointing                       a checkpoint is being written
  sending, receiving                  on its way to or from another node
  undecided                           handed over to a node that does not answer: it
                                      stands still here until that does (sterna release)
  settling                            runs here, memory is still being filled in
  lost                                its shim is dead"
    )]
    Ps(Ps),
    /// Move a running container to another node, with its memory.
    #[command(after_help = "\
Until the switch-over the container runs here, and any failure leaves it here as
if nothing had happened. Ctrl-C cancels and waits for that; a second Ctrl-C leaves
the migration to itself.

Examples:
  sterna migrate web --to b
  sterna migrate web --to b --max-blackout 100ms --deadline 2m
  sterna -n k8s.io migrate web --to b --json

Exit codes: as in sterna --help.")]
    Migrate(Migrate),
    /// Stop a migration; the container stays.
    #[command(after_help = "\
Example:
  sterna cancel web

Fails once the container has been handed over.")]
    Cancel(Cancel),
    /// Decide about a container that is undecided: its other node is gone for good.
    #[command(after_help = "\
A container that was handed over stands still here until the other node says that
it runs there, or that it does not and never will. sternad and the engines find that
out by themselves as soon as that node, its sternad and the way to it are back. Say it
yourself only if they will not be, and only if you have MADE SURE of it:

  --handed-back   It does not run on the other node and never will: that node is
                  switched off or was reinstalled, or its containerd has no such
                  container and it has been rebooted. The container goes on here.
                  If you are wrong, two copies run, and both write.
  --gone          It runs on the other node, or ran there. Its copy here is ended.
                  If you are wrong, the container and its memory are lost.

Anything but an undecided container is refused (sterna ps shows the state).

Examples:
  sterna release web --handed-back
  sterna release web --gone")]
    Release(Release),
    /// Can this node, this pair of nodes, this container do it? If not, why?
    #[command(after_help = "\
Examples:
  sterna doctor                  this node
  sterna doctor --to b           this node, and whether it and b fit together
  sterna doctor web --to b       the same for one container

Nothing is touched. Exits with 1 if there is a problem.")]
    Doctor(Doctor),
}

#[derive(Debug, Args)]
pub(crate) struct Ps {
    /// For scripts: an array with an object for each container.
    #[arg(long)]
    pub(crate) json: bool,
}

#[derive(Debug, Args)]
pub(crate) struct Migrate {
    /// The container.
    #[arg(value_name = "NAME")]
    pub(crate) name: String,
    /// The node to move it to.
    #[arg(long, value_name = "NODE")]
    pub(crate) to: String,
    /// Switch over when the pause is expected to be shorter than this
    /// [default: as in sternad.toml, 300ms].
    #[arg(long, value_name = "TIME", value_parser = duration)]
    pub(crate) max_blackout: Option<Duration>,
    /// Give up after this long and leave the container here [default: never].
    #[arg(long, value_name = "TIME", value_parser = duration)]
    pub(crate) deadline: Option<Duration>,
    /// Send the state of a pod's container into the container of the same name of
    /// another pod, by its uid. What is there is made by its kubelet.
    #[arg(long, value_name = "UID")]
    pub(crate) into_pod: Option<String>,
    /// For scripts: one object at the end instead of progress and a table.
    #[arg(long)]
    pub(crate) json: bool,
}

#[derive(Debug, Args)]
pub(crate) struct Cancel {
    /// The container.
    #[arg(value_name = "NAME")]
    pub(crate) name: String,
}

#[derive(Debug, Args)]
pub(crate) struct Release {
    /// The container.
    #[arg(value_name = "NAME")]
    pub(crate) name: String,
    #[command(flatten)]
    pub(crate) verdict: Verdict,
}

/// Exactly one of them: none is the default.
#[derive(Debug, Args)]
#[group(required = true, multiple = false)]
pub(crate) struct Verdict {
    /// It does not run on the other node and never will: let it go on here.
    #[arg(long)]
    pub(crate) handed_back: bool,
    /// It is the other node's: end its copy here.
    #[arg(long)]
    pub(crate) gone: bool,
}

#[derive(Debug, Args)]
pub(crate) struct Doctor {
    /// A container on this node.
    #[arg(value_name = "NAME")]
    pub(crate) name: Option<String>,
    /// The other node of a pair.
    #[arg(long, value_name = "NODE")]
    pub(crate) to: Option<String>,
    /// For scripts: one object with all findings.
    #[arg(long)]
    pub(crate) json: bool,
}

impl Arguments {
    /// A container by name, as sternad wants it.
    pub(crate) fn container(&self, id: &str) -> proto::agent::ContainerName {
        proto::agent::ContainerName {
            namespace: self.namespace.clone().unwrap_or_default(),
            id: id.to_owned(),
        }
    }
}

/// `300ms`, `1.5s`, `2m`, `1h`.
fn duration(text: &str) -> Result<Duration, String> {
    let wrong = || format!("{text:?} is no time like 300ms, 5s or 2m");
    let digits = text
        .find(|c: char| !c.is_ascii_digit() && c != '.')
        .ok_or_else(wrong)?;
    let (number, unit) = text.split_at(digits);
    let seconds_per_unit = match unit {
        "ms" => 0.001,
        "s" => 1.0,
        "m" => 60.0,
        "h" => 3600.0,
        _ => return Err(wrong()),
    };
    let number: f64 = number.parse().map_err(|_| wrong())?;
    let time = Duration::try_from_secs_f64(number * seconds_per_unit).map_err(|_| wrong())?;
    if time < Duration::from_millis(1) {
        return Err(format!("{text:?} is shorter than 1ms"));
    }
    Ok(time)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(line: &str) -> Result<Arguments, clap::Error> {
        Arguments::try_parse_from(line.split(' '))
    }

    #[test]
    fn the_command_line_is_consistent() {
        use clap::CommandFactory as _;
        Arguments::command().debug_assert();
    }

    #[test]
    fn a_migration_is_read_as_the_manual_writes_it() {
        let arguments =
            parse("sterna migrate web --to b --max-blackout 300ms --deadline 30s --json -n other")
                .unwrap();
        assert_eq!(arguments.container("web").namespace, "other");
        let Command::Migrate(migrate) = arguments.command else {
            panic!()
        };
        assert_eq!((migrate.name.as_str(), migrate.to.as_str()), ("web", "b"));
        assert_eq!(migrate.max_blackout, Some(Duration::from_millis(300)));
        assert_eq!(migrate.deadline, Some(Duration::from_secs(30)));
        assert!(migrate.json);
    }

    #[test]
    fn a_migration_without_a_destination_is_a_usage_error() {
        assert_eq!(parse("sterna migrate web").unwrap_err().exit_code(), 2);
        assert_eq!(
            parse("sterna migrate web --to b --deadline soon")
                .unwrap_err()
                .exit_code(),
            2
        );
    }

    #[test]
    fn a_release_says_one_thing_and_none_by_default() {
        let arguments = parse("sterna release web --gone").unwrap();
        let Command::Release(release) = arguments.command else {
            panic!()
        };
        assert!(release.verdict.gone && !release.verdict.handed_back);
        for wrong in ["", " --gone --handed-back"] {
            let line = format!("sterna release web{wrong}");
            assert_eq!(parse(&line).unwrap_err().exit_code(), 2, "{line}");
        }
    }

    #[test]
    fn durations_have_units_and_are_not_zero() {
        for (text, millis) in [
            ("300ms", 300),
            ("1.5s", 1500),
            ("2m", 120_000),
            ("1h", 3_600_000),
        ] {
            assert_eq!(duration(text), Ok(Duration::from_millis(millis)), "{text}");
        }
        for bad in [
            "",
            "5",
            "s",
            "-1s",
            "1d",
            "1e9s",
            "1.2.3s",
            "0s",
            "0.1ms",
            "99999999999999999999h",
        ] {
            assert!(duration(bad).is_err(), "{bad}");
        }
    }
}
