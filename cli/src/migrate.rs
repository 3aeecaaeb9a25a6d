//! `sterna migrate`

use std::io::{self, IsTerminal as _, Write as _};

use anyhow::Context as _;
use proto::agent as pb;
use proto::agent::migrate_event::Event;
use proto::engine::progress;
use tonic::Streaming;

use crate::Failed;
use crate::arguments::{Arguments, Migrate};
use crate::client::{Client, connect, refused};
use crate::exit::Exit;
use crate::format::{bytes, millis};
use crate::report::Report;

pub(crate) async fn run(arguments: &Arguments, command: &Migrate) -> Result<Exit, Failed> {
    let report = match begin(arguments, command).await {
        Ok((client, events)) => {
            let show = match command.json {
                true => Show::Nothing,
                false if io::stderr().is_terminal() => Show::Line,
                false => Show::Lines,
            };
            follow(client, events, show).await
        }
        Err(failed) => {
            if command.json {
                let reason = format!("{:#}", failed.error);
                let name = arguments.container(&command.name);
                object(&Report::not_begun(name, &command.to, failed.exit, reason))?;
            }
            return Err(failed);
        }
    };
    if command.json {
        object(&report)?;
    } else if report.exit() == Exit::Success {
        let table = report.table(&mut io::stdout().lock());
        table.context("cannot write the result")?;
    }
    for notice in &report.notices {
        eprintln!("sterna: note: {notice}");
    }
    if report.exit() != Exit::Success {
        eprintln!("sterna: {}", report.complaint());
    }
    Ok(report.exit())
}

async fn begin(
    arguments: &Arguments,
    command: &Migrate,
) -> Result<(Client, Streaming<pb::MigrateEvent>), Failed> {
    let mut client = connect(arguments).await?;
    let millis = |time: Option<std::time::Duration>| {
        time.map_or(0, |time| {
            u64::try_from(time.as_millis()).unwrap_or(u64::MAX)
        })
    };
    let request = pb::MigrateRequest {
        container: Some(arguments.container(&command.name)),
        node: command.to.clone(),
        max_blackout_ms: millis(command.max_blackout),
        deadline_ms: millis(command.deadline),
        into_pod: command.into_pod.clone().unwrap_or_default(),
    };
    let events = client.migrate(request).await.map_err(refused)?.into_inner();
    Ok((client, events))
}

/// For scripts: the one line on standard output.
fn object(report: &Report) -> anyhow::Result<()> {
    let mut out = io::stdout().lock();
    serde_json::to_writer(&mut out, report)
        .map_err(io::Error::from)
        .and_then(|()| writeln!(out))
        .context("cannot write the result")
}

/// Where progress goes; always to standard error.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Show {
    Nothing,
    /// One line for each phase and lap.
    Lines,
    /// One line that changes.
    Line,
}

/// Collects until the stream ends. Ctrl-C cancels and goes on waiting.
async fn follow(mut client: Client, mut events: Streaming<pb::MigrateEvent>, show: Show) -> Report {
    let mut report = Report::default();
    let mut cancelled = false;
    let mut shown = String::new();
    loop {
        let message = tokio::select! {
            message = events.message() => message,
            interrupted = tokio::signal::ctrl_c() => {
                // Without a handler for it Ctrl-C ends this process, and that is all.
                if cancelled || interrupted.is_err() {
                    report.notices.push("the migration goes on: sterna cancel stops it".into());
                    break;
                }
                cancelled = true;
                clear(show);
                eprintln!("sterna: cancelling; a second Ctrl-C leaves the migration to itself");
                let name = pb::ContainerName {
                    namespace: report.namespace.clone(),
                    id: report.container.clone(),
                };
                if let Err(status) = client.cancel(pb::CancelRequest { container: Some(name) }).await {
                    eprintln!("sterna: {}", status.message());
                }
                continue;
            }
        };
        match message {
            Ok(Some(pb::MigrateEvent { event: Some(event) })) => {
                report.add(&event);
                progress(show, &event, &report, &mut shown);
            }
            Ok(Some(_)) => {}
            Ok(None) => break,
            // The report says that the end is missing.
            Err(_) => break,
        }
    }
    clear(show);
    if report.outcome.is_empty() {
        report.outcome = "unknown".into();
    }
    report
}

fn clear(show: Show) {
    if show == Show::Line {
        eprint!("\r\x1b[K");
    }
}

fn progress(show: Show, event: &Event, report: &Report, shown: &mut String) {
    let Some((text, detail)) = sentence(event, report) else {
        return;
    };
    if *shown == text {
        return;
    }
    shown.clone_from(&text);
    match show {
        Show::Nothing => {}
        Show::Lines if detail => {}
        Show::Lines => eprintln!("{text}"),
        // Cut at the usual width: a line that wraps cannot be taken back.
        Show::Line => eprint!("\r\x1b[K{}", text.chars().take(79).collect::<String>()),
    }
}

/// What to show of an event, and whether it is one of many.
fn sentence(event: &Event, report: &Report) -> Option<(String, bool)> {
    let phase = report.phases.last().map_or("", |phase| phase.name.as_str());
    match event {
        Event::Accepted(accepted) => Some((format!("migration {}", accepted.migration_id), false)),
        Event::ImageCopy(copy) => Some((
            format!(
                "{phase}: image {} of {}",
                bytes(copy.bytes_done),
                bytes(copy.bytes_total)
            ),
            false,
        )),
        Event::Progress(progress) => match progress.event.as_ref()? {
            progress::Event::Phase(phase) => Some((phase.phase.clone(), false)),
            progress::Event::Lap(lap) => Some((
                format!(
                    "{phase}: lap {}: {} in {}, {} expected",
                    lap.number,
                    bytes(lap.bytes),
                    millis(lap.duration_ms),
                    match lap.expected_blackout_ms {
                        0 => "blackout not yet".into(),
                        expected => format!("blackout of {}", millis(expected)),
                    }
                ),
                false,
            )),
            progress::Event::Bytes(count) => Some((
                format!(
                    "{phase}: {} of {}",
                    bytes(count.memory_sent),
                    bytes(count.memory_total)
                ),
                true,
            )),
            progress::Event::Finished(_) => None,
        },
        Event::Refused(_) | Event::Notice(_) => None,
    }
}

#[cfg(test)]
mod tests {
    use proto::engine as epb;

    use super::*;

    #[test]
    fn laps_are_told_in_words() {
        let mut report = Report::default();
        let phase = progress::Event::Phase(epb::PhaseBegun {
            phase: "pre-copy".into(),
        });
        report.add(&Event::Progress(epb::Progress {
            at_ms: 0,
            event: Some(phase),
        }));
        let lap = epb::Lap {
            number: 2,
            bytes: 3 << 20,
            duration_ms: 40,
            expected_blackout_ms: 90,
            ..Default::default()
        };
        let event = Event::Progress(epb::Progress {
            at_ms: 1,
            event: Some(progress::Event::Lap(lap)),
        });
        let (text, detail) = sentence(&event, &report).unwrap();
        assert_eq!(
            text,
            "pre-copy: lap 2: 3.0 MiB in 40 ms, blackout of 90 ms expected"
        );
        assert!(!detail);
    }
}
