//! `start`: finds or makes the server of a container's pod and says where it is.
//!
//! Standard output and standard error are one pipe to containerd here: nothing
//! but the answer may be written.

use std::ffi::OsString;
use std::fs::{self, DirBuilder, Permissions};
use std::io::{self, IsTerminal, Read, Write};
use std::os::fd::OwnedFd;
use std::os::unix::fs::{DirBuilderExt, PermissionsExt};
use std::os::unix::net::{UnixListener, UnixStream};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context, bail};
use containerd_shim_protos::bootstrap_api::{BootstrapParams, BootstrapResult};
use protobuf::Message;
use protobuf::well_known_types::any::Any;
use rustix::thread::CoreSchedulingScope;
use sha2::{Digest, Sha256};

use crate::args::Invocation;
use crate::bundle::group;
use crate::cgroup;
use crate::options::Options;

/// Where sockets are unless containerd says otherwise.
const SOCKET_DIR: &str = "/run/containerd/s";

/// Version of the task service in the answer. Every containerd since 1.6 takes
/// 2, and with 3 those since 2.0 no longer clean up after single containers of
/// a pod whose shim died.
const TASK_VERSION: i32 = 2;

/// Most that containerd writes to standard input, as it limits that itself.
const INPUT_LIMIT: u64 = 10 << 20;

/// Highest oom_score_adj (include/uapi/linux/oom.h).
const OOM_SCORE_ADJ_MAX: i32 = 1000;

/// What containerd said, in either form.
#[derive(Debug, Default, PartialEq)]
struct Request {
    /// The answer is a `BootstrapResult`, as containerd wants it since 2.3.
    protobuf_answer: bool,
    grpc_address: String,
    ttrpc_address: Option<String>,
    socket_dir: Option<PathBuf>,
    debug: bool,
    options: Option<Any>,
}

impl Request {
    /// An `Any` with options, which older daemons send, parses as parameters
    /// too: only the names of this very container make it parameters.
    fn parse(input: &[u8], invocation: &Invocation) -> Self {
        if let Ok(params) = BootstrapParams::parse_from_bytes(input)
            && !params.instance_id.is_empty()
            && params.instance_id == invocation.id
            && params.namespace == invocation.namespace
        {
            // LOG_LEVEL_DEBUG is -4, and lower is more.
            let debug = params.log_level.value() <= -4;
            let mut options = params
                .extensions
                .into_iter()
                .filter_map(|extension| extension.value.into_option());
            return Self {
                protobuf_answer: true,
                grpc_address: Some(params.containerd_grpc_address)
                    .filter(|address| !address.is_empty())
                    .unwrap_or_else(|| invocation.address.clone()),
                ttrpc_address: Some(params.containerd_ttrpc_address)
                    .filter(|address| !address.is_empty()),
                socket_dir: params
                    .socket_dir
                    .filter(|directory| !directory.is_empty())
                    .map(PathBuf::from),
                debug: debug || invocation.debug,
                options: options.find(|any| Options::from_any(Some(any)).is_ok()),
            };
        }
        Self {
            grpc_address: invocation.address.clone(),
            debug: invocation.debug,
            options: Any::parse_from_bytes(input)
                .ok()
                .filter(|any| !any.type_url.is_empty()),
            ..Self::default()
        }
    }

    fn answer(&self, socket: &Path) -> anyhow::Result<Vec<u8>> {
        let address = format!("unix://{}", socket.display());
        if self.protobuf_answer {
            let result = BootstrapResult {
                version: TASK_VERSION,
                address,
                protocol: "ttrpc".to_owned(),
                ..Default::default()
            };
            return Ok(result.write_to_bytes()?);
        }
        Ok(serde_json::to_vec(&serde_json::json!({
            "version": TASK_VERSION,
            "address": address,
            "protocol": "ttrpc",
        }))?)
    }
}

