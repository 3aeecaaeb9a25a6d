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
pub use packages::engine::v1 as engine;

/// The command line to sternad, and sternad to sternad: `sterna.agent.v1`.
pub use packages::agent::v1 as agent;

/// Nested as the packages are: one package names another's types by that path.
mod packages {
    pub mod engine {
        pub mod v1 {
            tonic::include_proto!("sterna.engine.v1");
        }
    }
    pub mod agent {
        pub mod v1 {
            tonic::include_proto!("sterna.agent.v1");
        }
    }
}

/// sternad to a shim, over ttrpc: `sterna.shim.v1`.
pub mod shim {
    include!(concat!(env!("OUT_DIR"), "/ttrpc/mod.rs"));
}
