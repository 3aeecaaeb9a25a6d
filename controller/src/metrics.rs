//! What is counted, in the Prometheus text format.

use prometheus_client::encoding::EncodeLabelSet;
use prometheus_client::encoding::text::encode;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::metrics::histogram::Histogram;
use prometheus_client::registry::{Registry, Unit};
use sterna_kube::{MigrationStatus, Phase, Trigger};

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct Outcome {
    result: &'static str,
    trigger: String,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct Kind {
    kind: &'static str,
}

/// All of the controller's.
#[derive(Debug)]
pub(crate) struct Metrics {
    registry: Registry,
    migrations: Family<Outcome, Counter>,
    in_flight: Gauge,
    blackout: Histogram,
    freeze: Histogram,
    sent_bytes: Counter,
    cold_starts: Counter,
    errors: Family<Kind, Counter>,
    leader: Gauge,
}

impl Metrics {
    pub(crate) fn new() -> Self {
        let buckets =
            || Histogram::new([0.025, 0.05, 0.1, 0.2, 0.4, 0.8, 1.5, 3.0, 6.0, 12.0, 60.0]);
        let mut all = Self {
            registry: Registry::with_prefix("sterna_controller"),
            migrations: Family::default(),
            in_flight: Gauge::default(),
            blackout: buckets(),
            freeze: buckets(),
            sent_bytes: Counter::default(),
            cold_starts: Counter::default(),
            errors: Family::default(),
            leader: Gauge::default(),
        };
        let registry = &mut all.registry;
        registry.register(
            "migrations",
            "Migrations that are over",
            all.migrations.clone(),
        );
        registry.register(
            "migrations_in_flight",
            "Migrations that are not",
            all.in_flight.clone(),
        );
        registry.register_with_unit(
            "blackout",
            "How long no copy of a container ran",
            Unit::Seconds,
            all.blackout.clone(),
        );
        registry.register_with_unit(
            "freeze",
            "How long the source was frozen until it was dumped",
            Unit::Seconds,
            all.freeze.clone(),
        );
        registry.register_with_unit(
            "sent",
            "What migrations sent over the network",
            Unit::Bytes,
            all.sent_bytes.clone(),
        );
        registry.register(
            "cold_starts",
            "Pods that should have been restored and started from nothing",
            all.cold_starts.clone(),
        );
        registry.register("errors", "What the API server refused", all.errors.clone());
        registry.register(
            "leader",
            "1 on the replica that decides",
            all.leader.clone(),
        );
        all
    }

    pub(crate) fn over(&self, trigger: Trigger, status: &MigrationStatus) {
        let result = match status.phase {
            Phase::Succeeded => "succeeded",
            Phase::Cancelled => "cancelled",
            _ => "failed",
        };
        let trigger = format!("{trigger:?}").to_lowercase();
        self.migrations
            .get_or_create(&Outcome { result, trigger })
            .inc();
        for container in status
            .transfer
            .iter()
            .flat_map(|transfer| &transfer.containers)
        {
            #[allow(
                clippy::cast_precision_loss,
                reason = "milliseconds of a blackout are few"
            )]
            let seconds = |milliseconds: u64| milliseconds as f64 / 1000.0;
            if let Some(blackout) = container.blackout_milliseconds {
                self.blackout.observe(seconds(blackout));
            }
            if let Some(freeze) = container.freeze_milliseconds {
                self.freeze.observe(seconds(freeze));
            }
            self.sent_bytes.inc_by(container.sent_bytes.unwrap_or(0));
        }
    }

    pub(crate) fn in_flight(&self, migrations: usize) {
        self.in_flight
            .set(i64::try_from(migrations).unwrap_or(i64::MAX));
    }

    pub(crate) fn cold_start(&self) {
        self.cold_starts.inc();
    }

    pub(crate) fn error(&self, kind: &'static str) {
        self.errors.get_or_create(&Kind { kind }).inc();
    }

    pub(crate) fn leads(&self, leads: bool) {
        self.leader.set(i64::from(leads));
    }

    /// As a scraper reads it.
    pub(crate) fn text(&self) -> String {
        let mut text = String::new();
        // Writing into a String cannot fail.
        if encode(&mut text, &self.registry).is_err() {
            text.clear();
        }
        text
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_migration_did_is_counted() {
        let metrics = Metrics::new();
        let status = serde_json::from_value(serde_json::json!({
            "phase": "Succeeded",
            "transfer": {"containers": [{"name": "cache", "sentBytes": 7, "blackoutMilliseconds": 150}]},
        }))
        .unwrap();
        metrics.over(Trigger::Eviction, &status);
        let text = metrics.text();
        for line in [
            r#"sterna_controller_migrations_total{result="succeeded",trigger="eviction"} 1"#,
            "sterna_controller_sent_bytes_total 7",
            r#"sterna_controller_blackout_seconds_bucket{le="0.2"} 1"#,
        ] {
            assert!(text.contains(line), "{line} is not in\n{text}");
        }
    }
}
