//! The mappings of a process: `/proc/PID/maps`.

use std::io;
use std::ops::Range;

/// One mapping, as a line of `/proc/PID/maps` shows it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Mapping {
    /// Its addresses.
    pub(crate) range: Range<u64>,
    /// `r`
    pub(crate) readable: bool,
    /// `x`
    pub(crate) executable: bool,
    /// `s`; else private.
    pub(crate) shared: bool,
    /// Offset in the file, 0 without one.
    pub(crate) offset: u64,
    /// 0 without a file.
    pub(crate) inode: u64,
    /// Everything but the addresses and the offset: permissions, device, inode and name.
    pub(crate) attributes: Attributes,
    /// The whole line, without its end. Bytes, because file names need not be text.
    pub(crate) line: Vec<u8>,
}

/// What two pieces of one mapping have in common.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Attributes {
    permissions: Vec<u8>,
    device: Vec<u8>,
    inode: u64,
    name: Vec<u8>,
}

/// A line that is not a mapping's.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("line {line} is not a mapping")]
pub struct MalformedMaps {
    /// Number of the line, the first being 1.
    pub line: usize,
}

impl Mapping {
    /// Whether this is private memory that no file backs: what `malloc` and `mmap(MAP_ANONYMOUS | MAP_PRIVATE)` give,
    /// and no special mapping of the kernel.
    pub(crate) fn is_private_anonymous(&self) -> bool {
        let name = self.name();
        !self.shared
            && self.inode == 0
            && self.attributes.device == b"00:00"
            && (name.is_empty() || name == b"[heap]" || name.starts_with(b"[anon:"))
    }

    /// Name of the file or the special mapping; empty for most anonymous memory.
    pub(crate) fn name(&self) -> &[u8] {
        &self.attributes.name
    }

    /// Bytes covered.
    pub(crate) fn len_bytes(&self) -> u64 {
        self.range.end - self.range.start
    }
}

/// Reads the mappings of a process that exists; a zombie has none.
pub(crate) fn read(pid: i32) -> io::Result<Vec<u8>> {
    std::fs::read(format!("/proc/{pid}/maps"))
}

/// Parses the text of `/proc/PID/maps`.
pub(crate) fn parse(text: &[u8]) -> Result<Vec<Mapping>, MalformedMaps> {
    text.split(|byte| *byte == b'\n')
        .enumerate()
        .filter(|(_, line)| !line.is_empty())
        .map(|(number, line)| parse_line(line).ok_or(MalformedMaps { line: number + 1 }))
        .collect()
}

/// Parses a mapping's line, which is also how its section in `smaps` starts; `None` for anything else.
pub(crate) fn parse_line(line: &[u8]) -> Option<Mapping> {
    // "start-end perms offset device inode    name": single spaces up to the name, which is padded and may hold any.
    let mut fields = line.splitn(6, |byte| *byte == b' ');
    let addresses = fields.next()?;
    let permissions = fields.next()?;
    let offset = number(fields.next()?, 16)?;
    let device = fields.next()?;
    let inode = number(fields.next()?, 10)?;
    let name = fields.next().unwrap_or_default().trim_ascii_start();
    let dash = addresses.iter().position(|byte| *byte == b'-')?;
    let range = number(&addresses[..dash], 16)?..number(&addresses[dash + 1..], 16)?;
    let &[read, write, execute, share] = permissions else {
        return None;
    };
    if range.is_empty()
        || !matches!(read, b'r' | b'-')
        || !matches!(write, b'w' | b'-')
        || !matches!(execute, b'x' | b'-')
        || !matches!(share, b's' | b'p')
        || !device.contains(&b':')
    {
        return None;
    }
    Some(Mapping {
        range,
        readable: read == b'r',
        executable: execute == b'x',
        shared: share == b's',
        offset,
        inode,
        attributes: Attributes {
            permissions: permissions.to_vec(),
            device: device.to_vec(),
            inode,
            name: name.to_vec(),
        },
        line: line.to_vec(),
    })
}

fn number(digits: &[u8], radix: u32) -> Option<u64> {
    u64::from_str_radix(std::str::from_utf8(digits).ok()?, radix).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    const TEXT: &[u8] = b"\
55d0c7e00000-55d0c7e01000 r-xp 00001000 08:01 4711                       /bin/with a space (deleted)
55d0c7f00000-55d0c7f21000 rw-p 00000000 00:00 0                          [heap]
7f0000000000-7f0000021000 rw-p 00000000 00:00 0 
7f0000021000-7f0004000000 ---p 00000000 00:00 0 
7f0010000000-7f0010001000 rw-s 00000000 00:01 2048                       /dev/zero (deleted)
7f0020000000-7f0020001000 rw-p 00000000 00:00 0                          [anon: Go: heap]
7ffd0a1f0000-7ffd0a1f2000 r--p 00000000 00:00 0                          [vvar]
7ffd0a1f2000-7ffd0a1f4000 r-xp 00000000 00:00 0                          [vdso]
7ffd0a200000-7ffd0a221000 rw-p 00000000 00:00 0                          [stack]
ffffffffff600000-ffffffffff601000 --xp 00000000 00:00 0                  [vsyscall]
";

    #[test]
    fn every_kind_of_line_is_understood() {
        let mappings = parse(TEXT).unwrap();
        assert_eq!(mappings.len(), 10);
        let first = &mappings[0];
        assert_eq!(first.range, 0x55d0_c7e0_0000..0x55d0_c7e0_1000);
        assert!(first.readable && first.executable && !first.shared);
        assert_eq!((first.offset, first.inode), (0x1000, 4711));
        assert_eq!(first.name(), b"/bin/with a space (deleted)");
        assert_eq!(mappings[2].name(), b"");
        assert_eq!(mappings[2].len_bytes(), 0x21000);
        let again: Vec<u8> = mappings
            .iter()
            .flat_map(|mapping| [&mapping.line[..], b"\n"].concat())
            .collect();
        assert_eq!(again, TEXT);
    }

    #[test]
    fn private_anonymous_memory_is_told_from_special_mappings() {
        let mappings = parse(TEXT).unwrap();
        let private: Vec<_> = mappings.iter().map(Mapping::is_private_anonymous).collect();
        assert_eq!(
            private,
            [
                false, true, true, true, false, true, false, false, false, false
            ]
        );
    }

    #[test]
    fn file_names_need_not_be_text() {
        let mappings = parse(b"1000-2000 r--p 00000000 08:01 7 /\xff\xfe\n").unwrap();
        assert_eq!(mappings[0].name(), b"/\xff\xfe");
    }

    #[test]
    fn anything_else_is_refused_with_its_line() {
        for line in [
            "Size:                  4 kB",
            "1000-2000 rwxp 0 0:0",
            "2000-1000 rw-p 00000000 00:00 0",
            "1000 rw-p 00000000 00:00 0",
            "1000-2000 rw-q 00000000 00:00 0",
            "VmFlags: rd wr",
        ] {
            let text = format!("3000-4000 rw-p 00000000 00:00 0\n{line}\n");
            assert_eq!(
                parse(text.as_bytes()),
                Err(MalformedMaps { line: 2 }),
                "{line}"
            );
        }
    }
}
