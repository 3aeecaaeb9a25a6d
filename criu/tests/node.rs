//! Dumps and restores with the real CRIU and the real runc, and processes killed
//! on the way.
//!
//! Needs root, CRIU, libcriu and runc, and a root directory that is a mount: a
//! node of `hack/nodes`. Elsewhere every test says why it is skipped. To run it in
//! a node, copy the binary there (`cargo test -p criu --test node --no-run` names
//! it) and execute it; arguments are substrings of the tests to run.
//!
//! Not the usual test harness: the program has to be its own CRIU helper, its own
//! victim, and to fork for libcriu with a single thread.

#![allow(clippy::unwrap_used, reason = "a test, though without the attribute")]

use std::fs;
use std::ops::Range;
use std::os::unix::fs::{FileExt, symlink};
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};

use criu::{
    Action, CheckpointOptions, DumpError, DumpEvent, DumpRequest, DumpSession, Freezer,
    InterceptStats, Interceptor, Memory, NetworkLock, RuncContainer, Tools,
};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

/// What the victim fills.
const VICTIM_BYTES: usize = 64 << 20;

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    match arguments.first().map(String::as_str) {
        Some(criu::HELPER_ARGUMENT) => criu::helper_main(),
        Some("victim") => victim(Path::new(&arguments[1])),
        Some("restore") => restore(Path::new(&arguments[1]), arguments[2] == "yes"),
        _ => tests(&arguments),
    }
}

/// A sentence and what makes sure of it.
type Test = (&'static str, fn(&Tools));

fn tests(wanted: &[String]) -> ExitCode {
    let tools = match Tools::find() {
        _ if !nix::unistd::geteuid().is_root() => return skipped("not root"),
        Err(missing) => return skipped(&missing.to_string()),
        Ok(tools) => tools,
    };
    let tests: &[Test] = &[
        (
            "a process goes on where it was when it is restored",
            a_process_goes_on_where_it_was_when_it_is_restored,
        ),
        (
            "a no at either commit point leaves one process and never two",
            a_no_at_either_commit_point_leaves_one_process_and_never_two,
        ),
        (
            "memory that the engine owns is not in the images and the stack is",
            memory_that_the_engine_owns_is_not_in_the_images_and_the_stack_is,
        ),
        (
            "a victim goes on whoever is killed at whatever step",
            a_victim_goes_on_whoever_is_killed_at_whatever_step,
        ),
        (
            "a failure names the line of the log that matters",
            a_failure_names_the_line_of_the_log_that_matters,
        ),
        ("a container of root moves through runc restore", |tools| {
            a_container_moves_through_runc_restore(tools, 0)
        }),
        (
            "a container of another user moves through runc restore",
            |tools| a_container_moves_through_runc_restore(tools, 33),
        ),
        (
            "a frozen container stays frozen when criu dies before the commit",
            a_frozen_container_stays_frozen_when_criu_dies_before_the_commit,
        ),
    ];
    for (name, test) in tests {
        if wanted.is_empty() || wanted.iter().any(|part| name.contains(part.as_str())) {
            let begun = Instant::now();
            test(&tools);
            println!("test {name} ... ok ({} ms)", begun.elapsed().as_millis());
        }
    }
    ExitCode::SUCCESS
}

fn skipped(reason: &str) -> ExitCode {
    println!("all tests skipped: {reason}");
    ExitCode::SUCCESS
}

/// Counts in `file`, a step a millisecond, and checks its memory as it goes.
fn victim(file: &Path) -> ExitCode {
    let file = fs::File::create(file).unwrap();
    let mut memory: Vec<u64> = (0..VICTIM_BYTES as u64 / 8).collect();
    for step in 0u64.. {
        let index = (step as usize * 7919) % memory.len();
        assert_eq!(memory[index] % memory.len() as u64, index as u64);
        memory[index] += memory.len() as u64;
        file.write_all_at(format!("{step:10}").as_bytes(), 0)
            .unwrap();
        std::thread::sleep(Duration::from_millis(1));
    }
    ExitCode::SUCCESS
}

/// A process of its own, because libcriu forks.
fn restore(images: &Path, go_on: bool) -> ExitCode {
    match criu::restore_process(&Tools::find().unwrap(), images, move |_| go_on) {
        Ok(pid) => {
            println!("{pid}");
            ExitCode::SUCCESS
        }
        Err(error) => {
            println!("{error}");
            ExitCode::FAILURE
        }
    }
}

/// A running victim with a directory of its own; killed in the end.
struct Victim {
    directory: PathBuf,
    pid: i32,
}

impl Drop for Victim {
    fn drop(&mut self) {
        kill(Pid::from_raw(self.pid), Signal::SIGKILL).unwrap_or_default();
    }
}

impl Victim {
    fn start(name: &str) -> Self {
        let directory = scratch(name);
        let mut command = Command::new(std::env::current_exe().unwrap());
        command.arg("victim").arg(directory.join("count"));
        command
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::null());
        // SAFETY: it makes two plain system calls between fork and exec.
        unsafe { command.pre_exec(leave_everything_behind) };
        let mut child = command.spawn().unwrap();
        let pid = child.id() as i32;
        std::thread::spawn(move || child.wait());
        let victim = Self { directory, pid };
        victim.wait_for_progress();
        victim
    }

    fn count(&self) -> Option<u64> {
        count_in(&self.directory.join("count"))
    }

    fn wait_for_progress(&self) {
        wait_for_progress(&self.directory.join("count"));
    }

    fn images(&self) -> PathBuf {
        let images = self.directory.join("images");
        fs::create_dir_all(&images).unwrap();
        images
    }

    fn request(&self) -> DumpRequest {
        DumpRequest::new(self.pid, self.images())
    }

    /// Restores it in place of the dead one.
    fn restore(&mut self, go_on: bool) -> Result<(), String> {
        let output = Command::new(std::env::current_exe().unwrap())
            .args([Path::new("restore"), &self.images()])
            .arg(if go_on { "yes" } else { "no" })
            .output()
            .unwrap();
        let said = String::from_utf8(output.stdout).unwrap().trim().to_owned();
        if !output.status.success() {
            return Err(said);
        }
        self.pid = said.parse().unwrap();
        Ok(())
    }

    fn is_alive(&self) -> bool {
        fs::read_to_string(format!("/proc/{}/stat", self.pid))
            .is_ok_and(|stat| !stat.contains(") Z "))
    }
}

