//! `sterna-load report`: what the client and `sterna migrate` saw, side by side.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use crate::run::{Event, Mark, Verdict};

#[derive(Debug, clap::Args)]
pub(crate) struct Options {
    /// Directory with the lines that were collected: `result`, and for each
    /// migration N `mark-N` (of sterna-load run) and `migration-N` (of sterna
    /// migrate --json).
    #[arg(long, value_name = "DIR")]
    dir: PathBuf,
    /// Write the JSON object to this file too.
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
}

/// The part of `sterna migrate --json` that is of interest here.
#[derive(Debug, Deserialize)]
struct Moved {
    source: String,
    destination: String,
    tracking: String,
    laps: Vec<serde::de::IgnoredAny>,
    memory_bytes: u64,
    sent_bytes: u64,
    freeze_ms: f64,
    blackout_ms: f64,
    total_ms: u64,
}

/// One migration.
#[derive(Debug, Serialize)]
struct Migration {
    from: String,
    to: String,
    tracking: String,
    laps: usize,
    memory_bytes: u64,
    sent_bytes: u64,
    freeze_ms: f64,
    /// As the probe saw it.
    blackout_ms: f64,
    writer_blackout_ms: f64,
    /// An upper bound, as Sterna measured it: without what the network adds.
    own_blackout_ms: f64,
    total_ms: u64,
}

/// The last line of the demo. Of several migrations, times are those of the
/// worst.
#[derive(Debug, Serialize)]
struct Report {
    digest_equal: bool,
    writes_acknowledged: u64,
    writes_per_second: u64,
    writes_lost: u64,
    connections: usize,
    connections_dropped: usize,
    keys: usize,
    memory_bytes: u64,
    freeze_ms: f64,
    blackout_ms: f64,
    writer_blackout_ms: f64,
    total_ms: u64,
    migrations: Vec<Migration>,
}

pub(crate) fn run(options: &Options) -> Result<()> {
    let report = Report::load(&options.dir)?;
    print!("{}", report.table());
    let line = serde_json::to_string(&report)?;
    if let Some(path) = &options.json {
        fs::write(path, format!("{line}\n"))
            .with_context(|| format!("cannot write {}", path.display()))?;
    }
    println!("{line}");
    report.judge()
}

fn read<T: DeserializeOwned>(path: &Path) -> Result<T> {
    let text =
        fs::read_to_string(path).with_context(|| format!("cannot read {}", path.display()))?;
    serde_json::from_str(&text).with_context(|| format!("cannot understand {}", path.display()))
}

impl Report {
    fn load(dir: &Path) -> Result<Self> {
        let Event::Result(verdict) = read(&dir.join("result"))? else {
            anyhow::bail!("{} holds no result", dir.join("result").display());
        };
        let mut migrations = Vec::new();
        for number in 1.. {
            let path = dir.join(format!("migration-{number}"));
            if !path.exists() {
                break;
            }
            let Event::Mark(mark) = read(&dir.join(format!("mark-{number}")))? else {
                anyhow::bail!("mark-{number} holds no mark");
            };
            migrations.push(Migration::new(read(&path)?, &mark));
        }
        ensure!(!migrations.is_empty(), "there was no migration");
        Ok(Self::new(&verdict, migrations))
    }

    fn new(verdict: &Verdict, migrations: Vec<Migration>) -> Self {
        let worst = |time: fn(&Migration) -> f64| migrations.iter().map(time).fold(0.0, f64::max);
        Self {
            digest_equal: verdict.digest_equal,
            writes_acknowledged: verdict.writes_acknowledged,
            writes_per_second: verdict.writes_per_second,
            writes_lost: verdict.writes_lost,
            connections: verdict.connections,
            connections_dropped: verdict.connections_dropped,
            keys: verdict.keys,
            memory_bytes: migrations
                .iter()
                .map(|one| one.memory_bytes)
                .max()
                .unwrap_or_default(),
            freeze_ms: worst(|one| one.freeze_ms),
            blackout_ms: worst(|one| one.blackout_ms),
            writer_blackout_ms: worst(|one| one.writer_blackout_ms),
            total_ms: migrations
                .iter()
                .map(|one| one.total_ms)
                .max()
                .unwrap_or_default(),
            migrations,
        }
    }

