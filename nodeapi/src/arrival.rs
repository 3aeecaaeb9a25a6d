//! Arrival records on disk. What they mean is said in [`migrate::arrival`].
//!
//! A record is two files: `TICKET.json`, written when the ticket can be used, and
//! `TICKET.decided`, a copy that says `Ran` or `Fenced`. The second comes into
//! being by a hard link, which fails where there is one: whoever decides first
//! has decided, be it engine, shim or sternad, and nobody has to hold a lock.

use std::fs;
use std::io;
use std::sync::atomic::{AtomicU64, Ordering};

use migrate::arrival::{ArrivalRecord, ArrivalState};

use crate::rundir::{self, FileError, RunDir, io_error};

/// Extension of the files that say what a ticket has come to.
const DECIDED: &str = "decided";

/// Begins a record, before anybody can come with the ticket.
pub fn open(dir: &RunDir, record: &ArrivalRecord) -> Result<(), FileError> {
    debug_assert_eq!(record.state, ArrivalState::Open);
    rundir::write_json(&dir.arrival_record(&record.ticket_id), record)
}

/// Says that a ticket has come to `state`, unless that was decided before;
/// returns what holds. None: there is no such ticket.
pub fn decide(
    dir: &RunDir,
    ticket_id: &str,
    state: ArrivalState,
) -> Result<Option<ArrivalState>, FileError> {
    let Some(record) = read(dir, ticket_id)? else {
        return Ok(None);
    };
    if record.state != ArrivalState::Open {
        return Ok(Some(record.state));
    }
    let decided = dir.arrival_record(ticket_id).with_extension(DECIDED);
    // Others may be deciding, too.
    static DRAFTS: AtomicU64 = AtomicU64::new(0);
    let number = DRAFTS.fetch_add(1, Ordering::Relaxed);
    let draft = format!("{ticket_id}-{}-{number}.draft", std::process::id());
    let draft = dir.arrivals().join(draft);
    rundir::write_json(&draft, &ArrivalRecord { state, ..record })?;
    let linked = fs::hard_link(&draft, &decided);
    rundir::remove(&draft)?;
    match linked {
        Ok(()) => Ok(Some(state)),
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {
            Ok(read(dir, ticket_id)?.map(|record| record.state))
        }
        Err(error) => Err(io_error("write", &decided)(error)),
    }
}

/// The record of a ticket, as it stands.
pub fn read(dir: &RunDir, ticket_id: &str) -> Result<Option<ArrivalRecord>, FileError> {
    let path = dir.arrival_record(ticket_id);
    match rundir::read_json(&path.with_extension(DECIDED))? {
        Some(decided) => Ok(Some(decided)),
        None => rundir::read_json(&path),
    }
}

/// Fences every ticket of one container that has come to nothing yet. To be
/// called when no process of it is left here and none can come into being.
pub fn fence_container(dir: &RunDir, namespace: &str, id: &str) -> Result<(), FileError> {
    for record in rundir::read_all::<ArrivalRecord>(&dir.arrivals())? {
        if record.namespace == namespace && record.container_id == id {
            decide(dir, &record.ticket_id, ArrivalState::Fenced)?;
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use migrate::commit::Format;

    use super::*;

    fn lab() -> (tempfile::TempDir, RunDir) {
        let temp = tempfile::tempdir().unwrap();
        let dir = RunDir::at(temp.path());
        for ticket in ["t-1", "t-2"] {
            let record = ArrivalRecord {
                format: Format::CURRENT,
                migration_id: "m".into(),
                ticket_id: ticket.into(),
                source_node: "a".into(),
                namespace: "default".into(),
                container_id: "web".into(),
                state: ArrivalState::Open,
            };
            open(&dir, &record).unwrap();
        }
        (temp, dir)
    }

    fn state(dir: &RunDir, ticket: &str) -> Option<ArrivalState> {
        read(dir, ticket).unwrap().map(|record| record.state)
    }

    #[test]
    fn the_first_decision_holds() {
        use ArrivalState::{Fenced, Open, Ran};
        let (_temp, dir) = lab();
        assert_eq!(state(&dir, "t-1"), Some(Open));
        assert_eq!(decide(&dir, "t-1", Ran).unwrap(), Some(Ran));
        assert_eq!(decide(&dir, "t-1", Fenced).unwrap(), Some(Ran));
        assert_eq!(state(&dir, "t-1"), Some(Ran));
        assert_eq!(decide(&dir, "none", Ran).unwrap(), None);
        assert_eq!(state(&dir, "none"), None);
    }

    #[test]
    fn of_all_who_decide_at_once_one_does() {
        use ArrivalState::{Fenced, Ran};
        let (_temp, dir) = lab();
        let decided = std::thread::scope(|scope| {
            let threads: Vec<_> = (0..8)
                .map(|number| {
                    let (dir, wanted) = (&dir, if number % 2 == 0 { Ran } else { Fenced });
                    scope.spawn(move || decide(dir, "t-1", wanted).unwrap())
                })
                .collect();
            threads
                .into_iter()
                .map(|thread| thread.join().unwrap())
                .collect::<Vec<_>>()
        });
        let held = state(&dir, "t-1");
        assert!(decided.iter().all(|one| *one == held), "{decided:?}");
        let files = fs::read_dir(dir.arrivals()).unwrap().count();
        assert_eq!(files, 3, "two tickets, one decision, no draft");
    }

    #[test]
    fn fencing_a_container_leaves_what_ran() {
        use ArrivalState::{Fenced, Ran};
        let (_temp, dir) = lab();
        decide(&dir, "t-1", Ran).unwrap();
        fence_container(&dir, "default", "other").unwrap();
        fence_container(&dir, "default", "web").unwrap();
        assert_eq!(state(&dir, "t-1"), Some(Ran));
        assert_eq!(state(&dir, "t-2"), Some(Fenced));
    }
}
