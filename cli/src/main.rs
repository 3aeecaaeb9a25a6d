//! sterna: the command line
fn main() {}
