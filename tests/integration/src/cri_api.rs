//! The CRI as a kubelet speaks it: gRPC over containerd's socket.

use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use hyper_util::rt::TokioIo;
use k8s_cri::v1::runtime_service_client::RuntimeServiceClient;
use k8s_cri::v1::{
    ContainerConfig, ContainerEventType, ContainerMetadata, ContainerState, ContainerStatus,
    ContainerStatusRequest, CreateContainerRequest, ExecSyncRequest, ExecSyncResponse,
    GetEventsRequest, ImageSpec, LinuxContainerConfig, LinuxContainerResources,
    LinuxContainerSecurityContext, LinuxPodSandboxConfig, LinuxSandboxSecurityContext,
    NamespaceMode, NamespaceOption, PodSandboxConfig, PodSandboxMetadata, PodSandboxState,
    PodSandboxStatusRequest, PodSandboxStatusResponse, RemovePodSandboxRequest,
    RunPodSandboxRequest, StartContainerRequest, StopContainerRequest, StopPodSandboxRequest,
};
use tokio::net::UnixStream;
use tokio::runtime::Runtime;
use tonic::transport::{Channel, Endpoint};
use tonic::{Response, Status};

use crate::node::Node;
use crate::wait::{DEADLINE, eventually};

/// Where the logs of all pods are.
const LOGS: &str = "/var/log/pods";

/// Longer than containerd takes for anything that is asked of it here.
const PATIENCE: Duration = Duration::from_secs(120);

/// The CRI's runtime service of a node, with one runtime handler.
#[derive(Debug)]
pub struct CriApi<'lab> {
    node: &'lab Node,
    handler: &'static str,
    runtime: Runtime,
    client: RuntimeServiceClient<Channel>,
}

impl<'lab> CriApi<'lab> {
    /// Connects when it is first used, and again after a restart of containerd.
    pub fn new(node: &'lab Node, handler: &'static str) -> Self {
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(1)
            .enable_all()
            .build()
            .expect("a runtime starts");
        let socket = node.root().join("run/containerd/containerd.sock");
        let connector = tower::service_fn(move |_| {
            let socket: PathBuf = socket.clone();
            async move { UnixStream::connect(socket).await.map(TokioIo::new) }
        });
        let channel = {
            let _in_runtime = runtime.enter();
            // The URI is never resolved: the connector knows where to go.
            Endpoint::from_static("http://containerd").connect_with_connector_lazy(connector)
        };
        Self {
            node,
            handler,
            runtime,
            client: RuntimeServiceClient::new(channel),
        }
    }

    /// The node that it is of.
    pub fn node(&self) -> &'lab Node {
        self.node
    }

    /// The runtime handler of its pods.
    pub fn handler(&self) -> &'static str {
        self.handler
    }

    /// One request and its answer.
    pub fn ask<T>(
        &self,
        request: impl AsyncFnOnce(RuntimeServiceClient<Channel>) -> Result<Response<T>, Status>,
    ) -> Result<T, Status> {
        self.runtime.block_on(async {
            tokio::time::timeout(PATIENCE, request(self.client.clone()))
                .await
                .unwrap_or_else(|_| panic!("no answer within {} s", PATIENCE.as_secs()))
                .map(Response::into_inner)
        })
    }

    /// [`CriApi::ask`] for what has to succeed.
    #[track_caller]
    pub fn get<T>(
        &self,
        request: impl AsyncFnOnce(RuntimeServiceClient<Channel>) -> Result<Response<T>, Status>,
    ) -> T {
        self.ask(request)
            .unwrap_or_else(|status| panic!("{:?}: {}", status.code(), status.message()))
    }

    /// Events of containers, from now on.
    #[track_caller]
    pub fn events(&self) -> ContainerEvents {
        let events = ContainerEvents::default();
        let record = Arc::clone(&events.0);
        let mut client = self.client.clone();
        self.runtime.spawn(async move {
            let mut stream = client
                .get_container_events(GetEventsRequest {})
                .await?
                .into_inner();
            while let Some(event) = stream.message().await? {
                let kind = event.container_event_type();
                let mut record = record.lock().unwrap_or_else(PoisonError::into_inner);
                record.push((event.container_id, kind));
            }
            Ok::<_, Status>(())
        });
        // containerd does not say when it has subscribed us: the first event does.
        eventually("there are events", || {
            let pod = self.pod("listening");
            pod.stop();
            pod.remove();
            (!events.is_empty()).then_some(())
        });
        events
    }

    /// Runs a pod with a network of its own.
    #[track_caller]
    pub fn pod(&self, name: &str) -> Sandbox<'_> {
        self.pod_with(name, |_| {})
    }

    /// [`CriApi::pod`], with changes to its configuration.
    #[track_caller]
    pub fn pod_with(&self, name: &str, change: impl FnOnce(&mut PodSandboxConfig)) -> Sandbox<'_> {
        let mut config = PodSandboxConfig {
            metadata: Some(PodSandboxMetadata {
                name: name.to_owned(),
                uid: format!("{name}-uid"),
                namespace: "default".to_owned(),
                attempt: 0,
            }),
            hostname: name.to_owned(),
            log_directory: format!("{LOGS}/{name}"),
            linux: Some(LinuxPodSandboxConfig {
                cgroup_parent: "/pods".to_owned(),
                security_context: Some(LinuxSandboxSecurityContext {
                    namespace_options: Some(as_usual()),
                    ..Default::default()
                }),
                ..Default::default()
            }),
            ..Default::default()
        };
        change(&mut config);
        let logs = &config.log_directory;
        self.node.exec(&["mkdir", "-p", logs]).success();
        let request = RunPodSandboxRequest {
            config: Some(config.clone()),
            runtime_handler: self.handler.to_owned(),
        };
        let id = self.get(async |mut cri| cri.run_pod_sandbox(request).await);
        Sandbox {
            api: self,
            config,
            id: id.pod_sandbox_id,
        }
    }
}

