#!/bin/sh
# tree.sh BIN IMAGES TAG : an image from a registry, attached over ublk: every object of its tree is right, and rm leaves nothing.
. "$(dirname "$0")/guest.sh"
tag=$3
registry "$tag"
attach "$tag"
same_tree "$WORK/$tag" "$tag"
[ "$(stat_of duplicate_bytes)" = 0 ] || fail "$(stat_of duplicate_bytes) bytes were fetched twice"

# adding it again finds it
again=$(ublkimg add "$REG/sample:$tag" --name "$tag" --mount "$WORK/$tag" --transport ublk) || fail "the second add ended with $?"
[ "$again" = "$DEV $WORK/$tag" ] || fail "the second add printed '$again'"
ublkimg status "$tag" --json >"$WORK/status" || fail "status ended with $?"
ublkimg rm "$tag" || fail "rm ended with $?"

# and again from the store alone
sent=$(stat_of bytes_sent)
attach "$tag"
"$BIN/list-tree" "$WORK/$tag" | cmp -s - "$IMAGES/$tag.list" || fail "the tree differs the second time"
more=$(($(stat_of bytes_sent) - sent))
[ $more -lt 100000 ] || fail "$more bytes were fetched that the store has"
ublkimg rm "$WORK/$tag" || fail "rm by mount point ended with $?"
finish
