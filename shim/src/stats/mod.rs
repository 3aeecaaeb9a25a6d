//! What a control group counts, as containerd's messages.

mod v1;
mod v2;

use std::fs;
use std::path::Path;

use protobuf::well_known_types::any::Any;

use crate::any::to_any;
use crate::cgroup::Cgroup;
use crate::error::{Error, Result};

/// Reads everything. Blocks a little.
pub(crate) fn collect(cgroup: &Cgroup) -> Result<Any> {
    let any = match cgroup {
        Cgroup::V1(controllers) => to_any(&v1::collect(controllers)),
        Cgroup::V2(path) => to_any(&v2::collect(path)),
    };
    any.map_err(|error| Error::InvalidArgument {
        what: format!("statistics: {error}"),
    })
}

/// A file with one number; `max` is the largest. 0 where there is none: what a
/// kernel does not have it does not count.
fn number(path: &Path) -> u64 {
    fs::read_to_string(path).map_or(0, |text| parse_number(text.trim()))
}

fn parse_number(text: &str) -> u64 {
    match text {
        "max" => u64::MAX,
        text => text.parse().unwrap_or(0),
    }
}

/// A file with lines of `key value`.
fn table(path: &Path) -> Vec<(String, u64)> {
    fs::read_to_string(path).map_or_else(|_| Vec::new(), |text| parse_table(&text))
}

fn parse_table(text: &str) -> Vec<(String, u64)> {
    text.lines()
        .filter_map(|line| {
            let (key, value) = line.split_once(' ')?;
            Some((key.to_owned(), parse_number(value.trim())))
        })
        .collect()
}

/// Numbers of a block device: `8:0`.
fn device(text: &str) -> Option<(u64, u64)> {
    let (major, minor) = text.split_once(':')?;
    Some((major.parse().ok()?, minor.parse().ok()?))
}

/// `key=value` among words.
fn word<'a>(words: &'a str, key: &str) -> Option<&'a str> {
    words
        .split_whitespace()
        .find_map(|word| word.strip_prefix(key)?.strip_prefix('='))
}

/// Page sizes of hugetlb among the files of a directory: those of the files
/// `hugetlb.SIZE.SUFFIX`.
fn page_sizes(directory: &Path, suffix: &str) -> Vec<String> {
    let Ok(files) = fs::read_dir(directory) else {
        return Vec::new();
    };
    let mut sizes: Vec<String> = files
        .flatten()
        .filter_map(|file| {
            let name = file.file_name().into_string().ok()?;
            let size = name.strip_prefix("hugetlb.")?.strip_suffix(suffix)?;
            (!size.contains('.')).then(|| size.to_owned())
        })
        .collect();
    sizes.sort();
    sizes
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_tables_devices_and_words_are_read() {
        assert_eq!(parse_number("max"), u64::MAX);
        assert_eq!(parse_number("17"), 17);
        assert_eq!(
            parse_table("anon 4096\nfile 1\nodd\n"),
            [("anon".to_owned(), 4096), ("file".to_owned(), 1)]
        );
        assert_eq!(device("8:16"), Some((8, 16)));
        assert_eq!(
            word("mlx4_0 hca_handle=2 hca_object=max", "hca_object"),
            Some("max")
        );
        assert_eq!(word("rbytes=5", "wbytes"), None);
    }

    #[test]
    fn page_sizes_are_those_of_the_files() {
        let dir = tempfile::tempdir().unwrap();
        for file in [
            "hugetlb.2MB.current",
            "hugetlb.1GB.current",
            "hugetlb.2MB.rsvd.current",
        ] {
            fs::write(dir.path().join(file), "0").unwrap();
        }
        assert_eq!(page_sizes(dir.path(), ".current"), ["1GB", "2MB"]);
    }
}
