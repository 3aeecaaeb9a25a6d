//! Changes to CRIU's image files.
//!
//! An image file is two magic numbers and a sequence of messages, each a 32-bit
//! length and a protobuf message (criu/include/image.h, images/*.proto).

mod uts;

use std::fs;
use std::io;
use std::ops::Range;
use std::path::{Path, PathBuf};

pub use self::uts::set_hostname;

/// First magic number of image files since CRIU 1.0 (`IMG_COMMON_MAGIC`).
const COMMON_MAGIC: u32 = 0x5456_4319;

/// Second magic number of pagemap files (`PAGEMAP_MAGIC`).
const PAGEMAP_MAGIC: u32 = 0x5608_4025;

/// The largest pagemap file that is read: 16 bytes an entry, so that even a
/// terabyte in runs of 64 KiB fits.
const LIMIT_BYTES: u64 = 256 << 20;

/// Field `flags` of `pagemap_entry`.
const FLAGS_FIELD: u64 = 4;

/// Other fields of it: `vaddr`, `compat_nr_pages`, `nr_pages`.
const ADDRESS_FIELD: u64 = 1;
const OLD_PAGES_FIELD: u64 = 2;
const PAGES_FIELD: u64 = 5;

/// `PE_LAZY`: the page is served by the lazy-pages daemon.
const PE_LAZY: u64 = 1 << 1;

/// `PE_PRESENT`: the page is in the images.
const PE_PRESENT: u64 = 1 << 2;

const PAGE_BYTES: u64 = 4096;

/// Why an image file cannot be changed.
#[derive(Debug, thiserror::Error)]
pub enum ImageError {
    /// It cannot be read or written.
    #[error("cannot {operation} {}", path.display())]
    Io {
        /// "list", "read" or "write".
        operation: &'static str,
        /// The file or directory.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// It is larger than any that CRIU would write.
    #[error("{} is too large: {bytes} bytes", path.display())]
    TooLarge {
        /// The file.
        path: PathBuf,
        /// Its size.
        bytes: u64,
    },
    /// It is not what its name says.
    #[error("{} is not such an image: {reason}, at byte {offset}", path.display())]
    Malformed {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        reason: &'static str,
        /// Where.
        offset: usize,
    },
}

/// Makes a lazy restore load the pages that are in the images itself, eagerly:
/// clears the "lazy" flag of all entries in `pagemap-*.img` in `directory`.
/// Returns how many entries had it.
///
/// A dump flags every page that could be served lazily, and a lazy restore skips
/// these, whether they are in the images or not; the pages that CRIU dumped beside
/// our engine would be lost.
///
/// # Errors
///
/// When a file cannot be read or written, or is none of CRIU's; files before it
/// may have been changed.
pub fn clear_lazy(directory: &Path) -> Result<u64, ImageError> {
    let mut cleared = 0;
    for path in pagemaps(directory)? {
        let mut image = read(&path)?;
        let changed = clear_flags(&mut image).map_err(|wrong| wrong.of(&path))?;
        if changed != 0 {
            fs::write(&path, &image).map_err(io_error("write", &path))?;
            cleared += changed;
        }
    }
    Ok(cleared)
}

/// The pages of one process that lie in the images.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DumpedPages {
    /// The process, in its own pid namespace.
    pub pid: u32,
    /// Where its pages are, ascending.
    pub ranges: Vec<Range<u64>>,
}

/// The pages that CRIU dumped itself, of all processes: a restore puts them into
/// memory, and nobody else must.
///
/// # Errors
///
/// When a file cannot be read, or is none of CRIU's.
pub fn dumped_pages(directory: &Path) -> Result<Vec<DumpedPages>, ImageError> {
    let mut dumped = Vec::new();
    for path in pagemaps(directory)? {
        // Those of shared memory are named otherwise.
        let Some(pid) = process_of(&path) else {
            continue;
        };
        let mut ranges = Vec::new();
        entries(&read(&path)?, |entry| {
            if entry
                .flags
                .is_some_and(|(_, flags)| flags & PE_PRESENT != 0)
            {
                let length = entry.pages.saturating_mul(PAGE_BYTES);
                ranges.push(entry.address..entry.address.saturating_add(length));
            }
        })
        .map_err(|wrong| wrong.of(&path))?;
        dumped.push(DumpedPages { pid, ranges });
    }
    Ok(dumped)
}

fn io_error<'a>(
    operation: &'static str,
    path: &'a Path,
) -> impl FnOnce(io::Error) -> ImageError + 'a {
    move |source| ImageError::Io {
        operation,
        path: path.to_owned(),
        source,
    }
}

fn pagemaps(directory: &Path) -> Result<Vec<PathBuf>, ImageError> {
    list(directory, "pagemap-")
}

