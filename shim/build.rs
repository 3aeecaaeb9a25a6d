//! How the shim is linked: one of them runs for every pod.

fn main() {
    println!("cargo::rerun-if-changed=build.rs");
    // The loader reads every relocation of a program at each of its starts. Unpacked
    // they are a megabyte and a half of this one, which then stays with the process.
    // Needs glibc 2.36.
    println!("cargo::rustc-link-arg-bins=-Wl,-z,pack-relative-relocs");
}
