#!/bin/sh
# Two images at once that share a layer: both are right, and no byte of the shared layer is fetched twice.
. "$(dirname "$0")/guest.sh"
registry one two
attach one
first=$DEV
attach two
[ "$DEV" != "$first" ] || fail "both images have $DEV"
"$BIN/list-tree" "$WORK/two" >"$WORK/two.listed" &
same_tree "$WORK/one" one
wait $! || fail "the tree of two cannot be read"
cmp -s "$WORK/two.listed" "$IMAGES/two.list" || fail "the tree of two differs"
[ "$(stat_of duplicate_bytes)" = 0 ] || fail "$(stat_of duplicate_bytes) bytes were fetched twice"
ublkimg rm one
# the other goes on
echo 3 >/proc/sys/vm/drop_caches
same_tree "$WORK/two" two
ublkimg rm "$DEV" || fail "rm by device ended with $?"
finish
