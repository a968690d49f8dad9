#!/bin/bash
# Draws the pictures of the README from two starts that are made for them: pictures.sh BIN-DIR [START-OPTION...]
set -euo pipefail
here=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")" && pwd -P)
bin=$(realpath -- "${1:?usage: pictures.sh BIN-DIR [START-OPTION...]}")
shift
root=$(realpath -- "$here/../..")
starts=$root/target/starts pictures=$root/docs/pictures
cd "$root"
mkdir -p "$pictures"
"$bin/start" scipy --arms none,hot --rounds 1 --json "$starts/pictures.json" --events "$starts/events" "$@"
plot() { "$bin/ublkimg" trace plot "$@"; }
plot "$starts/events/scipy.none.events" -o "$pictures/start-without-profile.svg"
plot "$starts/events/scipy.hot.events" -o "$pictures/start-with-hot-blob.svg"
plot "$starts/scipy.trace" --image "oci:$starts/erofs:scipy" -o "$pictures/first-reads.svg"
ls -l "$pictures"
