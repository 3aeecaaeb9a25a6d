//! `sterna-load run`: fill, write, probe, verify.

use std::io::{BufRead, Write};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use serde::{Deserialize, Serialize};

use crate::client::Link;
use crate::dataset::Dataset;
use crate::probe;
use crate::rate::{Bytes, Rate};
use crate::verify;
use crate::writer::{self, Share};

/// Until caches are warm and the writers have found their pace.
const STEADY: Duration = Duration::from_secs(2);

#[derive(Debug, clap::Args)]
pub(crate) struct Options {
    /// host:port of the server.
    #[arg(long)]
    address: String,
    /// Random values to fill in, such as 64M or 1G.
    #[arg(long, default_value = "1G")]
    memory: Bytes,
    /// Size of one value in bytes.
    #[arg(long, default_value_t = 1024)]
    value_size: usize,
    /// Writes to make: 20000/s, 50M/s, max or 0/s.
    #[arg(long, default_value = "20000/s")]
    write_rate: Rate,
    /// Connections that write.
    #[arg(long, default_value_t = 4)]
    writers: usize,
    /// Connect again where a connection ends, instead of giving it up.
    #[arg(long)]
    reconnect: bool,
}

/// A line of standard output.
#[derive(Debug, Serialize, Deserialize)]
#[serde(tag = "event", rename_all = "kebab-case")]
pub(crate) enum Event {
    /// All keys are there.
    Filled {
        keys: usize,
        bytes: u64,
        seconds: f64,
    },
    /// The load is steady.
    Ready,
    /// What happened since the last mark.
    Mark(Mark),
    /// The end.
    Result(Verdict),
}

#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct Mark {
    /// Longest time between two answers to the probe, in milliseconds.
    pub(crate) blackout_ms: f64,
    /// Longest time between two answers to any one writer, in milliseconds.
    pub(crate) writer_blackout_ms: f64,
    /// Since the beginning.
    pub(crate) writes_acknowledged: u64,
}

#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct Verdict {
    pub(crate) digest_equal: bool,
    pub(crate) keys: usize,
    pub(crate) keys_wrong: usize,
    pub(crate) writes_acknowledged: u64,
    pub(crate) writes_per_second: u64,
    pub(crate) writes_lost: u64,
    pub(crate) connections: usize,
    pub(crate) connections_dropped: usize,
    pub(crate) probes: u64,
    /// As in [`Mark`], of the whole run.
    pub(crate) blackout_ms: f64,
    pub(crate) writer_blackout_ms: f64,
    pub(crate) probe_p50_us: u64,
    pub(crate) probe_p99_us: u64,
}

fn say(event: &Event) -> Result<()> {
    let mut out = std::io::stdout().lock();
    serde_json::to_writer(&mut out, event)?;
    writeln!(out)?;
    out.flush()?;
    Ok(())
}

fn ms(duration: Duration) -> f64 {
    (duration.as_secs_f64() * 1e6).round() / 1e3
}

pub(crate) fn run(options: &Options) -> Result<()> {
    let client = redis::Client::open(format!("redis://{}/", options.address))?;
    let dataset = Dataset::new(options.memory, options.value_size);
    ensure!(
        options.writers > 0,
        "--writers 0: for no writes say --write-rate 0/s"
    );
    ensure!(
        dataset.keys() >= options.writers,
        "there are fewer keys than writers"
    );
    let begun = Instant::now();
    dataset.fill(&client).context("cannot fill the server")?;
    say(&Event::Filled {
        keys: dataset.keys(),
        bytes: dataset.keys() as u64 * dataset.value_size() as u64,
        seconds: begun.elapsed().as_secs_f64(),
    })?;

    let load = Load::start(&client, dataset, options)?;
    std::thread::sleep(STEADY);
    say(&Event::Ready)?;
    serve(&load)?;
    let verdict = load.finish(&client)?;
    say(&Event::Result(verdict))
}

/// Does what standard input says until that is `stop` or nothing more.
fn serve(load: &Load) -> Result<()> {
    for line in std::io::stdin().lock().lines() {
        match line?.trim() {
            "mark" => say(&Event::Mark(load.mark()))?,
            "stop" => break,
            other => eprintln!("sterna-load: {other:?} is neither mark nor stop"),
        }
    }
    Ok(())
}

struct Load {
    dataset: Dataset,
    writers: Vec<writer::Running>,
    probe: probe::Running,
    begun: Instant,
    stop: Arc<AtomicBool>,
}

impl Load {
    fn start(client: &redis::Client, dataset: Dataset, options: &Options) -> Result<Self> {
        let stop = Arc::new(AtomicBool::new(false));
        let of = options.writers;
        let per_second = options.write_rate.writes_per_second(dataset.value_size());
        let per_writer = per_second.map(|rate| rate / of as f64);
        let writers = (0..of)
            .map(|number| {
                let link = Link::open(client, options.reconnect)?;
                writer::start(link, &dataset, Share { number, of }, per_writer, &stop)
            })
            .collect::<Result<Vec<_>>>()?;
        let probe = probe::start(Link::open(client, options.reconnect)?, &stop)?;
        Ok(Self {
            dataset,
            writers,
            probe,
            begun: Instant::now(),
            stop,
        })
    }

    fn acknowledged(&self) -> u64 {
        self.writers
            .iter()
            .map(|writer| writer.acknowledged.load(Ordering::Relaxed))
            .sum()
    }

    fn mark(&self) -> Mark {
        let writers = self.writers.iter().map(|writer| writer.gap.take());
        Mark {
            blackout_ms: ms(self.probe.gap.take()),
            writer_blackout_ms: ms(writers.max().unwrap_or_default()),
            writes_acknowledged: self.acknowledged(),
        }
    }

    /// Stops the load and reads everything back.
    fn finish(self, client: &redis::Client) -> Result<Verdict> {
        self.stop.store(true, Ordering::Relaxed);
        let seconds = self.begun.elapsed().as_secs_f64();
        let connections = self.writers.len() + 1;
        let writer_gaps: Vec<_> = self
            .writers
            .iter()
            .map(|writer| writer.gap.clone())
            .collect();
        let acknowledged: Vec<_> = self
            .writers
            .iter()
            .map(|writer| writer.acknowledged.clone())
            .collect();
        let probe_gap = self.probe.gap.clone();
        let written: Vec<_> = self
            .writers
            .into_iter()
            .map(writer::Running::join)
            .collect();
        let probed = self.probe.join();
        let acknowledged = acknowledged
            .iter()
            .map(|count| count.load(Ordering::Relaxed))
            .sum();

        let dropped: Vec<&String> = written
            .iter()
            .map(|writer| &writer.dropped)
            .chain([&probed.dropped])
            .flatten()
            .collect();
        for reason in &dropped {
            eprintln!("sterna-load: a connection was lost: {reason}");
        }
        let found = verify::verify(client, &self.dataset, &written).context("cannot read back")?;
        Ok(Verdict {
            digest_equal: found.digest_equal,
            keys: self.dataset.keys(),
            keys_wrong: found.keys_wrong,
            writes_acknowledged: acknowledged,
            writes_per_second: (acknowledged as f64 / seconds) as u64,
            writes_lost: found.writes_lost,
            connections,
            connections_dropped: dropped.len(),
            probes: probed.answers,
            blackout_ms: ms(probe_gap.longest()),
            writer_blackout_ms: ms(writer_gaps
                .iter()
                .map(|gap| gap.longest())
                .max()
                .unwrap_or_default()),
            probe_p50_us: probed.percentile(50),
            probe_p99_us: probed.percentile(99),
        })
    }
}
