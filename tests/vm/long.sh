#!/bin/bash
# Runs one lane for long: on this host if it has ublk, else in a User-Mode-Linux guest.
#   long.sh LANE BIN-DIR AMOUNT TIMEOUT-SECONDS
set -euo pipefail
here=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")" && pwd -P)
lane=${1:?} bin=$(realpath -- "${2:?}") amount=${3:?} timeout=${4:?}
work=$here/../../target/vm images=$here/../../target/vm/long-images
mkdir -p "$work"
work=$(realpath -- "$work") images=$(realpath -m -- "$images")
"$here/sample.sh" "$work/sample" "$bin"
rm -rf "$images"
mkdir -p "$images"
for tag in one two; do
  "$bin/ublkimg" convert "oci:$work/sample/$tag:latest" "oci:$images/erofs:$tag"
  cp "$work/sample/$tag.list" "$images/"
done
if [[ -e /dev/ublk-control && $EUID == 0 ]]; then
  exec timeout "$timeout" unshare --mount --propagation private sh "$here/lanes/$lane" "$bin" "$images" one "$amount"
fi
exec "$here/run-uml.sh" "$here/lanes/$lane" --mem 3G --timeout "$timeout" -- "/mnt/host$bin" "/mnt/host$images" one "$amount"
