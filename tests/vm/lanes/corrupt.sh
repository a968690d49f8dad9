#!/bin/sh
# A changed chunk in the registry: its bytes give EIO and a log line, never data; the chunks beside it still read.
. "$(dirname "$0")/guest.sh"
registry one
attach one
# The largest blob is the shared layer, and its middle lies in big/noise, which fills 10 of its 20 MB.
blob=$(manifest_of one | tr '{' '\n' | sed -n 's/.*"digest":"\(sha256:[0-9a-f]*\)","size":\([0-9]*\).*/\2 \1/p' | sort -n | tail -n 1)
[ -n "$blob" ] || fail "the manifest names no layers"
size=${blob%% *} blob=${blob##* }
faults "{\"flip\": {\"path\": \"*/blobs/$blob\", \"toxic\": {\"bit_flip\": {\"offset_bytes\": $((size / 2))}}}}"
failed=0 read=0
while [ $read -lt 40 ]; do
  if dd if="$WORK/one/big/noise" of="$WORK/piece" bs=256k skip=$read count=1 2>"$WORK/dd" ; then
    cat "$WORK/piece" >>"$WORK/whole"
  else
    grep -q 'Input/output error\|I/O error' "$WORK/dd" || fail "not EIO but $(cat "$WORK/dd")"
    failed=$((failed + 1)) hole=$read
  fi
  read=$((read + 1))
done
# a chunk need not begin where a piece does
[ $failed -ge 1 ] && [ $failed -le 2 ] || fail "$failed pieces of 256 KiB gave an error"
for log in "$WORK"/run/*.log; do
  grep -F "${blob#sha256:}" "$log" | grep -q chunk && logged=1
done
[ -n "${logged:-}" ] || fail "no line in the log names chunk and blob $blob"
# healed, it reads again, and so does the rest
faults '{"flip": null}'
sleep 2 # a chunk that failed is not asked for again for a second
dd if="$WORK/one/big/noise" of=/dev/null bs=256k skip="$hole" count=1 2>"$WORK/dd" || fail "still an error: $(cat "$WORK/dd")"
same_tree "$WORK/one" one
ublkimg rm one || fail "rm ended with $?"
finish
