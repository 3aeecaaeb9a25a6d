//! What is in the server: every value is a function of its key and version.

use anyhow::Result;

use crate::rate::Bytes;

/// Keys per round trip while filling and verifying.
pub(crate) const BATCH: usize = 256;
/// Index and version at the head of each value.
const HEAD: usize = 16;

/// A set of keys with values of one size.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Dataset {
    keys: usize,
    value_size: usize,
}

impl Dataset {
    pub(crate) fn new(memory: Bytes, value_size: usize) -> Self {
        let value_size = value_size.max(HEAD);
        Self {
            keys: (memory.0 as usize / value_size).max(1),
            value_size,
        }
    }

    pub(crate) fn keys(&self) -> usize {
        self.keys
    }

    pub(crate) fn value_size(&self) -> usize {
        self.value_size
    }

    pub(crate) fn key(index: usize) -> String {
        format!("key:{index:010}")
    }

    /// The value of a key at a version: its head names both, the rest is noise
    /// that does not compress.
    pub(crate) fn value(&self, index: usize, version: u64) -> Vec<u8> {
        let mut value = Vec::with_capacity(self.value_size + 8);
        value.extend_from_slice(&(index as u64).to_le_bytes());
        value.extend_from_slice(&version.to_le_bytes());
        let mut state = (index as u64).wrapping_mul(0x9e37_79b9_7f4a_7c15) ^ (version << 1);
        while value.len() < self.value_size {
            // splitmix64, https://prng.di.unimi.it/splitmix64.c
            state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
            let mut word = state;
            word = (word ^ (word >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
            word = (word ^ (word >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
            value.extend_from_slice(&(word ^ (word >> 31)).to_le_bytes());
        }
        value.truncate(self.value_size);
        value
    }

    /// The version that a value says it has.
    pub(crate) fn version(value: &[u8]) -> Option<u64> {
        value
            .get(8..HEAD)
            .and_then(|bytes| bytes.try_into().ok())
            .map(u64::from_le_bytes)
    }

    /// Writes version 0 of everything, and the key of the probe.
    pub(crate) fn fill(&self, client: &redis::Client) -> Result<()> {
        let mut connection = client.get_connection()?;
        let () = redis::cmd("SET")
            .arg("probe")
            .arg("here")
            .query(&mut connection)?;
        for first in (0..self.keys).step_by(BATCH) {
            let mut pipeline = redis::pipe();
            for index in first..(first + BATCH).min(self.keys) {
                pipeline
                    .set(Self::key(index), self.value(index, 0))
                    .ignore();
            }
            let () = pipeline.query(&mut connection)?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_value_tells_its_version_and_differs_from_every_other() {
        let dataset = Dataset::new(Bytes(1 << 20), 1024);
        assert_eq!(dataset.keys(), 1024);
        let value = dataset.value(7, 3);
        assert_eq!(value.len(), 1024);
        assert_eq!(Dataset::version(&value), Some(3));
        assert_ne!(value[16..], dataset.value(7, 4)[16..]);
        assert_ne!(value[16..], dataset.value(8, 3)[16..]);
    }
}