/// The namespaces of a pod of which nothing special was asked: its containers do
/// not see each other's processes.
fn as_usual() -> NamespaceOption {
    NamespaceOption {
        pid: NamespaceMode::Container.into(),
        ..Default::default()
    }
}

/// What `GetContainerEvents` has told.
#[derive(Debug, Default)]
pub struct ContainerEvents(Arc<Mutex<Vec<(String, ContainerEventType)>>>);

impl ContainerEvents {
    fn is_empty(&self) -> bool {
        let seen = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        seen.is_empty()
    }

    /// The events of one container, or of a sandbox, up to now.
    pub fn of(&self, id: &str) -> Vec<ContainerEventType> {
        let seen = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let about = seen.iter().filter(|(container, _)| container == id);
        about.map(|(_, kind)| *kind).collect()
    }

    /// Waits for an event, and returns all up to then.
    #[track_caller]
    pub fn until(&self, id: &str, kind: ContainerEventType) -> Vec<ContainerEventType> {
        eventually(&format!("the event {kind:?} of {id}"), || {
            let events = self.of(id);
            events.contains(&kind).then_some(events)
        })
    }
}

/// A pod. Removed with this value: what a failed test leaves must not fail the next.
#[derive(Debug)]
pub struct Sandbox<'api> {
    api: &'api CriApi<'api>,
    config: PodSandboxConfig,
    id: String,
}

impl<'api> Sandbox<'api> {
    /// Its id.
    pub fn id(&self) -> &str {
        &self.id
    }

    /// What containerd says of it.
    pub fn status(&self) -> Result<PodSandboxStatusResponse, Status> {
        let request = PodSandboxStatusRequest {
            pod_sandbox_id: self.id.clone(),
            verbose: false,
        };
        self.api
            .ask(async |mut cri| cri.pod_sandbox_status(request).await)
    }

    /// Whether it runs.
    #[track_caller]
    pub fn is_ready(&self) -> bool {
        let answer = self.status().expect("the pod is known");
        let status = answer.status.expect("a status is in the answer");
        status.state() == PodSandboxState::SandboxReady
    }

    /// Creates a container of it that runs a shell script in busybox.
    #[track_caller]
    pub fn create(&self, name: &str, script: &str) -> SandboxContainer<'api> {
        self.create_with(name, script, |_| {})
    }

    /// [`Sandbox::create`], with changes to its configuration.
    #[track_caller]
    pub fn create_with(
        &self,
        name: &str,
        script: &str,
        change: impl FnOnce(&mut ContainerConfig),
    ) -> SandboxContainer<'api> {
        let mut config = ContainerConfig {
            metadata: Some(ContainerMetadata {
                name: name.to_owned(),
                attempt: 0,
            }),
            image: Some(ImageSpec {
                image: "docker.io/library/busybox:1".to_owned(),
                ..Default::default()
            }),
            command: ["sh", "-c", script].map(String::from).into(),
            log_path: format!("{name}.log"),
            linux: Some(LinuxContainerConfig {
                resources: Some(LinuxContainerResources::default()),
                security_context: Some(LinuxContainerSecurityContext {
                    namespace_options: Some(as_usual()),
                    ..Default::default()
                }),
            }),
            ..Default::default()
        };
        change(&mut config);
        let log = format!("{}/{}", self.config.log_directory, config.log_path);
        let request = CreateContainerRequest {
            pod_sandbox_id: self.id.clone(),
            config: Some(config),
            sandbox_config: Some(self.config.clone()),
        };
        let created = self
            .api
            .get(async |mut cri| cri.create_container(request).await);
        SandboxContainer {
            api: self.api,
            id: created.container_id,
            log,
        }
    }

    /// Creates a container and starts it.
    #[track_caller]
    pub fn start(&self, name: &str, script: &str) -> SandboxContainer<'api> {
        self.start_with(name, script, |_| {})
    }

    /// [`Sandbox::start`], with changes to its configuration.
    #[track_caller]
    pub fn start_with(
        &self,
        name: &str,
        script: &str,
        change: impl FnOnce(&mut ContainerConfig),
    ) -> SandboxContainer<'api> {
        let container = self.create_with(name, script, change);
        container.start();
        container
    }

    /// Ends whatever runs in it.
    #[track_caller]
    pub fn stop(&self) {
        let request = StopPodSandboxRequest {
            pod_sandbox_id: self.id.clone(),
        };
        self.api
            .get(async |mut cri| cri.stop_pod_sandbox(request).await);
    }

    fn try_remove(&self) -> Result<(), Status> {
        let request = RemovePodSandboxRequest {
            pod_sandbox_id: self.id.clone(),
        };
        let removed = self
            .api
            .ask(async |mut cri| cri.remove_pod_sandbox(request).await);
        removed.map(drop)
    }

    /// Removes it and its containers.
    #[track_caller]
    pub fn remove(&self) {
        self.try_remove()
            .expect("a pod that has stopped can be removed");
    }
}

