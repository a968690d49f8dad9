#!/bin/sh
# devices.sh BIN IMAGES TAG [N] : N devices (64, the most there can be) of one image, all read whole at once with the largest
# requests, copied: how much memory the server takes for their buffers, and that it gives it back. One more than 64 is refused.
. "$(dirname "$0")/guest.sh"
n=${4:-64}
# Each device has a buffer of 512 KiB for each of 128 requests. They are taken in turn, so even one reader touches as many as the
# image is long: 25 MB here. When nobody has read for 10 s all are given back.
rss_kb() { sed -n 's/^VmRSS:[^0-9]*\([0-9]*\).*/\1/p' "/proc/$server/status"; }
add() { ublkimg add "$REG/sample:one" --name "$1" --transport ublk --data-path copy; }
registry one
for i in $(seq "$n"); do add "n$i" >>"$WORK/added" || fail "add $i ended with $?"; done
server=$(daemons --server)
attached_kb=$(rss_kb)
busy_kb_max=$((attached_kb + n * 26000)) idle_kb_max=$((attached_kb + 20000))
[ "$n" != 64 ] || {
  rc=0
  add one-more 2>"$WORK/refused" || rc=$?
  [ $rc = 9 ] || fail "one device more: exit code $rc, $(cat "$WORK/refused")"
}
most_kb=0 readers=
while read -r device; do
  dd if="$device" of=/dev/null bs=512k iflag=direct 2>/dev/null &
  readers="$readers $!"
done <"$WORK/added"
for reader in $readers; do
  wait "$reader" || fail "a reader ended with $?"
  now_kb=$(rss_kb)
  [ "$now_kb" -le $most_kb ] || most_kb=$now_kb
done
for _ in $(seq 200); do
  idle_kb=$(rss_kb)
  [ "$idle_kb" -gt $idle_kb_max ] || break
  sleep 0.1
done
say "$n devices: $attached_kb KB when they were attached, $most_kb KB while all were read, $idle_kb KB afterwards"
[ $most_kb -gt $((attached_kb + n * 5000)) ] || fail "$most_kb KB: the buffers were not used"
[ $most_kb -le $busy_kb_max ] || fail "$most_kb KB while all were read"
[ "$idle_kb" -le $idle_kb_max ] || fail "$idle_kb KB are kept"
for i in $(seq "$n"); do ublkimg rm "n$i" || fail "rm ended with $?"; done
finish