/// CRIU wants a session leader without descriptors from elsewhere.
fn leave_everything_behind() -> std::io::Result<()> {
    nix::unistd::setsid()?;
    let cloexec = libc::CLOSE_RANGE_CLOEXEC as libc::c_int;
    // SAFETY: it changes a flag of descriptors, which nobody uses until exec.
    match unsafe { libc::close_range(3, libc::c_uint::MAX, cloexec) } {
        0 => Ok(()),
        _ => Err(std::io::Error::last_os_error()),
    }
}

fn scratch(name: &str) -> PathBuf {
    let directory = Path::new("/var/lib/sterna/criu-tests").join(name);
    drop(fs::remove_dir_all(&directory));
    fs::create_dir_all(&directory).unwrap();
    directory
}

fn count_in(file: &Path) -> Option<u64> {
    fs::read_to_string(file).ok()?.trim().parse().ok()
}

fn wait_for_progress(file: &Path) {
    let first = count_in(file).unwrap_or(0);
    wait_until("the victim to go on", || {
        count_in(file).is_some_and(|count| count > first + 3)
    });
}

fn wait_until(what: &str, condition: impl Fn() -> bool) {
    let begun = Instant::now();
    while !condition() {
        assert!(
            begun.elapsed() < Duration::from_secs(10),
            "waited too long for {what}"
        );
        std::thread::sleep(Duration::from_millis(2));
    }
}

/// Dumps, with `at` at every step, which says whether to go on.
fn dump(
    tools: &Tools,
    request: &DumpRequest,
    memory: Option<Arc<dyn Memory>>,
    mut at: impl FnMut(&Action, &DumpSession) -> bool,
) -> (Result<(), DumpError>, InterceptStats) {
    let program = std::env::current_exe().unwrap();
    let mut session = DumpSession::spawn(&program, tools).unwrap();
    let interceptor = Interceptor::new(session.take_listener().unwrap());
    if let Some(memory) = memory {
        interceptor.memory().set(memory);
    }
    let answering = std::thread::spawn(move || interceptor.run());
    let mut steps = || {
        session.start(request)?;
        while let DumpEvent::Notify(action) = session.next(Duration::from_secs(20))? {
            let go_on = at(&action, &session);
            session.answer(go_on)?;
        }
        Ok(())
    };
    let result = steps();
    drop(session);
    (result, answering.join().unwrap().unwrap())
}