/// Serves `start`.
pub(crate) fn start(invocation: &Invocation) -> anyhow::Result<()> {
    let mut input = Vec::new();
    let stdin = io::stdin();
    if !stdin.is_terminal() {
        stdin
            .lock()
            .take(INPUT_LIMIT)
            .read_to_end(&mut input)
            .context("cannot read standard input")?;
    }
    let request = Request::parse(&input, invocation);
    let bundle = std::env::current_dir().context("no working directory")?;
    let group = group(&bundle, &invocation.id)?;
    let directory = request
        .socket_dir
        .clone()
        .unwrap_or_else(|| PathBuf::from(SOCKET_DIR));
    let socket = directory.join(socket_name(
        &request.grpc_address,
        &invocation.namespace,
        &group,
    ));
    if let Some(listener) = claim(&socket)?
        && let Err(error) = launch(invocation, &request, listener)
    {
        // Nobody serves it.
        drop(fs::remove_file(&socket));
        return Err(error);
    }
    fs::write(
        bundle.join("address"),
        format!("unix://{}", socket.display()),
    )
    .context("cannot write the address")?;
    let mut stdout = io::stdout().lock();
    stdout
        .write_all(&request.answer(&socket)?)
        .and_then(|()| stdout.flush())
        .context("cannot answer")
}

/// The name under which the Go shim serves the same group: either joins the
/// other's server.
fn socket_name(grpc_address: &str, namespace: &str, group: &str) -> String {
    let path = Path::new(grpc_address).join(namespace).join(group);
    let digest = Sha256::digest(path.as_os_str().as_encoded_bytes());
    digest.iter().map(|byte| format!("{byte:02x}")).collect()
}

/// A listener where nobody serves yet; none where somebody does.
fn claim(socket: &Path) -> anyhow::Result<Option<UnixListener>> {
    let directory = socket.parent().context("the socket has no directory")?;
    DirBuilder::new()
        .recursive(true)
        .mode(0o700)
        .create(directory)
        .with_context(|| format!("cannot create {}", directory.display()))?;
    for _ in 0..2 {
        match UnixListener::bind(socket) {
            Ok(listener) => {
                fs::set_permissions(socket, Permissions::from_mode(0o600))
                    .context("cannot protect the socket")?;
                return Ok(Some(listener));
            }
            Err(error) if error.kind() == io::ErrorKind::AddrInUse => {}
            Err(error) => {
                return Err(error)
                    .with_context(|| format!("cannot listen on {}", socket.display()));
            }
        }
        if UnixStream::connect(socket).is_ok() {
            return Ok(None);
        }
        // Left by a server that is dead.
        match fs::remove_file(socket) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => {
                return Err(error).context("cannot remove a dead server's socket");
            }
            _ => {}
        }
    }
    bail!("{} is taken and nobody serves it", socket.display())
}

/// Starts the server. The socket listens already, so that nobody has to wait
/// for it.
fn launch(
    invocation: &Invocation,
    request: &Request,
    listener: UnixListener,
) -> anyhow::Result<()> {
    let options = Options::from_any(request.options.as_ref())?;
    if std::env::var_os("SCHED_CORE").is_some() {
        rustix::thread::create_core_scheduling_cookie(
            rustix::process::getpid(),
            CoreSchedulingScope::ProcessGroup,
        )
        .context("cannot enable core scheduling")?;
    }
    let program = std::env::current_exe().context("cannot find this program")?;
    let mut arguments: Vec<OsString> = vec![
        "-namespace".into(),
        invocation.namespace.clone().into(),
        "-id".into(),
        invocation.id.clone().into(),
        "-address".into(),
        request.grpc_address.clone().into(),
    ];
    if request.debug {
        arguments.push("-debug".into());
    }
    let mut command = Command::new(program);
    command
        .args(arguments)
        .stdin(OwnedFd::from(listener))
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .process_group(0);
    if let Some(address) = &request.ttrpc_address {
        command.env("TTRPC_ADDRESS", address);
    }
    let mut server = command.spawn().context("cannot start the server")?;
    let confined = confine(server.id(), &options);
    if confined.is_err() {
        drop(server.kill());
        drop(server.wait());
    }
    confined
}

/// Puts the server where the options want it and has it go before containerd
/// when memory is short.
fn confine(pid: u32, options: &Options) -> anyhow::Result<()> {
    if !options.shim_cgroup.is_empty() {
        cgroup::join(pid, &options.shim_cgroup)
            .with_context(|| format!("cannot join the cgroup {}", options.shim_cgroup))?;
    }
    let containerd = std::os::unix::process::parent_id();
    let score = fs::read_to_string(format!("/proc/{containerd}/oom_score_adj"))
        .ok()
        .and_then(|text| text.trim().parse::<i32>().ok())
        .unwrap_or(0);
    fs::write(
        format!("/proc/{pid}/oom_score_adj"),
        (score + 1).min(OOM_SCORE_ADJ_MAX).to_string(),
    )
    .context("cannot adjust the server's oom score")
}

