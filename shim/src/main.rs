//! containerd-shim-sterna-v1: a containerd runtime shim whose containers can move
fn main() {}
