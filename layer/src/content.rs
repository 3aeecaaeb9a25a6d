//! The content of a regular file, in chunks, without its holes.

use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::unix::fs::FileExt;

use bytes::Bytes;
use rustix::fs::{SeekFrom, seek};
use rustix::io::Errno;
use twox_hash::XxHash3_64;

/// Content is read, compared and sent in chunks of this size, aligned to it.
pub const CHUNK_BYTES: usize = 256 << 10;

const CHUNK: u64 = CHUNK_BYTES as u64;

/// XXH3-64 of a chunk's content; zero if all of it is zeros.
///
/// A hash stands for the content when a file is compared with what was sent
/// before. It is not a cryptographic one: whoever can make two chunks of the
/// same hash spoils only their own container's file.
pub(crate) type Digest = u64;

/// Digests of the chunks that are not all zeros, by the chunk's number. Memory
/// follows what a file holds, not how large it says it is.
pub(crate) type Digests = Vec<(u64, Digest)>;

/// One chunk that may hold something else than zeros.
#[derive(Debug)]
pub(crate) struct Chunk {
    pub(crate) number: u64,
    pub(crate) digest: Digest,
    content: Bytes,
    /// The parts of `content` that are no holes, in bytes from its start.
    pieces: Vec<Range<usize>>,
}

impl Chunk {
    pub(crate) fn offset(&self) -> u64 {
        self.number * CHUNK
    }

    /// All of it, holes as zeros.
    pub(crate) fn whole(&self) -> (u64, Bytes) {
        (self.offset(), self.content.clone())
    }

    /// What is not a hole: offsets in the file and content.
    pub(crate) fn pieces(&self) -> impl Iterator<Item = (u64, Bytes)> + '_ {
        self.pieces.iter().map(|piece| {
            (
                self.offset() + piece.start as u64,
                self.content.slice(piece.clone()),
            )
        })
    }
}

/// The zeros that replace chunk `number` of a file of `size` bytes; none where
/// the file ends before it.
pub(crate) fn zeros(number: u64, size: u64) -> Option<(u64, Bytes)> {
    static ZEROS: [u8; CHUNK_BYTES] = [0; CHUNK_BYTES];
    let offset = number * CHUNK;
    let length = size.saturating_sub(offset).min(CHUNK);
    (length > 0).then(|| (offset, Bytes::from_static(&ZEROS[..length as usize])))
}

/// Reads the first `size` bytes of a file, chunk by chunk, and leaves out chunks
/// that are holes. What is missing because the file shrank reads as zeros.
#[derive(Debug)]
pub(crate) struct Chunks<'a> {
    file: &'a File,
    size: u64,
    at: u64,
    /// The last stretch of data that the file system told of.
    extent: Range<u64>,
}

impl<'a> Chunks<'a> {
    pub(crate) fn new(file: &'a File, size: u64) -> Self {
        Self {
            file,
            size,
            at: 0,
            extent: 0..0,
        }
    }

    /// The first stretch of data that ends after `from`.
    fn data(&mut self, from: u64) -> io::Result<Option<Range<u64>>> {
        if from >= self.size {
            return Ok(None);
        }
        if self.extent.end <= from {
            let found = seek(self.file, SeekFrom::Data(from))
                .and_then(|start| Ok(start..seek(self.file, SeekFrom::Hole(start))?));
            self.extent = match found {
                Ok(extent) => extent.start..extent.end.min(self.size),
                Err(Errno::NXIO) => return Ok(None), // only holes to the end
                Err(errno) => return Err(errno.into()),
            };
            if self.extent.is_empty() {
                return Ok(None);
            }
        }
        Ok(Some(self.extent.start.max(from)..self.extent.end))
    }

    fn read(&mut self) -> io::Result<Option<Chunk>> {
        let Some(mut data) = self.data(self.at)? else {
            return Ok(None);
        };
        let number = data.start / CHUNK;
        let start = number * CHUNK;
        let end = (start + CHUNK).min(self.size);
        let mut content = vec![0; (end - start) as usize];
        let mut pieces = Vec::new();
        loop {
            let piece = (data.start - start) as usize..(data.end.min(end) - start) as usize;
            fill(self.file, &mut content[piece.clone()], data.start)?;
            pieces.push(piece);
            match self.data(data.end.min(end))? {
                Some(next) if next.start < end => data = next,
                _ => break,
            }
        }
        self.at = end;
        let digest = digest(&content);
        Ok(Some(Chunk {
            number,
            digest,
            content: content.into(),
            pieces,
        }))
    }
}

