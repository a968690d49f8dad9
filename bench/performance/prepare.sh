#!/bin/bash
# Makes what `performance` measures, in target/bench and target/starts: prepare.sh BIN-DIR. Some minutes, once.
set -euo pipefail
here=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")" && pwd -P)
bin=$(realpath -- "${1:?usage: prepare.sh BIN-DIR}")
"$here/../starts/prepare.sh" "$bin"
"$bin/performance" --prepare --images "$here/../../target/bench/images"
