//! Reads everything back and compares it with what must be there.

use std::hash::Hasher;

use anyhow::Result;
use twox_hash::XxHash3_64;

use crate::dataset::{BATCH, Dataset};
use crate::writer::Written;

/// What was found.
#[derive(Debug, Default)]
pub(crate) struct Verdict {
    /// The digest over all keys and values is what it must be.
    pub(crate) digest_equal: bool,
    /// Keys that are missing, or hold what was never written.
    pub(crate) keys_wrong: usize,
    /// Acknowledged writes that are not there.
    pub(crate) writes_lost: u64,
}

/// Compares the server's content with the writers' memory, on a new connection.
pub(crate) fn verify(
    client: &redis::Client,
    dataset: &Dataset,
    written: &[Written],
) -> Result<Verdict> {
    let mut connection = client.get_connection()?;
    let (mut expected, mut found) = (XxHash3_64::new(), XxHash3_64::new());
    let mut verdict = Verdict::default();
    for first in (0..dataset.keys()).step_by(BATCH) {
        let indices = first..(first + BATCH).min(dataset.keys());
        let keys: Vec<_> = indices.clone().map(Dataset::key).collect();
        let values: Vec<Option<Vec<u8>>> = redis::cmd("MGET").arg(&keys).query(&mut connection)?;
        for (index, value) in indices.zip(values) {
            let value = value.unwrap_or_default();
            let writer = &written[index % written.len()];
            let acknowledged = writer.versions.get(&index).copied().unwrap_or(0);
            let version = Dataset::version(&value);
            // Writes without an answer may or may not have happened.
            let unanswered = writer.unanswered.get(&index).copied().unwrap_or(0);
            let meant = match version {
                Some(version) if (acknowledged..=unanswered).contains(&version) => version,
                _ => acknowledged,
            };
            let wanted = dataset.value(index, meant);
            expected.write(&wanted);
            found.write(&value);
            if value != wanted {
                verdict.keys_wrong += 1;
                verdict.writes_lost += acknowledged.saturating_sub(version.unwrap_or(0));
            }
        }
    }
    verdict.digest_equal = expected.finish() == found.finish();
    Ok(verdict)
}
