//! What ptrace(2) says about the seccomp filters of a thread
//! (`seccomp_get_filter` and `seccomp_get_metadata` in kernel/seccomp.c).

use sys::seccomp_filters::Filter;

/// Bytes of `struct seccomp_metadata`, and of the number that it begins with.
const METADATA_BYTES: usize = 16;
const NUMBER_BYTES: usize = 8;

/// The instructions of a filter, or the error number.
pub(super) fn filter(filters: &[Filter], number: u64) -> Result<Vec<u8>, i32> {
    Ok(get(filters, number)?.instructions.concat())
}

/// As many bytes of a filter's metadata as were asked for.
pub(super) fn metadata(filters: &[Filter], number: u64, size: u64) -> Result<Vec<u8>, i32> {
    let size = usize::try_from(size).unwrap_or(usize::MAX);
    if size < NUMBER_BYTES {
        return Err(libc::EINVAL);
    }
    let words = [number, get(filters, number)?.flags];
    let mut bytes: Vec<u8> = words.iter().flat_map(|word| word.to_ne_bytes()).collect();
    bytes.truncate(size.min(METADATA_BYTES));
    Ok(bytes)
}

fn get(filters: &[Filter], number: u64) -> Result<&Filter, i32> {
    usize::try_from(number)
        .ok()
        .and_then(|number| filters.get(number))
        .ok_or(libc::ENOENT)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn filters() -> [Filter; 2] {
        [(1, 0), (2, 2)].map(|(length, flags)| Filter {
            instructions: vec![[length as u8; 8]; length],
            flags,
        })
    }

    #[test]
    fn filters_have_numbers_from_zero() {
        assert_eq!(filter(&filters(), 0), Ok(vec![1; 8]));
        assert_eq!(filter(&filters(), 1), Ok(vec![2; 16]));
        assert_eq!(filter(&filters(), 2), Err(libc::ENOENT));
    }

    #[test]
    fn metadata_is_as_long_as_asked_for() {
        let words = [1_u64, 2].map(u64::to_ne_bytes).concat();
        assert_eq!(metadata(&filters(), 1, 16), Ok(words.clone()));
        assert_eq!(metadata(&filters(), 1, 99), Ok(words.clone()));
        assert_eq!(metadata(&filters(), 1, 8), Ok(words[..8].to_vec()));
        assert_eq!(metadata(&filters(), 1, 7), Err(libc::EINVAL));
        assert_eq!(metadata(&filters(), 5, 16), Err(libc::ENOENT));
    }
}
