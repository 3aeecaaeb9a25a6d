//! A migration, collected event by event, and shown when it is over.

use std::io::{self, Write};

use proto::agent::ContainerName;
use proto::agent::migrate_event::Event;
use proto::engine as epb;
use proto::engine::progress;
use serde::Serialize;

use crate::exit::Exit;
use crate::format::{bytes, micros, millis};

/// Everything about one migration. Its JSON form is stable: fields are added, not
/// changed.
#[derive(Debug, Clone, Default, PartialEq, Serialize)]
pub(crate) struct Report {
    /// migrated, refused, cancelled, failed, handed-back, unknown
    pub(crate) outcome: String,
    pub(crate) migration_id: String,
    pub(crate) namespace: String,
    pub(crate) container: String,
    pub(crate) source: String,
    pub(crate) destination: String,
    /// Where it failed, who failed, why.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) failure: Option<Failure>,
    /// Why it was refused.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub(crate) refusals: Vec<Refusal>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub(crate) notices: Vec<String>,
    pub(crate) phases: Vec<Phase>,
    pub(crate) laps: Vec<Lap>,
    /// Sent because the destination lacked the image.
    pub(crate) image_copied_bytes: u64,
    #[serde(flatten)]
    pub(crate) summary: Option<Summary>,
    pub(crate) total_ms: u64,
}

#[derive(Debug, Clone, PartialEq, Serialize)]
pub(crate) struct Failure {
    pub(crate) phase: String,
    pub(crate) side: String,
    pub(crate) reason: String,
}

#[derive(Debug, Clone, PartialEq, Serialize)]
pub(crate) struct Refusal {
    pub(crate) subject: String,
    pub(crate) text: String,
}

#[derive(Debug, Clone, PartialEq, Serialize)]
pub(crate) struct Phase {
    pub(crate) name: String,
    pub(crate) began_ms: u64,
    pub(crate) duration_ms: u64,
}

#[derive(Debug, Clone, PartialEq, Serialize)]
pub(crate) struct Lap {
    pub(crate) number: u32,
    pub(crate) pages: u64,
    pub(crate) zero_pages: u64,
    pub(crate) bytes: u64,
    pub(crate) duration_ms: u64,
    pub(crate) expected_blackout_ms: u64,
}

#[derive(Debug, Clone, PartialEq, Serialize)]
pub(crate) struct Summary {
    /// userfaultfd, or none: stop-and-copy
    pub(crate) tracking: String,
    pub(crate) memory_bytes: u64,
    pub(crate) sent_bytes: u64,
    pub(crate) layer_bytes: u64,
    /// CRIU's images.
    pub(crate) image_bytes: u64,
    pub(crate) final_pages: u64,
    pub(crate) freeze_ms: f64,
    /// Until CRIU went on.
    pub(crate) claim_ms: f64,
    pub(crate) final_lap_ms: f64,
    pub(crate) dump_ms: f64,
    /// From the end of the dump to the account of everything.
    pub(crate) images_ms: f64,
    pub(crate) prepare_ms: f64,
    /// From the commit to the tasks being let go.
    pub(crate) let_go_ms: f64,
    pub(crate) restore_ms: f64,
    /// An upper bound, by the source's clock.
    pub(crate) blackout_ms: f64,
}

fn ms(micros: u64) -> f64 {
    micros as f64 / 1000.0
}

impl Report {
    /// Of a migration that sternad did not take on, or was not there to take on.
    pub(crate) fn not_begun(
        container: ContainerName,
        destination: &str,
        exit: Exit,
        reason: String,
    ) -> Self {
        let mut report = Self {
            namespace: container.namespace,
            container: container.id,
            destination: destination.into(),
            ..Self::default()
        };
        if let Exit::Refused | Exit::Usage = exit {
            report.outcome = "refused".into();
            report.refusals.push(Refusal {
                subject: "request".into(),
                text: reason,
            });
        } else {
            report.outcome = "failed".into();
            report.failure = Some(Failure {
                phase: "begin".into(),
                side: "source agent".into(),
                reason,
            });
        }
        report
    }

