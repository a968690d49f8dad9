# shellcheck shell=dash
# Sourced by every lane script, which runs as root on a kernel with ublk: bash or busybox sh, nothing assumed but busybox.
# usage of a lane: NAME.sh BIN-DIR IMAGES-DIR [MORE]; IMAGES-DIR/erofs is a layout with ublkimg images, IMAGES-DIR/TAG.list their trees.
set -eu
BIN=$1 IMAGES=$2
WORK=$(mktemp -d)
# Reads are counted: nobody else is to read.
export UBLKIMG_WARM=off
REG=

say() { echo "$(basename "$0"): $*"; }
fail() {
  say "FAILED: $*"
  for log in "$WORK"/run/*.log; do [ ! -e "$log" ] || { echo "--- $log"; tail -n 200 "$log"; }; done
  exit 1
}

# fault_row WHAT OUTCOME MS : a row of the table in docs/guarantees.md, as tests/src/fault_row.rs prints them
fault_row() {
  took=$(awk -v ms="$3" 'BEGIN { if (ms < 10) print "< 10 ms"; else if (ms < 1000) printf "%d ms", ms; else printf "%.1f s", ms / 1000 }')
  printf '\nfault: | %s | %s | %s | `tests/vm/lanes/%s` |\n' "$1" "$2" "$took" "$(basename "$0")"
}
# now_ms : a clock; busybox's date has no fractions
now_ms() { awk '{ printf "%d", $1 * 1000 }' /proc/uptime; }
# longest_ms : the longest read that a steady reader reported
longest_ms() {
  sed -n 's/.*longest \([^;]*\);.*/\1/p' "$WORK/steady" |
    awk '/[0-9]ms$/ { print $1 + 0; next } /µs$/ { print $1 / 1000; next } { print $1 * 1000 }'
}

ublkimg() { "$BIN/ublkimg" --root "$WORK/store" --run-dir "$WORK/run" "$@"; }

# registry TAG... : starts the test registry with these images of the layout; $REG is its address, images are $REG/sample:TAG
registry() {
  loads=
  for tag; do loads="$loads --load sample:$tag=$IMAGES/erofs:$tag"; done
  mkdir -p "$WORK/registry"
  # shellcheck disable=SC2086 # words on purpose
  "$BIN/test-registry" $loads >"$WORK/registry/out" &
  registry_pid=$!
  for _ in $(seq 100); do
    REG=$(sed -n 's#^listening on http://##p' "$WORK/registry/out")
    [ -z "$REG" ] || return 0
    sleep 0.1
  done
  fail "the test registry does not start"
}

# control PATH [BODY] : what a test asks of the registry beside images
control() {
  if [ $# -gt 1 ]; then
    busybox wget -q -O - --post-data "$2" "http://$REG$1"
  else
    busybox wget -q -O - "http://$REG$1"
  fi
}

faults() { control /_faults "$1" || fail "the registry refused $1"; }

# stat_of NAME : a counter of the registry
stat_of() { control /_stats | sed -n "s/^  \"$1\": \([0-9]*\).*/\1/p"; }

# manifest_of TAG : the image's manifest, which the tag's index names
manifest_of() {
  control "/v2/sample/manifests/$(control "/v2/sample/manifests/$1" | sed -n 's/.*"digest":"\(sha256:[0-9a-f]*\)".*/\1/p')"
}

# attach TAG : adds and mounts $REG/sample:TAG as TAG at $WORK/TAG; sets $DEV
attach() {
  line=$(ublkimg add "$REG/sample:$1" --name "$1" --mount "$WORK/$1" --transport ublk) || fail "add $1 ended with $?"
  DEV=${line%% *}
  [ "$line" = "$DEV $WORK/$1" ] || fail "add printed '$line'"
  case $DEV in /dev/ublkb*) ;; *) fail "$DEV is not a ublk device" ;; esac
  [ -b "$DEV" ] || fail "$DEV is no block device"
}

# same_tree DIR TAG : the whole tree below DIR is the image's
same_tree() {
  "$BIN/list-tree" "$1" >"$WORK/listed" || fail "the tree of $2 cannot be read"
  cmp -s "$WORK/listed" "$IMAGES/$2.list" || {
    diff "$IMAGES/$2.list" "$WORK/listed" | head -n 20
    fail "the tree of $2 differs"
  }
}

# The device numbers that are there before anything is added belong to others.
devices() { for node in /dev/ublkb* /dev/ublkc*; do [ ! -e "$node" ] || echo "$node"; done; }
loops() { for file in /sys/block/loop*/loop/backing_file; do [ ! -e "$file" ] || cat "$file"; done; }
# daemons [MORE] : process ids of the guard and the server of this lane; with --server, of the server alone
daemons() {
  for process in /proc/[0-9]*; do
    # A program for each process would take seconds in a guest. `read` drops the zeros between the words.
    command=
    { read -r command <"$process/cmdline"; } 2>/dev/null || true
    case $command in *"$WORK/run"*daemon"${1:-}"*) echo "${process#/proc/}" ;; esac
  done
}
# of_this_lane : processes that name the lane's directory, whatever they are: the daemon, mount helpers, warmers, commands
of_this_lane() {
  for process in /proc/[0-9]*; do
    command=
    { read -r command <"$process/cmdline"; } 2>/dev/null || true
    case $command in *"$WORK"*) echo "${process#/proc/} $command" ;; esac
  done
}
devices_before=$(devices)
loops_before=$(loops)

# finish : after everything was removed: nothing is left of it in the kernel, in any mount namespace, in the directories, or as
# a process
finish() {
  [ "$(devices)" = "$devices_before" ] || fail "devices are left: $(devices | tr '\n' ' ')"
  [ "$(loops)" = "$loops_before" ] || fail "loop devices are left: $(loops)"
  ! grep -F " $WORK/" /proc/mounts | grep erofs || fail "mounts are left"
  ublkimg daemon --stop || fail "daemon --stop ended with $?"
  # A guard that was told to end may be at it.
  for _ in $(seq 50); do [ -n "$(of_this_lane)" ] || break; sleep 0.1; done
  [ -z "$(of_this_lane)" ] || fail "processes are left: $(of_this_lane)"
  ! grep -lF " $WORK/" /proc/[0-9]*/mountinfo 2>/dev/null || fail "mounts are left in the namespaces of these"
  [ ! -e "$WORK/run/daemon.sock" ] || fail "the socket is left"
  ! grep -F "$WORK/" /proc/net/unix || fail "somebody still listens"
  ! find "$WORK/store" "$WORK/run" -name '*.tmp' -o -name '.*.new' | grep . || fail "temporary files are left"
  ! ls -A "$WORK/run/fuse" 2>/dev/null | grep . || fail "mount points of FUSE are left"
  kill "$registry_pid"
  rm -rf "$WORK"
}
