#!/bin/bash
# In a guest with ublk: the tutorial in the Debian root that has the package, as `tests/package.sh` left it.
#   tutorial.sh ROOT TUTORIAL-DIR BIN-DIR
set -euo pipefail
root=${1:?} tutorial=${2:?} bin=${3:?}
copy=/tmp/root
mkdir "$copy"
mount -t tmpfs -o size=90% root "$copy"
cp -a "$root/." "$copy/"
cp "$tutorial/run" "$copy/run-tutorial"
mkdir -p "$copy/old"
for place in dev proc sys; do mount --rbind "/$place" "$copy/$place"; done
"$bin/test-registry" --load "app:1=$tutorial/app" >/tmp/registry.out 2>/tmp/registry.log &
for _ in $(seq 100); do address=$(grep -oE '127\.0\.0\.1:[0-9]+' /tmp/registry.out | head -n 1) && break; sleep 0.1; done
[[ -n ${address:-} ]] || { echo "the registry did not come up"; exit 1; }
cd "$copy"
# shellcheck disable=SC2016 # for the shell within
unshare --mount --propagation private sh -c 'pivot_root . old && umount -l /old && exec env -i PATH=/usr/sbin:/usr/bin:/sbin:/bin HOME=/root "$@"' sh sh /run-tutorial "$address"
