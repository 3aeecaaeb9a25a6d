//! What the shim gives back when nobody has asked it anything for a while.
//!
//! To bring a container up takes half of this program's code, to wait for its end
//! hardly any, and there is a shim for every pod. What was mapped of the program's
//! file stays with the process until somebody takes it away: the shim itself, as soon
//! as it rests. The next request maps what it needs again, out of the page cache, in
//! some ten microseconds.

use std::sync::Arc;
use std::time::Duration;

use tokio::sync::Notify;

/// Nobody asks for so long: then the shim rests.
const QUIET: Duration = Duration::from_secs(3);

/// Notices when the shim is asked something, and when it no longer is.
#[derive(Debug, Clone, Default)]
pub(crate) struct Rest(Arc<Notify>);

impl Rest {
    /// A request is there.
    pub(crate) fn disturb(&self) {
        self.0.notify_one();
    }

    /// Gives back what is not needed whenever it has been quiet for a while.
    pub(crate) async fn watch(self) {
        loop {
            self.0.notified().await;
            while tokio::time::timeout(QUIET, self.0.notified()).await.is_ok() {}
            if let Err(error) = sys::memory::release_own_code() {
                tracing::debug!(%error, "the program's pages stay");
            }
        }
    }
}
