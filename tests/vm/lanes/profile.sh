#!/bin/sh
# A start is recorded, a profile made of it, and a host with an empty store starts with that: nothing is missed, nothing is
# fetched twice, and little more than the hot blob is fetched.
. "$(dirname "$0")/guest.sh"
registry one

# start_reads : what the start of the sample reads; every file by its own open
start_reads() {
  for i in $(seq 1 3 250); do cat "$WORK/one/a/text$i"; done | cksum
  head -c 3000000 "$WORK/one/big/noise" | cksum
  tail -c 100000 "$WORK/one/z/last" | cksum
  cat "$WORK/one"/empty/* "$WORK/one/usr/third" | cksum
}
# fresh : as a host that has never seen the image
fresh() {
  ublkimg rm one || fail "rm ended with $?"
  ublkimg daemon --stop || fail "daemon --stop ended with $?"
  rm -rf "$WORK/store"
  echo 3 >/proc/sys/vm/drop_caches
  control /_stats/reset '' || true
}
add_with() { # add_with OPTION...
  ublkimg add "$REG/sample:one" --name one --mount "$WORK/one" --transport ublk "$@" >/dev/null || fail "add $* ended with $?"
}

add_with --profile none --read-ahead-kb 0
ublkimg record start one --read-ahead-kb 0 || fail "record start ended with $?"
start_reads >"$WORK/expected"
ublkimg record stop one -o "$WORK/trace" || fail "record stop ended with $?"
ublkimg optimize "$REG/sample:one" --trace "$WORK/trace" --default --tmpdir "$WORK" --json >"$WORK/profile" ||
  fail "optimize ended with $?"
hot=$(sed -n 's/^ *"stored_bytes": \([0-9]*\).*/\1/p' "$WORK/profile")
[ "${hot:-0}" -gt 1000000 ] || fail "a hot blob of '$hot' bytes"

fresh
add_with --profile none
attach=$(stat_of bytes_sent)

fresh
add_with
start_reads >"$WORK/read"
cmp -s "$WORK/read" "$WORK/expected" || fail "what was read is wrong"
sent=$(stat_of bytes_sent)
ublkimg ready one || fail "ready ended with $?"
ublkimg status one --json --events "$WORK/events" >"$WORK/status" || fail "status ended with $?"
# The last of them: those of the start.
awk '/"first_reads"/ { lines = "" } { lines = lines $0 "\n" } END { printf "%s", lines }' "$WORK/status" | sed '/}/q' >"$WORK/first"
hits=$(sed -n 's/^ *"hits": \([0-9]*\).*/\1/p' "$WORK/first") late=$(sed -n 's/^ *"late_hits": \([0-9]*\).*/\1/p' "$WORK/first")
misses=$(sed -n 's/^ *"misses": \([0-9]*\).*/\1/p' "$WORK/first")
say "hot blob $hot bytes, attach $attach bytes, sent $sent bytes; $hits hits, $late late hits, $misses misses"
[ $((hits + late)) -gt 500 ] || fail "the device was hardly read: a page cache was not cold"
[ $((misses * 100)) -le $((hits + late + misses)) ] || fail "$misses misses"
[ "$(stat_of duplicate_bytes)" = 0 ] || fail "$(stat_of duplicate_bytes) bytes were fetched twice"
[ $((sent * 100)) -le $(((hot + attach) * 115)) ] || fail "$sent bytes for a hot blob of $hot and an attach of $attach"
# Every first read and every request of that start is an event of its picture.
events_of() { grep -c "^{\"$1\":\"$2\"" "$WORK/events" || true; }
[ "$(events_of read hit)" = "$hits" ] || fail "$(events_of read hit) events of $hits hits"
[ "$(events_of read late-hit) $(events_of read miss)" = "$late $misses" ] || fail "events of other reads than $late and $misses"
requests=$(sed -n 's/^ *"prefetch_requests": \([0-9]*\).*/\1/p' "$WORK/status")
[ "$(events_of fetch trace)" = "$requests" ] || fail "$(events_of fetch trace) events of $requests requests for the profile"
for mark in manifest profile device mount ready; do
  [ "$(events_of mark $mark)" = 1 ] || fail "$(events_of mark $mark) marks $mark"
done
ublkimg trace plot "$WORK/events" -o "$WORK/start.svg" || fail "trace plot ended with $?"
grep -q ">hit: $hits<" "$WORK/start.svg" || fail "the picture does not tell of $hits hits"
ublkimg rm one || fail "rm ended with $?"
finish
