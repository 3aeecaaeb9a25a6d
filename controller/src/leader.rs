//! Who decides: whoever holds the Lease, which the chart makes.
//!
//! A holder renews every [`RENEW`]; who has not renewed for [`DURATION`] may be
//! replaced, and ends itself well before ([`GIVE_UP`]), so that two never decide.
//! A candidate measures by its own clock since it last saw the Lease change, never
//! by the time in it: clocks of nodes differ.

use std::time::Duration;

use anyhow::{Context as _, anyhow};
use k8s_openapi::api::coordination::v1::{Lease, LeaseSpec};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::MicroTime;
use kube::api::{Api, PostParams};
use tokio::time::Instant;

const NAME: &str = "sterna-controller";
const DURATION: Duration = Duration::from_secs(15);
const GIVE_UP: Duration = Duration::from_secs(10);
const RENEW: Duration = Duration::from_secs(3);
/// For one request.
const TIMEOUT: Duration = Duration::from_secs(3);

/// What a candidate remembers of the Lease.
#[derive(Debug, Clone, PartialEq)]
struct Seen {
    holder: Option<String>,
    renewed: Option<MicroTime>,
    /// When it was first seen like this.
    at: Instant,
}

/// What a candidate does.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Step {
    Take,
    Wait,
}

/// Whether a Lease may be taken, from how it was seen before and how it is.
fn next(seen: Option<&Seen>, lease: Option<&LeaseSpec>, me: &str, now: Instant) -> (Step, Seen) {
    let holder = lease.and_then(|lease| lease.holder_identity.clone());
    let renewed = lease.and_then(|lease| lease.renew_time.clone());
    let at = match seen {
        Some(seen) if seen.holder == holder && seen.renewed == renewed => seen.at,
        _ => now,
    };
    let free = holder
        .as_deref()
        .is_none_or(|holder| holder.is_empty() || holder == me);
    let step = if free || now.duration_since(at) >= DURATION {
        Step::Take
    } else {
        Step::Wait
    };
    (
        step,
        Seen {
            holder,
            renewed,
            at,
        },
    )
}

#[derive(Debug, Clone)]
pub(crate) struct Election {
    leases: Api<Lease>,
    me: String,
}

/// The Lease is ours.
#[derive(Debug)]
pub(crate) struct Held {
    election: Election,
    lease: Lease,
}

impl Election {
    pub(crate) fn new(client: kube::Client, namespace: &str, me: &str) -> Self {
        Self {
            leases: Api::namespaced(client, namespace),
            me: me.to_owned(),
        }
    }

    /// Waits until the Lease is ours.
    pub(crate) async fn acquire(&self) -> Held {
        let mut seen = None;
        loop {
            match self.try_acquire(&mut seen).await {
                Ok(Some(lease)) => {
                    return Held {
                        election: self.clone(),
                        lease,
                    };
                }
                Ok(None) => (),
                Err(error) => tracing::warn!(error = format!("{error:#}"), "try to lead"),
            }
            tokio::time::sleep(RENEW).await;
        }
    }

    async fn try_acquire(&self, seen: &mut Option<Seen>) -> anyhow::Result<Option<Lease>> {
        let mut lease = timed(self.leases.get(NAME))
            .await
            .context("get the Lease")?;
        let spec = lease.spec.as_ref();
        let (step, now_seen) = next(seen.as_ref(), spec, &self.me, Instant::now());
        *seen = Some(now_seen);
        if step == Step::Wait {
            return Ok(None);
        }
        let spec = lease.spec.get_or_insert_default();
        if spec.holder_identity.as_ref() != Some(&self.me) {
            spec.lease_transitions = Some(spec.lease_transitions.unwrap_or(0) + 1);
            spec.acquire_time = Some(MicroTime(jiff::Timestamp::now()));
        }
        self.sign(spec);
        let params = PostParams::default();
        // The resource version is that of what was read: only one candidate wins.
        match timed(self.leases.replace(NAME, &params, &lease)).await {
            Ok(lease) => Ok(Some(lease)),
            Err(error) if is_conflict(&error) => Ok(None),
            Err(error) => Err(error.context("take the Lease")),
        }
    }