#[cfg(test)]
mod tests {
    use containerd_shim_protos::bootstrap_api::{Extension, LogLevel};
    use containerd_shim_protos::shim::oci;
    use protobuf::{EnumOrUnknown, MessageField};

    use super::*;
    use crate::any::to_any;

    fn invocation() -> Invocation {
        Invocation::parse(
            "-namespace k8s.io -address /run/c.sock -id web start"
                .split(' ')
                .map(str::to_owned),
        )
        .unwrap()
    }

    fn options() -> Any {
        to_any(&oci::Options {
            shim_cgroup: "/shims".into(),
            ..Default::default()
        })
        .unwrap()
    }

    #[test]
    fn an_old_daemon_sends_options_or_nothing() {
        let request = Request::parse(&[], &invocation());
        assert!(!request.protobuf_answer);
        assert_eq!(request.options, None);
        assert_eq!(request.grpc_address, "/run/c.sock");

        let input = options().write_to_bytes().unwrap();
        let request = Request::parse(&input, &invocation());
        assert!(!request.protobuf_answer);
        assert_eq!(request.options, Some(options()));
        let answer = request.answer(Path::new("/run/s")).unwrap();
        let answer: serde_json::Value = serde_json::from_slice(&answer).unwrap();
        assert_eq!(answer["version"], 2);
        assert_eq!(answer["address"], "unix:///run/s");
        assert_eq!(answer["protocol"], "ttrpc");
    }

    #[test]
    fn a_new_daemon_sends_parameters_and_gets_a_result() {
        let params = BootstrapParams {
            instance_id: "web".into(),
            namespace: "k8s.io".into(),
            log_level: EnumOrUnknown::new(LogLevel::LOG_LEVEL_DEBUG),
            containerd_ttrpc_address: "/run/c.sock.ttrpc".into(),
            containerd_grpc_address: "/run/other.sock".into(),
            socket_dir: Some("/run/short".into()),
            extensions: vec![Extension {
                value: MessageField::some(options()),
                ..Default::default()
            }],
            ..Default::default()
        };
        let request = Request::parse(&params.write_to_bytes().unwrap(), &invocation());
        assert!(request.protobuf_answer && request.debug);
        assert_eq!(request.grpc_address, "/run/other.sock");
        assert_eq!(request.ttrpc_address.as_deref(), Some("/run/c.sock.ttrpc"));
        assert_eq!(request.socket_dir, Some(PathBuf::from("/run/short")));
        assert_eq!(request.options, Some(options()));
        let answer = request.answer(Path::new("/run/s")).unwrap();
        let answer = BootstrapResult::parse_from_bytes(&answer).unwrap();
        assert_eq!((answer.version, answer.protocol.as_str()), (2, "ttrpc"));
    }

    #[test]
    fn parameters_of_another_container_are_not_taken() {
        let params = BootstrapParams {
            instance_id: "other".into(),
            namespace: "k8s.io".into(),
            ..Default::default()
        };
        let request = Request::parse(&params.write_to_bytes().unwrap(), &invocation());
        assert!(!request.protobuf_answer);
    }

    #[test]
    fn the_socket_is_where_the_go_shim_has_it() {
        assert_eq!(
            socket_name("/run/containerd/containerd.sock", "default", "123"),
            "0ddfbd72d02b3551e75f3a0ed90b9965b533401be618f43a568bc522764e0ad0"
        );
    }

    #[test]
    fn a_dead_servers_socket_is_taken_over_and_a_living_one_joined() {
        let dir = tempfile::tempdir().unwrap();
        let socket = dir.path().join("s/x");
        let listener = claim(&socket).unwrap().unwrap();
        let mode = fs::metadata(&socket).unwrap().permissions().mode();
        assert_eq!(mode & 0o777, 0o600);
        let mode = fs::metadata(socket.parent().unwrap())
            .unwrap()
            .permissions()
            .mode();
        assert_eq!(mode & 0o777, 0o700);
        assert!(claim(&socket).unwrap().is_none());
        drop(listener);
        assert!(claim(&socket).unwrap().is_some());
    }
}
