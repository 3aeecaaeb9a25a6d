//! Carries a container's writable layer to another node.
//!
//! A container on overlayfs keeps everything it ever wrote in one directory,
//! the *upperdir*. [`Scanner`] reads that directory, first as a whole while the
//! container runs, then again for what changed, the last time while it is
//! frozen; [`Placer`] builds the same directory elsewhere, before an overlay is
//! mounted on it. Between them travel [`Item`]s, in order.
//!
//! What moves: regular files with their holes, directories, symbolic and hard
//! links, whiteouts (character devices 0/0), opaque directories (an extended
//! attribute), devices, FIFOs, sockets, owners, modes with setuid and sticky
//! bits, modification times, extended attributes with ACLs and capabilities.
//!
//! What does not: access times, inode numbers, `chattr` flags, project quotas,
//! and those attributes of overlayfs that hold handles or identities of the
//! file system they lie on (see [`xattr`]).
//!
//! Nothing here knows about the network or about containers; a plain directory
//! of files is carried just as well, and into one that others use with [`Merge`]. In a
//! plain directory a character device 0/0 is one, and what was removed is removed.

mod content;
mod entry;
mod error;
mod inode;
mod mapped;
mod merge;
mod meta;
mod output;
mod place;
mod scan;
mod tree;
pub mod xattr;

pub use content::CHUNK_BYTES;
pub use entry::{Entry, Item, Kind, MAX_DEPTH};
pub use error::{LayerError, Stopped};
pub use mapped::shared_writable;
pub use merge::{InPlace, Merge, Wins};
pub use place::{Limits, Placer};
pub use scan::{PassReport, Scanner};
