#!/bin/sh
# dm-verity over a device: the whole tree reads through it; a byte that changes where our own checks do not look, in the
# store's file, is read as it is from the device and is EIO through dm-verity; a killed daemon changes nothing; nothing is left.
. "$(dirname "$0")/guest.sh"
[ -e /dev/mapper/control ] || modprobe -q dm-verity 2>/dev/null || true
[ -e /dev/mapper/control ] || { say "this kernel has no device mapper"; exit 77; }
mapped() { for dm in /sys/block/dm-*; do [ ! -e "$dm" ] || grep '^ublkimg-' "$dm/dm/name" 2>/dev/null || true; done; }
links() { find /dev/mapper -name 'ublkimg-*'; }
add() {
  line=$(ublkimg add "$REG/sample:verity" --name sample --transport ublk --profile none --verity "$@") || fail "add --verity $* ended with $?"
}
registry verity one
! ublkimg add "$REG/sample:one" --name one --verity >/dev/null 2>"$WORK/error" || fail "an image without a tree is taken"
[ "$(wc -l <"$WORK/error")" = 1 ] && grep -q 'convert --verity' "$WORK/error" || fail "the message is $(cat "$WORK/error")"
[ "$(ublkimg ls | wc -l)" = 1 ] || fail "devices are left: $(ublkimg ls)"

# Who does not ask for it has an image like others.
attach verity
same_tree "$WORK/verity" verity
[ -z "$(mapped)" ] || fail "mapped although nobody asked: $(mapped)"
ublkimg rm verity || fail "rm ended with $?"
ublkimg cache gc --cache-limit 0 >/dev/null || fail "the cache cannot be emptied"

sent=$(stat_of bytes_sent)
add --mount "$WORK/verity"
[ "$line" = "/dev/mapper/ublkimg-sample $WORK/verity" ] || fail "add printed '$line'"
add --mount "$WORK/verity"
[ "$line" = "/dev/mapper/ublkimg-sample $WORK/verity" ] || fail "the second add printed '$line'"
fetched=$(($(stat_of bytes_sent) - sent))
[ $fetched -lt 500000 ] || fail "$fetched bytes were fetched before anything was read: the tree is not fetched lazily"
same_tree "$WORK/verity" verity
fetched=$(($(stat_of bytes_sent) - sent))
[ $fetched -gt 5000000 ] || fail "only $fetched bytes were fetched for the whole tree: they were there before"
ublkimg status sample --json >"$WORK/status" || fail "status ended with $?"
field() { sed -n "s/^ *\"$1\": \"*\([^\",]*\)\"*,*$/\1/p" "$WORK/status" | tail -n 1; }
device=$(field device) blocks=$(field data_blocks)

# The kernel, the tree and another implementation agree.
if command -v veritysetup >/dev/null; then
  veritysetup verify "$device" "$device" "$(field root)" --no-superblock --hash=sha256 --format=1 --data-block-size=4096 \
    --hash-block-size=4096 --data-blocks="$blocks" --hash-offset=$((blocks * 4096)) --salt="$(field salt)" ||
    fail "veritysetup refuses the tree"
  say "veritysetup verifies $blocks blocks"
else
  say "no veritysetup here: the tree is compared by cli_verity alone"
fi

# a byte of big/noise, in the middle of the data file of the largest layer
cp "$device" "$WORK/reference"
cp "$WORK/verity/big/noise" "$WORK/noise"
# shellcheck disable=SC2012 # names are digests
data=$(ls -S "$WORK"/store/blobs/*.data | head -n 1)
at=$(($(stat -c %s "$data") / 2))
byte() { dd if="$data" bs=1 skip=$at count=1 2>/dev/null; }
put() { dd of="$data" bs=1 seek=$at conv=notrunc 2>/dev/null; }
byte >"$WORK/byte"
tr '\000-\377' '\001-\377\000' <"$WORK/byte" | put
echo 3 >/proc/sys/vm/drop_caches
failed=0 piece=0
while [ $piece -lt 40 ]; do
  began=$(now_ms)
  if dd if="$WORK/verity/big/noise" of="$WORK/piece" bs=256k skip=$piece count=1 iflag=fullblock 2>"$WORK/error"; then
    dd if="$WORK/noise" of="$WORK/expected" bs=256k skip=$piece count=1 iflag=fullblock 2>/dev/null
    cmp "$WORK/piece" "$WORK/expected" || fail "a changed byte was read through dm-verity"
  else
    took_ms=$(($(now_ms) - began))
    grep -q 'Input/output error\|I/O error' "$WORK/error" || fail "not EIO but $(cat "$WORK/error")"
    failed=$((failed + 1))
  fi
  piece=$((piece + 1))
done
[ $failed = 1 ] || fail "$failed pieces of 256 KiB gave an error"
cp "$device" "$WORK/changed" || fail "the device itself gives an error: dm-verity had nothing to find"
! cmp -s "$WORK/reference" "$WORK/changed" || fail "the byte was not changed"
fault_row 'a byte that the disk changed, below dm-verity' 'EIO for that block' "$took_ms"
put <"$WORK/byte"
echo 3 >/proc/sys/vm/drop_caches

# killed under a reader, which waits; and the mount is still the same one
"$BIN/list-tree" "$WORK/verity" >"$WORK/listed" &
reader=$!
kill -9 "$(daemons --server)"
wait $reader || fail "a reader ended with $? over the kill"
cmp -s "$WORK/listed" "$IMAGES/verity.list" || fail "the tree differs"
[ "$(mapped)" = ublkimg-sample ] || fail "mapped are '$(mapped)'"
# shellcheck disable=SC2046 # one word each
kill -9 $(daemons)
ublkimg rm "$WORK/verity" || fail "rm after a crash ended with $?"
[ -z "$(mapped)$(links)" ] || fail "left are: $(mapped) $(links)"

# unmounted by somebody else: the mapped device goes with the mount
add --mount "$WORK/verity"
umount "$WORK/verity"
# The kernel takes it down a moment later.
for _ in $(seq 50); do [ -z "$(mapped)" ] || sleep 0.1; done
[ -z "$(mapped)" ] || fail "mapped devices are left: $(mapped)"
ublkimg rm sample || fail "rm ended with $?"
[ -z "$(links)" ] || fail "left are: $(links)"

# not mounted by us
add
[ "$line" = /dev/mapper/ublkimg-sample ] || fail "add printed '$line'"
mount -t erofs -o ro /dev/mapper/ublkimg-sample "$WORK/verity" || fail "cannot be mounted"
umount "$WORK/verity"
[ "$(mapped)" = ublkimg-sample ] || fail "it went although nobody asked for that"
# shellcheck disable=SC2046 # one word each
kill -9 $(daemons)
ublkimg rm sample || fail "rm ended with $?"
[ -z "$(mapped)$(links)" ] || fail "left are: $(mapped) $(links)"
finish
