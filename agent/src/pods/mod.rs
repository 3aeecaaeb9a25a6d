//! Containers of pods: who asks for a state and who has one, brought together.
//!
//! A pod's containers are made by its kubelet, on both nodes. So a migration
//! between pods makes nothing here: the shim of the replacement asks in `Create`
//! whether a state comes for it, the source's sternad asks for whoever asks.
//! Either may be first.
//!
//! ```text
//!   shim: expect ──> Ask ──┐
//!                          ├── meet ──> permission ──> the shim receives
//!   source: Begin, Prepare ┘
//! ```
//!
//! Who is restored from whom is decided elsewhere, once, for all nodes; what is
//! decided comes in through [`Guide`]. Without a guide a state comes where a
//! source has begun to send one.

pub(crate) mod service;

use std::collections::HashMap;
use std::fmt::Debug;
use std::path::PathBuf;
use std::sync::{Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::Duration;

use nodeapi::PodContainer;
use tokio::sync::{oneshot, watch};

/// How long a shim's question waits: the kubelet gives `Create` and `Start`
/// together two minutes.
const ASK_TIMEOUT: Duration = Duration::from_secs(90);

/// What an orchestrator knows about the pods of this node.
#[tonic::async_trait]
pub(crate) trait Guide: Debug + Send + Sync {
    /// Resolves once it is certain that no state comes for this container; as
    /// long as one may come, or comes, never.
    async fn nothing_comes(&self, container: &PodContainer) -> Nothing;

    /// Resolves once it is certain that this container does not leave, or that its
    /// state is to wait here; as long as it may be sent to another pod, never.
    async fn leaves(&self, container: &PodContainer) -> Leaving;

    /// The state of a container waits here now; an error: it was to, and does not.
    async fn waits(&self, container: &PodContainer, outcome: Result<(), &str>);
}

/// What becomes of a container that was told to end.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Leaving {
    /// It ends like any other, for this reason.
    Stays(String),
    /// There is no pod yet to take its state, and there is no more time: it waits.
    Waits,
}

/// Why no state comes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Nothing {
    /// There is none: the container is a new one.
    Fresh,
    /// There is one, or was, and it will not come.
    Lost(String),
}

/// What a shim is told.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Answer {
    /// Its permission to receive lies ready.
    Expected,
    Nothing(Nothing),
}

/// A container that is being made, as its shim describes it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Place {
    /// containerd's namespace.
    pub(crate) namespace: String,
    /// containerd's id.
    pub(crate) id: String,
    pub(crate) upperdir: Option<PathBuf>,
}

/// A shim that waits.
#[derive(Debug)]
pub(crate) struct Ask {
    pub(crate) place: Place,
    granted: oneshot::Sender<()>,
    number: u64,
}

impl Ask {
    /// The permission lies ready. False: nobody waits for it any more.
    pub(crate) fn grant(self) -> bool {
        self.granted.send(()).is_ok()
    }
}

/// What a source said of the state of one container.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Coming {
    OnItsWay,
    Failed(String),
}

/// A pod's uid and the container's name: its names alone may mean another pod.
type Key = (String, String);

fn key(container: &PodContainer) -> Key {
    (container.uid.clone(), container.container.clone())
}

#[derive(Debug, Default)]
struct Meeting {
    asks: HashMap<Key, Ask>,
    coming: HashMap<Key, Coming>,
    number: u64,
}

/// See the module's documentation.
#[derive(Debug)]
pub(crate) struct Pods {
    meeting: Mutex<Meeting>,
    changed: watch::Sender<()>,
    guide: OnceLock<Box<dyn Guide>>,
}

impl Pods {
    pub(crate) fn new() -> Self {
        Self {
            meeting: Mutex::default(),
            changed: watch::Sender::new(()),
            guide: OnceLock::new(),
        }
    }

    /// Who decides from now on.
    pub(crate) fn follow(&self, guide: Box<dyn Guide>) {
        // There is one orchestrator to a node.
        drop(self.guide.set(guide));
    }

    pub(crate) fn guide(&self) -> Option<&dyn Guide> {
        self.guide.get().map(|guide| &**guide)
    }

    fn meeting(&self) -> MutexGuard<'_, Meeting> {
        // Every change under the lock is one insertion or removal.
        self.meeting.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Serves a shim in `Create`. Dropped, the question is withdrawn.
    pub(crate) async fn expect(&self, container: &PodContainer, place: Place) -> Answer {
        let (granted, mut grant) = oneshot::channel();
        let asked = self.ask(container, place, granted);
        let nothing = tokio::select! {
            biased;
            granted = &mut grant => return answer(granted),
            nothing = self.nothing_comes(container) => nothing,
            () = tokio::time::sleep(ASK_TIMEOUT) => Nothing::Lost(format!(
                "its state did not begin to come within {} s",
                ASK_TIMEOUT.as_secs()
            )),
        };
        // Who has the question answers it.
        if asked.withdraw() {
            return Answer::Nothing(nothing);
        }
        answer(grant.await)
    }

