//! Reading another process's memory, and giving back our own.

use std::io;
use std::ops::Range;

/// The most ranges one call takes: the kernel's `UIO_MAXIOV`.
pub const MAX_RANGES: usize = 1024;

/// Appends the content of `ranges` of the process's address space to `buffer`, within the capacity it already has.
///
/// Returns the bytes appended. Fewer than asked for means that the read stopped at memory that is not there or not
/// readable: what was appended is the beginning of the ranges, back to back, not necessarily ending where a range does.
/// Nothing readable at all is the error `EFAULT`; a process that is gone is `ESRCH`.
///
/// The process may run: each byte is then one that was there at some moment during the call. Reading makes pages
/// present (swapped ones come in, untouched ones become the zero page) but never dirty.
///
/// # Errors
///
/// `InvalidInput` for more than [`MAX_RANGES`] ranges or ranges that the buffer has no room for; else what
/// `process_vm_readv` says.
pub fn read_appending(pid: i32, ranges: &[Range<u64>], buffer: &mut Vec<u8>) -> io::Result<usize> {
    let mut wanted = 0_usize;
    let mut remote = Vec::with_capacity(ranges.len());
    for range in ranges {
        let bytes = range
            .end
            .checked_sub(range.start)
            .and_then(|bytes| usize::try_from(bytes).ok())
            .ok_or(io::ErrorKind::InvalidInput)?;
        let base = usize::try_from(range.start).map_err(|_| io::ErrorKind::InvalidInput)?;
        wanted = wanted
            .checked_add(bytes)
            .ok_or(io::ErrorKind::InvalidInput)?;
        remote.push(libc::iovec {
            iov_base: base as *mut libc::c_void,
            iov_len: bytes,
        });
    }
    let room = buffer.spare_capacity_mut();
    if ranges.len() > MAX_RANGES || wanted > room.len() {
        return Err(io::ErrorKind::InvalidInput.into());
    }
    if wanted == 0 {
        return Ok(0);
    }
    let local = libc::iovec {
        iov_base: room.as_mut_ptr().cast(),
        iov_len: wanted,
    };
    // SAFETY: `local` is `wanted` bytes of the buffer's spare capacity, checked above, and exclusively borrowed. The
    // remote vector points at `remote.len()` initialised entries; the addresses in them are the other process's and
    // never dereferenced here.
    let result = unsafe {
        libc::process_vm_readv(
            pid,
            &raw const local,
            1,
            remote.as_ptr(),
            remote.len() as _,
            0,
        )
    };
    let read = usize::try_from(result).map_err(|_| io::Error::last_os_error())?;
    let filled = buffer.len() + read;
    // SAFETY: the kernel wrote `read` bytes, at most `wanted`, at the start of the spare capacity, so everything below
    // `filled` is initialised and within the capacity.
    unsafe { buffer.set_len(filled) };
    Ok(read)
}

/// Gives the pages of `memory` back to the kernel (`MADV_DONTNEED`). Private anonymous memory reads as zeros then.
///
/// # Errors
///
/// `InvalidInput` where `memory` does not start on a page or is not a multiple of 64 KiB long; else those of madvise(2).
pub fn discard(memory: &mut [u8]) -> io::Result<()> {
    // SAFETY: the memory is exclusively borrowed, and whatever the kernel fills its pages with, zeros or the content of
    // a file, are bytes again. A length that is not whole pages is refused by the check below, so nothing else is hit.
    let result = unsafe {
        libc::madvise(
            memory.as_mut_ptr().cast(),
            whole_pages(memory)?,
            libc::MADV_DONTNEED,
        )
    };
    if result < 0 {
        Err(io::Error::last_os_error())
    } else {
        Ok(())
    }
}

/// Gives back the pages of this program's own code and constants, as many as it has touched up to now. They stay in the
/// page cache, as other processes of the program and the kernel see fit, and are mapped again when they are next used.
///
/// # Errors
///
/// Those of reading `/proc/self/maps` and of madvise(2).
pub fn release_own_code() -> io::Result<()> {
    let program = std::fs::read_link("/proc/self/exe")?;
    let maps = std::fs::read_to_string("/proc/self/maps")?;
    let own = maps
        .lines()
        .filter_map(|line| unchangeable(line, &program.to_string_lossy()));
    for range in own {
        // SAFETY: the range is one mapping of the file that this process executes, which is not unmapped as long as
        // the process lives. It is private, not writable, and not of a segment that ever was (`unchangeable`), so
        // that its pages are the file's, and the kernel maps the same bytes again at the next access, be it the
        // return from this call.
        let result = unsafe {
            libc::madvise(
                range.start as *mut libc::c_void,
                range.len(),
                libc::MADV_DONTNEED,
            )
        };
        if result < 0 {
            return Err(io::Error::last_os_error());
        }
    }
    Ok(())
}

