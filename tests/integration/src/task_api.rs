//! A shim's own interface, which containerd uses: its task service, asked without
//! containerd in between.

use std::time::Duration;

use containerd_shim_protos::shim_sync::TaskClient;
use ttrpc::context::{Context, with_duration};
use ttrpc::proto::Code;

use crate::container::Running;
use crate::node::Node;

/// Longer than a shim takes for anything that is asked of it here.
const PATIENCE: Duration = Duration::from_secs(60);

/// The task service of the shim of one container.
pub struct TaskApi {
    id: String,
    socket: String,
    client: TaskClient,
}

impl std::fmt::Debug for TaskApi {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let mut shown = f.debug_struct("TaskApi");
        shown.field("id", &self.id).field("socket", &self.socket);
        shown.finish_non_exhaustive()
    }
}

impl TaskApi {
    /// Connects to the shim that serves the container.
    #[track_caller]
    pub fn of(container: &Running<'_>, node: &Node) -> Self {
        let id = container.name();
        let bundle = format!("/run/containerd/io.containerd.runtime.v2.task/default/{id}");
        // containerd writes the one, shims write the other.
        let script =
            "cat \"$1/address\" 2>/dev/null || grep -o 'unix://[^\"]*' \"$1/bootstrap.json\"";
        let said = node.exec(&["sh", "-c", script, "sh", &bundle]);
        let socket = said.success().trim().trim_start_matches("unix://");
        let address = format!("unix://{}{socket}", node.root().display());
        let client = ttrpc::Client::connect(&address)
            .unwrap_or_else(|error| panic!("cannot connect to {address}: {error}"));
        Self {
            id: id.to_owned(),
            socket: socket.to_owned(),
            client: TaskClient::new(client),
        }
    }

    /// The container's id, for requests.
    pub fn id(&self) -> String {
        self.id.clone()
    }

    /// Where the shim listens, as the node sees it.
    pub fn socket(&self) -> &str {
        &self.socket
    }

    /// One request and its answer, or the code of the error and its text.
    pub fn ask<T>(
        &self,
        request: impl FnOnce(&TaskClient, Context) -> ttrpc::Result<T>,
    ) -> Result<T, (Code, String)> {
        self.ask_within(PATIENCE, request)
    }

    /// [`TaskApi::ask`] with a deadline of its own.
    pub fn ask_within<T>(
        &self,
        deadline: Duration,
        request: impl FnOnce(&TaskClient, Context) -> ttrpc::Result<T>,
    ) -> Result<T, (Code, String)> {
        request(&self.client, with_duration(deadline)).map_err(|error| match error {
            ttrpc::Error::RpcStatus(status) => (status.code(), status.message().to_owned()),
            // What the client itself says when time is up.
            other if other.to_string().contains("timed out") => {
                (Code::DEADLINE_EXCEEDED, other.to_string())
            }
            other => panic!("the shim cannot be asked: {other}"),
        })
    }

    /// [`TaskApi::ask`] for what has to succeed.
    #[track_caller]
    pub fn get<T>(&self, request: impl FnOnce(&TaskClient, Context) -> ttrpc::Result<T>) -> T {
        self.ask(request)
            .unwrap_or_else(|(code, text)| panic!("{code:?}: {text}"))
    }
}
