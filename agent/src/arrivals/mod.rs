//! Containers on their way to this node.
//!
//! ```text
//! Begin ──> Begun ──Prepare──> Prepared ──started──> Over (arrived)
//!             │                   │
//!             └──── abort, the caller is gone ──> Over (nothing was made)
//!                                 │
//!                                 └── start failed, abort ──> Over (taken back)
//! ```
//!
//! Whoever moves an arrival to `Over` owns what was made for it. After `Prepared`
//! it is the two engines that know whether the container has come: sternad takes
//! nothing back unless the start failed or the source, which has it then, says so.

pub(crate) mod admission;
pub(crate) mod plan;
mod pod;
pub(crate) mod prepare;

use std::collections::HashMap;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use nodeapi::Ticket;
use proto::agent as pb;
use tokio::sync::{Mutex, watch};
use tokio_util::sync::CancellationToken;
use tonic::Status;
use tracing::Instrument as _;

use self::admission::Fate;
use self::plan::{BlobPlan, Plan};
use self::prepare::Made;
use crate::containerd::content::BlobWriter;
use crate::node::Node;
use crate::pods::{Place, Pods};
use crate::side::{Failure, Side};

/// A source that began and then neither holds nor prepares is gone.
const BEGUN_LIFETIME: Duration = Duration::from_secs(60);

/// How long the outcome can be asked for.
const OVER_LIFETIME: Duration = Duration::from_secs(120);

/// How often the shim's record is looked at while containerd is away.
const FATE_PAUSE: Duration = Duration::from_millis(500);

/// Taking back is tried again while containerd is away.
const TAKE_BACK_PAUSE: Duration = Duration::from_secs(2);
const TAKE_BACK_LIMIT: Duration = Duration::from_secs(600);

/// What became of an arrival.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Outcome {
    Arrived { pid: u32 },
    Failed(Failure),
}

#[derive(Debug)]
enum Stage {
    Begun,
    Prepared { made: Box<Made>, ticket: Ticket },
    Over,
}

/// One container on its way.
#[derive(Debug)]
pub(crate) struct Arrival {
    plan: Plan,
    missing: Vec<BlobPlan>,
    /// The container of the pod that gets it, once there is one.
    place: OnceLock<Place>,
    stage: Mutex<Stage>,
    outcome: watch::Sender<Option<Outcome>>,
    /// Set once all has been done for it: whether nothing of a failed one is left.
    settled: watch::Sender<Option<bool>>,
    holders: AtomicUsize,
    aborted: CancellationToken,
}

impl Arrival {
    /// Waits for the outcome.
    pub(crate) async fn outcome(&self) -> Outcome {
        let mut outcome = self.outcome.subscribe();
        loop {
            if let Some(outcome) = &*outcome.borrow_and_update() {
                return outcome.clone();
            }
            // The sender is in `self`.
            drop(outcome.changed().await);
        }
    }

    /// containerd's id of the container; none until a pod's is made.
    fn id(&self) -> &str {
        self.place
            .get()
            .map_or_else(|| self.plan.id(), |place| &place.id)
    }

    /// Whether both are about the same container.
    fn is_about(&self, plan: &Plan) -> bool {
        match (&self.plan.pod, &plan.pod) {
            (Some(own), Some(other)) => {
                (&own.uid, &own.container) == (&other.uid, &other.container)
            }
            (None, None) => self.plan.namespace == plan.namespace && self.plan.id() == plan.id(),
            _ => false,
        }
    }

    fn span(&self) -> tracing::Span {
        tracing::info_span!(
            "arrival",
            migration_id = self.plan.migration_id,
            namespace = self.plan.namespace,
            container = self
                .plan
                .pod
                .as_ref()
                .map_or(self.plan.id(), |pod| &pod.pod),
            from = self.plan.source_node,
        )
    }
}

