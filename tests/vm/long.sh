#!/bin/bash
# Runs one lane for long: on this host if it has ublk, else in a User-Mode-Linux guest.
#   long.sh LANE BIN-DIR AMOUNT TIMEOUT-SECONDS
set -euo pipefail
here=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")" && pwd -P)
lane=${1:?} bin=$(realpath -- "${2:?}") amount=${3:?} timeout=${4:?}
work=$here/../../target/vm images=$here/../../target/vm/long-images
mkdir -p "$work"
work=$(realpath -- "$work") images=$(realpath -m -- "$images")
"$here/images.sh" "$work" "$images" "$bin"
if [[ -e /dev/ublk-control && $EUID == 0 ]]; then
  exec timeout "$timeout" unshare --mount --propagation private sh "$here/lanes/$lane" "$bin" "$images" one "$amount"
fi
exec "$here/run-uml.sh" "$here/lanes/$lane" --mem 3G --timeout "$timeout" -- "/mnt/host$bin" "/mnt/host$images" one "$amount"