fn a_process_goes_on_where_it_was_when_it_is_restored(tools: &Tools) {
    let mut victim = Victim::start("plain");
    let mut steps = Vec::new();
    let (result, _) = dump(tools, &victim.request(), None, |action, _| {
        steps.push(action.clone());
        true
    });
    result.unwrap();
    assert_eq!(steps.first(), Some(&Action::PreDump));
    assert_eq!(steps.last(), Some(&Action::PostDump));
    wait_until("the victim to be gone", || !victim.is_alive());
    let count = victim.count().unwrap();
    std::thread::sleep(Duration::from_millis(20));
    assert_eq!(victim.count(), Some(count));
    victim.restore(true).unwrap();
    victim.wait_for_progress();
    assert!(victim.count().unwrap() >= count, "it does not begin again");
}

fn a_no_at_either_commit_point_leaves_one_process_and_never_two(tools: &Tools) {
    let mut victim = Victim::start("commit");
    let (result, _) = dump(tools, &victim.request(), None, |action, session| {
        assert!(session.still_waits().unwrap());
        *action != Action::PostDump
    });
    let action = Action::PostDump;
    assert!(matches!(result.unwrap_err(), DumpError::Aborted { action: at } if at == action));
    victim.wait_for_progress();

    dump(tools, &victim.request(), None, |_, _| true).0.unwrap();
    let count = victim.count();
    let error = victim.restore(false).unwrap_err();
    assert!(error.contains("stopped at its commit point"), "{error}");
    std::thread::sleep(Duration::from_millis(50));
    assert_eq!(victim.count(), count, "nothing has run");
    victim.restore(true).unwrap();
    victim.wait_for_progress();
}

/// Owns everything but the page of the stack pointer.
struct Everything {
    stack: Vec<u64>,
    smaps: Vec<u8>,
}

impl Memory for Everything {
    fn owns(&self, _pid: i32, _range: Range<u64>) -> bool {
        true
    }
    fn stack_pages(&self, _pid: i32) -> &[u64] {
        &self.stack
    }
    fn smaps(&self, _pid: i32) -> Option<Vec<u8>> {
        Some(self.smaps.clone())
    }
}

fn memory_that_the_engine_owns_is_not_in_the_images_and_the_stack_is(tools: &Tools) {
    let victim = Victim::start("memory");
    let call = fs::read_to_string(format!("/proc/{}/syscall", victim.pid)).unwrap();
    let stack = call.split_whitespace().nth_back(1).unwrap();
    let stack = u64::from_str_radix(stack.trim_start_matches("0x"), 16).unwrap() & !4095;
    let smaps = fs::read(format!("/proc/{}/smaps", victim.pid)).unwrap();
    let memory = Everything {
        stack: vec![stack],
        smaps,
    };
    let (result, stats) = dump(
        tools,
        &victim.request(),
        Some(Arc::new(memory)),
        |action, _| *action != Action::PostDump,
    );
    assert!(matches!(result, Err(DumpError::Aborted { .. })));
    victim.wait_for_progress();
    assert_eq!((stats.smaps_given, stats.smaps_passed), (1, 0));
    assert!(
        stats.scans_empty > 0 && stats.scans_composed == 1,
        "{stats:?}"
    );
    let pages = fs::metadata(victim.images().join("pages-1.img"))
        .unwrap()
        .len();
    // The vdso is dumped whatever its page tables say.
    assert!((4096..=4 * 4096).contains(&pages), "{pages} bytes of pages");
    // Dumped pages look lazy to a lazy restore; here only the stack's.
    assert_eq!(criu::images::clear_lazy(&victim.images()).unwrap(), 1);
}

fn child_of(pid: u32) -> Option<u32> {
    let tasks = fs::read_dir(format!("/proc/{pid}/task")).ok()?;
    tasks.flatten().find_map(|task| {
        let children = fs::read_to_string(task.path().join("children")).ok()?;
        children.split_whitespace().next()?.parse().ok()
    })
}

fn a_victim_goes_on_whoever_is_killed_at_whatever_step(tools: &Tools) {
    for step in [
        Action::PreDump,
        Action::QueryExternalFiles,
        Action::PostDump,
    ] {
        for whom in ["session", "helper", "criu"] {
            // The session is this process, so for a session to be killed there is
            // one in a child, which kills itself.
            let victim = Victim::start("killed");
            let request = victim.request();
            let killer = |action: &Action, _: &DumpSession| {
                if *action == step {
                    kill_one(whom);
                }
                true
            };
            if whom == "session" {
                // SAFETY: the child has one thread, and ends in a signal.
                match unsafe { nix::unistd::fork() }.unwrap() {
                    nix::unistd::ForkResult::Child => {
                        drop(dump(tools, &request, None, killer));
                        std::process::exit(0);
                    }
                    nix::unistd::ForkResult::Parent { child } => {
                        nix::sys::wait::waitpid(child, None).unwrap();
                    }
                }
            } else {
                let (result, _) = dump(tools, &request, None, killer);
                let error = result.unwrap_err();
                match whom {
                    "helper" => assert!(matches!(error, DumpError::HelperDied), "{error}"),
                    _ => assert!(error.to_string().contains("killed by signal 9"), "{error}"),
                }
            }
            // CRIU with its code inside a task is never killed by us in earnest.
            victim.wait_for_progress();
            let status = fs::read_to_string(format!("/proc/{}/status", victim.pid)).unwrap();
            assert!(status.contains("TracerPid:\t0"), "{whom} at {step:?}");
        }
    }
}