/// All containers on their way to this node, by migration.
#[derive(Debug)]
pub(crate) struct Arrivals {
    node: Arc<Node>,
    pods: Arc<Pods>,
    all: Mutex<HashMap<String, Arc<Arrival>>>,
}

impl Arrivals {
    pub(crate) fn new(node: Arc<Node>, pods: Arc<Pods>) -> Arc<Self> {
        Arc::new(Self {
            node,
            pods,
            all: Mutex::default(),
        })
    }

    /// Migration and source node of a container that is on its way here.
    pub(crate) async fn find(&self, namespace: &str, id: &str) -> Option<(String, String)> {
        let all = self.all.lock().await;
        all.values()
            .filter(|arrival| arrival.outcome.borrow().is_none())
            .find(|arrival| arrival.plan.namespace == namespace && arrival.id() == id)
            .map(|arrival| {
                (
                    arrival.plan.migration_id.clone(),
                    arrival.plan.source_node.clone(),
                )
            })
    }

    /// Negotiates.
    pub(crate) async fn begin(
        self: &Arc<Self>,
        source: &str,
        request: pb::BeginRequest,
    ) -> Result<pb::BeginResponse, Status> {
        if let Ok(arrival) = self.get(source, &request.migration_id).await {
            return Ok(answer(&arrival.missing));
        }
        let plan = Plan::parse(source, request)
            .map_err(|error| Status::invalid_argument(format!("{error:#}")))?;
        self.wait_for_take_back(&plan).await;
        let refusals = match plan.pod {
            Some(_) => pod::refusals(&self.node, &plan).await,
            None => admission::refusals(&self.node, &plan).await,
        };
        let refusals = refusals.map_err(internal)?;
        if !refusals.is_empty() {
            return Ok(pb::BeginResponse {
                refusals,
                missing_blobs: Vec::new(),
            });
        }
        let missing = match plan.pod {
            Some(_) => Vec::new(),
            None => admission::missing_blobs(&self.node, &plan)
                .await
                .map_err(internal)?,
        };
        let response = answer(&missing);
        let arrival = Arc::new(Arrival {
            plan,
            missing,
            place: OnceLock::new(),
            stage: Mutex::new(Stage::Begun),
            outcome: watch::Sender::new(None),
            settled: watch::Sender::new(None),
            holders: AtomicUsize::new(0),
            aborted: CancellationToken::new(),
        });
        {
            let mut all = self.all.lock().await;
            let busy = all
                .values()
                .filter(|other| other.outcome.borrow().is_none());
            if busy.clone().count() >= self.node.config.limits.incoming {
                let text = format!(
                    "{} containers are on their way here already (limits.incoming)",
                    self.node.config.limits.incoming
                );
                return Ok(refused("agent", text));
            }
            for other in busy {
                if other.is_about(&arrival.plan) {
                    let text = format!(
                        "the same container is on its way here already from {}",
                        other.plan.source_node
                    );
                    return Ok(refused("container", text));
                }
            }
            all.insert(arrival.plan.migration_id.clone(), Arc::clone(&arrival));
        }
        if let Some(pod) = &arrival.plan.pod {
            self.pods.comes(pod);
        }
        tracing::info!(parent: &arrival.span(), blobs = arrival.missing.len(), "accepted");
        let this = Arc::clone(self);
        tokio::spawn(async move {
            tokio::time::sleep(BEGUN_LIFETIME).await;
            if arrival.holders.load(Ordering::Relaxed) == 0 {
                this.forget_unprepared(&arrival).await;
            }
        });
        Ok(response)
    }

    /// An earlier migration of the same container may still be taken back.
    async fn wait_for_take_back(&self, plan: &Plan) {
        let earlier: Vec<_> = self.all.lock().await.values().cloned().collect();
        for arrival in earlier {
            let same = arrival.is_about(plan);
            let failed = matches!(*arrival.outcome.borrow(), Some(Outcome::Failed(_)));
            if same && failed {
                let mut settled = arrival.settled.subscribe();
                // Afterwards leftovers are found and judged like any others.
                drop(
                    tokio::time::timeout(
                        Duration::from_secs(15),
                        settled.wait_for(Option::is_some),
                    )
                    .await,
                );
            }
        }
    }

