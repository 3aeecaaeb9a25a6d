//! The thread that answers page faults and acts upon events. One for all address spaces, so that the events of each
//! are read by one thread only, as [`super::recipient`] demands.

use std::sync::Arc;
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::sys::epoll::{EpollEvent, EpollTimeout};
use sys::uffd::Userfaultfd;

use super::LazyError;
use super::crew::{Crew, Message, STOP_KEY};
use super::outstanding::Outstanding;
use super::recipient::{Placed, Recipient};
use super::report::add;

/// How long to try again at once when a fault cannot be answered because mappings are changing: the thread that
/// changed them only has to be scheduled.
const SPIN_FOR: Duration = Duration::from_millis(1);

/// Address spaces looked at after one wait.
const BATCH: usize = 64;

/// Nice value of this thread. A process of the container stands still until its fault is answered, while the threads
/// that fill, the ones that receive and the container itself want the same processors.
const NICE: i32 = -15;

/// Somebody waits for a page.
struct Fault {
    space: Arc<Recipient>,
    addr: u64,
    since: Instant,
}

/// Serves until the crew stops. A failure goes to the server.
pub(super) fn run(crew: &Crew) {
    // Without the right to it, faults are answered later but as well.
    drop(sys::priority::set_nice_of_thread(NICE));
    if let Err(error) = serve(crew) {
        crew.send(Message::Failed(error));
    }
}

fn serve(crew: &Crew) -> Result<(), LazyError> {
    let mut ready = [EpollEvent::empty(); BATCH];
    let mut faults: Vec<Fault> = Vec::new();
    loop {
        let count = match crew.epoll.wait(&mut ready, patience(&faults)) {
            Ok(count) => count,
            Err(Errno::EINTR) => 0,
            Err(errno) => return Err(LazyError::Wait(errno.into())),
        };
        let now = Instant::now();
        for event in &ready[..count] {
            if event.data() == STOP_KEY {
                return Ok(());
            }
            if let Some(space) = crew.space(event.data()) {
                hear(crew, &space, now, &mut faults)?;
            }
        }
        let mut postponed = Vec::new();
        for fault in faults {
            if !answer(crew, &fault)? {
                postponed.push(fault);
            }
        }
        faults = postponed;
        if !faults.is_empty() {
            std::thread::yield_now();
        }
    }
}

/// How long to wait for news: not at all, or not for long, while faults wait to be tried again.
fn patience(faults: &[Fault]) -> EpollTimeout {
    match faults.first() {
        None => EpollTimeout::NONE,
        Some(fault) if fault.since.elapsed() < SPIN_FOR => EpollTimeout::ZERO,
        Some(_) => EpollTimeout::from(1_u8),
    }
}

/// Reads what a space reports, once; what is left is reported again.
fn hear(
    crew: &Crew,
    space: &Arc<Recipient>,
    now: Instant,
    faults: &mut Vec<Fault>,
) -> Result<(), LazyError> {
    let announce = |uffd: Userfaultfd, outstanding: Outstanding| {
        add(&crew.tally.forks, 1);
        if outstanding.pages() == 0 {
            // Closed at once: the kernel can deal with a child that misses nothing alone.
            return;
        }
        crew.send(Message::Forked {
            parent: space.id,
            uffd,
            outstanding,
        });
    };
    let waiting = space
        .read_news(announce)
        .map_err(|error| error.of(space.id))?;
    for addr in waiting {
        // Whatever is filled next should be near.
        space.look_at(addr as i64);
        faults.push(Fault {
            space: Arc::clone(space),
            addr,
            since: now,
        });
    }
    Ok(())
}

/// Answers a fault; false if it has to be tried again.
fn answer(crew: &Crew, fault: &Fault) -> Result<bool, LazyError> {
    let space = &fault.space;
    let failed = |error: super::recipient::RequestError| error.of(space.id);
    match space.serve(fault.addr).map_err(failed)? {
        Placed::All => crew.tally.fault(fault.since.elapsed()),
        Placed::Changing => return Ok(false),
        Placed::NoMemory => {
            crew.memory(space.id, false)?;
            return Ok(false);
        }
        Placed::Gone => crew.forget(space),
        Placed::Occupied(addr) => {
            return Err(LazyError::Occupied {
                space: space.id,
                addr,
            });
        }
        // It was mapped when it was touched and is not any more; whoever touched it has to find out.
        Placed::Homeless(addr) => space.wake(addr).map_err(failed)?,
    }
    Ok(true)
}
