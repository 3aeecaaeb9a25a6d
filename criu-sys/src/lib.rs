//! Raw FFI to libcriu, loaded at run time.
//!
//! `libcriu.so.2` is opened when it is first needed and not linked, so that a
//! program runs on nodes without it. [`Libcriu`] holds the functions that Sterna
//! uses, typed by hand; nothing here is safe, nothing here decides anything.
//!
//! Source of the signatures: `lib/c/criu.h` of CRIU 4.1.1 and 4.2.1 (LGPL-2.1;
//! the two differ only in `criu_local_set_config_file`, new in 4.2). `bool` is
//! C99's `_Bool`; the enumerations have no negative members and are therefore
//! `unsigned int` in the C ABI of the compilers that build libcriu.
//!
//! What criu.h does not say and `lib/c/criu.c` does:
//!
//! * strings are copied, file descriptors are used by number (the service fd is
//!   closed by the call that uses it), `criu_opts` is not synchronised;
//! * a request writes process-global state (`saved_errno`): one at a time;
//! * a non-zero result of the notify callback is returned at once, while CRIU is
//!   still undoing what it did;
//! * for the library to find the images directory, CRIU opens
//!   `/proc/<peer>/fd/<number>`, where the peer is whoever made the socket pair.

use std::ffi::{c_char, c_int, c_uint};

use libloading::Library;

/// The library's file name; its major version is its ABI.
pub const LIBRARY_NAME: &str = "libcriu.so.2";

/// `CRIU_LOG_WARN` and its neighbours.
pub mod log_level {
    use std::ffi::c_int;

    /// Errors only.
    pub const ERROR: c_int = 1;
    /// Errors and warnings.
    pub const WARN: c_int = 2;
    /// What runc uses: everything; costs time for every memory mapping.
    pub const DEBUG: c_int = 4;
}

/// `enum criu_cg_mode`
pub mod cg_mode {
    use std::ffi::c_uint;

    /// `CRIU_CG_MODE_IGNORE`
    pub const IGNORE: c_uint = 0;
    /// `CRIU_CG_MODE_NONE`
    pub const NONE: c_uint = 1;
    /// `CRIU_CG_MODE_PROPS`
    pub const PROPS: c_uint = 2;
    /// `CRIU_CG_MODE_SOFT`
    pub const SOFT: c_uint = 3;
    /// `CRIU_CG_MODE_FULL`
    pub const FULL: c_uint = 4;
    /// `CRIU_CG_MODE_STRICT`
    pub const STRICT: c_uint = 5;
    /// `CRIU_CG_MODE_DEFAULT`
    pub const DEFAULT: c_uint = 6;
}

/// `enum criu_network_lock_method`
pub mod network_lock {
    use std::ffi::c_uint;

    /// `CRIU_NETWORK_LOCK_IPTABLES`
    pub const IPTABLES: c_uint = 1;
    /// `CRIU_NETWORK_LOCK_NFTABLES`
    pub const NFTABLES: c_uint = 2;
    /// `CRIU_NETWORK_LOCK_SKIP`
    pub const SKIP: c_uint = 3;
}

/// `struct criu_opts`: only libcriu knows what is in it.
#[repr(C)]
#[derive(Debug)]
pub struct CriuOpts {
    _opaque: [u8; 0],
}

/// `CriuNotify`: only libcriu knows what is in it.
#[repr(C)]
#[derive(Debug)]
pub struct CriuNotify {
    _opaque: [u8; 0],
}

/// What CRIU's notifications call: the action's name (valid during the call) and
/// the argument of [`Libcriu::notify_pid`]. Anything but 0 means "abort". Must
/// not unwind.
pub type NotifyCallback = unsafe extern "C" fn(*mut c_char, *mut CriuNotify) -> c_int;

/// Why libcriu cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum LoadError {
    /// The library is not installed or cannot be loaded.
    #[error("cannot load {LIBRARY_NAME} (package libcriu2)")]
    Library(#[source] libloading::Error),
    /// It is installed and too old.
    #[error("{LIBRARY_NAME} has no function {symbol}: it is too old")]
    Symbol {
        /// What is missing.
        symbol: &'static str,
        /// What the dynamic linker says.
        source: libloading::Error,
    },
}