    /// An arrival by its migration, if it is of that source.
    async fn get(&self, source: &str, migration_id: &str) -> Result<Arc<Arrival>, Status> {
        let all = self.all.lock().await;
        let arrival = all
            .get(migration_id)
            .ok_or_else(|| Status::not_found("this migration is not known here"))?;
        if arrival.plan.source_node != source {
            return Err(Status::permission_denied(
                "this migration is another node's",
            ));
        }
        Ok(Arc::clone(arrival))
    }

    /// Opens one of the blobs that were asked for. `None`: it is there already.
    /// The second value is the size that must come.
    pub(crate) async fn open_blob(
        &self,
        source: &str,
        migration_id: &str,
        digest: &str,
    ) -> Result<(Option<BlobWriter>, u64), Status> {
        let arrival = self.get(source, migration_id).await?;
        let blob = arrival
            .missing
            .iter()
            .find(|blob| blob.digest == digest)
            .ok_or_else(|| Status::invalid_argument(format!("blob {digest} was not asked for")))?;
        let open = async {
            let containerd = self.node.containerd.namespace(&arrival.plan.namespace)?;
            let leased = containerd.lease(&prepare::lease_id(migration_id)).await?;
            anyhow::Ok(
                leased
                    .write_blob(migration_id, &blob.digest, blob.size)
                    .await?,
            )
        };
        Ok((open.await.map_err(internal)?, blob.size))
    }

    /// Makes everything ready, and starts to wait for the container.
    pub(crate) async fn prepare(
        self: &Arc<Self>,
        source: &str,
        migration_id: &str,
    ) -> Result<Ticket, Status> {
        let arrival = self.get(source, migration_id).await?;
        let span = arrival.span();
        let this = Arc::clone(self);
        // A caller that goes away must not leave it half done.
        let work = tokio::spawn(async move { this.prepare_whole(arrival).await }.instrument(span));
        match work.await {
            Ok(Ok(ticket)) => Ok(ticket),
            Ok(Err(failure)) => Err(status_of(&failure)),
            Err(_) => Err(Status::internal("preparing ended in a panic")),
        }
    }

    async fn prepare_whole(self: &Arc<Self>, arrival: Arc<Arrival>) -> Result<Ticket, Failure> {
        let mut stage = arrival.stage.lock().await;
        match &*stage {
            Stage::Prepared { ticket, .. } => return Ok(ticket.clone()),
            Stage::Over => {
                return Err(Failure::new(
                    Side::DestinationAgent,
                    "the migration is over",
                ));
            }
            Stage::Begun => {}
        }
        let plan = &arrival.plan;
        let mut made = Made {
            namespace: plan.namespace.clone(),
            id: plan.id().to_owned(),
            migration_id: plan.migration_id.clone(),
            pod: plan.pod.is_some(),
            ..Made::default()
        };
        let preparing = async {
            match &plan.pod {
                None => prepare::prepare(&self.node, plan, &mut made).await,
                Some(container) => {
                    let place = &arrival.place;
                    pod::prepare(&self.node, &self.pods, plan, container, place, &mut made).await
                }
            }
        };
        let prepared = tokio::select! {
            prepared = preparing => prepared,
            () = arrival.aborted.cancelled() => Err(anyhow::anyhow!("the source gave up")),
        };
        match prepared {
            Ok(ticket) => {
                *stage = Stage::Prepared {
                    made: Box::new(made),
                    ticket: ticket.clone(),
                };
                drop(stage);
                tracing::info!("prepared");
                let this = Arc::clone(self);
                let span = tracing::Span::current();
                tokio::spawn(async move { this.start(arrival).await }.instrument(span));
                Ok(ticket)
            }
            Err(error) => {
                // Creating the task is the last step, and the shim's.
                let ours = if made.task {
                    Side::DestinationShim
                } else {
                    Side::DestinationAgent
                };
                let failure = Failure::local(&error, ours, Side::DestinationContainerd);
                *stage = Stage::Over;
                drop(stage);
                let (this, answer) = (Arc::clone(self), failure.clone());
                tokio::spawn(
                    async move { this.failed(&arrival, failure, made).await }.in_current_span(),
                );
                Err(answer)
            }
        }
    }

