//! Trees of files on the wire: the writable layer, volumes and CRIU's images.

use std::path::{Path, PathBuf};
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

/// Which tree of files.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) enum Tree {
    /// The writable layer.
    Layer,
    /// CRIU's images.
    Images,
    /// A volume, by its place in the list of them.
    Volume(u32),
}

impl Tree {
    pub(crate) fn of_item(item: &pb::FileItem) -> Result<Self, WireError> {
        Self::from_wire(item.tree(), item.volume)
    }

    pub(crate) fn of_total(total: &pb::TreeTotal) -> Result<Self, WireError> {
        Self::from_wire(total.tree(), total.volume)
    }

    fn from_wire(tree: pb::FileTree, volume: u32) -> Result<Self, WireError> {
        match tree {
            pb::FileTree::Layer => Ok(Self::Layer),
            pb::FileTree::Images => Ok(Self::Images),
            pb::FileTree::Volume => Ok(Self::Volume(volume)),
            pb::FileTree::Unspecified => Err(WireError::Field("the tree of a file")),
        }
    }

    /// One number for each, which is recorded on disk.
    pub(crate) fn number(self) -> u32 {
        match self {
            Self::Layer => 1,
            Self::Images => 2,
            Self::Volume(volume) => volume.saturating_add(3),
        }
    }

    fn to_wire(self) -> (i32, u32) {
        match self {
            Self::Layer => (pb::FileTree::Layer.into(), 0),
            Self::Images => (pb::FileTree::Images.into(), 0),
            Self::Volume(volume) => (pb::FileTree::Volume.into(), volume),
        }
    }
}

/// Files that a process has mapped so that stores to them do not show in their times.
#[derive(Debug)]
pub(crate) struct Mapped {
    pid: i32,
    paths: Vec<PathBuf>,
}

impl Mapped {
    /// Those of all that have some. Blocks.
    pub(crate) fn by(processes: &[pages::Process]) -> Vec<Self> {
        let of = |process: &pages::Process| {
            // One that ended has no mappings, and what it left shows in the times.
            let paths = layer::shared_writable(process.pid).ok()?;
            let pid = process.pid;
            (!paths.is_empty()).then_some(Self { pid, paths })
        };
        processes.iter().filter_map(of).collect()
    }
}

/// Sends one tree: the first pass everything, later passes what changed.
#[derive(Debug)]
pub(crate) struct TreeSender {
    tree: Tree,
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
        tree: Tree,
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

    /// Has the next pass read these files.
    pub(crate) fn suspect(&mut self, mapped: &[Mapped]) {
        for Mapped { pid, paths } in mapped {
            let paths = paths.iter().cloned();
            match self.tree {
                Tree::Volume(_) => {
                    let root = PathBuf::from(format!("/proc/{pid}/root"));
                    self.scanner.suspect_seen_from(&root, paths);
                }
                Tree::Layer | Tree::Images => self.scanner.suspect(paths),
            }
        }
    }

    /// One pass over the tree; blocks, and returns when everything is queued. Volumes
    /// are never read strictly: others may use them, who do not stand still.
    pub(crate) fn pass(&mut self, strict: bool) -> Result<PassReport, FilesError> {
        let strict = strict && !matches!(self.tree, Tree::Volume(_));
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
        });
        report.map_err(|error| match error {
            // The peer, who may have said why.
            LayerError::Stopped(Stopped) => FilesError::Ended,
            error => error.into(),
        })
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
        let (tree, volume) = self.tree.to_wire();
        pb::TreeTotal {
            tree,
            items: self.items,
            volume,
        }
    }
}

fn wrap(tree: Tree, sequence: u64, item: pb::file_item::Item) -> pb::FileItem {
    let (tree, volume) = tree.to_wire();
    pb::FileItem {
        tree,
        sequence,
        item: Some(item),
        volume,
    }
}

/// Places the items of one stream, in order; blocks.
#[derive(Debug)]
pub(crate) struct TreePlacer {
    tree: Tree,
    placer: Placer,
    items: u64,
}

impl TreePlacer {
    pub(crate) fn new(tree: Tree, placer: Placer) -> Self {
        Self {
            tree,
            placer,
            items: 0,
        }
    }

    /// Places one item. Returns the flush to acknowledge, if it was a marker.
    pub(crate) fn apply(&mut self, item: pb::FileItem) -> Result<Option<u64>, FilesError> {
        if Tree::of_item(&item)? != self.tree {
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_tree_is_the_same_on_the_other_side_and_an_unknown_one_is_refused() {
        for tree in [Tree::Layer, Tree::Images, Tree::Volume(0), Tree::Volume(7)] {
            let flush = pb::file_item::Item::Flush(1);
            assert_eq!(Tree::of_item(&wrap(tree, 1, flush)), Ok(tree));
        }
        Tree::of_item(&pb::FileItem::default()).unwrap_err();
        let later = pb::TreeTotal {
            tree: 99,
            ..Default::default()
        };
        Tree::of_total(&later).unwrap_err();
    }

    #[test]
    fn one_stream_carries_one_volume() {
        let directory = tempfile::tempdir().unwrap();
        let placer = Placer::new(directory.path(), layer::Limits::default()).unwrap();
        let mut placer = TreePlacer::new(Tree::Volume(0), placer);
        let flush = |volume, sequence| {
            let item = pb::file_item::Item::Flush(1);
            wrap(Tree::Volume(volume), sequence, item)
        };
        assert_eq!(placer.apply(flush(0, 1)).unwrap(), Some(1));
        placer.apply(flush(1, 2)).unwrap_err();
    }
}
