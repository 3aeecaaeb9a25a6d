//! Trees of files on the wire: the writable layer and CRIU's images.

use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use layer::{Item, LayerError, PassReport, Placer, Scanner, Stopped};
use proto::migration as pb;
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::Status;

use crate::link::Client;
use crate::wire::{self, WireError};

/// Items in flight between the reader of a tree and its stream. Each holds at
/// most one chunk of a file.
const QUEUE: usize = 16;

/// What can go wrong with a tree of files.
#[derive(Debug, thiserror::Error)]
pub(crate) enum FilesError {
    #[error("cannot read or place files")]
    Layer(#[from] LayerError),
    #[error("the peer sent a malformed file")]
    Wire(#[from] WireError),
    #[error("the stream of files broke: {}", .0.message())]
    Stream(#[from] Status),
    #[error("the stream of files ended early")]
    Ended,
}

/// Sends one tree: the first pass everything, later passes what changed.
#[derive(Debug)]
pub(crate) struct TreeSender {
    tree: pb::FileTree,
    scanner: Scanner,
    queue: mpsc::Sender<pb::FileItem>,
    items: u64,
    flushes: u64,
    bytes: Arc<AtomicU64>,
}

impl TreeSender {
    /// Opens the stream for the tree below `root`.
    pub(crate) async fn open(
        mut client: Client,
        tree: pb::FileTree,
        root: &Path,
    ) -> Result<Self, FilesError> {
        let (queue, items) = mpsc::channel(QUEUE);
        let mut answers = client.files(ReceiverStream::new(items)).await?.into_inner();
        tokio::spawn(async move {
            // Read so that the stream does not stall; `Prepared` tells what counts,
            // and an error shows as a queue that nobody empties.
            while let Ok(Some(_)) = answers.message().await {}
        });
        let scanner = Scanner::new(root)?;
        let bytes = Arc::default();
        Ok(Self {
            tree,
            scanner,
            queue,
            items: 0,
            flushes: 0,
            bytes,
        })
    }

    /// Has the next pass read the files that these processes have mapped: a store
    /// to a mapping does not always show in a file's times. Blocks.
    pub(crate) fn suspect_mapped_by(&mut self, processes: &[pages::Process]) {
        for process in processes {
            // One that ended has no mappings, and what it left shows in the times.
            if let Ok(paths) = layer::shared_writable(process.pid) {
                self.scanner.suspect(paths);
            }
        }
    }

    /// One pass over the tree; blocks, and returns when everything is queued.
    pub(crate) fn pass(&mut self, strict: bool) -> Result<PassReport, FilesError> {
        let Self {
            tree,
            scanner,
            queue,
            items,
            bytes,
            ..
        } = self;
        let report = scanner.pass(strict, &mut |item| {
            if let Item::Data { content, .. } = &item {
                bytes.fetch_add(content.len() as u64, Ordering::Relaxed);
            }
            *items += 1;
            queue
                .blocking_send(wrap(*tree, *items, wire::item_to_wire(item)))
                .map_err(|_| Stopped)
        })?;
        Ok(report)
    }

    /// Has the peer complete everything queued so far; `Final` waits for it.
    pub(crate) fn flush_later(&mut self) -> Result<(), FilesError> {
        self.flushes += 1;
        self.items += 1;
        let marker = wrap(
            self.tree,
            self.items,
            pb::file_item::Item::Flush(self.flushes),
        );
        self.queue
            .blocking_send(marker)
            .map_err(|_| FilesError::Ended)
    }

    /// Content sent so far, in bytes.
    pub(crate) fn bytes(&self) -> u64 {
        self.bytes.load(Ordering::Relaxed)
    }

    /// The account for `Final`.
    pub(crate) fn total(&self) -> pb::TreeTotal {
        pb::TreeTotal {
            tree: self.tree.into(),
            items: self.items,
        }
    }
}

fn wrap(tree: pb::FileTree, sequence: u64, item: pb::file_item::Item) -> pb::FileItem {
    pb::FileItem {
        tree: tree.into(),
        sequence,
        item: Some(item),
    }
}

/// Places the items of one stream, in order; blocks.
#[derive(Debug)]
pub(crate) struct TreePlacer {
    tree: pb::FileTree,
    placer: Placer,
    items: u64,
}

impl TreePlacer {
    pub(crate) fn new(tree: pb::FileTree, placer: Placer) -> Self {
        Self {
            tree,
            placer,
            items: 0,
        }
    }

    /// Places one item. Returns the flush to acknowledge, if it was a marker.
    pub(crate) fn apply(&mut self, item: pb::FileItem) -> Result<Option<u64>, FilesError> {
        if item.tree() != self.tree {
            return Err(WireError::Field("the tree of a file").into());
        }
        let expected = self.items + 1;
        if item.sequence != expected {
            return Err(WireError::Sequence {
                expected,
                got: item.sequence,
            }
            .into());
        }
        self.items = expected;
        let flush = match item.item {
            Some(pb::file_item::Item::Flush(flush)) => {
                self.placer.finish()?;
                Some(flush)
            }
            Some(item) => {
                if let Some(item) = wire::item_from_wire(item)? {
                    self.placer.apply(item)?;
                }
                None
            }
            None => return Err(WireError::Field("a file's content").into()),
        };
        Ok(flush)
    }

    /// Items placed so far, markers included.
    pub(crate) fn items(&self) -> u64 {
        self.items
    }
}