impl Drop for Sandbox<'_> {
    fn drop(&mut self) {
        // Nothing is left to remove if the test did that.
        let request = StopPodSandboxRequest {
            pod_sandbox_id: self.id.clone(),
        };
        drop(
            self.api
                .ask(async |mut cri| cri.stop_pod_sandbox(request).await),
        );
        drop(self.try_remove());
        let logs = &self.config.log_directory;
        self.api.node.exec(&["rm", "-rf", logs]);
    }
}

/// A container of a pod. It goes with the pod.
#[derive(Debug, Clone)]
pub struct SandboxContainer<'api> {
    api: &'api CriApi<'api>,
    id: String,
    log: String,
}

impl SandboxContainer<'_> {
    /// Its id.
    pub fn id(&self) -> &str {
        &self.id
    }

    /// Where its log is on the node.
    pub fn log_path(&self) -> &str {
        &self.log
    }

    /// Starts it.
    #[track_caller]
    pub fn start(&self) {
        let request = StartContainerRequest {
            container_id: self.id.clone(),
        };
        self.api
            .get(async |mut cri| cri.start_container(request).await);
    }

    /// Stops it, with SIGKILL after the grace period.
    #[track_caller]
    pub fn stop(&self, grace: Duration) {
        let request = StopContainerRequest {
            container_id: self.id.clone(),
            timeout: i64::try_from(grace.as_secs()).unwrap_or(i64::MAX),
        };
        self.api
            .get(async |mut cri| cri.stop_container(request).await);
    }

    /// What containerd says of it.
    #[track_caller]
    pub fn status(&self) -> ContainerStatus {
        let request = ContainerStatusRequest {
            container_id: self.id.clone(),
            verbose: false,
        };
        let answer = self
            .api
            .get(async |mut cri| cri.container_status(request).await);
        answer.status.expect("a status is in the answer")
    }

    /// Waits for its end; returns the exit code and the reason.
    #[track_caller]
    pub fn end(&self) -> (i32, String) {
        eventually("the container ends", || {
            let status = self.status();
            (status.state() == ContainerState::ContainerExited)
                .then_some((status.exit_code, status.reason))
        })
    }

    /// Runs a command in it, to its end or to the end of so many seconds; 0 is none.
    pub fn exec(&self, words: &[&str], timeout: i64) -> Result<ExecSyncResponse, Status> {
        let request = ExecSyncRequest {
            container_id: self.id.clone(),
            cmd: words.iter().map(|word| (*word).to_owned()).collect(),
            timeout,
        };
        self.api.ask(async |mut cri| cri.exec_sync(request).await)
    }

    /// Standard output of a command in it that has to succeed.
    #[track_caller]
    pub fn said(&self, words: &[&str]) -> String {
        let answer = self
            .exec(words, DEADLINE.as_secs().cast_signed())
            .unwrap_or_else(|status| panic!("{words:?}: {status}"));
        let said = String::from_utf8_lossy(&answer.stdout).into_owned();
        let errors = String::from_utf8_lossy(&answer.stderr);
        assert_eq!(answer.exit_code, 0, "{words:?}: {said}{errors}");
        said
    }

    /// What it has written to standard output, byte by byte, as it is in its log.
    pub fn output(&self) -> String {
        self.output_in(&[&self.log])
    }

    /// [`SandboxContainer::output`] in several files: a log that was rotated.
    pub fn output_in(&self, paths: &[&str]) -> String {
        let text = self.api.node.exec(&[&["cat"], paths].concat()).stdout;
        let mut output = String::new();
        for line in text.lines() {
            // TIME STREAM TAG TEXT, where the tag says whether the line goes on.
            let fields: Vec<&str> = line.splitn(4, ' ').collect();
            match fields.as_slice() {
                [_, "stdout", "F", text] => output.extend([text, "\n"]),
                [_, "stdout", "P", text] => output.push_str(text),
                _ => {}
            }
        }
        output
    }
}
