//! What a pass emits, and the account of it.

use std::fs::File;
use std::io;
use std::path::PathBuf;

use bytes::Bytes;

use crate::content::{self, Chunk, Chunks, Digests};
use crate::entry::{Entry, Item};
use crate::error::Stopped;
use crate::scan::PassReport;

/// Where the items of one pass go.
pub(crate) struct Output<'a> {
    emit: &'a mut dyn FnMut(Item) -> Result<(), Stopped>,
    pub(crate) report: PassReport,
}

impl<'a> Output<'a> {
    pub(crate) fn new(emit: &'a mut dyn FnMut(Item) -> Result<(), Stopped>) -> Self {
        Self {
            emit,
            report: PassReport::default(),
        }
    }

    pub(crate) fn entry(&mut self, entry: Entry) -> Result<(), Stopped> {
        self.report.files += 1;
        (self.emit)(Item::Entry(entry))
    }

    pub(crate) fn remove(&mut self, path: PathBuf) -> Result<(), Stopped> {
        self.report.removed += 1;
        (self.emit)(Item::Remove(path))
    }

    fn data(&mut self, offset: u64, content: Bytes) -> Result<(), Stopped> {
        self.report.bytes += content.len() as u64;
        (self.emit)(Item::Data { offset, content })
    }
}

/// A regular file on its way.
pub(crate) struct Sending<'a, 'b> {
    /// Not sent yet.
    entry: Option<Entry>,
    output: &'a mut Output<'b>,
}

/// Why content was not sent.
pub(crate) enum Unread {
    Read(io::Error),
    Stopped(Stopped),
}

impl From<Stopped> for Unread {
    fn from(stopped: Stopped) -> Self {
        Self::Stopped(stopped)
    }
}

impl<'a, 'b> Sending<'a, 'b> {
    pub(crate) fn new(output: &'a mut Output<'b>, entry: Entry) -> Self {
        Self {
            entry: Some(entry),
            output,
        }
    }

    /// Sends the entry, unless it went already.
    pub(crate) fn announce(&mut self) -> Result<(), Stopped> {
        match self.entry.take() {
            Some(entry) => self.output.entry(entry),
            None => Ok(()),
        }
    }

    fn data(&mut self, (offset, content): (u64, Bytes)) -> Result<(), Stopped> {
        self.announce()?;
        self.output.data(offset, content)
    }

    /// Sends the chunks that differ from what the receiver has, and before the
    /// first of them the entry.
    pub(crate) fn content(
        &mut self,
        file: &File,
        size: u64,
        before: &Digests,
    ) -> Result<Digests, Unread> {
        let mut before = before.iter().copied().peekable();
        let mut digests = Digests::new();
        for chunk in Chunks::new(file, size) {
            let chunk = chunk.map_err(Unread::Read)?;
            while let Some((number, _)) = before.next_if(|(number, _)| *number < chunk.number) {
                self.clear(number, size)?;
            }
            let known = before
                .next_if(|(number, _)| *number == chunk.number)
                .map(|(_, digest)| digest);
            self.chunk(&chunk, known)?;
            if chunk.digest != 0 {
                digests.push((chunk.number, chunk.digest));
            }
        }
        for (number, _) in before {
            self.clear(number, size)?;
        }
        Ok(digests)
    }

    fn chunk(&mut self, chunk: &Chunk, known: Option<content::Digest>) -> Result<(), Stopped> {
        match known {
            Some(digest) if digest == chunk.digest => Ok(()),
            Some(_) => self.data(chunk.whole()),
            None if chunk.digest == 0 => Ok(()),
            None => chunk.pieces().try_for_each(|piece| self.data(piece)),
        }
    }

    /// What was content became a hole.
    fn clear(&mut self, number: u64, size: u64) -> Result<(), Stopped> {
        content::zeros(number, size).map_or(Ok(()), |zeros| self.data(zeros))
    }
}
