//! CRIU's part of a migration, seen from the sender's loop.
//!
//! A [`criu::DumpSession`] blocks and belongs to one thread; that thread lives
//! here and is talked to by messages.

use std::ops::Range;
use std::path::Path;
use std::sync::{Arc, mpsc as blocking};
use std::time::Duration;

use criu::{
    Action, DumpEvent, DumpRequest, DumpSession, Interceptor, Memory, MemorySlot, SeccompFilters,
    SeccompSlot, Tools,
};
use pages::Claims;
use tokio::sync::{mpsc, oneshot};

use crate::tmpfs::{self, Programs};

/// Longest time between two signs of life of CRIU.
const CRIU_TIMEOUT: Duration = Duration::from_secs(60);

/// Why there is no dump.
#[derive(Debug, Clone, thiserror::Error)]
pub(crate) enum DumpFailure {
    #[error("{0}")]
    Missing(String),
    #[error("{0}")]
    Failed(String),
    #[error("CRIU ended before {0:?}")]
    Ended(Action),
    #[error("the thread that drives CRIU is gone")]
    Gone,
}

/// A dump that is under way in a process of its own.
#[derive(Debug)]
pub(crate) struct Dump {
    news: mpsc::UnboundedReceiver<News>,
    orders: blocking::Sender<Order>,
    slots: Option<(MemorySlot, SeccompSlot)>,
    pending: bool,
    finished: bool,
}

#[derive(Debug)]
enum News {
    Ready(MemorySlot, SeccompSlot),
    Notify(Action),
    Finished(Result<(), DumpFailure>),
}

#[derive(Debug)]
enum Order {
    Answer(bool),
    StillWaits(oneshot::Sender<bool>),
}

/// What the page engine owns, in CRIU's terms.
struct Owned(Arc<Claims>);

impl Memory for Owned {
    fn owns(&self, pid: i32, range: Range<u64>) -> bool {
        self.0.owns(pid, range)
    }

    fn may_own(&self, pid: i32, range: Range<u64>) -> bool {
        self.0.may_own(pid, range)
    }

    fn stack_pages(&self, pid: i32) -> &[u64] {
        self.0.stack_pages(pid)
    }

    fn smaps(&self, pid: i32) -> Option<Vec<u8>> {
        self.0.smaps(pid)
    }
}

impl Dump {
    /// Starts CRIU on `request`, with `programs` before those of the system; it stops
    /// at [`Action::PreDump`], short of the tasks.
    pub(crate) fn spawn(
        request: DumpRequest,
        programs: Option<&Programs>,
    ) -> Result<Self, DumpFailure> {
        let programs = programs.map(|programs| programs.directory().to_owned());
        let (report, news) = mpsc::unbounded_channel();
        let (orders, ordered) = blocking::channel();
        std::thread::Builder::new()
            .name("criu".into())
            .spawn(move || {
                let result = drive(&request, programs.as_deref(), &report, &ordered);
                // Nobody may be left to hear it.
                drop(report.send(News::Finished(result)));
            })
            .map_err(|error| DumpFailure::Failed(error.to_string()))?;
        Ok(Self {
            news,
            orders,
            slots: None,
            pending: false,
            finished: false,
        })
    }

    /// Tells the interceptor what the page engine owns, and what seccomp filters
    /// the tasks have; once, while CRIU stands at [`Action::PreDump`].
    pub(crate) fn claim(&mut self, claims: Arc<Claims>, filters: SeccompFilters) {
        if let Some((memory, seccomp)) = self.slots.take() {
            memory.set(Arc::new(Owned(claims)));
            seccomp.set(filters);
        }
    }

    /// Lets CRIU go on until it stops at `action`; stops before it are let pass.
    pub(crate) async fn until(&mut self, action: Action) -> Result<(), DumpFailure> {
        loop {
            match self.news.recv().await {
                Some(News::Ready(memory, seccomp)) => self.slots = Some((memory, seccomp)),
                Some(News::Notify(reached)) => {
                    self.pending = true;
                    if reached == action {
                        return Ok(());
                    }
                    self.answer(true)?;
                }
                Some(News::Finished(result)) => {
                    self.finished = true;
                    return Err(result.err().unwrap_or(DumpFailure::Ended(action)));
                }
                None => return Err(DumpFailure::Gone),
            }
        }
    }

