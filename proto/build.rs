//! Compiles the .proto files: with protox and prost for gRPC between nodes and
//! inside one, with ttrpc-codegen for what sternad asks of a shim.

use std::{env, error::Error, fs, path::PathBuf};

const INCLUDE: &str = "proto";
const GRPC: &[&str] = &[
    "sterna/migration/v1/migration.proto",
    "sterna/engine/v1/engine.proto",
    "sterna/agent/v1/agent.proto",
];
const TTRPC: &[&str] = &["sterna/shim/v1/control.proto"];

fn main() -> Result<(), Box<dyn Error>> {
    println!("cargo::rerun-if-changed={INCLUDE}");

    let mut config = tonic_prost_build::Config::new();
    // Page payloads are sliced out of the receive buffer, never copied.
    config.bytes(["."]);
    tonic_prost_build::configure()
        .build_transport(false)
        .compile_fds_with_config(protox::compile(GRPC, [INCLUDE])?, config)?;

    let out = PathBuf::from(env::var("OUT_DIR")?).join("ttrpc");
    fs::create_dir_all(&out)?;
    ttrpc_codegen::Codegen::new()
        .out_dir(&out)
        .include(INCLUDE)
        .inputs(TTRPC.iter().map(|file| format!("{INCLUDE}/{file}")))
        .rust_protobuf()
        .rust_protobuf_customize(ttrpc_codegen::ProtobufCustomize::default().gen_mod_rs(false))
        .customize(ttrpc_codegen::Customize {
            async_all: true,
            ..Default::default()
        })
        .run()?;
    // Both generators write a mod.rs of their own and neither names the other's module.
    fs::write(
        out.join("mod.rs"),
        "pub mod control;\npub mod control_ttrpc;\n",
    )?;
    Ok(())
}