/// The range of a line of `/proc/PID/maps` that is of the program's code, or of what lies in its file before that:
/// headers and constants. What the loader has relocated and made read-only lies behind the code, and has changed.
fn unchangeable(line: &str, program: &str) -> Option<Range<usize>> {
    let mut fields = line.split_whitespace();
    let (range, permissions, offset) = (fields.next()?, fields.next()?, fields.next()?);
    let offset = u64::from_str_radix(offset, 16).ok()?;
    let wanted = permissions == "r-xp" || (permissions == "r--p" && offset == 0);
    if !wanted || !line.ends_with(&format!(" {program}")) {
        return None;
    }
    let (start, end) = range.split_once('-')?;
    let start = usize::from_str_radix(start, 16).ok()?;
    Some(start..usize::from_str_radix(end, 16).ok()?)
}

/// The length of memory that is whole pages.
fn whole_pages(memory: &[u8]) -> io::Result<usize> {
    /// The largest page size that Linux has on any machine we run on; multiples of it are whole pages on all of them.
    const LARGEST_PAGE: usize = 64 << 10;
    if memory.len().is_multiple_of(LARGEST_PAGE) {
        Ok(memory.len())
    } else {
        Err(io::ErrorKind::InvalidInput.into())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_program_goes_on_after_its_code_was_released() {
        for _ in 0..3 {
            release_own_code().unwrap();
        }
    }

    #[test]
    fn only_what_never_changes_is_released() {
        let of = |line| unchangeable(line, "/bin/program");
        let code = "1000-3000 r-xp 00001000 08:01 7    /bin/program";
        assert_eq!(of(code), Some(0x1000..0x3000));
        let headers = "1000-2000 r--p 00000000 08:01 7    /bin/program";
        assert_eq!(of(headers), Some(0x1000..0x2000));
        for other in [
            "1000-2000 r--p 00002000 08:01 7    /bin/program",
            "1000-2000 rw-p 00000000 08:01 7    /bin/program",
            "1000-2000 rwxp 00001000 08:01 7    /bin/program",
            "1000-2000 r-xp 00001000 08:01 7    /other/bin/program",
            "1000-2000 r-xp 00000000 00:00 0    [vdso]",
            "1000-2000 rw-p 00000000 00:00 0",
        ] {
            assert_eq!(of(other), None, "{other}");
        }
    }

    fn own_pid() -> i32 {
        i32::try_from(std::process::id()).unwrap()
    }

    fn range_of(bytes: &[u8]) -> Range<u64> {
        let start = bytes.as_ptr() as u64;
        start..start + bytes.len() as u64
    }

    #[test]
    fn scattered_ranges_arrive_back_to_back() {
        let source = b"sterna paradisaea".to_vec();
        let mut buffer = Vec::with_capacity(64);
        buffer.push(b'>');
        let ranges = [range_of(&source[7..]), range_of(&source[..6])];
        assert_eq!(read_appending(own_pid(), &ranges, &mut buffer).unwrap(), 16);
        assert_eq!(buffer, b">paradisaeasterna");
    }

    #[test]
    fn a_read_never_exceeds_the_capacity() {
        let source = vec![1; 64];
        let mut buffer = Vec::with_capacity(8);
        let error = read_appending(own_pid(), &[range_of(&source)], &mut buffer).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::InvalidInput);
        assert!(buffer.is_empty());
    }

    #[test]
    fn memory_that_is_not_mapped_ends_the_read() {
        let source = vec![7; 16];
        let mut buffer = Vec::with_capacity(64);
        let nowhere = 4096..4112;
        let ranges = [range_of(&source), nowhere.clone()];
        assert_eq!(read_appending(own_pid(), &ranges, &mut buffer).unwrap(), 16);
        let error = read_appending(own_pid(), &[nowhere], &mut buffer).unwrap_err();
        assert_eq!(error.raw_os_error(), Some(libc::EFAULT));
    }
}
