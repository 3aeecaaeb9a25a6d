//! `utsns-ID.img`: the names of a UTS namespace.

use std::fs;
use std::path::Path;

use super::{COMMON_MAGIC, ImageError, Malformed, Reader, io_error, list, read};

/// Second magic number of such files (`UTSNS_MAGIC`).
const UTSNS_MAGIC: u32 = 0x5447_3203;

/// Field `nodename` of `utsns_entry`, and its key: bytes with a length.
const NODENAME_FIELD: u64 = 1;
const NODENAME_KEY: u8 = (NODENAME_FIELD as u8) << 3 | 2;

/// `__NEW_UTS_LEN`: a length that fits one byte of a varint.
const NAME_LIMIT_BYTES: usize = 64;

/// Gives the restored processes another host name: that of the UTS namespace that
/// they are to join, whose name CRIU would otherwise replace by the dumped one.
///
/// # Errors
///
/// When a file cannot be read or written, or is none of CRIU's.
pub fn set_hostname(directory: &Path, name: &str) -> Result<(), ImageError> {
    for path in list(directory, "utsns-")? {
        let image = renamed(&read(&path)?, name).map_err(|wrong| wrong.of(&path))?;
        fs::write(&path, image).map_err(io_error("write", &path))?;
    }
    Ok(())
}

fn renamed(image: &[u8], name: &str) -> Result<Vec<u8>, Malformed> {
    let mut reader = Reader {
        bytes: image,
        position: 0,
    };
    if reader.word()? != COMMON_MAGIC || reader.word()? != UTSNS_MAGIC {
        return Err(reader.malformed("wrong magic number"));
    }
    let head = reader.position;
    let length = reader.word()? as usize;
    if reader.position.saturating_add(length) != image.len() {
        return Err(reader.malformed("it holds more or less than one message"));
    }
    let mut end = name.len().min(NAME_LIMIT_BYTES);
    while !name.is_char_boundary(end) {
        end -= 1;
    }
    let mut message = vec![NODENAME_KEY, end as u8];
    message.extend_from_slice(&name.as_bytes()[..end]);
    while reader.position < image.len() {
        let begin = reader.position;
        let (field, _) = reader.field()?;
        if field != NODENAME_FIELD {
            message.extend_from_slice(&image[begin..reader.position]);
        }
    }
    let mut renamed = image[..head].to_vec();
    renamed.extend_from_slice(&(message.len() as u32).to_ne_bytes());
    renamed.extend_from_slice(&message);
    Ok(renamed)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn image(message: &[u8]) -> Vec<u8> {
        let mut image = COMMON_MAGIC.to_ne_bytes().to_vec();
        image.extend_from_slice(&UTSNS_MAGIC.to_ne_bytes());
        image.extend_from_slice(&(message.len() as u32).to_ne_bytes());
        image.extend_from_slice(message);
        image
    }

    #[test]
    fn the_host_gets_another_name_and_keeps_its_domain() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("utsns-11.img");
        fs::write(&path, image(b"\x0a\x03old\x12\x06(none)")).unwrap();
        set_hostname(directory.path(), "another").unwrap();
        assert_eq!(
            fs::read(&path).unwrap(),
            image(b"\x0a\x07another\x12\x06(none)")
        );
    }

    #[test]
    fn a_name_that_no_namespace_can_have_is_cut() {
        let renamed = renamed(&image(b"\x0a\x01a"), &"x".repeat(70)).unwrap();
        assert_eq!(renamed.len(), image(&[0; 66]).len());
    }

    #[test]
    fn what_is_no_such_image_is_left_alone() {
        assert!(renamed(b"hello, world", "x").is_err());
        assert!(renamed(&image(b"\x0a\x09old"), "x").is_err());
        let mut long = image(b"\x0a\x01a");
        long.push(0);
        assert!(renamed(&long, "x").is_err());
    }
}
