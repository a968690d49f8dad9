#!/bin/sh
# No server comes to serve, since somebody else has the store's lock. Readers wait; when the lock is free again within the
# limit of --recovery-timeout they go on without an error, and when it is not they get an error and the device is gone. So they do
# when the next server cannot read the device's record.
. "$(dirname "$0")/guest.sh"
registry one
limit_ms=3000
mkdir "$WORK/run"
# start : a daemon with that limit
start() {
  ublkimg daemon --recovery-timeout ${limit_ms}ms >>"$WORK/run/daemon.out.log" 2>&1 </dev/null &
  guard=$!
  for _ in $(seq 100); do [ -e "$WORK/run/daemon.sock" ] || sleep 0.1; done
}
start
attach one

# without_server SECONDS : kills the server while a reader waits, and keeps the store's lock for so long
without_server() {
  echo 3 >/proc/sys/vm/drop_caches
  faults '{"slow": {"path": "*/blobs/*", "toxic": {"latency": {"latency_ms": 500}}}}'
  "$BIN/list-tree" "$WORK/one" >"$WORK/listed" 2>"$WORK/errors" &
  reader=$!
  # It waits for the lock, and has it before the next server has.
  flock --no-fork "$WORK/store/lock" sleep "$1" &
  holder=$!
  sleep 0.5
  kill -0 $reader 2>/dev/null || fail "the reader was done before the kill: the registry is too quick for this test"
  kill -9 "$(daemons --server)"
  began=$(date +%s%N)
  faults '{"slow": null}'
}
waited_ms() { echo $((($(date +%s%N) - began) / 1000000)); }

without_server 1
wait $reader || fail "the reader ended with $? although a server came after $(waited_ms) ms"
[ "$(waited_ms)" -ge 900 ] || fail "the reader did not wait for the server"
fault_row 'no server for 1 s' 'readers wait: data' "$(waited_ms)"
ublkimg cache gc --cache-limit 0 >/dev/null

without_server 60
! wait $reader || fail "the reader saw no error in $(waited_ms) ms without a server"
took_ms=$(waited_ms)
[ "$took_ms" -ge $((limit_ms - 1000)) ] || fail "the reader got an error after $took_ms ms already"
[ "$took_ms" -le $((limit_ms + 5000)) ] || fail "the reader got its error after $took_ms ms only"
! wait $guard || fail "the guard ended well"
[ ! -e "$DEV" ] || fail "$DEV is still there"
fault_row 'no server comes to serve within `--recovery-timeout` (3 s)' 'EIO; the device is deleted' "$took_ms"
kill $holder
umount "$WORK/one"
start
[ "$(ublkimg ls | wc -l)" = 1 ] || fail "the next daemon has devices: $(ublkimg ls)"
attach one
ublkimg cache gc --cache-limit 0 >/dev/null
record=$WORK/store/devices/one.json
head -c $(($(wc -c <"$record") / 2)) "$record" >"$WORK/half"
cp "$WORK/half" "$record"
without_server 0
! wait $reader || fail "the reader saw no error although nothing says what it reads"
took_ms=$(waited_ms)
[ "$took_ms" -le $((limit_ms + 5000)) ] || fail "the reader got its error after $took_ms ms only"
fault_row 'a device record that was cut short, and no server' 'EIO; the device is deleted, what is left of the record is kept' "$took_ms"
for _ in $(seq 100); do [ ! -e "$WORK/store/devices/one.unreadable" ] || break; sleep 0.1; done
cmp -s "$WORK/half" "$WORK/store/devices/one.unreadable" || fail "what was left of the record is not kept"
[ ! -e "$DEV" ] || fail "$DEV is still there"
umount "$WORK/one"
attach one
same_tree "$WORK/one" one
ublkimg rm one || fail "rm ended with $?"
finish
