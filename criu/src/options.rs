//! libcriu's options, owned.

use std::ffi::{CString, c_char, c_int, c_uint};
use std::os::fd::{AsRawFd, BorrowedFd, IntoRawFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::Path;
use std::ptr;

use criu_sys::{CriuOpts, Libcriu, NotifyCallback, cg_mode, network_lock};

use crate::request::{CgroupsMode, DUMP_LOG, DumpRequest, NetworkLock, RUNC_CONFIG_FILE};

/// An option that libcriu does not take.
#[derive(Debug, thiserror::Error)]
pub enum OptionError {
    /// It has no memory for options at all.
    #[error("libcriu cannot allocate options")]
    Allocate,
    /// It holds a NUL byte.
    #[error("option {option} holds a NUL byte")]
    Nul {
        /// Which one.
        option: &'static str,
    },
    /// libcriu refuses it.
    #[error("libcriu refuses option {option} (result {result})")]
    Refused {
        /// Which one.
        option: &'static str,
        /// What the setter returned.
        result: i32,
    },
    /// This libcriu does not know it.
    #[error("this libcriu has no option {option}: it needs CRIU 4.2")]
    Unknown {
        /// Which one.
        option: &'static str,
    },
}

type Setter<T> = unsafe extern "C" fn(*mut CriuOpts, T);
type CheckedSetter<T> = unsafe extern "C" fn(*mut CriuOpts, T) -> c_int;

/// Owned options of libcriu.
pub(crate) struct Options<'a> {
    library: &'a Libcriu,
    raw: *mut CriuOpts,
}

impl Drop for Options<'_> {
    fn drop(&mut self) {
        // SAFETY: `raw` came from init_opts and is freed only here.
        unsafe { (self.library.free_opts)(self.raw) };
    }
}

impl<'a> Options<'a> {
    pub(crate) fn new(library: &'a Libcriu) -> Result<Self, OptionError> {
        let mut raw = ptr::null_mut();
        // SAFETY: init_opts writes a pointer to `raw`.
        let result = unsafe { (library.init_opts)(&raw mut raw) };
        if result != 0 || raw.is_null() {
            return Err(OptionError::Allocate);
        }
        Ok(Self { library, raw })
    }

    /// Sets everything that `request` says. The directories stay open, and at
    /// these numbers, until the request is done.
    pub(crate) fn apply(
        &self,
        request: &DumpRequest,
        images: BorrowedFd<'_>,
        work_dir: BorrowedFd<'_>,
    ) -> Result<(), OptionError> {
        let lib = self.library;
        self.set(lib.set_images_dir_fd, images.as_raw_fd());
        self.set(lib.set_work_dir_fd, work_dir.as_raw_fd());
        self.set(lib.set_pid, request.pid);
        self.set(lib.set_log_level, request.log_level);
        self.string("log_file", lib.set_log_file, Path::new(DUMP_LOG))?;
        self.set(lib.set_leave_running, request.leave_running);
        self.set(lib.set_tcp_established, request.tcp_established);
        self.set(lib.set_tcp_close, request.tcp_close);
        self.set(lib.set_tcp_skip_in_flight, request.tcp_skip_in_flight);
        self.set(lib.set_ext_unix_sk, request.ext_unix_sk);
        self.set(lib.set_shell_job, request.shell_job);
        self.set(lib.set_file_locks, request.file_locks);
        self.set(lib.set_link_remap, request.link_remap);
        self.set(lib.set_orphan_pts_master, request.orphan_pts_master);
        if request.empty_namespaces != 0 {
            self.set(lib.set_empty_ns, request.empty_namespaces);
        }
        if let Some(root) = &request.root {
            self.string("root", lib.set_root, root)?;
        }
        if let Some(bytes) = request.ghost_limit {
            self.set(lib.set_ghost_limit, bytes);
        }
        if let Some(mode) = request.cgroups {
            self.set(lib.set_manage_cgroups, true);
            self.set(lib.set_manage_cgroups_mode, mode_number(mode));
        }
        if let Some(directory) = &request.freeze_cgroup {
            self.string("freeze_cgroup", lib.set_freeze_cgroup, directory)?;
        }
        if let Some(method) = request.network_lock {
            self.checked("network_lock", lib.set_network_lock, lock_number(method))?;
        }
        if let Some(seconds) = request.timeout_seconds {
            self.set(lib.set_timeout, seconds);
        }
        for external in &request.external {
            self.string("external", lib.add_external, Path::new(external))?;
        }
        for mount in &request.external_mounts {
            self.pair("ext_mount", lib.add_ext_mount, &mount.key, &mount.value)?;
        }
        match (&request.config_file, lib.set_config_file) {
            (Some(file), Some(setter)) => self.string("config_file", setter, file),
            // The helper tells CRIU of runc's own file by a variable; CRIU ignores
            // files that do not exist.
            (Some(file), None) if file == Path::new(RUNC_CONFIG_FILE) || !file.exists() => Ok(()),
            (Some(_), None) => Err(OptionError::Unknown {
                option: "config_file",
            }),
            (None, _) => Ok(()),
        }
    }

