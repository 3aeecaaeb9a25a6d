//! Raw FFI to libcriu, loaded at run time
