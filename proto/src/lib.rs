//! The wire: protocol buffers and generated types.
//!
//! Nothing here has behaviour. Conversions to domain types stand beside the
//! code that speaks each protocol.
#![allow(
    missing_docs,
    unreachable_pub,
    missing_debug_implementations,
    reason = "generated code"
)]
#![allow(clippy::all, reason = "generated code")]

/// Shim to shim: `sterna.migration.v1`.
pub mod migration {
    tonic::include_proto!("sterna.migration.v1");
}

/// sternad to a running migration on its node: `sterna.engine.v1`.
pub mod engine {
    tonic::include_proto!("sterna.engine.v1");
}

/// The command line to sternad, and sternad to sternad: `sterna.agent.v1`.
pub mod agent {
    tonic::include_proto!("sterna.agent.v1");
}

/// sternad to a shim, over ttrpc: `sterna.shim.v1`.
pub mod shim {
    include!(concat!(env!("OUT_DIR"), "/ttrpc/mod.rs"));
}