/// The images of one kind: those whose name begins so.
fn list(directory: &Path, kind: &str) -> Result<Vec<PathBuf>, ImageError> {
    let mut found = Vec::new();
    for entry in fs::read_dir(directory).map_err(io_error("list", directory))? {
        let path = entry.map_err(io_error("list", directory))?.path();
        let name = path.file_name().unwrap_or_default().as_encoded_bytes();
        if name.starts_with(kind.as_bytes()) && name.ends_with(b".img") {
            found.push(path);
        }
    }
    Ok(found)
}

fn read(path: &Path) -> Result<Vec<u8>, ImageError> {
    let bytes = fs::metadata(path).map_err(io_error("read", path))?.len();
    if bytes > LIMIT_BYTES {
        return Err(ImageError::TooLarge {
            path: path.to_owned(),
            bytes,
        });
    }
    fs::read(path).map_err(io_error("read", path))
}

/// `pagemap-PID.img`
fn process_of(path: &Path) -> Option<u32> {
    let name = path.file_name()?.to_str()?;
    name.strip_prefix("pagemap-")?
        .strip_suffix(".img")?
        .parse()
        .ok()
}

#[derive(Debug, PartialEq, Eq)]
struct Malformed {
    reason: &'static str,
    offset: usize,
}

impl Malformed {
    fn of(self, path: &Path) -> ImageError {
        ImageError::Malformed {
            path: path.to_owned(),
            reason: self.reason,
            offset: self.offset,
        }
    }
}

/// `pagemap_entry`, as far as it matters.
#[derive(Debug, Default)]
struct Entry {
    address: u64,
    pages: u64,
    /// Where the value is, and the value.
    flags: Option<(usize, u64)>,
}

/// Reads all entries of a pagemap image.
fn entries(image: &[u8], mut found: impl FnMut(Entry)) -> Result<(), Malformed> {
    let mut reader = Reader {
        bytes: image,
        position: 0,
    };
    if reader.word()? != COMMON_MAGIC || reader.word()? != PAGEMAP_MAGIC {
        return Err(reader.malformed("wrong magic number"));
    }
    let mut is_head = true;
    while reader.position < reader.bytes.len() {
        let length = reader.word()? as usize;
        let end = reader.position.saturating_add(length);
        if end > reader.bytes.len() {
            return Err(reader.malformed("a message ends behind the file"));
        }
        let mut entry = Entry::default();
        while reader.position < end {
            let (field, value) = reader.field()?;
            match (field, value) {
                (ADDRESS_FIELD, Some((_, address))) => entry.address = address,
                // Before 4.2 the first, from 4.2 on the second; the other is zero
                // or missing.
                (OLD_PAGES_FIELD | PAGES_FIELD, Some((_, pages))) => {
                    entry.pages = entry.pages.max(pages);
                }
                (FLAGS_FIELD, Some(flags)) => entry.flags = Some(flags),
                _ => {}
            }
        }
        if reader.position != end {
            return Err(reader.malformed("a field ends behind its message"));
        }
        // The first message is the head: no entry.
        if !std::mem::replace(&mut is_head, false) {
            found(entry);
        }
    }
    Ok(())
}

/// Clears the flag in every entry of a pagemap image, in place: the value keeps
/// its length.
fn clear_flags(image: &mut [u8]) -> Result<u64, Malformed> {
    let mut lazy = Vec::new();
    entries(image, |entry| {
        if let Some((position, flags)) = entry.flags
            && flags & PE_LAZY != 0
        {
            lazy.push(position);
        }
    })?;
    for position in &lazy {
        // The low bits of a number are those of the first byte of its encoding.
        image[*position] &= !(PE_LAZY as u8);
    }
    Ok(lazy.len() as u64)
}

struct Reader<'a> {
    bytes: &'a [u8],
    position: usize,
}

