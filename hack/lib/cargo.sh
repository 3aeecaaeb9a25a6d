# shellcheck shell=bash
# Cargo and what our build needs besides. Sourced, never run. Needs common.sh.

# find_cargo: puts cargo into the PATH, or says how to get it.
find_cargo() {
  command -v cargo >/dev/null || PATH=$PATH:${CARGO_HOME:-$HOME/.cargo}/bin
  command -v cargo >/dev/null || die "there is no Rust toolchain: install one (https://rustup.rs) and try again"
}

# need_build_tools: a C compiler for ring, and protoc with the well-known types
# for containerd-client.
need_build_tools() {
  need_file /usr/bin/cc gcc
  need_file /usr/include/stdio.h libc6-dev
  need_file /usr/bin/protoc protobuf-compiler
  need_file /usr/include/google/protobuf/any.proto libprotobuf-dev
}

# need_file FILE PACKAGE
need_file() {
  [[ -e $1 ]] || { require_root && install_package "$2"; }
}

# in_repository COMMAND...: with the build directory where the nodes look for it.
in_repository() {
  (cd "$REPO_DIR" && CARGO_TARGET_DIR=$REPO_DIR/target "$@")
}