/// Declares [`Libcriu`]: a function pointer per symbol, looked up by name.
macro_rules! functions {
    (
        required { $( $(#[$doc:meta])* $name:ident = $symbol:literal : $type:ty; )* }
        optional { $( $(#[$odoc:meta])* $oname:ident = $osymbol:literal : $otype:ty; )* }
    ) => {
        /// The functions of libcriu that Sterna uses.
        ///
        /// The pointers are valid as long as this value lives: it keeps the library
        /// loaded.
        #[derive(Debug)]
        pub struct Libcriu {
            $( $(#[$doc])* pub $name: $type, )*
            $( $(#[$odoc])* pub $oname: Option<$otype>, )*
            _library: Library,
        }

        impl Libcriu {
            /// Looks every function up.
            fn bind(library: Library) -> Result<Self, LoadError> {
                Ok(Self {
                    $( $name: {
                        // SAFETY: the type is the function's signature in criu.h of
                        // every version with this soname (see the module's text).
                        let found = unsafe { library.get::<$type>($symbol.as_bytes()) };
                        *found.map_err(|source| LoadError::Symbol { symbol: $symbol, source })?
                    }, )*
                    $( $oname: {
                        // SAFETY: as above.
                        let found = unsafe { library.get::<$otype>($osymbol.as_bytes()) };
                        found.ok().map(|function| *function)
                    }, )*
                    _library: library,
                })
            }

            /// Every symbol that has to be there, to say what a version lacks.
            pub const REQUIRED: &[&'static str] = &[$( $symbol, )*];
        }
    };
}

type SetBool = unsafe extern "C" fn(*mut CriuOpts, bool);
type SetInt = unsafe extern "C" fn(*mut CriuOpts, c_int);
type SetUint = unsafe extern "C" fn(*mut CriuOpts, c_uint);
type SetUintChecked = unsafe extern "C" fn(*mut CriuOpts, c_uint) -> c_int;
type SetString = unsafe extern "C" fn(*mut CriuOpts, *const c_char) -> c_int;
type SetStrings = unsafe extern "C" fn(*mut CriuOpts, *const c_char, *const c_char) -> c_int;
type Request = unsafe extern "C" fn(*mut CriuOpts) -> c_int;

functions! {
    required {
        /// Allocates options; 0 on success.
        init_opts = "criu_local_init_opts": unsafe extern "C" fn(*mut *mut CriuOpts) -> c_int;
        /// Frees them.
        free_opts = "criu_local_free_opts": unsafe extern "C" fn(*mut CriuOpts);
        /// A connected CRIU; the next request closes the descriptor.
        set_service_fd = "criu_local_set_service_fd": SetInt;
        /// The program to run as CRIU instead.
        set_service_binary = "criu_local_set_service_binary": SetString;
        /// Directory of the images; required.
        set_images_dir_fd = "criu_local_set_images_dir_fd": SetInt;
        /// Directory of log and statistics, if another.
        set_work_dir_fd = "criu_local_set_work_dir_fd": SetInt;
        /// File name in the work directory.
        set_log_file = "criu_local_set_log_file": SetString;
        /// See [`log_level`].
        set_log_level = "criu_local_set_log_level": SetInt;
        /// The process to dump, with its descendants.
        set_pid = "criu_local_set_pid": SetInt;
        /// The container's root directory.
        set_root = "criu_local_set_root": SetString;
        /// Let the tasks go on after a successful dump.
        set_leave_running = "criu_local_set_leave_running": SetBool;
        /// Dump TCP connections.
        set_tcp_established = "criu_local_set_tcp_established": SetBool;
        /// Restore TCP connections as closed.
        set_tcp_close = "criu_local_set_tcp_close": SetBool;
        /// Ignore connections that are being made.
        set_tcp_skip_in_flight = "criu_local_set_tcp_skip_in_flight": SetBool;
        /// Allow unix sockets whose other end is outside.
        set_ext_unix_sk = "criu_local_set_ext_unix_sk": SetBool;
        /// Allow a terminal of the caller's session.
        set_shell_job = "criu_local_set_shell_job": SetBool;
        /// Dump file locks.
        set_file_locks = "criu_local_set_file_locks": SetBool;
        /// Keep unlinked files by linking them for the time being.
        set_link_remap = "criu_local_set_link_remap": SetBool;
        /// Largest unlinked file that is put into the images, in bytes.
        set_ghost_limit = "criu_local_set_ghost_limit": SetUint;
        /// Dump control groups.
        set_manage_cgroups = "criu_local_set_manage_cgroups": SetBool;
        /// See [`cg_mode`].
        set_manage_cgroups_mode = "criu_local_set_manage_cgroups_mode": SetUint;
        /// Directory of the freezer cgroup that holds the tasks.
        set_freeze_cgroup = "criu_local_set_freeze_cgroup": SetString;
        /// Expect a terminal whose master is outside.
        set_orphan_pts_master = "criu_local_set_orphan_pts_master": SetBool;
        /// `CLONE_NEW*` namespaces whose content is not dumped.
        set_empty_ns = "criu_local_set_empty_ns": SetInt;
        /// See [`network_lock`].
        set_network_lock = "criu_local_set_network_lock": SetUintChecked;
        /// Seconds until freezing is given up.
        set_timeout = "criu_local_set_timeout": SetUint;
        /// A resource that is provided from outside at restore.
        add_external = "criu_local_add_external": SetString;
        /// A mount that is provided from outside: mount point and name.
        add_ext_mount = "criu_local_add_ext_mount": SetStrings;
        /// Who is told of, and may veto, the steps of a request.
        set_notify_cb = "criu_local_set_notify_cb":
            unsafe extern "C" fn(*mut CriuOpts, NotifyCallback);
        /// The root task's pid, where the notification has one, else 0.
        notify_pid = "criu_notify_pid": unsafe extern "C" fn(*mut CriuNotify) -> c_int;
        /// Dumps; 0 on success, the callback's result, or -errno.
        dump = "criu_local_dump": Request;
        /// Restores as a child of this process; its pid on success.
        restore_child = "criu_local_restore_child": Request;
    }
    optional {
        /// A file of options that win over these (CRIU 4.2).
        set_config_file = "criu_local_set_config_file": SetString;
    }
}

impl Libcriu {
    /// Loads the library and finds all functions.
    ///
    /// # Errors
    ///
    /// When it is not installed, or too old to have them all.
    pub fn load() -> Result<Self, LoadError> {
        // SAFETY: libcriu.so.2 and what it needs (libprotobuf-c) have no
        // initialisation routines that could break an invariant of this process.
        let library = unsafe { Library::new(LIBRARY_NAME) }.map_err(LoadError::Library)?;
        Self::bind(library)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_library_without_the_functions_is_an_error_that_names_the_first() {
        // SAFETY: libc is loaded already.
        let library = unsafe { Library::new("libc.so.6") }.unwrap();
        let error = Libcriu::bind(library).unwrap_err();
        assert!(error.to_string().contains(Libcriu::REQUIRED[0]), "{error}");
    }

    #[test]
    fn where_libcriu_is_installed_it_has_all_functions() {
        match Libcriu::load() {
            Err(LoadError::Library(_)) => {}
            result => drop(result.unwrap()),
        }
    }
}