    fn sign(&self, spec: &mut LeaseSpec) {
        spec.holder_identity = Some(self.me.clone());
        spec.lease_duration_seconds = i32::try_from(DURATION.as_secs()).ok();
        spec.renew_time = Some(MicroTime(jiff::Timestamp::now()));
    }

    /// Gives it back, if it is ours.
    pub(crate) async fn release(&self) {
        let Ok(Some(mut lease)) = self.leases.get_opt(NAME).await else {
            return;
        };
        let Some(spec) = lease.spec.as_mut() else {
            return;
        };
        if spec.holder_identity.as_ref() != Some(&self.me) {
            return;
        }
        spec.holder_identity = None;
        if let Err(error) = self
            .leases
            .replace(NAME, &PostParams::default(), &lease)
            .await
        {
            tracing::warn!(%error, "give the Lease back");
        }
    }
}

impl Held {
    /// Renews it; returns why it is ours no more.
    pub(crate) async fn lost(mut self) -> anyhow::Error {
        let mut renewed = Instant::now();
        loop {
            tokio::time::sleep(RENEW).await;
            let began = Instant::now();
            self.election.sign(self.lease.spec.get_or_insert_default());
            let leases = &self.election.leases;
            match timed(leases.replace(NAME, &PostParams::default(), &self.lease)).await {
                Ok(lease) => {
                    self.lease = lease;
                    renewed = began;
                }
                Err(error) if is_conflict(&error) => {
                    // Somebody took it, or our own last renewal got through unanswered.
                    match timed(leases.get(NAME)).await {
                        Ok(lease) => {
                            let holder = lease
                                .spec
                                .as_ref()
                                .and_then(|spec| spec.holder_identity.clone());
                            if holder.as_ref() != Some(&self.election.me) {
                                return anyhow!("the Lease is {}'s", holder.unwrap_or_default());
                            }
                            self.lease = lease;
                        }
                        Err(error) => tracing::warn!(error = format!("{error:#}"), "get the Lease"),
                    }
                }
                Err(error) => tracing::warn!(error = format!("{error:#}"), "renew the Lease"),
            }
            if renewed.elapsed() >= GIVE_UP {
                return anyhow!("the Lease could not be renewed for {GIVE_UP:?}");
            }
        }
    }
}

fn is_conflict(error: &anyhow::Error) -> bool {
    let error = error.downcast_ref::<kube::Error>();
    matches!(error, Some(kube::Error::Api(status)) if status.code == 409)
}

async fn timed<T>(request: impl Future<Output = Result<T, kube::Error>>) -> anyhow::Result<T> {
    tokio::time::timeout(TIMEOUT, request)
        .await
        .context("the API server does not answer")?
        .map_err(anyhow::Error::new)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn lease(holder: &str, renewed: i64) -> LeaseSpec {
        LeaseSpec {
            holder_identity: Some(holder.to_owned()),
            renew_time: Some(MicroTime(jiff::Timestamp::from_second(renewed).unwrap())),
            ..LeaseSpec::default()
        }
    }

    #[test]
    fn what_is_free_or_mine_is_taken_at_once() {
        let now = Instant::now();
        for of in [None, Some(lease("", 0)), Some(lease("me", 0))] {
            assert_eq!(next(None, of.as_ref(), "me", now).0, Step::Take, "{of:?}");
        }
    }

    #[test]
    fn anothers_is_taken_only_after_it_was_seen_unchanged_for_its_duration() {
        let now = Instant::now();
        let (step, seen) = next(None, Some(&lease("other", 1)), "me", now);
        assert_eq!(step, Step::Wait);
        let (step, _) = next(Some(&seen), Some(&lease("other", 1)), "me", now + DURATION);
        assert_eq!(step, Step::Take);
        // It was renewed meanwhile, whatever the time in it says.
        let (step, seen) = next(Some(&seen), Some(&lease("other", 0)), "me", now + DURATION);
        assert_eq!((step, seen.at), (Step::Wait, now + DURATION));
    }

    #[test]
    fn a_holder_gives_up_before_another_may_take_it() {
        assert!(GIVE_UP + TIMEOUT < DURATION);
    }
}