    /// Waits until the container runs or will not.
    async fn start(self: Arc<Self>, arrival: Arc<Arrival>) {
        if arrival.plan.pod.is_some() {
            return self.see_started(arrival).await;
        }
        let started = match self.node.containerd.namespace(&arrival.plan.namespace) {
            Ok(containerd) => containerd
                .start_task(arrival.plan.id())
                .await
                .map_err(anyhow::Error::from),
            Err(error) => Err(error),
        };
        let mut stage = arrival.stage.lock().await;
        let Stage::Prepared { made, .. } = std::mem::replace(&mut *stage, Stage::Over) else {
            return; // aborted, and taken back by whoever aborted it
        };
        drop(stage);
        match started {
            Ok(pid) => {
                tracing::info!(pid, "arrived");
                arrival.outcome.send_replace(Some(Outcome::Arrived { pid }));
                self.arrived(&arrival).await;
            }
            Err(error) => {
                let failure =
                    Failure::local(&error, Side::DestinationShim, Side::DestinationContainerd);
                self.say_failed(&arrival, failure);
                // N.B. containerd did not answer, or knows less than the shim: a
                // container that came all the same may be the only copy.
                match self.fate(&arrival).await {
                    Fate::Here => self.arrived(&arrival).await,
                    Fate::Gone | Fate::OnItsWay => self.take_back(&arrival, *made).await,
                }
            }
        }
    }

    /// As [`start`](Self::start), of a container that its kubelet starts.
    async fn see_started(self: Arc<Self>, arrival: Arc<Arrival>) {
        let namespace = &arrival.plan.namespace;
        let started = pod::until_it_runs(&self.node, namespace, arrival.id()).await;
        let mut stage = arrival.stage.lock().await;
        let Stage::Prepared { made, .. } = std::mem::replace(&mut *stage, Stage::Over) else {
            return; // aborted, and taken back by whoever aborted it
        };
        drop(stage);
        match started {
            Ok(pid) => {
                tracing::info!(pid, "arrived");
                if let Some(pod) = &arrival.plan.pod {
                    self.pods.came(pod);
                }
                arrival.outcome.send_replace(Some(Outcome::Arrived { pid }));
                arrival.settled.send_replace(Some(true));
                self.forget_later(&arrival).await;
            }
            Err(reason) => {
                let failure = Failure::new(Side::DestinationShim, reason);
                self.failed(&arrival, failure, *made).await;
            }
        }
    }

    fn say_failed(&self, arrival: &Arrival, failure: Failure) {
        tracing::warn!(
            side = failure.side.name(),
            reason = failure.reason,
            "did not arrive"
        );
        if let Some(pod) = &arrival.plan.pod {
            self.pods.failed(pod, &failure.reason);
        }
        arrival.outcome.send_replace(Some(Outcome::Failed(failure)));
    }

    /// Waits until the shim knows what has become of the container: while it is
    /// on its way its engine has the timeouts.
    async fn fate(&self, arrival: &Arrival) -> Fate {
        loop {
            match admission::fate(&self.node, &arrival.plan.namespace, arrival.plan.id()) {
                Ok(Fate::OnItsWay) => {}
                Ok(fate) => return fate,
                Err(error) => {
                    tracing::warn!("cannot tell whether the container has arrived: {error}");
                }
            }
            tokio::time::sleep(FATE_PAUSE).await;
        }
    }

