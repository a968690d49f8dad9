#!/bin/bash
# Runs the lanes: tests that need a ublk driver, on this host if it has one, else in guests. One line each, a count at the end.
#   lanes.sh --bin DIR [--full] [LANE...]       docs/testing.md lists the lanes
set -euo pipefail
here=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")" && pwd -P)
die() { echo "lanes.sh: $*" >&2; exit 2; }
bin='' full='' wanted=()
while (($#)); do
  case $1 in
  --bin) bin=$(realpath -- "${2:?--bin needs a directory}"); shift 2 ;;
  --full) full=1; shift ;;
  -*) die "usage: lanes.sh --bin DIR [--full] [LANE...]" ;;
  *) wanted+=("$1"); shift ;;
  esac
done
for program in ublkimg test-registry list-tree read-latency steady-reader; do
  [[ -x $bin/$program ]] || die "no $program in ${bin:-the directory that --bin should name}"
done
root=$(realpath -- "$here/../..")
target=$root/target/vm
images=$target/images demo_images=$target/demo-images kernels=${VM_CACHE:-$target/kernels} logs=$target/logs
rm -rf "$logs"
mkdir -p "$logs"

passed=0 failed=0 skipped=0 ublk_ran=0
report() { # report ok|FAIL|SKIP LANE REST
  printf '%-4s %-20s %s\n' "$@"
  case $1 in ok) passed=$((passed + 1)) ;; FAIL) failed=$((failed + 1)) ;; SKIP) skipped=$((skipped + 1)) ;; esac
}
is_wanted() {
  local name
  ((${#wanted[@]})) || return 0
  for name in "${wanted[@]}"; do [[ $1 != "$name" ]] || return 0; done
  return 1
}
reason_in() { tail -n 1 "$1" | sed 's/^[a-z-]*\.sh: //'; }

# lane NAME COMMAND... : runs it, its output in a log that is shown if it fails; 77 is a lane that says why it cannot run, 124 a
# timeout, 125 a guest that did not start
lane() {
  local name=$1 log=$logs/$1 rc=0 began=$EPOCHREALTIME
  shift
  "$@" >"$log" 2>&1 </dev/null || rc=$?
  local seconds
  seconds=$(awk -v a="$began" -v b="$EPOCHREALTIME" 'BEGIN { printf "%.1f s", b - a }')
  if ((rc == 0)); then
    ublk_ran=1
    report ok "$name" "$seconds"
  elif ((rc == 77)); then
    report SKIP "$name:" "$(reason_in "$log")"
  else
    report FAIL "$name" "$seconds, exit $rc"
    sed "s/^/  | /" "$log" | tail -n 60
  fi
}

prepare_images() { "$here/images.sh" "$target" "$images" "$bin"; }

prepare_demo_image() {
  "$root/tests/demo/build-image.sh" || return 1
  local list=$root/target/demo/source.list
  if [[ ! -e $list || $root/target/demo/source/index.json -nt $list ]]; then
    "$here/reference.sh" "$root/target/demo/source" "$bin" >"$list.new" && mv "$list.new" "$list" || return 1
  fi
  rm -rf "$demo_images"
  "$bin/ublkimg" convert "oci:$root/target/demo/source:latest" "oci:$demo_images/erofs:demo" || return 1
  cp "$list" "$demo_images/demo.list"
}

# prepare WHAT LANES... : runs prepare_WHAT; if that fails the lanes are skipped
prepare() {
  local what=$1 name
  shift
  "prepare_$what" >"$logs/$what" 2>&1 </dev/null && return 0
  for name; do ! is_wanted "$name" || report SKIP "$name:" "no $what: $(reason_in "$logs/$what")"; done
  return 1
}

# --- a full kernel: the host's own, or User-Mode Linux
if [[ -e /dev/ublk-control && $EUID == 0 ]]; then
  where=host
  run_full() { # SCRIPT SECONDS IMAGES TAG MORE... : in a mount namespace of its own
    timeout --kill-after=10 "$2" unshare --mount --propagation private sh "$here/lanes/$1" "$bin" "${@:3}"
  }
else
  where=uml
  run_full() {
    "$here/run-uml.sh" "$here/lanes/$1" --mem 3G --timeout "$2" -- "/mnt/host$bin" "/mnt/host$3" "${@:4}"
  }
fi
full_lanes=("$where-tree" "$where-shared" "$where-restart" "$where-giveup" "$where-takeover" "$where-service" "$where-rights" "$where-corrupt" "$where-latency" "$where-profile" "$where-verity" "$where-kills")
[[ -z $full ]] || full_lanes+=("$where-devices")
# The workspace's own tests of devices. On a host with ublk cargo has run them already.
test_lanes=()
[[ $where == host ]] || test_lanes=(uml-test-ublk uml-test-processes uml-test-cli_add uml-test-cli_daemon uml-test-cli_cache uml-test-cli_bundle uml-test-cli_runtime uml-test-cli_warm)
if [[ $where == uml ]] && ! kernel=$("$here/run-uml.sh" --find-kernel 2>&1); then
  for name in "${test_lanes[@]}" "${full_lanes[@]}" uml-soak uml-demo-image; do
    ! is_wanted "$name" || report SKIP "$name:" "${kernel#run-uml.sh: }"
  done
  test_lanes=() full_lanes=()
fi

# --- stock kernels: busybox and our static programs in an emulated machine
run_stock() { # KERNEL SECONDS MEMORY IMAGES LANE...
  local adds=() program
  printf '%s\n' "${@:5}" >"$target/lanes.list"
  for program in ublkimg test-registry list-tree read-latency; do
    # The emulated machine has to unpack them; names of functions and lines are of no use there.
    mkdir -p "$target/stripped"
    strip -o "$target/stripped/$program" "$bin/$program"
    adds+=(--add "$target/stripped/$program:/programs/$program")
  done
  "$here/run-qemu.sh" --kernel "$1" --cache "$kernels" --timeout "$2" --mem "$3" --init "$here/lanes/stock.sh" \
    "${adds[@]}" --add "$target/lanes.list:/lanes.list" --add "$here/lanes:/lanes" --add "$4:/images"
}
prepare_kernels() {
  command -v qemu-system-x86_64 >/dev/null || { echo "missing package qemu-system-x86"; return 1; }
  "$here/fetch-kernels.sh" "$kernels"
}
stock_lanes() {
  local version
  prepare kernels qemu-6.12 qemu-7.2 || return 0
  for version in 6.12 7.2; do
    # What takes time is left out: where a processor is emulated, it tells nothing.
    ! is_wanted "qemu-$version" || lane "qemu-$version" run_stock "$version" 420 1G "$images" 'tree one' shared restart corrupt rights
    if [[ -n $full && -n $have_demo_image ]] && is_wanted "qemu-$version-demo-image"; then
      lane "qemu-$version-demo-image" run_stock "$version" 1200 3G "$demo_images" 'tree demo'
    fi
  done
}

have_images=''
if prepare images "${full_lanes[@]}" "$where-soak" qemu-6.12 qemu-7.2; then have_images=1; else full_lanes=(); fi
demo_lanes=()
((${#full_lanes[@]} == 0)) || demo_lanes+=("$where-demo-image")
[[ -z $full ]] || demo_lanes+=(qemu-6.12-demo-image qemu-7.2-demo-image)
have_demo_image=''
for name in "${demo_lanes[@]}"; do ! is_wanted "$name" || have_demo_image=wanted; done
[[ -z $have_demo_image ]] || prepare demo_image "${demo_lanes[@]}" || have_demo_image=

# Five minutes: for those who do not watch, long enough for a leak to show.
soak_lane() {
  ! is_wanted "$where-soak" || lane "$where-soak" run_full soak.sh 480 "$images" one 300
}

# An emulated machine keeps one processor busy for minutes, and so does a User-Mode-Linux guest: beside each other. Its lines come last.
# The longest guest comes after the emulated machines, on the processor that other guests do not take (run-uml.sh pins them to the last);
# a host's own lanes cannot be beside each other, since they look for what others left.
beside_lanes() {
  stock_lanes
  if [[ $where == uml ]] && ((${#full_lanes[@]})); then
    taskset -cp "$(taskset -cp $BASHPID | grep -oE '[0-9]+' | sed -n 2p)" $BASHPID >/dev/null
    soak_lane
  fi
}
stock_log=$logs/stock stock_pid=
if [[ -n $have_images ]]; then
  beside_lanes >"$stock_log" &
  stock_pid=$!
fi

for name in "${test_lanes[@]}"; do
  test=${name#uml-test-}
  is_wanted "$name" || continue
  if [[ -x $bin/guest-tests/$test ]]; then
    lane "$name" run_full rust-test.sh 180 "$images" "$test"
  else
    report SKIP "$name:" "not built: guest-tests.sh does"
  fi
done

for name in "${full_lanes[@]}"; do
  ! is_wanted "$name" || lane "$name" run_full "${name#"$where-"}.sh" 180 "$images" one
done
[[ -z $have_images || $where == uml ]] || soak_lane
if ((${#full_lanes[@]})) && [[ -n $have_demo_image ]] && is_wanted "$where-demo-image"; then
  lane "$where-demo-image" run_full tree.sh 300 "$demo_images" demo
fi

if [[ -n $stock_pid ]]; then
  wait "$stock_pid" || { echo 'FAIL the stock lanes ended early'; failed=$((failed + 1)); }
  cat "$stock_log"
  count() { grep -c "^$1 " "$stock_log" || true; }
  passed=$((passed + $(count ok))) failed=$((failed + $(count FAIL))) skipped=$((skipped + $(count SKIP)))
  (($(count ok) == 0)) || ublk_ran=1
fi

if [[ ${UBLKIMG_REQUIRE_UBLK:-} == 1 && $ublk_ran == 0 ]]; then
  echo "FAIL: no lane ran on a real ublk device, and UBLKIMG_REQUIRE_UBLK=1 asks for one"
  failed=$((failed + 1))
fi
echo "$passed passed, $failed failed, $skipped skipped"
((failed == 0))
