#!/bin/bash
# The measurements in a User-Mode-Linux guest: vm.sh BIN-DIR [PERFORMANCE-OPTION...]. The JSON is left in target/bench/vm.
set -euo pipefail
here=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")" && pwd -P)
bin=$(realpath -- "${1:?usage: vm.sh BIN-DIR [PERFORMANCE-OPTION...]}")
shift
target=$(realpath -- "$here/../../target")
exec "$here/../../tests/vm/run-uml.sh" "$here/guest.sh" --mem "${BENCH_MEM:-6G}" --timeout "${BENCH_TIMEOUT:-3600}" \
  --out "$target/bench/vm" -- "$bin" "$target" "$@"