    /// Takes one event in.
    pub(crate) fn add(&mut self, event: &Event) {
        match event {
            Event::Accepted(accepted) => {
                let name = accepted.container.clone().unwrap_or_default();
                self.migration_id.clone_from(&accepted.migration_id);
                self.source.clone_from(&accepted.source);
                self.destination.clone_from(&accepted.destination);
                (self.namespace, self.container) = (name.namespace, name.id);
            }
            Event::ImageCopy(copy) => self.image_copied_bytes = copy.bytes_done,
            Event::Progress(progress) => self.add_progress(progress),
            Event::Refused(refused) => {
                self.outcome = "refused".into();
                self.refusals = refused
                    .reasons
                    .iter()
                    .map(|reason| Refusal {
                        subject: reason.subject.clone(),
                        text: reason.text.clone(),
                    })
                    .collect();
            }
            Event::Notice(text) => self.notices.push(text.clone()),
        }
    }

    fn add_progress(&mut self, progress: &epb::Progress) {
        let at_ms = progress.at_ms;
        self.total_ms = self.total_ms.max(at_ms);
        match &progress.event {
            Some(progress::Event::Phase(phase)) => {
                self.end_phase(at_ms);
                self.phases.push(Phase {
                    name: phase.phase.clone(),
                    began_ms: at_ms,
                    duration_ms: 0,
                });
            }
            Some(progress::Event::Lap(lap)) => self.laps.push(Lap {
                number: lap.number,
                pages: lap.pages,
                zero_pages: lap.zero_pages,
                bytes: lap.bytes,
                duration_ms: lap.duration_ms,
                expected_blackout_ms: lap.expected_blackout_ms,
            }),
            Some(progress::Event::Finished(finished)) => {
                self.end_phase(at_ms);
                self.finish(finished);
            }
            Some(progress::Event::Bytes(_)) | None => {}
        }
    }

    fn end_phase(&mut self, at_ms: u64) {
        if let Some(last) = self.phases.last_mut() {
            last.duration_ms = at_ms.saturating_sub(last.began_ms);
        }
    }

    fn finish(&mut self, finished: &epb::Finished) {
        self.outcome.clone_from(&finished.outcome);
        if finished.outcome != "migrated" {
            self.failure = Some(Failure {
                phase: finished.phase.clone(),
                side: finished.side.clone(),
                reason: finished.reason.clone(),
            });
        }
        if let Some(summary) = &finished.summary {
            self.total_ms = self.total_ms.max(summary.total_ms);
            self.summary = Some(Summary {
                tracking: summary.tracking.clone(),
                memory_bytes: summary.memory_bytes,
                sent_bytes: summary.sent_bytes,
                layer_bytes: summary.layer_bytes,
                image_bytes: summary.image_bytes,
                final_pages: summary.final_pages,
                freeze_ms: ms(summary.freeze_us),
                claim_ms: ms(summary.claim_us),
                final_lap_ms: ms(summary.final_lap_us),
                dump_ms: ms(summary.dump_us),
                images_ms: ms(summary.images_us),
                let_go_ms: ms(summary.let_go_us),
                prepare_ms: ms(summary.prepare_us),
                restore_ms: ms(summary.restore_us),
                blackout_ms: ms(summary.blackout_us),
            });
        }
    }

    pub(crate) fn exit(&self) -> Exit {
        match self.outcome.as_str() {
            "migrated" => Exit::Success,
            "refused" => Exit::Refused,
            "cancelled" => Exit::Cancelled,
            _ => Exit::Failed,
        }
    }

