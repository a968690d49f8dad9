#!/bin/bash
# Builds the fuzz targets with coverage instrumentation and runs each of them for a while.
#   fuzz/run.sh [--seconds N] [TARGET...]     N seconds for each target, 5 unless told
#   fuzz/run.sh --build                       only builds them
#   fuzz/run.sh --clippy                      only clippy, on what would be built
# Two targets run at a time. Inputs that found something new stay in target/fuzz/corpus/TARGET and are where the next run starts; with
# UBLKIMG_FUZZ_FRESH=1 it starts from the seeds alone. What makes a target fail stays in target/fuzz/failures.
set -euo pipefail
die() { echo "fuzz/run.sh: $*" >&2; exit 1; }
here=$(dirname -- "$(realpath -- "${BASH_SOURCE[0]}")")

seconds=5
only=
targets=()
while (($#)); do
  case $1 in
  --seconds) seconds=${2:?--seconds N}; shift 2 ;;
  --build | --clippy) only=$1; shift ;;
  -*) die "unknown option $1" ;;
  *) targets+=("$1"); shift ;;
  esac
done
((${#targets[@]})) || mapfile -t targets < <(sed -nE 's/^ *Target \{ name: "([a-z_]+)".*/\1/p' "$here/src/main.rs")
((${#targets[@]})) || die "no targets in src/main.rs"

# The passes that libFuzzer lives on; all of these flags are stable. Naming the target keeps them off build scripts.
triple=$(rustc -vV | sed -n 's/^host: //p')
flags=(--cfg fuzzing -Cpasses=sancov-module)
for option in level=4 inline-8bit-counters pc-table trace-compares; do flags+=("-Cllvm-args=-sanitizer-coverage-$option"); done
out=${CARGO_TARGET_DIR:-$here/../target}/fuzz
export RUSTFLAGS=${flags[*]}
options=(--quiet --locked --release --manifest-path "$here/Cargo.toml" --target "$triple" --target-dir "$out/build")
[[ $only != --clippy ]] || exec cargo clippy "${options[@]}" -- -D warnings
cargo build "${options[@]}"
[[ $only != --build ]] || exit 0
program=$out/build/$triple/release/ublkimg-fuzz

run() {
  local target=$1 work=$out/runs/$1 corpus=$out/corpus/$1 inputs=()
  rm -rf "$work"
  [[ -z ${UBLKIMG_FUZZ_FRESH:-} ]] || corpus=$work/corpus
  mkdir -p "$work/seeds" "$corpus" "$out/failures"
  inputs=("$corpus" "$work/seeds")
  [[ ! -d $here/found/$target ]] || inputs+=("$here/found/$target")
  export UBLKIMG_FUZZ_TARGET=$target
  # Seeds are checked as they are written: a panic there fails too.
  UBLKIMG_FUZZ_SEEDS=$work/seeds "$program" >"$work/log" 2>&1 || { cat "$work/log" >&2; return 1; }
  # Only the first directory is written to. 64 KiB: metadata of some blocks, traces of some thousand entries. 512 MiB: a hundred times what any target needs.
  if ! "$program" -seed=1 -max_total_time="$seconds" -max_len=65536 -rss_limit_mb=512 -timeout=10 \
    -artifact_prefix="$out/failures/$target-" "${inputs[@]}" >"$work/log" 2>&1; then
    tail -n 40 "$work/log" >&2
    echo "FAIL fuzz $target: input in $out/failures" >&2
    return 1
  fi
  awk -v target="$target" '/DONE/ { sub(/^#/, ""); printf "ok   fuzz %-16s %9d inputs, coverage %d, rss %s\n", target, $1, $4, $NF }' "$work/log"
}

failed=0
running=()
for target in "${targets[@]}"; do
  run "$target" &
  running+=($!)
  if ((${#running[@]} == 2)); then
    wait "${running[0]}" || failed=1
    running=("${running[@]:1}")
  fi
done
for job in "${running[@]}"; do wait "$job" || failed=1; done
exit "$failed"
