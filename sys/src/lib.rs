//! The unsafe system interface: userfaultfd, PAGEMAP_SCAN, ptrace injection, pidfd, seccomp listener, loop devices.
//!
//! One module per kernel interface. What a module exports is safe to call unless it is marked `unsafe`; file
//! descriptors are owned or borrowed, never numbers; errors carry the `errno`.

#[cfg(feature = "testing")]
pub mod churn;
pub mod fdpass;
pub mod idmap;
pub mod inject;
pub mod loop_device;
pub mod mapping;
pub mod memory;
pub mod netns;
pub mod packet;
pub mod pagemap;
pub mod pidfd;
pub mod priority;
pub mod seccomp;
pub mod seccomp_filters;
pub mod signal;
pub mod spawn;
#[cfg(any(test, feature = "testing"))]
pub mod testing;
pub mod uffd;
pub mod uffd_wp;
