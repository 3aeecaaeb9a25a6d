//! What both ends of a test agree on: where memory lies, what is in it, and how the processes are started.

use std::os::fd::OwnedFd;
use std::path::Path;
use std::process::{Child, Command, ExitStatus, Stdio};

use bytes::Bytes;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use sterna_pages::{
    BATCH_BYTES, Batch, EXTENT_BYTES, FillOptions, FillReport, LazyError, LazyEvent, LazyServer,
    PAGE_BYTES, Record, RecordKind, SpaceId, Staging,
};
use sys::uffd::{FEATURE_EVENT_FORK, Userfaultfd};
use tempfile::TempDir;

pub(crate) const PAGE: u64 = PAGE_BYTES as u64;
/// The pid of the restored process, as CRIU would know it.
pub(crate) const SPACE: SpaceId = SpaceId(17);
/// Where its memory lies: nothing else is mapped there, and it is no multiple of a window.
pub(crate) const START: u64 = 0x10_0000_0000 + 5 * PAGE;
/// How much there is of it.
pub(crate) const PAGES: u64 = 16 * 1024 + 100;
/// The pages that are hot where that matters.
pub(crate) const HOT: [std::ops::Range<u64>; 2] = [1000..1500, PAGES - 10..PAGES];
/// Roles other than a test, by this variable.
pub(crate) const ROLE: &str = "STERNA_TEST_ROLE";
/// The work directory of the lazy server.
pub(crate) const WORK_DIR: &str = "STERNA_TEST_WORK_DIR";
/// The exit code for "this machine does not let me".
pub(crate) const SKIPPED: i32 = 77;

/// Whether this machine lets us hear of forks.
pub(crate) fn hears_forks() -> bool {
    [false, true].into_iter().any(|user_mode_only| {
        Userfaultfd::create(user_mode_only)
            .and_then(|uffd| uffd.handshake(FEATURE_EVENT_FORK))
            .is_ok()
    })
}

/// The default options, as far as this machine allows.
pub(crate) fn options() -> FillOptions {
    FillOptions {
        require_forks: hears_forks(),
        ..FillOptions::default()
    }
}

/// Whether there is content for a page. Those between are zeros that never were anything else.
pub(crate) fn is_staged(page: u64) -> bool {
    page % 7 != 3 && !(2000..2600).contains(&page)
}

/// The content of a page, as 64-bit words: different for every page and word.
pub(crate) fn word(page: u64, index: u64) -> u64 {
    (page << 16 | index | 1 << 63).wrapping_mul(0x9e37_79b9_7f4a_7c15)
}

pub(crate) fn content(page: u64) -> Vec<u8> {
    (0..PAGE / 8)
        .flat_map(|index| word(page, index).to_ne_bytes())
        .collect()
}

/// Stages the pages of `from` that have content.
pub(crate) fn stage(staging: &Staging, space: SpaceId, from: std::ops::Range<u64>) {
    let mut page = from.start;
    while page < from.end {
        if !is_staged(page) {
            page += 1;
            continue;
        }
        let extent = (START + page * PAGE) / EXTENT_BYTES;
        let longest = (BATCH_BYTES / PAGE_BYTES) as u64;
        let end = (page..from.end.min(page + longest))
            .find(|page| !is_staged(*page) || (START + page * PAGE) / EXTENT_BYTES != extent)
            .unwrap_or(from.end.min(page + longest));
        let payload: Vec<u8> = (page..end).flat_map(content).collect();
        let record = Record {
            addr: START + page * PAGE,
            pages: u32::try_from(end - page).unwrap(),
            kind: RecordKind::Data,
        };
        staging
            .apply(&Batch {
                space,
                records: vec![record],
                payload: Bytes::from(payload),
            })
            .unwrap();
        page = end;
    }
}

/// Staging with everything the restored process has.
pub(crate) fn staged() -> Staging {
    let staging = Staging::new(4 << 30);
    stage(&staging, SPACE, 0..PAGES);
    staging
}

/// Starts this test program in another role.
pub(crate) fn start(role: &str, work_dir: &Path) -> Child {
    Command::new(std::env::current_exe().unwrap())
        .args(["--exact", "another_role", "--nocapture", "--test-threads=1"])
        .env(ROLE, role)
        .env(WORK_DIR, work_dir)
        .stdin(Stdio::null())
        .spawn()
        .unwrap()
}

/// What a restore came to.
pub(crate) struct Outcome {
    pub(crate) result: Result<FillReport, LazyError>,
    /// How the restored process ended, by a signal if filling failed.
    pub(crate) status: ExitStatus,
    pub(crate) events: Vec<&'static str>,
}

impl Outcome {
    /// The report of a restore that worked; none if it could not be tried here.
    pub(crate) fn expect_filled(self) -> Option<FillReport> {
        if self.is_skipped() {
            return None;
        }
        assert!(self.status.success(), "the process found wrong content");
        Some(self.result.unwrap())
    }

    pub(crate) fn is_skipped(&self) -> bool {
        let skipped = self.status.code() == Some(SKIPPED);
        if skipped {
            println!("skipped: this machine does not let us use userfaultfd");
        }
        skipped
    }
}

/// Serves a process that is restored in the given role.
pub(crate) fn restore(staging: &Staging, role: &str, options: FillOptions) -> Outcome {
    let dir = TempDir::new().unwrap();
    let server = LazyServer::bind(dir.path()).unwrap();
    let canceller = server.canceller();
    let mut process = start(role, dir.path());
    let pid = Pid::from_raw(i32::try_from(process.id()).unwrap());
    let mut guards: Vec<OwnedFd> = Vec::new();
    let mut events = Vec::new();
    std::thread::scope(|scope| {
        let watch = scope.spawn(move || {
            let status = process.wait().unwrap();
            // A process that never connected would be waited for for ever.
            if !status.success() {
                canceller.cancel();
            }
            status
        });
        let result = server.run(staging, options, &mut |event| match event {
            LazyEvent::Handed { guard, .. } => {
                guards.push(guard);
                events.push("handed");
            }
            LazyEvent::RestoreFinished => events.push("restored"),
            LazyEvent::Filled => {
                guards.clear();
                events.push("filled");
            }
        });
        if result.is_err() && !watch.is_finished() {
            // As the shim has to: first the process, then the guards. It may have ended just now.
            kill(pid, Signal::SIGKILL).ok();
        }
        let status = watch.join().unwrap();
        drop(guards);
        Outcome {
            result,
            status,
            events,
        }
    })
}
