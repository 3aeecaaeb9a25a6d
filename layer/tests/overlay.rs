//! The writable layer of a real overlay, moved and mounted again, shows what the
//! first one showed.

#![allow(clippy::unwrap_used, reason = "a test may panic")]

mod support;

use std::fs;
use std::path::Path;
use std::process::Command;

use support::{Pair, is_root, skipped};

const LOWER: &str = r#"
mkdir -p kept removed replaced/deep renamed
echo lower >kept/file; echo lower >kept/changed; echo lower >kept/gone
echo lower >removed/file; echo lower >replaced/deep/file; echo lower >renamed/file
echo tool >tool; chmod 755 tool; ln -s kept/file link
"#;

const CHANGES: &str = r#"
echo upper >>kept/changed; rm kept/gone; rm -r removed
rm -r replaced; mkdir replaced; echo new >replaced/new
mv renamed moved || { cp -a renamed moved; rm -r renamed; }
chmod 4711 tool; chown 33:44 kept/file; ln kept/changed kept/hard
rm link; ln -s elsewhere link; mknod pipe p
touch -d @1000000000.123456789 kept; chmod 1777 .
"#;

const LISTING: &str = r#"
find . -printf '%P %y %m %U:%G %T@ %l %n\n' | sort
find . -type f -exec sha256sum {} + | sort
"#;

/// Runs a script in an overlay of `lower` and `upper`, mounted for it alone.
fn overlay(lower: &Path, upper: &Path, script: &str) -> Result<String, String> {
    let work = tempfile::tempdir().unwrap();
    let mount = format!(
        "set -e; mkdir {work}/w {work}/m; mount -t overlay overlay \
         -o lowerdir={lower},upperdir={upper},workdir={work}/w {work}/m; cd {work}/m\n{script}",
        lower = lower.display(),
        upper = upper.display(),
        work = work.path().display(),
    );
    let output = Command::new("unshare")
        .args(["--mount", "sh", "-c", &mount])
        .output();
    let output = output.map_err(|error| error.to_string())?;
    if output.status.success() {
        Ok(String::from_utf8(output.stdout).unwrap())
    } else {
        Err(String::from_utf8_lossy(&output.stderr).into_owned())
    }
}

#[test]
fn a_moved_layer_shows_the_same_files() {
    if !is_root() {
        return skipped("mounting an overlay needs root");
    }
    let lower = tempfile::tempdir().unwrap();
    let made = Command::new("sh")
        .args(["-ec", LOWER])
        .current_dir(lower.path())
        .status();
    assert!(made.unwrap().success());
    let mut pair = Pair::new();
    if let Err(reason) = overlay(lower.path(), pair.source.path(), "true") {
        return skipped(&format!("no overlay can be mounted here: {reason}"));
    }
    pair.pass(false);
    overlay(lower.path(), pair.source.path(), CHANGES).unwrap();
    pair.pass(false);
    pair.pass(true);
    let here = overlay(lower.path(), pair.source.path(), LISTING).unwrap();
    let there = overlay(lower.path(), pair.copy.path(), LISTING).unwrap();
    assert!(
        here.contains("tool f 4711") && here.contains("replaced/new f"),
        "{here}"
    );
    assert!(
        !here.contains("kept/gone") && !here.contains("replaced/deep"),
        "{here}"
    );
    assert_eq!(here, there);
    assert!(
        fs::symlink_metadata(pair.copy.path().join("kept/gone")).is_ok(),
        "a whiteout"
    );
}