fn kill_one(whom: &str) {
    let own = std::process::id();
    let pid = match whom {
        "session" => own,
        "helper" => helper_of(own).unwrap(),
        _ => child_of(helper_of(own).unwrap()).unwrap(),
    };
    kill(Pid::from_raw(pid as i32), Signal::SIGKILL).unwrap();
    std::thread::sleep(Duration::from_millis(20));
}

/// The child that has a child: the others are victims.
fn helper_of(pid: u32) -> Option<u32> {
    let tasks = fs::read_dir(format!("/proc/{pid}/task")).ok()?;
    tasks.flatten().find_map(|task| {
        let children = fs::read_to_string(task.path().join("children")).ok()?;
        let mut children = children
            .split_whitespace()
            .filter_map(|child| child.parse().ok());
        children.find(|child| child_of(*child).is_some())
    })
}

fn a_failure_names_the_line_of_the_log_that_matters(tools: &Tools) {
    let victim = Victim::start("failure");
    let mut request = victim.request();
    request.pid = 1 << 22;
    let error = dump(tools, &request, None, |_, _| true)
        .0
        .unwrap_err()
        .to_string();
    assert!(
        error.contains("No such process") && error.contains("dump.log"),
        "{error}"
    );
    request.images = "/nowhere".into();
    let error = dump(tools, &request, None, |_, _| true)
        .0
        .unwrap_err()
        .to_string();
    assert!(
        error.starts_with("cannot open directory /nowhere: No such file"),
        "{error}"
    );
}

/// A container of runc whose program is the victim.
struct Container {
    bundle: PathBuf,
    runc: RuncContainer,
}

impl Drop for Container {
    fn drop(&mut self) {
        drop(self.runc(&["delete", "-f", &self.runc.id]).output());
    }
}

impl Container {
    fn start(name: &str, uid: u32) -> Self {
        let bundle = scratch(name);
        let rootfs = bundle.join("rootfs");
        for directory in ["usr", "proc", "dev", "var", "run", "tmp"] {
            fs::create_dir_all(rootfs.join(directory)).unwrap();
        }
        for link in ["lib", "lib64"] {
            symlink(Path::new("usr").join(link), rootfs.join(link)).unwrap();
        }
        // A mount point behind a link: CRIU has to be told where it leads.
        symlink("/run", rootfs.join("var/run")).unwrap();
        fs::write(rootfs.join("victim"), "").unwrap();
        nix::unistd::chown(&rootfs.join("tmp"), Some(uid.into()), None).unwrap();
        let program = std::env::current_exe().unwrap();
        let data = bundle.join("data");
        fs::create_dir_all(&data).unwrap();
        let config = serde_json::json!({
            "ociVersion": "1.2.0",
            "process": {
                "user": {"uid": uid, "gid": uid},
                "args": ["/victim", "victim", "/tmp/count"],
                "env": ["PATH=/usr/bin"], "cwd": "/", "noNewPrivileges": true,
            },
            "root": {"path": "rootfs"},
            "mounts": [
                {"destination": "/proc", "type": "proc", "source": "proc"},
                {"destination": "/dev", "type": "tmpfs", "source": "tmpfs", "options": ["mode=755"]},
                {"destination": "/usr", "type": "bind", "source": "/usr", "options": ["rbind", "ro"]},
                {"destination": "/victim", "type": "bind", "source": program, "options": ["bind", "ro"]},
                {"destination": "/var/run/data", "type": "bind", "source": data, "options": ["bind"]},
            ],
            "linux": {
                "cgroupsPath": format!("/criu-tests/{name}"),
                "namespaces": [{"type": "pid"}, {"type": "mount"}, {"type": "ipc"},
                    {"type": "uts"}, {"type": "network"}],
                "maskedPaths": ["/proc/kcore", "/proc/scsi"],
            },
        });
        fs::write(bundle.join("config.json"), config.to_string()).unwrap();
        let runc = RuncContainer {
            runc_root: "/run/criu-tests".into(),
            id: name.into(),
        };
        let container = Self { bundle, runc };
        drop(container.runc(&["delete", "-f", name]).output());
        let bundle = container.bundle.clone();
        container.run(&["run", "-d", "--bundle", bundle.to_str().unwrap(), name]);
        container.wait_for_progress();
        container
    }