    /// Sends the next request over `socket`, which that request closes.
    pub(crate) fn use_socket(&self, socket: OwnedFd) {
        self.set(self.library.set_service_fd, socket.into_raw_fd());
    }

    /// Runs `program` for the next request instead of using a socket.
    pub(crate) fn use_program(&self, program: &Path) -> Result<(), OptionError> {
        self.string("service_binary", self.library.set_service_binary, program)
    }

    /// What a restore needs beside [`Options::use_program`].
    pub(crate) fn for_restore(&self, images: BorrowedFd<'_>, log: &str) -> Result<(), OptionError> {
        let lib = self.library;
        self.set(lib.set_images_dir_fd, images.as_raw_fd());
        self.set(lib.set_log_level, criu_sys::log_level::WARN);
        self.string("log_file", lib.set_log_file, Path::new(log))
    }

    pub(crate) fn notify(&self, callback: NotifyCallback) {
        // SAFETY: `raw` is valid; the callback is a function, valid for ever.
        unsafe { (self.library.set_notify_cb)(self.raw, callback) };
    }

    /// Dumps: blocks and calls the callback on this thread.
    pub(crate) fn dump(&mut self) -> i32 {
        // SAFETY: `raw` is valid, and libcriu's process-global state is ours:
        // requests are made by single-threaded helpers only.
        unsafe { (self.library.dump)(self.raw) }
    }

    /// Restores as a child of this process: blocks and calls the callback.
    pub(crate) fn restore_child(&mut self) -> i32 {
        // SAFETY: as for `dump`; it forks, and only the child of the fork goes on
        // to execute CRIU.
        unsafe { (self.library.restore_child)(self.raw) }
    }

    fn set<T>(&self, setter: Setter<T>, value: T) {
        // SAFETY: `raw` is valid, and the setter stores a plain value.
        unsafe { setter(self.raw, value) };
    }

    fn checked<T>(
        &self,
        option: &'static str,
        setter: CheckedSetter<T>,
        value: T,
    ) -> Result<(), OptionError> {
        // SAFETY: `raw` is valid. The setter stores a plain value, or copies a
        // terminated string that lives until it returns.
        match unsafe { setter(self.raw, value) } {
            0 => Ok(()),
            result => Err(OptionError::Refused { option, result }),
        }
    }

    fn string(
        &self,
        option: &'static str,
        setter: CheckedSetter<*const c_char>,
        value: &Path,
    ) -> Result<(), OptionError> {
        let value = terminated(option, value)?;
        self.checked(option, setter, value.as_ptr())
    }

    fn pair(
        &self,
        option: &'static str,
        setter: unsafe extern "C" fn(*mut CriuOpts, *const c_char, *const c_char) -> c_int,
        key: &Path,
        value: &Path,
    ) -> Result<(), OptionError> {
        let (key, value) = (terminated(option, key)?, terminated(option, value)?);
        // SAFETY: `raw` is valid; the setter copies two terminated strings that
        // live until it returns.
        match unsafe { setter(self.raw, key.as_ptr(), value.as_ptr()) } {
            0 => Ok(()),
            result => Err(OptionError::Refused { option, result }),
        }
    }
}

fn terminated(option: &'static str, value: &Path) -> Result<CString, OptionError> {
    CString::new(value.as_os_str().as_bytes()).map_err(|_| OptionError::Nul { option })
}

fn mode_number(mode: CgroupsMode) -> c_uint {
    match mode {
        CgroupsMode::Default => cg_mode::DEFAULT,
        CgroupsMode::Soft => cg_mode::SOFT,
        CgroupsMode::Full => cg_mode::FULL,
        CgroupsMode::Strict => cg_mode::STRICT,
        CgroupsMode::Ignore => cg_mode::IGNORE,
    }
}

fn lock_number(method: NetworkLock) -> c_uint {
    match method {
        NetworkLock::Iptables => network_lock::IPTABLES,
        NetworkLock::Nftables => network_lock::NFTABLES,
        NetworkLock::Skip => network_lock::SKIP,
    }
}
