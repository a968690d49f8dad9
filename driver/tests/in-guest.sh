#!/bin/bash
# Runs the driver's device tests in a User-Mode Linux guest, whose kernel has ublk.
# usage: driver/tests/in-guest.sh [TEST [ARG...]]     TEST: ublk, fuse or processes; without one, all of them
# environment: UML_KERNEL (see tests/vm/run-uml.sh), CARGO_TARGET_DIR, CARGO_PROFILE (default dev), TIMEOUT (default 120 s each)
set -euo pipefail
cd -- "$(dirname -- "${BASH_SOURCE[0]}")/../.."
if [[ ${1:-} == --in-guest ]]; then
  shift
  exec "$@"
fi
tests=(ublk fuse processes) arguments=()
if (($#)); then
  tests=("$1") arguments=("${@:2}")
fi
for test in "${tests[@]}"; do
  # The executable is in the message of cargo that names it; messages are one JSON object a line.
  binary=$(cargo test --locked --profile "${CARGO_PROFILE:-dev}" -p ublkimg-driver --test "$test" --no-run --message-format=json |
    sed -n 's/.*"executable":"\([^"]*\)".*/\1/p' | tail -n 1)
  [[ -x $binary ]] || { echo "in-guest.sh: cargo built no test $test" >&2; exit 1; }
  echo "== $test, in a guest"
  # The guest hides the host's /tmp, /run and /mnt, and shows the whole host below /mnt/host.
  tests/vm/run-uml.sh driver/tests/in-guest.sh --timeout "${TIMEOUT:-120}" -- \
    --in-guest "/mnt/host$(realpath "$binary")" --nocapture --test-threads=1 "${arguments[@]}"
done
