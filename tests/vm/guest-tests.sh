#!/bin/bash
# Puts the workspace's test programs that want a kernel with ublk into BIN-DIR/guest-tests, by name.
#   guest-tests.sh BIN-DIR CARGO-OPTION...
set -euo pipefail
bin=${1:?usage: guest-tests.sh BIN-DIR CARGO-OPTION...}
shift
rm -rf "$bin/guest-tests"
mkdir -p "$bin/guest-tests"
# Cargo names each executable in a message of its own, one JSON object a line. The whole workspace, as for `cargo test`: a part of it
# would get dependencies with other features, built once more.
cargo test --workspace --no-run --message-format=json "$@" | grep -F '"kind":["test"]' |
  sed -nE 's/.*"name":"(ublk|processes|cli_add|cli_daemon|cli_cache|cli_bundle|cli_runtime|cli_warm)".*"executable":"([^"]*)".*/\1 \2/p' |
  while read -r name executable; do ln "$executable" "$bin/guest-tests/$name"; done