impl Reader<'_> {
    fn malformed(&self, reason: &'static str) -> Malformed {
        Malformed {
            reason,
            offset: self.position,
        }
    }

    fn skip(&mut self, length: u64) -> Result<(), Malformed> {
        let left = self.bytes.len() - self.position;
        match usize::try_from(length) {
            Ok(length) if length <= left => self.position += length,
            _ => return Err(self.malformed("the file ends early")),
        }
        Ok(())
    }

    fn word(&mut self) -> Result<u32, Malformed> {
        let begin = self.position;
        self.skip(4)?;
        let mut word = [0; 4];
        word.copy_from_slice(&self.bytes[begin..self.position]);
        // The host's byte order; images are not moved between byte orders.
        Ok(u32::from_ne_bytes(word))
    }

    fn varint(&mut self) -> Result<u64, Malformed> {
        let mut value = 0;
        for shift in (0..64).step_by(7) {
            let begin = self.position;
            self.skip(1)?;
            let byte = self.bytes[begin];
            value |= u64::from(byte & 0x7f) << shift;
            if byte & 0x80 == 0 {
                return Ok(value);
            }
        }
        Err(self.malformed("a number is too long"))
    }

    /// Reads one field: its number and, for a number, where its value is and the value.
    fn field(&mut self) -> Result<(u64, Option<(usize, u64)>), Malformed> {
        let key = self.varint()?;
        let begin = self.position;
        let value = match key & 7 {
            0 => Some((begin, self.varint()?)),
            1 => self.skip(8).map(|()| None)?,
            2 => {
                let length = self.varint()?;
                self.skip(length).map(|()| None)?
            }
            5 => self.skip(4).map(|()| None)?,
            _ => return Err(self.malformed("unknown kind of field")),
        };
        Ok((key >> 3, value))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A pagemap file as CRIU 4.2.1 writes it: head {pages_id: 1}, then entries
    /// {vaddr, compat_nr_pages: 0, flags, nr_pages}.
    fn image(flags: &[u8]) -> Vec<u8> {
        let mut image = Vec::new();
        image.extend(COMMON_MAGIC.to_ne_bytes());
        image.extend(PAGEMAP_MAGIC.to_ne_bytes());
        let mut message = |bytes: &[u8]| {
            image.extend((bytes.len() as u32).to_ne_bytes());
            image.extend(bytes);
        };
        message(&[0x08, 0x01]);
        for &flags in flags {
            message(&[
                0x08, 0x80, 0xa0, 0xf0, 0x05, 0x10, 0x00, 0x20, flags, 0x28, 0x03,
            ]);
        }
        image
    }

    #[test]
    fn lazy_becomes_eager_and_all_else_stays() {
        let mut changed = image(&[6, 4, 2, 1]);
        assert_eq!(clear_flags(&mut changed), Ok(2));
        assert_eq!(changed, image(&[4, 4, 0, 1]));
        assert_eq!(clear_flags(&mut changed), Ok(0));
    }

    #[test]
    fn the_head_and_unknown_fields_are_read_over() {
        let mut file = image(&[]);
        // A head whose field 4 is 6, an entry with fields of every kind.
        file.truncate(8);
        let head = [0x20, 0x06];
        let entry = [
            0x31, 1, 2, 3, 4, 5, 6, 7, 8, 0x3a, 2, 0x20, 0x06, 0x45, 1, 2, 3, 4, 0x20, 0x06,
        ];
        for message in [head.as_slice(), entry.as_slice()] {
            file.extend((message.len() as u32).to_ne_bytes());
            file.extend(message);
        }
        let before = file.clone();
        assert_eq!(clear_flags(&mut file), Ok(1));
        assert_eq!(file[..file.len() - 1], before[..file.len() - 1]);
        assert_eq!(file.last(), Some(&4));
    }

    #[test]
    fn damaged_files_are_errors_and_never_panics() {
        let whole = image(&[6, 6]);
        for length in 0..whole.len() {
            let mut part = whole[..length].to_vec();
            // Between two messages the file may end.
            if let Err(Malformed { offset, .. }) = clear_flags(&mut part) {
                assert!(offset <= length);
            }
        }
        for index in 0..whole.len() {
            for value in [0x00, 0x07, 0x7f, 0x80, 0xff] {
                let mut damaged = whole.clone();
                damaged[index] = value;
                drop(clear_flags(&mut damaged));
            }
        }
        let mut other = whole;
        other[4] ^= 1;
        assert_eq!(
            clear_flags(&mut other).unwrap_err().reason,
            "wrong magic number"
        );
    }

    #[test]
    fn dumped_pages_are_those_present_in_images_of_processes() {
        let directory = tempfile::tempdir().unwrap();
        fs::write(directory.path().join("pagemap-7.img"), image(&[6, 2, 4])).unwrap();
        fs::write(directory.path().join("pagemap-shmem-9.img"), image(&[4])).unwrap();
        // 80 a0 f0 05: 0x00, 0x20, 0x70 and 0x05, seven bits each.
        let address = 0x20 << 7 | 0x70 << 14 | 0x05 << 21;
        let range = address..address + 3 * PAGE_BYTES;
        let dumped = dumped_pages(directory.path()).unwrap();
        let ranges = vec![range.clone(), range];
        assert_eq!(dumped, [DumpedPages { pid: 7, ranges }]);
    }

    #[test]
    fn only_pagemap_files_of_a_directory_are_changed() {
        let directory = tempfile::tempdir().unwrap();
        let file = |name: &str| directory.path().join(name);
        fs::write(file("pagemap-1.img"), image(&[6, 6])).unwrap();
        fs::write(file("pagemap-shmem-77.img"), image(&[4])).unwrap();
        fs::write(file("pages-1.img"), image(&[6])).unwrap();
        assert_eq!(clear_lazy(directory.path()).unwrap(), 2);
        assert_eq!(fs::read(file("pages-1.img")).unwrap(), image(&[6]));
        fs::write(file("pagemap-2.img"), "else").unwrap();
        let error = clear_lazy(directory.path()).unwrap_err().to_string();
        assert!(
            error.contains("pagemap-2.img is not such an image"),
            "{error}"
        );
    }
}
