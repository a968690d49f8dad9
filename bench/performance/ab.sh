#!/bin/bash
# Measures two revisions of ublkimg with the same programs, in turn: ab.sh BIN-DIR REVISION [PERFORMANCE-OPTION...]
# The tables come one after the other; the JSON is left in target/bench/vm/base.json and target/bench/vm/here.json.
set -euo pipefail
here=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")" && pwd -P)
bin=$(realpath -- "${1:?usage: ab.sh BIN-DIR REVISION [PERFORMANCE-OPTION...]}") revision=${2:?a revision}
shift 2
root=$(realpath -- "$here/../..")
commit=$(git -C "$root" rev-parse --short "$revision^{commit}")
tree=$root/target/bench/base-$commit
if [[ ! -e $tree ]]; then
  git -C "$root" worktree prune
  git -C "$root" worktree add --detach "$tree" "$commit" >/dev/null
fi
# With the flags of this build, in a directory of its own, which the next comparison with this revision uses again.
triple=$(rustc -vV | sed -n 's/^host: //p')
env -C "$tree" CARGO_TARGET_DIR="$tree/target" cargo build --locked --release --target "$triple" -p ublkimg
base=$tree/target/$triple/release/ublkimg
measure() { # NAME PROGRAM OPTION...
  local name=$1 program=$2
  shift 2
  echo "== $name"
  if [[ -e /dev/ublk-control ]]; then
    mkdir -p "$root/target/bench/vm"
    "$bin/performance" --ublkimg "$program" --json "$root/target/bench/vm/$name.json" "$@"
  else
    "$here/vm.sh" "$bin" --ublkimg "/mnt/host$program" "$@"
    mv "$root/target/bench/vm/performance.json" "$root/target/bench/vm/$name.json"
  fi
}
measure base "$base" "$@"
measure here "$bin/ublkimg" "$@"
