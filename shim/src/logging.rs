//! The server's log: the fifo `log` in its first bundle, which containerd copies
//! to its own.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;
use std::sync::Arc;

use tracing_subscriber::filter::{LevelFilter, Targets};
use tracing_subscriber::layer::SubscriberExt;
use tracing_subscriber::util::SubscriberInitExt;

/// Opens the fifo and logs there from now on; answers it for the engines, whose
/// output goes there too.
///
/// Opened for reading too, so that it is there for a containerd that comes
/// back, and never waited for: lines that do not fit are lost.
pub(crate) fn start(bundle: &Path, debug: bool) -> io::Result<Arc<File>> {
    let fifo = OpenOptions::new()
        .read(true)
        .write(true)
        .custom_flags(libc::O_NONBLOCK)
        .open(bundle.join("log"))?;
    let fifo = Arc::new(fifo);
    let level = match debug {
        true => LevelFilter::DEBUG,
        false => LevelFilter::INFO,
    };
    // ttrpc reports every request that was answered with an error.
    let targets = Targets::new().with_default(level).with_target(
        "ttrpc",
        if debug {
            LevelFilter::INFO
        } else {
            LevelFilter::OFF
        },
    );
    let lines = tracing_subscriber::fmt::layer()
        .with_ansi(false)
        .with_target(false)
        .log_internal_errors(false)
        .with_writer(Arc::clone(&fifo));
    tracing_subscriber::registry()
        .with(lines)
        .with(targets)
        .init();
    Ok(fifo)
}
