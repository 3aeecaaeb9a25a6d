//! A restore of a plain process tree, with its commit point.
//!
//! Containers are restored by `runc restore`. This is for tests and tools that
//! want no container.

use std::cell::RefCell;
use std::ffi::{CStr, c_char, c_int};
use std::fs::File;
use std::io;
use std::os::fd::AsFd;
use std::path::{Path, PathBuf};

use criu_sys::{CriuNotify, Libcriu};
use nix::sys::signal::{SigSet, Signal};

use crate::log;
use crate::options::{OptionError, Options};
use crate::version::Tools;

const RESTORE_LOG: &str = "restore.log";

/// Why nothing was restored.
#[derive(Debug, thiserror::Error)]
pub enum RestoreError {
    /// libcriu is not there.
    #[error("cannot load libcriu")]
    Library(#[from] criu_sys::LoadError),
    /// libcriu does not take an option.
    #[error("cannot set the options of the restore")]
    Options(#[from] OptionError),
    /// The images are not there.
    #[error("cannot open directory {}", path.display())]
    Directory {
        /// The directory.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// SIGCHLD cannot be blocked.
    #[error("cannot block SIGCHLD")]
    Signal(#[source] io::Error),
    /// The caller said no at the commit point: nothing has run.
    #[error("the restore was stopped at its commit point and undone")]
    Aborted,
    /// CRIU failed.
    #[error("criu cannot restore the process: {reason} (see {})", log.display())]
    Failed {
        /// The first error in its log that matters.
        reason: String,
        /// The log.
        log: PathBuf,
    },
}

/// Decides at the commit point, with the restored process's pid.
type Commit = Box<dyn FnMut(i32) -> bool>;

thread_local! {
    // libcriu's callback has no argument for its user.
    static COMMIT: RefCell<Option<(Commit, bool)>> = const { RefCell::new(None) };
}

/// Restores the process in `images` as a child of the calling one, and returns its
/// pid; the caller has to wait for it.
///
/// `commit` is asked at CRIU's `post-restore`: everything is in place and nothing
/// has run. After "no" everything is killed.
///
/// To be called in a process with a single thread: libcriu forks and keeps
/// process-global state.
///
/// # Errors
///
/// See [`RestoreError`]; nothing of the process is left.
pub fn restore_process(
    tools: &Tools,
    images: &Path,
    commit: impl FnMut(i32) -> bool + 'static,
) -> Result<i32, RestoreError> {
    let library = Libcriu::load()?;
    let directory = File::open(images).map_err(|source| RestoreError::Directory {
        path: images.to_owned(),
        source,
    })?;
    let mut options = Options::new(&library)?;
    options.use_program(&tools.criu)?;
    options.for_restore(directory.as_fd(), RESTORE_LOG)?;
    options.notify(on_notify);
    COMMIT.set(Some((Box::new(commit), false)));
    // So that the restored process cannot end before libcriu knows of it.
    let before = SigSet::from_iter([Signal::SIGCHLD])
        .thread_swap_mask(nix::sys::signal::SigmaskHow::SIG_BLOCK)
        .map_err(|error| RestoreError::Signal(error.into()))?;
    let result = options.restore_child();
    before
        .thread_set_mask()
        .map_err(|error| RestoreError::Signal(error.into()))?;
    let refused = COMMIT.take().is_some_and(|(_, refused)| refused);
    match result {
        _ if refused => Err(RestoreError::Aborted),
        pid if pid > 0 => Ok(pid),
        result => {
            let log = images.join(RESTORE_LOG);
            let unknown = || io::Error::from_raw_os_error(-result).to_string();
            let logged = log::first_error(&log).ok().flatten();
            Err(RestoreError::Failed {
                reason: logged.unwrap_or_else(unknown),
                log,
            })
        }
    }
}

/// libcriu's callback. Runs on the thread that called `Options::restore_child`.
unsafe extern "C" fn on_notify(action: *mut c_char, notify: *mut CriuNotify) -> c_int {
    // SAFETY: libcriu passes the action's name, a terminated string that lives
    // during the call.
    let action = unsafe { CStr::from_ptr(action) };
    if action != c"post-restore" {
        return 0;
    }
    let Ok(library) = Libcriu::load() else {
        return -1;
    };
    // SAFETY: the argument is the one of this callback.
    let pid = unsafe { (library.notify_pid)(notify) };
    // A panic must not unwind into C.
    let go_on = std::panic::catch_unwind(|| {
        COMMIT.with_borrow_mut(|commit| {
            commit.as_mut().is_some_and(|(commit, refused)| {
                let go_on = commit(pid);
                *refused = !go_on;
                go_on
            })
        })
    });
    if go_on.unwrap_or(false) { 0 } else { -1 }
}