    /// The table at the end of a migration that worked.
    pub(crate) fn table(&self, out: &mut impl Write) -> io::Result<()> {
        let mut line = |name: &str, text: String| writeln!(out, "{name:10} {text}");
        line(
            "container",
            format!("{}/{}", self.namespace, self.container),
        )?;
        line("moved", format!("{} -> {}", self.source, self.destination))?;
        let phases: Vec<_> = self
            .phases
            .iter()
            .map(|phase| format!("{} {}", phase.name, millis(phase.duration_ms)))
            .collect();
        line("phases", phases.join(", "))?;
        if self.image_copied_bytes > 0 {
            line(
                "image",
                format!("{} copied", bytes(self.image_copied_bytes)),
            )?;
        }
        let laps: Vec<_> = self.laps.iter().map(|lap| bytes(lap.bytes)).collect();
        match laps.len() {
            0 => line("laps", "none: all memory moved in the freeze".into())?,
            count => line("laps", format!("{count}: {}", abbreviated(&laps)))?,
        }
        if let Some(summary) = &self.summary {
            line("tracking", summary.tracking.clone())?;
            line(
                "memory",
                format!(
                    "{}, {} sent",
                    bytes(summary.memory_bytes),
                    bytes(summary.sent_bytes)
                ),
            )?;
            line(
                "files",
                format!(
                    "{} written by the container, {} of state",
                    bytes(summary.layer_bytes),
                    bytes(summary.image_bytes)
                ),
            )?;
            let us = |ms: f64| micros((ms * 1000.0) as u64);
            line(
                "freeze",
                format!(
                    "{} (claim {}, final pages {}, dump {}, images {})",
                    us(summary.freeze_ms),
                    us(summary.claim_ms),
                    us(summary.final_lap_ms),
                    us(summary.dump_ms),
                    us(summary.images_ms)
                ),
            )?;
            line(
                "blackout",
                format!(
                    "at most {} (prepare {}, let go {}, restore {})",
                    us(summary.blackout_ms),
                    us(summary.prepare_ms),
                    us(summary.let_go_ms),
                    us(summary.restore_ms)
                ),
            )?;
        }
        line("total", millis(self.total_ms))
    }

    /// What to say when it did not work.
    pub(crate) fn complaint(&self) -> String {
        let name = format!("{}/{}", self.namespace, self.container);
        let stays = format!("container {name} goes on on node {}", self.source);
        match (&*self.outcome, &self.failure) {
            ("refused", _) => {
                let mut text =
                    format!("container {name} cannot move to node {}:", self.destination);
                for refusal in &self.refusals {
                    text.push_str(&format!("\n  {}: {}", refusal.subject, refusal.text));
                }
                text
            }
            ("cancelled", Some(failure)) => {
                format!(
                    "cancelled in phase {}: {}; {stays}",
                    failure.phase, failure.reason
                )
            }
            ("unknown", Some(failure)) => {
                format!(
                    "{} failed in phase {}: {}",
                    failure.side, failure.phase, failure.reason
                )
            }
            (_, Some(failure)) => format!(
                "{} failed in phase {}: {}; {stays}",
                failure.side, failure.phase, failure.reason
            ),
            // Sternad ended before the migration did, or we were told to leave.
            _ => "how the migration ends is not known here: sterna ps shows where the container is"
                .into(),
        }
    }
}

/// A long list by its beginning and end.
fn abbreviated(items: &[String]) -> String {
    const SHOWN: usize = 8;
    if items.len() <= SHOWN {
        return items.join(", ");
    }
    let (first, last) = (&items[..SHOWN / 2], &items[items.len() - SHOWN / 2..]);
    format!("{}, ..., {}", first.join(", "), last.join(", "))
}

#[cfg(test)]
mod tests {
    use proto::agent as pb;

    use super::*;

    fn at(at_ms: u64, event: progress::Event) -> Event {
        Event::Progress(epb::Progress {
            at_ms,
            event: Some(event),
        })
    }

    fn phase(at_ms: u64, name: &str) -> Event {
        at(
            at_ms,
            progress::Event::Phase(epb::PhaseBegun { phase: name.into() }),
        )
    }

    fn accepted() -> Event {
        Event::Accepted(pb::Accepted {
            migration_id: "m".into(),
            source: "a".into(),
            destination: "b".into(),
            container: Some(pb::ContainerName {
                namespace: "default".into(),
                id: "web".into(),
            }),
        })
    }

    fn finished(outcome: &str) -> epb::Finished {
        epb::Finished {
            outcome: outcome.into(),
            ..Default::default()
        }
    }