    fn ask(
        &self,
        container: &PodContainer,
        place: Place,
        granted: oneshot::Sender<()>,
    ) -> Asked<'_> {
        let mut meeting = self.meeting();
        meeting.number += 1;
        let number = meeting.number;
        let key = key(container);
        let ask = Ask {
            place,
            granted,
            number,
        };
        // A second container of that name replaces one that failed to start.
        meeting.asks.insert(key.clone(), ask);
        drop(meeting);
        self.changed.send_replace(());
        Asked {
            pods: self,
            key,
            number,
        }
    }

    async fn nothing_comes(&self, container: &PodContainer) -> Nothing {
        let mut changed = self.changed.subscribe();
        let key = key(container);
        loop {
            let coming = self.meeting().coming.get(&key).cloned();
            let decided = async {
                match (coming, self.guide()) {
                    (Some(Coming::OnItsWay), _) => std::future::pending().await,
                    (_, Some(guide)) => guide.nothing_comes(container).await,
                    (Some(Coming::Failed(reason)), None) => Nothing::Lost(reason),
                    (None, None) => Nothing::Fresh,
                }
            };
            tokio::select! {
                nothing = decided => return nothing,
                // The sender is in `self`.
                _ = changed.changed() => {}
            }
        }
    }

    /// The shim that asks for this container's state, waited for.
    pub(crate) async fn asked(&self, container: &PodContainer) -> Ask {
        let mut changed = self.changed.subscribe();
        let key = key(container);
        loop {
            if let Some(ask) = self.meeting().asks.remove(&key) {
                return ask;
            }
            // The sender is in `self`.
            drop(changed.changed().await);
        }
    }

    /// A source has begun to send this container's state.
    pub(crate) fn comes(&self, container: &PodContainer) {
        self.set_coming(container, Some(Coming::OnItsWay));
    }

    /// It is here.
    pub(crate) fn came(&self, container: &PodContainer) {
        self.set_coming(container, None);
    }

    /// It will not come from there.
    pub(crate) fn failed(&self, container: &PodContainer, reason: &str) {
        self.set_coming(container, Some(Coming::Failed(reason.to_owned())));
    }

    fn set_coming(&self, container: &PodContainer, coming: Option<Coming>) {
        {
            let coming_in = &mut self.meeting().coming;
            match coming {
                Some(coming) => coming_in.insert(key(container), coming),
                None => coming_in.remove(&key(container)),
            };
        }
        self.changed.send_replace(());
    }
}

fn answer(granted: Result<(), oneshot::error::RecvError>) -> Answer {
    match granted {
        Ok(()) => Answer::Expected,
        Err(_) => Answer::Nothing(Nothing::Lost(
            "its state was on its way and was given up".into(),
        )),
    }
}

/// A question that nobody has taken up yet, as far as one knows.
struct Asked<'a> {
    pods: &'a Pods,
    key: Key,
    number: u64,
}

impl Asked<'_> {
    /// Takes it back; false if somebody answers it.
    fn withdraw(&self) -> bool {
        let asks = &mut self.pods.meeting().asks;
        let own = asks
            .get(&self.key)
            .is_some_and(|ask| ask.number == self.number);
        if own {
            asks.remove(&self.key);
        }
        own
    }
}

impl Drop for Asked<'_> {
    fn drop(&mut self) {
        self.withdraw();
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;

    fn container(uid: &str) -> PodContainer {
        PodContainer {
            namespace: "shop".into(),
            pod: "cart".into(),
            uid: uid.into(),
            container: "cache".into(),
        }
    }

    fn place(id: &str) -> Place {
        Place {
            namespace: "k8s.io".into(),
            id: id.into(),
            upperdir: None,
        }
    }

    #[tokio::test]
    async fn without_a_source_a_container_is_a_new_one() {
        let pods = Pods::new();
        let answer = pods.expect(&container("1"), place("c")).await;
        assert_eq!(answer, Answer::Nothing(Nothing::Fresh));
        assert!(pods.meeting().asks.is_empty());
    }

    #[tokio::test]
    async fn they_meet_whoever_is_first() {
        for shim_first in [true, false] {
            let pods = Arc::new(Pods::new());
            let container = container("1");
            pods.comes(&container);
            let shim = {
                let (pods, container) = (Arc::clone(&pods), container.clone());
                tokio::spawn(async move { pods.expect(&container, place("c")).await })
            };
            if shim_first {
                tokio::task::yield_now().await;
            }
            let ask = pods.asked(&container).await;
            assert_eq!(ask.place, place("c"));
            assert!(ask.grant());
            assert_eq!(shim.await.unwrap(), Answer::Expected);
        }
    }

    #[tokio::test]
    async fn another_pod_of_that_name_gets_nothing() {
        let pods = Pods::new();
        pods.comes(&container("1"));
        let answer = pods.expect(&container("2"), place("c")).await;
        assert_eq!(answer, Answer::Nothing(Nothing::Fresh));
    }

    #[tokio::test]
    async fn what_failed_to_come_is_no_reason_to_start_from_nothing() {
        let pods = Pods::new();
        let container = container("1");
        pods.comes(&container);
        let (answer, ()) = tokio::join!(pods.expect(&container, place("c")), async {
            tokio::task::yield_now().await;
            pods.failed(&container, "the node is gone");
        });
        let lost = Answer::Nothing(Nothing::Lost("the node is gone".into()));
        assert_eq!(answer, lost);
        assert_eq!(pods.expect(&container, place("d")).await, lost);
        // A container that crashes after it came is a new one.
        pods.came(&container);
        assert_eq!(
            pods.expect(&container, place("e")).await,
            Answer::Nothing(Nothing::Fresh)
        );
    }

    #[tokio::test]
    async fn who_goes_away_is_not_waited_for() {
        let pods = Arc::new(Pods::new());
        let container = container("1");
        pods.comes(&container);
        let shim = {
            let (pods, container) = (Arc::clone(&pods), container.clone());
            tokio::spawn(async move { pods.expect(&container, place("c")).await })
        };
        tokio::task::yield_now().await;
        shim.abort();
        assert!(shim.await.unwrap_err().is_cancelled());
        assert!(pods.meeting().asks.is_empty());
    }
}
