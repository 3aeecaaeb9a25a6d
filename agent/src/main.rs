//! sternad: the node agent
fn main() {}
