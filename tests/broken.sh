#!/bin/bash
# Breaks the program on purpose in a copy of the tree, once for each file in tests/broken/, and shows that the test which stands guard
# fails there by itself, while it passes without the patch.
#   broken.sh COPY CARGO-OPTION...
set -euo pipefail
root=$(realpath -- "$(dirname -- "${BASH_SOURCE[0]}")/..")
copy=${1:?usage: broken.sh COPY CARGO-OPTION...}
shift
options=("$@")
rm -rf "$copy"
mkdir -p "$copy"
copy=$(realpath -- "$copy")
export CARGO_TARGET_DIR=${CARGO_TARGET_DIR:-$root/target}
# With the times of the files, so that cargo builds again what a patch changes and nothing else.
(cd "$root" && git ls-files -z | xargs -0 cp -p --parents -t "$copy")
cd "$copy"
log=$copy/test.log

# program KIND NAME OPTION... : builds those tests of the driver, and prints where they are
program() {
  local kind=$1 name=$2 messages
  shift 2
  messages=$(cargo test -p ublkimg-driver "$@" --no-run --message-format=json "${options[@]}" 2>build.log) ||
    { cat build.log; echo "it does not build"; exit 126; } >&2
  grep -F "\"kind\":[\"$kind\"]" <<<"$messages" | grep -F "\"name\":\"$name\"" | sed -nE 's/.*"executable":"([^"]*)".*/\1/p'
}

# guard PATCH : the outcome of the test that PATCH must make fail; 125 if it cannot run here, 126 if it cannot be built
guard() {
  case $1 in
  verification-off) in_process a_changed_byte_is_refused_before_it_is_decoded ;;
  bit-before-data) in_process whatever_a_power_cut_leaves_no_block_is_wrong_and_nothing_durable_is_forgotten ;;
  hole-before-bit) in_process eviction_during_reads_never_serves_a_hole ;;
  wake-before-bit) in_process in_whatever_order_things_happen_reads_are_right_and_nobody_waits_for_ever ;;
  no-recovery) on_ublk a_reader_does_not_notice_that_its_server_was_killed ;;
  *) echo "nobody stands guard against $1"; return 126 ;;
  esac >"$log" 2>&1
}
in_process() {
  local unit
  unit=$(program lib ublkimg_driver --lib) || return
  (cd driver && "$unit" --nocapture "$1")
}
on_ublk() {
  local processes
  processes=$(program test processes --test processes) || return
  if [[ -e /dev/ublk-control && $EUID == 0 ]]; then
    timeout 120 "$processes" "$1"
  else
    printf '#!/bin/sh\nexec "%s" "%s"\n' "$processes" "$1" >run
    "$root/tests/vm/run-uml.sh" run --mem 1G --timeout 120
  fi
}

failed=0 guarded=()
for patch in tests/broken/*.patch; do
  name=$(basename "$patch" .patch) outcome=0
  guard "$name" || outcome=$?
  case $outcome in
  0) guarded+=("$name") ;;
  125) echo "SKIP $name: $(tail -n 1 "$log")" ;;
  *) tail -n 20 "$log"; echo "FAIL $name: its test fails without the patch"; failed=1 ;;
  esac
done
for name in "${guarded[@]}"; do
  patch -s -p1 <"tests/broken/$name.patch"
  if guard "$name"; then
    echo "FAIL $name: nobody notices"
    failed=1
  elif ! panic=$(grep -m 1 -A 1 panicked "$log"); then
    tail -n 20 "$log"
    echo "FAIL $name: the test ends in another way than by failing"
    failed=1
  else
    echo "ok   $name is noticed: ${panic//$'\n'/ }"
  fi
  patch -s -p1 -R <"tests/broken/$name.patch"
done
cd "$root"
rm -rf "$copy"
exit $failed
