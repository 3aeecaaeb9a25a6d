//! The unsafe system interface: userfaultfd, PAGEMAP_SCAN, ptrace injection, pidfd, seccomp listener
