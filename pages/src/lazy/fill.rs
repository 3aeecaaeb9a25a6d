//! The threads that fill memory in the background: hot pages first, then around the last fault, then by address.

use std::sync::Arc;
use std::time::Duration;

use super::LazyError;
use super::crew::{Crew, Message};
use super::outstanding::Piece;
use super::recipient::{Origin, Placed, Recipient};

/// How long to wait before pages are tried again that cannot be placed yet. CRIU sends the userfaultfd of a process some
/// 2 ms before it registers the mappings, each at its final address, and lets the tasks go 1 to 5 ms after that.
const RETRY_AFTER: Duration = Duration::from_micros(500);

/// Pieces that are tried before such a wait: when one mapping is not there yet, another may be.
const MISSES: u32 = 16;

/// How long to wait while the mappings of a process change: until the reader of events has been there and the thread
/// that changed them has gone on.
const CHANGING_FOR: Duration = Duration::from_micros(50);

/// How long to wait when others have taken all there is to do: they may have to give something back.
const IDLE_FOR: Duration = Duration::from_millis(1);

/// Why a thread stopped working on a piece.
enum Pause {
    /// All pages that were wanted are placed, or given up.
    Done,
    /// Mappings are changing.
    Changing,
    /// No mapping yet.
    Homeless,
    /// No memory.
    Starved,
}

/// A thread's place in the work.
#[derive(Default)]
struct Worker {
    last_space: Option<u64>,
    misses: u32,
}

/// Fills until the crew stops. A failure goes to the server.
///
/// Before the restore has finished only the `leader` does: CRIU needs the processors itself.
pub(super) fn run(crew: &Crew, leader: bool) {
    let mut worker = Worker::default();
    while !crew.is_stopped() {
        if !leader && !crew.has_resumed() {
            crew.wait(IDLE_FOR);
            continue;
        }
        match worker.work_once(crew) {
            Ok(None) => {}
            Ok(Some(wait)) => crew.wait(wait),
            Err(error) => {
                crew.send(Message::Failed(error));
                return;
            }
        }
    }
}

impl Worker {
    /// Fills one piece; returns how long to wait, if that makes sense.
    fn work_once(&mut self, crew: &Crew) -> Result<Option<Duration>, LazyError> {
        if let Some((space, piece)) = crew.next_hot() {
            if !piece.claim() {
                // Somebody fills all of it just now.
                return Ok(None);
            }
            let pause = fill(crew, &space, &piece, true);
            piece.unclaim();
            let pause = pause?;
            let wait = self.wait(&pause);
            if !matches!(pause, Pause::Done) {
                crew.hot_again(space, piece);
            }
            return Ok(wait);
        }
        if !crew.may_fill_all() {
            return Ok(Some(IDLE_FOR));
        }
        let Some((space, piece)) = crew.claim_next(&mut self.last_space) else {
            return Ok(Some(IDLE_FOR));
        };
        let pause = fill(crew, &space, &piece, false);
        piece.unclaim();
        let pause = pause?;
        if matches!(pause, Pause::Changing) {
            space.look_at(piece.base());
        }
        Ok(self.wait(&pause))
    }

    fn wait(&mut self, pause: &Pause) -> Option<Duration> {
        self.misses = match pause {
            Pause::Homeless => self.misses + 1,
            _ => 0,
        };
        match pause {
            Pause::Done => None,
            Pause::Changing => Some(CHANGING_FOR),
            Pause::Homeless if !self.misses.is_multiple_of(MISSES) => None,
            Pause::Homeless | Pause::Starved => Some(RETRY_AFTER),
        }
    }
}

/// Places the wanted pages of a piece that this thread has claimed.
fn fill(
    crew: &Crew,
    space: &Arc<Recipient>,
    piece: &Piece,
    hot_only: bool,
) -> Result<Pause, LazyError> {
    // Held until the end, so that the memory is given back without a lock held.
    let Some(window) = piece.window() else {
        return Ok(Pause::Done);
    };
    let mut from = 0;
    while !crew.is_stopped() {
        let (placed, next) = space
            .place_next(piece, &window, from, hot_only)
            .map_err(|error| error.of(space.id))?;
        match (placed, next) {
            (Placed::All, None) if from == 0 => return Ok(Pause::Done),
            (Placed::All, None) => from = 0,
            (Placed::All, Some(next)) => {
                crew.memory(space.id, true)?;
                from = next;
            }
            (Placed::Changing, _) => return Ok(Pause::Changing),
            (Placed::NoMemory, _) => {
                crew.memory(space.id, false)?;
                return Ok(Pause::Starved);
            }
            (Placed::Gone, _) => {
                crew.forget(space);
                return Ok(Pause::Done);
            }
            (Placed::Occupied(addr), _) => {
                return Err(LazyError::Occupied {
                    space: space.id,
                    addr,
                });
            }
            (Placed::Homeless(_), _) if !crew.has_resumed() => return Ok(Pause::Homeless),
            (Placed::Homeless(addr), _) => match space.origin {
                Origin::Forked => space.give_up(addr),
                Origin::Restored => {
                    return Err(LazyError::Homeless {
                        space: space.id,
                        addr,
                    });
                }
            },
        }
    }
    Ok(Pause::Done)
}