    async fn arrived(&self, arrival: &Arc<Arrival>) {
        let mark = || async {
            let containerd = self.node.containerd.namespace(&arrival.plan.namespace)?;
            let id = arrival.plan.id();
            prepare::mark_arrived(&containerd, id, &arrival.plan.container.labels).await
        };
        let marked = retry("take the label of arriving containers off", mark).await;
        arrival.settled.send_replace(Some(marked));
        self.forget_later(arrival).await;
    }

    /// Says so, takes back, forgets.
    async fn failed(&self, arrival: &Arc<Arrival>, failure: Failure, made: Made) {
        self.say_failed(arrival, failure);
        self.take_back(arrival, made).await;
    }

    async fn take_back(&self, arrival: &Arc<Arrival>, made: Made) {
        let work = || prepare::take_back(&self.node, &made);
        let clean = retry("take back what was prepared", work).await;
        let has_run = prepare::has_run(&self.node, &made).unwrap_or_else(|error| {
            tracing::error!("cannot tell whether it has run: {error:#}");
            true
        });
        let vouched = clean && !has_run;
        arrival.settled.send_replace(Some(vouched));
        self.forget_later(arrival).await;
    }

    async fn forget_later(&self, arrival: &Arc<Arrival>) {
        tokio::time::sleep(OVER_LIFETIME).await;
        self.all.lock().await.remove(&arrival.plan.migration_id);
    }

    /// Lets go of an arrival for which nothing but blobs was made.
    async fn forget_unprepared(&self, arrival: &Arc<Arrival>) {
        // While it is being prepared the lock is taken; what happens then is
        // decided there.
        let Ok(mut stage) = arrival.stage.try_lock() else {
            return;
        };
        if !matches!(*stage, Stage::Begun) {
            return;
        }
        *stage = Stage::Over;
        drop(stage);
        self.say_failed(arrival, Failure::new(Side::Source, "the source went away"));
        let made = Made {
            namespace: arrival.plan.namespace.clone(),
            migration_id: arrival.plan.migration_id.clone(),
            lease: true,
            ..Made::default()
        };
        let let_go = async {
            let containerd = self.node.containerd.namespace(&made.namespace)?;
            for blob in &arrival.missing {
                containerd
                    .discard_blob(&made.migration_id, &blob.digest)
                    .await?;
            }
            prepare::take_back(&self.node, &made).await
        };
        if let Err(error) = let_go.await {
            tracing::warn!(parent: &arrival.span(), "cannot let go of the image: {error:#}");
        }
        arrival.settled.send_replace(Some(true));
        self.all.lock().await.remove(&arrival.plan.migration_id);
    }

    /// The source gives up a migration that was not committed.
    pub(crate) async fn abort(
        self: &Arc<Self>,
        source: &str,
        migration_id: &str,
        reason: &str,
    ) -> Result<(), Status> {
        let arrival = match self.get(source, migration_id).await {
            Ok(arrival) => arrival,
            Err(status) if status.code() == tonic::Code::NotFound => return Ok(()),
            Err(status) => return Err(status),
        };
        let plan = &arrival.plan;
        let fate = admission::fate(&self.node, &plan.namespace, arrival.id());
        if matches!(fate, Ok(Fate::Here)) {
            return Err(Status::failed_precondition("the container has arrived"));
        }
        arrival.aborted.cancel();
        let this = Arc::clone(self);
        let reason = reason.to_owned();
        let span = arrival.span();
        let work = async move {
            let mut stage = arrival.stage.lock().await;
            match std::mem::replace(&mut *stage, Stage::Over) {
                Stage::Begun => {
                    *stage = Stage::Begun;
                    drop(stage);
                    this.forget_unprepared(&arrival).await;
                }
                Stage::Prepared { made, .. } => {
                    drop(stage);
                    let failure = Failure::new(Side::Source, reason);
                    let waiting = Arc::clone(&arrival);
                    tokio::spawn(
                        async move { this.failed(&waiting, failure, *made).await }
                            .in_current_span(),
                    );
                }
                // Whoever made it so takes back.
                Stage::Over => drop(stage),
            }
            // The answer means that nothing is left.
            drop(arrival.settled.subscribe().wait_for(Option::is_some).await);
        };
        drop(tokio::spawn(work.instrument(span)).await);
        Ok(())
    }