    fn table(&self) -> String {
        let mut text = format!(
            "{:8} {:>5} {:>10} {:>10} {:>10} {:>10} {:>9}\n",
            "moved", "laps", "memory", "sent", "freeze", "blackout", "total"
        );
        for one in &self.migrations {
            text += &format!(
                "{:8} {:>5} {:>10} {:>10} {:>10} {:>10} {:>9}\n",
                format!("{} -> {}", one.from, one.to),
                one.laps,
                mebibytes(one.memory_bytes),
                mebibytes(one.sent_bytes),
                format!("{:.0} ms", one.freeze_ms),
                format!("{:.0} ms", one.blackout_ms),
                format!("{:.1} s", one.total_ms as f64 / 1e3),
            );
        }
        let verdict = if self.is_good() {
            "every one of"
        } else {
            "NOT all of"
        };
        text += &format!(
            "{verdict} {} acknowledged writes ({} a second) is there: {} lost, {} of {} connections dropped, digest over {} keys {}\n",
            self.writes_acknowledged,
            self.writes_per_second,
            self.writes_lost,
            self.connections_dropped,
            self.connections,
            self.keys,
            if self.digest_equal {
                "equal"
            } else {
                "NOT equal"
            },
        );
        text
    }

    fn is_good(&self) -> bool {
        self.digest_equal && self.writes_lost == 0 && self.connections_dropped == 0
    }

    fn judge(&self) -> Result<()> {
        ensure!(self.is_good(), "something was lost (above: what)");
        ensure!(
            self.writes_acknowledged > 0 || self.writes_per_second == 0,
            "nothing was written"
        );
        Ok(())
    }
}

impl Migration {
    fn new(moved: Moved, mark: &Mark) -> Self {
        Self {
            from: moved.source,
            to: moved.destination,
            tracking: moved.tracking,
            laps: moved.laps.len(),
            memory_bytes: moved.memory_bytes,
            sent_bytes: moved.sent_bytes,
            freeze_ms: moved.freeze_ms,
            blackout_ms: mark.blackout_ms,
            writer_blackout_ms: mark.writer_blackout_ms,
            own_blackout_ms: moved.blackout_ms,
            total_ms: moved.total_ms,
        }
    }
}

fn mebibytes(bytes: u64) -> String {
    format!("{} MiB", bytes >> 20)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn verdict() -> Verdict {
        Verdict {
            digest_equal: true,
            keys: 10,
            keys_wrong: 0,
            writes_acknowledged: 1000,
            writes_per_second: 100,
            writes_lost: 0,
            connections: 5,
            connections_dropped: 0,
            probes: 900,
            blackout_ms: 120.0,
            writer_blackout_ms: 130.0,
            probe_p50_us: 40,
            probe_p99_us: 400,
        }
    }

    fn migrations() -> Vec<Migration> {
        let line = |source: &str, destination: &str, freeze_ms: f64| {
            let json = serde_json::json!({
                "outcome": "migrated", "source": source, "destination": destination,
                "tracking": "userfaultfd", "laps": [{"number": 1}, {"number": 2}],
                "memory_bytes": 1 << 30, "sent_bytes": 1100 << 20, "freeze_ms": freeze_ms,
                "blackout_ms": 300.0, "total_ms": 2600,
            });
            serde_json::from_value::<Moved>(json).unwrap()
        };
        let mark = |blackout_ms| Mark {
            blackout_ms,
            writer_blackout_ms: 1.0,
            writes_acknowledged: 1,
        };
        vec![
            Migration::new(line("a", "b", 62.0), &mark(110.5)),
            Migration::new(line("b", "a", 61.0), &mark(120.0)),
        ]
    }

    #[test]
    fn the_last_line_has_what_the_client_saw_and_the_worst_of_all_migrations() {
        let report = Report::new(&verdict(), migrations());
        let value = serde_json::to_value(&report).unwrap();
        assert_eq!(value["digest_equal"], true);
        assert_eq!(value["freeze_ms"], 62.0);
        assert_eq!(value["blackout_ms"], 120.0);
        assert_eq!(value["total_ms"], 2600);
        assert_eq!(value["migrations"][0]["laps"], 2);
        assert!(report.judge().is_ok());
        assert!(report.table().contains("a -> b"));
    }

    #[test]
    fn anything_lost_is_a_failure() {
        for spoil in [
            (|verdict: &mut Verdict| verdict.digest_equal = false) as fn(&mut Verdict),
            |verdict| verdict.writes_lost = 1,
            |verdict| verdict.connections_dropped = 1,
        ] {
            let mut verdict = verdict();
            spoil(&mut verdict);
            assert!(Report::new(&verdict, migrations()).judge().is_err());
        }
    }
}
