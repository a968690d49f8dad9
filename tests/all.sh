#!/bin/bash
# `make test`: everything that must hold, step by step, with the time that each took.
#   tests/all.sh LANES      LANES: the make target of the lanes, `lanes` or `lanes-full`
#
# Tests mostly wait: for links that are slow on purpose, for disks, for time-outs. What only compiles, and the fuzzing, therefore run
# beside them at the lowest priority, and say what they have to say when the tests have ended. Cargo lets nobody else build while it
# builds, so that begins when the first test runs. The lanes come last, and end with their count: some of them measure times.
set -euo pipefail
lanes=${1:?usage: tests/all.sh LANES}
logs=$(mktemp -d)
beside=
cleanup() {
  [[ -z $beside ]] || kill -- "-$beside" 2>/dev/null || true
  rm -rf "$logs"
}
trap cleanup EXIT

step() {
  local began=$SECONDS
  make --no-print-directory "$1"
  echo "== $1: $((SECONDS - began)) s"
}
compile() {
  until grep -qs '^ *Running' "$logs/unit"; do sleep 1; done
  for name in clippy doc fuzz-build fuzz; do step "$name"; done
}

step fmt
step deny
# In a process group of its own, so that it can be ended as a whole.
set -m
compile >"$logs/beside" 2>&1 </dev/null &
beside=$!
set +m
renice -n 19 -g "$beside" >/dev/null
step unit 2>&1 | tee "$logs/unit"
rc=0
wait "$beside" || rc=$?
beside=
cat "$logs/beside"
((rc == 0)) || exit "$rc"
step "$lanes"