    /// Someone watches this arrival; see [`Holder`].
    pub(crate) async fn hold(
        self: &Arc<Self>,
        source: &str,
        migration_id: &str,
    ) -> Result<Holder, Status> {
        let arrival = self.get(source, migration_id).await?;
        arrival.holders.fetch_add(1, Ordering::Relaxed);
        Ok(Holder {
            arrivals: Arc::clone(self),
            arrival,
        })
    }
}

/// Keeps an unprepared arrival alive; with the last one it is forgotten.
#[derive(Debug)]
pub(crate) struct Holder {
    arrivals: Arc<Arrivals>,
    arrival: Arc<Arrival>,
}

impl Holder {
    pub(crate) async fn outcome(&self) -> Outcome {
        self.arrival.outcome().await
    }

    /// After a failure: waits until nothing is left of the container. False: that
    /// cannot be promised.
    pub(crate) async fn taken_back(&self) -> bool {
        let mut settled = self.arrival.settled.subscribe();
        // The sender is in the arrival.
        settled
            .wait_for(Option::is_some)
            .await
            .is_ok_and(|settled| *settled == Some(true))
    }
}

impl Drop for Holder {
    fn drop(&mut self) {
        if self.arrival.holders.fetch_sub(1, Ordering::Relaxed) == 1 {
            let (arrivals, arrival) = (Arc::clone(&self.arrivals), Arc::clone(&self.arrival));
            tokio::spawn(async move { arrivals.forget_unprepared(&arrival).await });
        }
    }
}

/// Tries again while containerd is away; whether it worked in the end.
async fn retry<F>(what: &'static str, work: impl Fn() -> F) -> bool
where
    F: Future<Output = anyhow::Result<()>>,
{
    let deadline = tokio::time::Instant::now() + TAKE_BACK_LIMIT;
    let mut warned = false;
    loop {
        let Err(error) = work().await else {
            return true;
        };
        if tokio::time::Instant::now() >= deadline {
            tracing::error!("cannot {what}, giving up: {error:#}");
            return false;
        }
        if !warned {
            tracing::warn!("cannot {what} yet: {error:#}");
            warned = true;
        }
        tokio::time::sleep(TAKE_BACK_PAUSE).await;
    }
}

fn answer(missing: &[BlobPlan]) -> pb::BeginResponse {
    pb::BeginResponse {
        refusals: Vec::new(),
        missing_blobs: missing.iter().map(|blob| blob.digest.clone()).collect(),
    }
}

fn refused(subject: &str, text: String) -> pb::BeginResponse {
    let reason = pb::Reason {
        subject: subject.into(),
        text,
    };
    pb::BeginResponse {
        refusals: vec![reason],
        missing_blobs: Vec::new(),
    }
}

/// Metadata key that says who failed.
pub(crate) const SIDE_KEY: &str = "sterna-side";

fn status_of(failure: &Failure) -> Status {
    let mut status = Status::internal(failure.reason.clone());
    if let Ok(side) = failure.side.name().parse() {
        status.metadata_mut().insert(SIDE_KEY, side);
    }
    status
}

/// An error on this node, for the other one.
pub(crate) fn internal(error: anyhow::Error) -> Status {
    status_of(&Failure::local(
        &error,
        Side::DestinationAgent,
        Side::DestinationContainerd,
    ))
}