    fn migrated() -> Report {
        let lap = |number, bytes| {
            progress::Event::Lap(epb::Lap {
                number,
                bytes,
                pages: bytes / 4096,
                ..Default::default()
            })
        };
        let mut done = finished("migrated");
        done.summary = Some(epb::Summary {
            tracking: "userfaultfd".into(),
            memory_bytes: 1 << 30,
            sent_bytes: 1100 << 20,
            freeze_us: 62_000,
            blackout_us: 110_500,
            total_ms: 2600,
            ..Default::default()
        });
        let mut report = Report::default();
        for event in [
            accepted(),
            phase(0, "negotiate"),
            phase(100, "prepare"),
            phase(400, "pre-copy"),
            at(1400, lap(1, 1 << 30)),
            at(1500, lap(2, 4 << 20)),
            phase(2000, "freeze"),
            at(2600, progress::Event::Finished(done)),
        ] {
            report.add(&event);
        }
        report
    }

    #[test]
    fn a_migration_that_worked_has_phases_laps_freeze_and_blackout() {
        let report = migrated();
        assert_eq!(report.exit(), Exit::Success);
        let mut out = Vec::new();
        report.table(&mut out).unwrap();
        let text = String::from_utf8(out).unwrap();
        for expected in [
            "default/web",
            "a -> b",
            "negotiate 100 ms, prepare 300 ms, pre-copy 1.6 s, freeze 600 ms",
            "2: 1.0 GiB, 4.0 MiB",
            "62 ms",
            "at most 110 ms",
            "2.6 s",
        ] {
            assert!(text.contains(expected), "{expected} in {text}");
        }
    }

    #[test]
    fn json_has_what_scripts_need_at_the_top() {
        let value = serde_json::to_value(migrated()).unwrap();
        assert_eq!(value["outcome"], "migrated");
        assert_eq!(value["freeze_ms"], 62.0);
        assert_eq!(value["blackout_ms"], 110.5);
        assert_eq!(value["memory_bytes"], 1u64 << 30);
        assert_eq!(value["laps"][1]["bytes"], 4u64 << 20);
        assert!(value.get("failure").is_none());
    }

    #[test]
    fn a_failure_says_who_where_why_and_that_the_container_goes_on() {
        let mut report = Report::default();
        report.add(&accepted());
        report.add(&at(
            5,
            progress::Event::Finished(epb::Finished {
                phase: "pre-copy".into(),
                side: "destination agent".into(),
                reason: "sternad of node b is not running".into(),
                ..finished("failed")
            }),
        ));
        assert_eq!(report.exit(), Exit::Failed);
        assert_eq!(
            report.complaint(),
            "destination agent failed in phase pre-copy: sternad of node b is not running; \
             container default/web goes on on node a"
        );
    }

    #[test]
    fn a_refusal_lists_all_reasons_and_a_cancellation_is_neither() {
        let mut report = Report::default();
        report.add(&accepted());
        let reason = |subject: &str| pb::Reason {
            subject: subject.into(),
            text: "no".into(),
        };
        report.add(&Event::Refused(pb::Refused {
            reasons: vec![reason("cpu"), reason("memory")],
        }));
        assert_eq!(report.exit(), Exit::Refused);
        assert!(
            report
                .complaint()
                .ends_with("to node b:\n  cpu: no\n  memory: no")
        );

        let mut report = Report::default();
        report.add(&at(5, progress::Event::Finished(finished("cancelled"))));
        assert_eq!(report.exit(), Exit::Cancelled);
    }

    #[test]
    fn what_was_not_begun_has_an_outcome_and_a_reason() {
        let report = |exit| {
            let name = ContainerName {
                namespace: String::new(),
                id: "web".into(),
            };
            let report = Report::not_begun(name, "b", exit, "no".into());
            serde_json::to_value(report).unwrap()
        };
        let refused = report(Exit::Refused);
        assert_eq!(refused["outcome"], "refused");
        assert_eq!(refused["container"], "web");
        assert_eq!(refused["refusals"][0]["text"], "no");
        let failed = report(Exit::NoAgent);
        assert_eq!(failed["outcome"], "failed");
        assert_eq!(failed["failure"]["reason"], "no");
    }

    #[test]
    fn a_stream_that_ends_early_is_a_failure() {
        let report = Report::default();
        assert_eq!(report.exit(), Exit::Failed);
        assert!(report.complaint().contains("sterna ps"));
    }

    #[test]
    fn many_laps_are_abbreviated() {
        let many: Vec<_> = (1..=20).map(|n| n.to_string()).collect();
        assert_eq!(abbreviated(&many), "1, 2, 3, 4, ..., 17, 18, 19, 20");
    }
}
