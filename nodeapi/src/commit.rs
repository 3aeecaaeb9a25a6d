//! Commit records on disk. What they mean is said in [`migrate::commit`].

use migrate::commit::CommitRecord;

use crate::rundir::{self, FileError, RunDir};

/// Puts `record` in the place of an older one of its migration.
pub fn write(dir: &RunDir, record: &CommitRecord) -> Result<(), FileError> {
    rundir::write_json(&dir.commit_record(&record.migration_id), record)
}

/// The record of a migration, if it came to a commit.
pub fn read(dir: &RunDir, migration_id: &str) -> Result<Option<CommitRecord>, FileError> {
    rundir::read_json(&dir.commit_record(migration_id))
}

/// Takes the record of a migration away.
pub fn remove(dir: &RunDir, migration_id: &str) -> Result<(), FileError> {
    rundir::remove(&dir.commit_record(migration_id))
}

/// The records of one container: for whoever removes what is left of it.
pub fn of_container(
    dir: &RunDir,
    namespace: &str,
    id: &str,
) -> Result<Vec<CommitRecord>, FileError> {
    let mut records: Vec<CommitRecord> = rundir::read_all(&dir.commits())?;
    records.retain(|record| record.namespace == namespace && record.container_id == id);
    Ok(records)
}

#[cfg(test)]
mod tests {
    use migrate::commit::{CommitState, Format, InitProcess};

    use super::*;

    #[test]
    fn a_containers_records_are_found_by_its_name() {
        let temp = tempfile::tempdir().unwrap();
        let dir = RunDir::at(temp.path());
        assert_eq!(of_container(&dir, "default", "web").unwrap(), []);
        let record = CommitRecord {
            format: Format::CURRENT,
            migration_id: "m".into(),
            namespace: "default".into(),
            container_id: "web".into(),
            destination_node: "b".into(),
            destination_address: "b:7443".into(),
            ticket_id: "t".into(),
            init: InitProcess {
                pid: 7,
                start_ticks: 8,
            },
            state: CommitState::Committing,
        };
        write(&dir, &record).unwrap();
        assert_eq!(of_container(&dir, "default", "db").unwrap(), []);
        assert_eq!(of_container(&dir, "default", "web").unwrap(), [record]);
        remove(&dir, "m").unwrap();
        remove(&dir, "m").unwrap();
        assert_eq!(read(&dir, "m").unwrap(), None);
    }
}
