#!/bin/sh
# 64 misses wait on a registry that takes a second per answer: p99 of cached reads stays within twice that of an idle device.
. "$(dirname "$0")/guest.sh"
registry one
# The host may be busy with something else for a moment; a device that makes hits wait for misses fails every round.
for round in 1 2 3; do
  attach one
  # out of order, or read-ahead would bring the blocks that have to miss
  for piece in 5 0 7 2 4 1 6 3; do
    dd if="$DEV" of=/dev/null bs=256k skip=$piece count=1 2>/dev/null || fail "the device cannot be read"
  done
  faults '{"slow": {"path": "*/blobs/*", "toxic": {"latency": {"latency_ms": 1000}}}}'
  rc=0
  "$BIN/read-latency" "$DEV" --warm-mib 2 --first-miss-mib 9 --misses 64 --answer-ms 1000 || rc=$?
  faults '{"slow": null}'
  ublkimg rm one || fail "rm ended with $?"
  [ $rc != 0 ] || break
  [ $rc = 1 ] || fail "the measurement failed"
  ublkimg daemon --stop
  rm -rf "$WORK/store"
done
[ $rc = 0 ] || fail "cached reads wait for misses"
say "within the limit in round $round"
finish
