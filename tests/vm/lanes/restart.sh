#!/bin/sh
# The daemon is killed with -9 during a read, and started again: the reader waits, and ends without an error.
. "$(dirname "$0")/guest.sh"
registry one
attach one
faults '{"slow": {"path": "*/blobs/*", "toxic": {"latency": {"latency_ms": 1000}}}}'
"$BIN/list-tree" "$WORK/one" >"$WORK/listed" &
reader=$!
sleep 1
kill -0 $reader 2>/dev/null || fail "the reader was done before the kill: the registry is too quick for this test"
# the guard too, or it would bring the server back at once
pids=$(daemons)
[ -n "$pids" ] || fail "no daemon is running"
began=$(now_ms)
# shellcheck disable=SC2086 # one word each
kill -9 $pids
sleep 1
kill -0 $reader 2>/dev/null || {
  wait $reader || fail "the reader ended with $? while there was no daemon"
  fail "the reader was done before the daemon was killed"
}
[ -b "$DEV" ] || fail "$DEV went with the daemon"
faults '{"slow": null}'
ublkimg daemon >"$WORK/daemon.out" 2>&1 </dev/null &
wait $reader || { cat "$WORK/daemon.out"; fail "the reader ended with $?"; }
fault_row '`kill -9` of server and guard; a daemon comes after 1 s' 'readers wait for it: data' $(($(now_ms) - began))
cmp -s "$WORK/listed" "$IMAGES/one.list" || fail "the tree differs"

# once more, the server alone: the guard brings it back without being asked; and all that was read is in the store for good
echo 3 >/proc/sys/vm/drop_caches
sent=$(stat_of bytes_sent)
# What one leaves that is killed amid a write, or over FUSE: the next takes it away, finish sees to it.
touch "$WORK/store/devices/.gone.new" "$WORK/store/links.json.7.tmp"
mkdir -p "$WORK/run/fuse/gone/fuse"
kill -9 "$(daemons --server)"
same_tree "$WORK/one" one
[ "$(stat_of bytes_sent)" = "$sent" ] || fail "$(($(stat_of bytes_sent) - sent)) bytes were fetched again that were stored before the kill"
ublkimg rm one || fail "rm ended with $?"
finish
