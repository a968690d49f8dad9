#!/bin/sh
# A service manager restarts the daemon while two images are mounted: it sends SIGTERM to the guard, waits for its end, and
# starts the next one. Readers who wait for the registry at that moment wait for the next daemon. Then both images are removed.
# Nothing hangs, nothing is left.
. "$(dirname "$0")/guest.sh"
# start : a daemon in the background; sets $guard, the process that a service manager knows
start() {
  rm -f "$WORK/run/guard.lock"
  ublkimg daemon >>"$WORK/run/daemon.out.log" 2>&1 </dev/null &
  started=$!
  for _ in $(seq 100); do
    guard=$(cat "$WORK/run/guard.lock" 2>/dev/null) || true
    [ -z "$guard" ] || [ ! -e "$WORK/run/daemon.sock" ] || return 0
    sleep 0.1
  done
  fail "the daemon does not start"
}
# misses : reads of one that had to wait so far
misses() { ublkimg status one | sed -n 's/^misses *//p'; }
# wait_for_the_registry : readers of what the store does not have, while the registry does not answer; sets $waiting
wait_for_the_registry() {
  ublkimg cache gc --cache-limit 0 >/dev/null
  echo 3 >/proc/sys/vm/drop_caches
  faults '{"hangs": {"path": "*/blobs/*", "toxic": "hang"}}'
  missed=$(misses)
  for piece in 1 11 21 31; do
    dd if="$WORK/one/big/noise" of=/dev/null bs=256k skip=$piece count=1 iflag=direct 2>>"$WORK/waiting.errors" &
    waiting="$waiting $!"
  done
  for _ in $(seq 100); do
    [ "$(misses)" -lt $((missed + 4)) ] || return 0
    sleep 0.1
  done
  fail "$(($(misses) - missed)) of 4 readers wait for the registry: $(cat "$WORK/waiting.errors")"
}
registry one two
mkdir "$WORK/run"
start
attach one
attach two
for round in 1 2 3; do
  waiting=
  [ $round != 1 ] || wait_for_the_registry
  kill -TERM $guard
  began=$(date +%s%N)
  wait $started || fail "round $round: the guard ended with $?"
  ended=$(now_ms)
  say "the daemon ended $((($(date +%s%N) - began) / 1000000)) ms after SIGTERM, with two images mounted"
  [ -z "$(daemons)" ] || fail "processes are left: $(daemons | tr '\n' ' ')"
  [ -z "$waiting" ] || faults '{"hangs": null}'
  # reads of what is not in the page cache wait for the next daemon
  echo 3 >/proc/sys/vm/drop_caches
  "$BIN/list-tree" "$WORK/one" >"$WORK/waiting" &
  reader=$!
  start
  wait $reader || fail "round $round: a reader ended with $? over the restart"
  fault_row 'SIGTERM while images are mounted' 'readers wait for the next daemon: data' $(($(now_ms) - ended))
  for reader in $waiting; do
    wait "$reader" || fail "a reader that waited for the registry ended with $?: $(cat "$WORK/waiting.errors")"
  done
  [ -z "$waiting" ] || fault_row 'SIGTERM while readers wait for the registry' 'they wait for the next daemon: data' $(($(now_ms) - ended))
  cmp -s "$WORK/waiting" "$IMAGES/one.list" || fail "round $round: the tree differs"
  same_tree "$WORK/two" two
done
ublkimg rm one || fail "rm one ended with $?"
ublkimg rm two || fail "rm two ended with $?"
finish
