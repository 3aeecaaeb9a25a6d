//! Safe sessions over libcriu: dump, restore, notifications, versions.
//!
//! A [`DumpSession`] is a dump in steps that a caller can stop at each of them; an
//! [`Interceptor`] keeps CRIU away from memory that the page engine owns;
//! [`checkpoint`] is a whole dump for those who want nothing of that.
//! [`dump_request_for_runc`] says what runc would say about a container, so that
//! the images restore with `runc restore`.
//!
//! All of it blocks. libcriu runs in a process of its own, which is our binary
//! executed again ([`helper_main`]).

mod channel;
mod container;
mod freezer;
mod guard;
mod helper;
pub mod images;
mod intercept;
mod log;
mod options;
mod request;
mod restore;
mod seccomp;
mod securejoin;
mod session;
mod version;

use std::error::Error;

pub use container::{
    CheckpointOptions, ContainerError, RuncContainer, RuncState, dump_request_for_runc,
};
pub use freezer::{Freezer, FreezerError};
pub use helper::helper_main;
pub use intercept::{InterceptStats, Interceptor, Memory, MemorySlot};
pub use log::first_error;
pub use request::{CgroupsMode, DUMP_LOG, DumpRequest, ExternalMount, NetworkLock};
pub use restore::{RestoreError, restore_process};
pub use seccomp::{SeccompError, SeccompFilters, SeccompSlot};
pub use session::{Action, DumpError, DumpEvent, DumpSession, HELPER_ARGUMENT, checkpoint};
pub use version::{MINIMUM, Missing, Tools, Version};

/// An error and its causes in one line, for where only text can go.
fn report(error: &dyn Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        text.push_str(": ");
        text.push_str(&error.to_string());
        cause = error.source();
    }
    text
}
