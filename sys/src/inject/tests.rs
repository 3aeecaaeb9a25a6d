use std::io::{BufRead, BufReader, Write};
use std::process::{Child, ChildStdout, Command, Stdio};
use std::time::Instant;

use super::*;
use crate::pagemap::{Effect, Pagemap, Selection};
use crate::uffd::Userfaultfd;

/// A child that is killed when the test ends, however it ends.
struct Helper(Child);

impl Helper {
    fn shell(script: &str) -> (Self, BufReader<ChildStdout>) {
        let mut child = Command::new("/bin/sh")
            .args(["-c", script])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let output = BufReader::new(child.stdout.take().unwrap());
        (Self(child), output)
    }

    fn pid(&self) -> i32 {
        i32::try_from(self.0.id()).unwrap()
    }

    fn status(&self, name: &str) -> String {
        let status = std::fs::read_to_string(format!("/proc/{}/status", self.pid())).unwrap();
        let line = status.lines().find_map(|line| line.strip_prefix(name));
        line.unwrap_or_default().trim().to_owned()
    }

    fn signal(&self, signal: nix::sys::signal::Signal) {
        nix::sys::signal::kill(nix::unistd::Pid::from_raw(self.pid()), signal).unwrap();
    }

    fn wait_for_state(&self, state: char) {
        let begin = Instant::now();
        while !self.status("State:").starts_with(state) {
            assert!(
                begin.elapsed() < Duration::from_secs(10),
                "state {}",
                self.status("State:")
            );
            std::thread::sleep(Duration::from_millis(1));
        }
    }

    fn holds_userfaultfd(&self) -> bool {
        std::fs::read_dir(format!("/proc/{}/fd", self.pid()))
            .unwrap()
            .any(|entry| {
                std::fs::read_link(entry.unwrap().path())
                    .is_ok_and(|target| target.to_string_lossy().contains("userfaultfd"))
            })
    }
}

impl Drop for Helper {
    fn drop(&mut self) {
        let _ended_already = self.0.kill();
        let _ended_already = self.0.wait();
    }
}

fn inject(helper: &Helper) -> Option<Injected> {
    allowed(userfaultfd_of(helper.pid()))
}

/// What came of it, or `None` with a line about it where this machine does not let us trace our own children.
fn allowed<T>(result: Result<T, InjectError>) -> Option<T> {
    match result {
        Ok(injected) => Some(injected),
        Err(InjectError::Ptrace { source, .. } | InjectError::Refused { source, .. })
            if crate::testing::not_permitted(&source) =>
        {
            println!("skipped: not permitted here: {source}");
            None
        }
        Err(error) => panic!("{error}: {error:?}"),
    }
}

fn read_line(output: &mut BufReader<ChildStdout>) -> String {
    let mut line = String::new();
    output.read_line(&mut line).unwrap();
    line.trim_end().to_owned()
}

#[test]
fn a_sleeping_process_sleeps_on_for_the_time_that_was_left() {
    let begin = Instant::now();
    let mut helper = Helper(Command::new("/bin/sleep").arg("0.6").spawn().unwrap());
    helper.wait_for_state('S');
    std::thread::sleep(Duration::from_millis(200));
    let Some(injected) = inject(&helper) else {
        return;
    };
    assert!(
        injected.stopped < Duration::from_millis(100),
        "{:?}",
        injected.stopped
    );
    assert!(!helper.holds_userfaultfd());
    assert_eq!(helper.status("TracerPid:"), "0");
    assert!(helper.0.wait().unwrap().success());
    let slept = begin.elapsed();
    assert!(slept > Duration::from_millis(590), "woken early: {slept:?}");
    assert!(
        slept < Duration::from_millis(790),
        "the time started anew: {slept:?}"
    );
}

#[test]
fn an_interrupted_read_is_restarted_unseen() {
    let (mut helper, mut output) = Helper::shell("exec cat");
    for round in 0..20 {
        helper.wait_for_state('S');
        if inject(&helper).is_none() {
            return;
        }
        writeln!(helper.0.stdin.as_mut().unwrap(), "round {round}").unwrap();
        assert_eq!(read_line(&mut output), format!("round {round}"));
    }
    drop(helper.0.stdin.take());
    assert!(helper.0.wait().unwrap().success());
}

#[test]
fn a_computing_process_computes_on() {
    let (mut helper, mut output) =
        Helper::shell("i=0; while [ $i -lt 200000 ]; do i=$((i+1)); done; echo $i");
    let mut injected = 0;
    while injected < 200 && userfaultfd_of(helper.pid()).is_ok() {
        injected += 1;
    }
    assert_eq!(read_line(&mut output), "200000");
    assert!(helper.0.wait().unwrap().success());
}

#[test]
fn signals_that_arrive_meanwhile_are_delivered_once() {
    let (helper, mut output) =
        Helper::shell("trap 'echo caught' USR1; echo ready; while :; do sleep 0.02; done");
    assert_eq!(read_line(&mut output), "ready");
    for _ in 0..30 {
        let pid = helper.pid();
        let injecting = std::thread::spawn(move || userfaultfd_of(pid).map(drop));
        helper.signal(nix::sys::signal::Signal::SIGUSR1);
        if allowed(injecting.join().unwrap()).is_none() {
            return;
        }
        assert_eq!(read_line(&mut output), "caught");
    }
    // Another line would have to be a second delivery.
    helper.signal(nix::sys::signal::Signal::SIGKILL);
    assert_eq!(read_line(&mut output), "");
}