    /// Answers the stop that [`until`](Self::until) returned from.
    pub(crate) fn answer(&mut self, go_on: bool) -> Result<(), DumpFailure> {
        self.pending = false;
        self.orders
            .send(Order::Answer(go_on))
            .map_err(|_| DumpFailure::Gone)
    }

    /// Whether CRIU still holds the tasks at the stop that
    /// [`until`](Self::until) returned from.
    pub(crate) async fn still_waits(&self) -> bool {
        let (reply, answer) = oneshot::channel();
        self.orders.send(Order::StillWaits(reply)).is_ok() && answer.await.unwrap_or(false)
    }

    /// Ends the dump: with `true` at the commit point CRIU ends the tasks, with
    /// `false` it lets them go. Returns when CRIU is gone.
    pub(crate) async fn finish(&mut self, go_on: bool) -> Result<(), DumpFailure> {
        if self.finished {
            return Ok(());
        }
        if self.pending {
            self.answer(go_on)?;
        }
        loop {
            match self.news.recv().await {
                Some(News::Ready(..)) => {}
                Some(News::Notify(_)) => self.answer(go_on)?,
                Some(News::Finished(result)) => {
                    self.finished = true;
                    return result;
                }
                None => return Err(DumpFailure::Gone),
            }
        }
    }
}

fn drive(
    request: &DumpRequest,
    programs: Option<&Path>,
    report: &mpsc::UnboundedSender<News>,
    orders: &blocking::Receiver<Order>,
) -> Result<(), DumpFailure> {
    let mut tools =
        Tools::find().map_err(|error| DumpFailure::Missing(crate::error_chain(&error)))?;
    if let Some(programs) = programs {
        tools.search_path = tmpfs::before(programs, &tools.search_path);
    }
    // This very build, even if the file was replaced by another.
    let program = Path::new("/proc/self/exe");
    let mut session = DumpSession::spawn(program, &tools).map_err(|error| failed(&error))?;
    let listener = session.take_listener().ok_or(DumpFailure::Gone)?;
    let mut interceptor = Interceptor::new(listener);
    if request.has_external_network() {
        interceptor = interceptor.with_external_network();
    }
    // A sender that is gone shows at the first notification.
    let (memory, seccomp) = (interceptor.memory(), interceptor.seccomp());
    drop(report.send(News::Ready(memory, seccomp)));
    std::thread::scope(|scope| {
        let answering = scope.spawn(|| interceptor.run());
        let result = steps(&mut session, request, report, orders);
        // Lets CRIU go whatever happened, so that the interceptor ends.
        drop(session);
        match answering.join() {
            Ok(Ok(stats)) => tracing::info!(?stats, "answered CRIU's system calls"),
            Ok(Err(error)) => tracing::warn!(%error, "could not answer CRIU's system calls"),
            Err(_) => return Err(DumpFailure::Gone),
        }
        result
    })
}

fn steps(
    session: &mut DumpSession,
    request: &DumpRequest,
    report: &mpsc::UnboundedSender<News>,
    orders: &blocking::Receiver<Order>,
) -> Result<(), DumpFailure> {
    session.start(request).map_err(|error| failed(&error))?;
    loop {
        match session.next(CRIU_TIMEOUT).map_err(|error| failed(&error))? {
            DumpEvent::Finished => return Ok(()),
            DumpEvent::Notify(action) => {
                // Nobody may be left to hear it: then nobody orders either.
                drop(report.send(News::Notify(action)));
                let go_on = loop {
                    match orders.recv() {
                        Ok(Order::Answer(go_on)) => break go_on,
                        Ok(Order::StillWaits(reply)) => {
                            // Who asked may have stopped waiting.
                            reply.send(session.still_waits().unwrap_or(false)).ok();
                        }
                        // A sender that is gone must not have its container ended.
                        Err(_) => break false,
                    }
                };
                session.answer(go_on).map_err(|error| failed(&error))?;
            }
        }
    }
}

fn failed(error: &(dyn std::error::Error + 'static)) -> DumpFailure {
    DumpFailure::Failed(crate::error_chain(error))
}