    fn runc(&self, arguments: &[&str]) -> Command {
        let mut command = Command::new("runc");
        command
            .arg("--root")
            .arg(&self.runc.runc_root)
            .args(arguments);
        command
    }

    /// With pipes for stdio, as a shim has.
    fn run(&self, arguments: &[&str]) {
        let log = fs::File::create(self.bundle.join("runc.log")).unwrap();
        let (reader, writer) = std::io::pipe().unwrap();
        std::thread::spawn(move || std::io::copy(&mut { reader }, &mut { log }));
        let status = self
            .runc(arguments)
            .stdin(Stdio::null())
            .stdout(writer.try_clone().unwrap())
            .stderr(writer)
            .status()
            .unwrap();
        let said = fs::read_to_string(self.bundle.join("runc.log")).unwrap_or_default();
        assert!(
            status.success(),
            "runc {arguments:?}: {:?} {said}",
            status.signal()
        );
    }

    fn count_file(&self) -> PathBuf {
        self.bundle.join("rootfs/tmp/count")
    }

    fn wait_for_progress(&self) {
        wait_for_progress(&self.count_file());
    }

    fn request(&self) -> (DumpRequest, Freezer) {
        let mut options = CheckpointOptions::new(self.bundle.join("images"));
        options.exit = true;
        options.network_lock = Some(NetworkLock::Nftables);
        let request = criu::dump_request_for_runc(&self.runc, &options).unwrap();
        (request, self.runc.state().unwrap().freezer().unwrap())
    }
}

const FREEZE_TIMEOUT: Duration = Duration::from_secs(2);

fn a_container_moves_through_runc_restore(tools: &Tools, uid: u32) {
    let container = Container::start(&format!("container-{uid}"), uid);
    // Twice: what was restored has to move again.
    for _ in 0..2 {
        let (request, freezer) = container.request();
        let freeze_first = |action: &Action, _: &DumpSession| {
            if *action == Action::PreDump {
                freezer.freeze(FREEZE_TIMEOUT).unwrap();
            }
            *action != Action::PostDump
        };
        let (result, _) = dump(tools, &request, None, freeze_first);
        assert!(
            matches!(result, Err(DumpError::Aborted { .. })),
            "{result:?}"
        );
        assert!(freezer.is_frozen().unwrap(), "what we froze stays frozen");
        freezer.thaw().unwrap();
        container.wait_for_progress();

        let program = std::env::current_exe().unwrap();
        criu::checkpoint(&program, tools, &request).unwrap();
        let count = count_in(&container.count_file()).unwrap();
        container.run(&["delete", &container.runc.id]);
        let images = request.images.to_str().unwrap();
        let work = scratch(&format!("work-{uid}"));
        let work = work.to_str().unwrap();
        let bundle = container.bundle.to_str().unwrap();
        let restore = [
            "restore",
            "-d",
            "--image-path",
            images,
            "--work-path",
            work,
            "--bundle",
        ];
        container.run(&[restore.as_slice(), &[bundle, &container.runc.id]].concat());
        container.wait_for_progress();
        assert!(count_in(&container.count_file()).unwrap() >= count);
        fs::remove_dir_all(&request.images).unwrap();
    }
}

fn a_frozen_container_stays_frozen_when_criu_dies_before_the_commit(tools: &Tools) {
    let container = Container::start("criu-dies", 0);
    let (request, freezer) = container.request();
    let (result, _) = dump(tools, &request, None, |action, session| {
        match action {
            Action::PreDump => freezer.freeze(FREEZE_TIMEOUT).unwrap(),
            Action::PostDump => {
                assert!(!freezer.is_frozen().unwrap(), "criu thawed the group");
                freezer.freeze_later().unwrap();
                kill_one("criu");
                assert!(!session.still_waits().unwrap());
            }
            _ => {}
        }
        true
    });
    let error = result.unwrap_err().to_string();
    assert!(error.contains("killed by signal 9"), "{error}");
    let count = count_in(&container.count_file());
    std::thread::sleep(Duration::from_millis(50));
    assert_eq!(count_in(&container.count_file()), count);
    freezer.thaw().unwrap();
    container.wait_for_progress();
}