impl Iterator for Chunks<'_> {
    type Item = io::Result<Chunk>;

    fn next(&mut self) -> Option<Self::Item> {
        self.read().transpose()
    }
}

/// Like `read_exact_at`, but a file that ended earlier is no error.
fn fill(file: &File, mut buffer: &mut [u8], mut offset: u64) -> io::Result<()> {
    while !buffer.is_empty() {
        match file.read_at(buffer, offset) {
            Ok(0) => break,
            Ok(read) => {
                buffer = &mut buffer[read..];
                offset += read as u64;
            }
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    Ok(())
}

fn digest(content: &[u8]) -> Digest {
    if is_zero(content) {
        0
    } else {
        XxHash3_64::oneshot(content).max(1)
    }
}

fn is_zero(content: &[u8]) -> bool {
    let (words, rest) = content.as_chunks::<16>();
    words.iter().all(|word| u128::from_ne_bytes(*word) == 0) && rest.iter().all(|byte| *byte == 0)
}

#[cfg(test)]
mod tests {
    use super::*;

    const KIB: u64 = 1024;

    fn file(size: u64, pieces: &[(u64, &[u8])]) -> File {
        let file = tempfile::tempfile().unwrap();
        file.set_len(size).unwrap();
        for (offset, content) in pieces {
            file.write_all_at(content, *offset).unwrap();
        }
        file
    }

    fn read(file: &File, size: u64) -> Vec<Chunk> {
        Chunks::new(file, size).map(Result::unwrap).collect()
    }

    #[test]
    fn holes_are_left_out() {
        let page = [7; 4096];
        let far = (1 << 40) + 8 * KIB;
        let file = file(far + 4096, &[(0, &page), (64 * KIB, &page), (far, &page)]);
        let chunks = read(&file, far + 4096);
        assert_eq!(chunks.len(), 2);
        let pieces: Vec<_> = chunks[0]
            .pieces()
            .map(|(offset, content)| (offset, content.len()))
            .collect();
        assert_eq!(pieces, [(0, 4096), (64 * KIB, 4096)]);
        assert_eq!(chunks[1].number, (1 << 40) / CHUNK);
        let (offset, content) = chunks[1].pieces().next().unwrap();
        assert_eq!((offset, &content[..]), (far, &page[..]));
    }

    #[test]
    fn a_file_that_shrank_reads_as_zeros_behind_its_end() {
        let file = file(0, &[(0, b"abc")]);
        let chunks = read(&file, 10);
        assert_eq!(chunks[0].whole().0, 0);
        assert_eq!(&chunks[0].whole().1[..], b"abc\0\0\0\0\0\0\0");
        let file = file_of_ones(CHUNK + 10);
        let chunks = Chunks::new(&file, CHUNK + 20);
        let lengths: Vec<_> = chunks.map(|chunk| chunk.unwrap().content.len()).collect();
        assert_eq!(lengths, [CHUNK_BYTES, 20]);
    }

    fn file_of_ones(size: u64) -> File {
        file(0, &[(0, &vec![1; size as usize])])
    }

    #[test]
    fn equal_content_has_equal_digests_with_and_without_holes() {
        let holes = file(CHUNK * 2, &[(CHUNK, &[1; 10])]);
        let zeros = file(0, &[(0, &vec![0; CHUNK_BYTES * 2]), (CHUNK, &[1; 10])]);
        let digests = |file: &File| -> Digests {
            let chunks = read(file, CHUNK * 2).into_iter();
            chunks
                .map(|chunk| (chunk.number, chunk.digest))
                .filter(|(_, digest)| *digest != 0)
                .collect()
        };
        assert_eq!(digests(&holes), digests(&zeros));
        assert_eq!(digests(&holes).len(), 1);
    }

    #[test]
    fn a_chunk_of_zeros_ends_where_its_file_ends() {
        assert_eq!(
            zeros(0, 10).map(|(offset, content)| (offset, content.len())),
            Some((0, 10))
        );
        assert_eq!(zeros(1, CHUNK), None);
        assert_eq!(
            zeros(1, CHUNK * 3).map(|(offset, content)| (offset, content.len())),
            Some((CHUNK, CHUNK_BYTES))
        );
    }
}
