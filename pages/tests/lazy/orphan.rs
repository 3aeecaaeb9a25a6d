//! What becomes of a process whose server dies while its memory is being filled.

use std::os::fd::AsFd;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::process::ExitStatus;
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, raise};
use sterna_pages::{FillOptions, LazyEvent, LazyServer, Prefill};
use sys::fdpass::{recv_with_fds, send_with_fds};

use crate::fixture::{SKIPPED, options, staged, start};

/// The role of the server.
pub(crate) const SERVER: &str = "serves and dies";

const GUARDS: &str = "guards.socket";

/// Hands its guard to the test, serves, and is gone when the process has been restored.
pub(crate) fn serve_and_die(work_dir: &Path) {
    let keeper = UnixStream::connect(work_dir.join(GUARDS)).unwrap();
    let options = FillOptions {
        threads: 1,
        prefill: Prefill::Off,
        ..options()
    };
    let server = LazyServer::bind(work_dir).unwrap();
    // Tells the test that the process can be started.
    send_with_fds(&keeper, &[0], &[]).unwrap();
    let result = server.run(&staged(), options, &mut |event| match event {
        LazyEvent::Handed { guard, .. } => {
            send_with_fds(&keeper, &[0], &[guard.as_fd()]).unwrap();
        }
        LazyEvent::RestoreFinished | LazyEvent::Filled => raise(Signal::SIGKILL).unwrap(),
    });
    panic!("still here: {result:?}");
}

/// How a process ended whose server died, with or without somebody who keeps the guard; `Some(None)` if it did not.
/// `None` where that cannot be tried.
pub(crate) fn outlive_the_server(keep: bool) -> Option<Option<ExitStatus>> {
    let dir = tempfile::tempdir().unwrap();
    let listener = UnixListener::bind(dir.path().join(GUARDS)).unwrap();
    let mut server = start(SERVER, dir.path());
    let (keeper, _) = listener.accept().unwrap();
    recv_with_fds(&keeper, &mut [0]).unwrap();
    let mut process = start("touches slowly", dir.path());
    let mut guards = Vec::new();
    // The server sends one guard and then closes by dying; a process that may not use userfaultfd never connects.
    keeper
        .set_read_timeout(Some(Duration::from_millis(100)))
        .unwrap();
    loop {
        match recv_with_fds(&keeper, &mut [0]) {
            Ok((0, _)) => break,
            Ok((_, fds)) => guards.extend(fds.into_iter().filter(|_| keep)),
            Err(_) if process.try_wait().unwrap().is_some() => break,
            Err(_) => {}
        }
    }
    // Long enough to be sure that it waits, or for a slow machine to let it go wrong.
    let patience = Duration::from_millis(if keep { 500 } else { 30_000 });
    let deadline = Instant::now() + patience;
    let mut ended = None;
    while ended.is_none() && Instant::now() < deadline {
        ended = process.try_wait().unwrap();
        std::thread::sleep(Duration::from_millis(5));
    }
    // First the process, then its guard.
    process.kill().unwrap();
    process.wait().unwrap();
    drop(guards);
    server.kill().unwrap();
    server.wait().unwrap();
    if ended.and_then(|status| status.code()) == Some(SKIPPED) {
        println!("skipped: this machine does not let us use userfaultfd");
        return None;
    }
    Some(ended)
}