#[test]
fn a_stopped_process_stays_stopped_and_continues_when_told() {
    let (mut helper, mut output) = Helper::shell("exec cat");
    helper.wait_for_state('S');
    helper.signal(nix::sys::signal::Signal::SIGSTOP);
    helper.wait_for_state('T');
    if inject(&helper).is_none() {
        return;
    }
    helper.wait_for_state('T');
    writeln!(helper.0.stdin.as_mut().unwrap(), "still here").unwrap();
    std::thread::sleep(Duration::from_millis(20));
    helper.wait_for_state('T');
    helper.signal(nix::sys::signal::Signal::SIGCONT);
    assert_eq!(read_line(&mut output), "still here");
}

#[test]
fn a_stop_signal_during_the_injection_takes_effect() {
    let (mut helper, mut output) = Helper::shell("exec cat");
    for _ in 0..20 {
        helper.wait_for_state('S');
        let pid = helper.pid();
        let injecting = std::thread::spawn(move || userfaultfd_of(pid).map(drop));
        helper.signal(nix::sys::signal::Signal::SIGSTOP);
        if allowed(injecting.join().unwrap()).is_none() {
            return;
        }
        helper.wait_for_state('T');
        helper.signal(nix::sys::signal::Signal::SIGCONT);
        writeln!(helper.0.stdin.as_mut().unwrap(), "on").unwrap();
        assert_eq!(read_line(&mut output), "on");
    }
}

#[test]
fn the_descriptor_tracks_the_other_process() {
    let (helper, _output) = Helper::shell("exec cat");
    helper.wait_for_state('S');
    let Some(injected) = inject(&helper) else {
        return;
    };
    let uffd = Userfaultfd::from_fd(injected.userfaultfd);
    if let Err(error) = uffd.handshake_tracking() {
        println!("skipped: this kernel does not track writes: {error}");
        return;
    }
    let maps = std::fs::read_to_string(format!("/proc/{}/maps", helper.pid())).unwrap();
    let heap = maps.lines().find(|line| line.ends_with("[heap]")).unwrap();
    let (start, rest) = heap.split_once('-').unwrap();
    let (end, _) = rest.split_once(' ').unwrap();
    let range = u64::from_str_radix(start, 16).unwrap()..u64::from_str_radix(end, 16).unwrap();
    uffd.track(range.clone()).unwrap();
    let pagemap = Pagemap::open(helper.pid()).unwrap();
    let mut regions = Vec::with_capacity(64);
    let mut scan = |selection| {
        pagemap
            .scan(range.clone(), selection, Effect::Protect, &mut regions)
            .unwrap();
        regions.len()
    };
    assert!(scan(Selection::POPULATED) > 0);
    scan(Selection::WRITTEN);
    assert_eq!(
        scan(Selection::WRITTEN),
        0,
        "a process that sleeps has written"
    );
}

#[test]
fn a_process_that_is_traced_or_gone_is_said_to_be() {
    let mut helper = Helper(Command::new("/bin/sleep").arg("10").spawn().unwrap());
    helper.wait_for_state('S');
    let pid = helper.pid();
    let tid = pid;
    // The tracer has to be this thread, and the tracee is released before it ends.
    let Ok(first) = tracee::Stopped::seize(pid, tid, STOP_TIMEOUT) else {
        println!("skipped: not permitted here");
        return;
    };
    let error = userfaultfd_of(pid).unwrap_err();
    assert!(matches!(error, InjectError::Traced { .. }), "{error:?}");
    first.release().unwrap();
    helper.0.kill().unwrap();
    helper.wait_for_state('Z');
    let error = userfaultfd_of(pid).unwrap_err();
    assert!(matches!(error, InjectError::Gone { .. }), "{error:?}");
    helper.0.wait().unwrap();
    let error = userfaultfd_of(pid).unwrap_err();
    assert!(matches!(error, InjectError::Gone { .. }), "{error:?}");
}

#[test]
fn a_thread_that_is_dropped_in_the_middle_gets_everything_back() {
    let (mut helper, mut output) = Helper::shell("exec cat");
    helper.wait_for_state('S');
    let pid = helper.pid();
    let Ok(instruction) = syscall_instruction(pid) else {
        panic!("no instruction")
    };
    let Ok(mut thread) = tracee::Stopped::seize(pid, pid, STOP_TIMEOUT) else {
        println!("skipped: not permitted here");
        return;
    };
    let own_pid = thread
        .call(instruction, libc::SYS_getpid, [0; 3])
        .unwrap()
        .unwrap();
    assert_eq!(i32::try_from(own_pid).unwrap(), pid);
    let bad = thread
        .call(instruction, libc::SYS_close, [u64::MAX, 0, 0])
        .unwrap();
    assert_eq!(bad.unwrap_err().raw_os_error(), Some(libc::EBADF));
    drop(thread);
    writeln!(helper.0.stdin.as_mut().unwrap(), "on").unwrap();
    assert_eq!(read_line(&mut output), "on");
    assert_eq!(helper.status("TracerPid:"), "0");
}

#[test]
fn the_vdso_is_searched_first_and_vsyscall_never() {
    let maps = "\
55d0c7e00000-55d0c7e01000 r-xp 00000000 08:01 1 /bin/a b
55d0c7f00000-55d0c7f01000 rw-p 00000000 00:00 0 [heap]
7ffd0a1f2000-7ffd0a1f4000 r-xp 00000000 00:00 0 [vdso]
ffffffffff600000-ffffffffff601000 r-xp 00000000 00:00 0 [vsyscall]
";
    assert_eq!(
        executable_mappings(maps),
        [
            0x7ffd_0a1f_2000..0x7ffd_0a1f_4000,
            0x55d0_c7e0_0000..0x55d0_c7e0_1000
        ]
    );
}
