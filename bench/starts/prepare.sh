#!/bin/bash
# Builds and converts the images of the measured starts, into target/starts: prepare.sh BIN-DIR. Some minutes, once.
set -euo pipefail
here=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")" && pwd -P)
bin=$(realpath -- "${1:?usage: prepare.sh BIN-DIR}")
dir=$(realpath -m -- "$here/../../target/starts")
images=(scipy nginx node)
"$here/../../tests/demo/build-image.sh" "$dir" "${images[@]}"
for image in "${images[@]}"; do
  # A source image that was built anew is another one.
  [[ $dir/erofs.$image -nt $dir/$image/index.json ]] && continue
  "$bin/ublkimg" convert "oci:$dir/$image:latest" "oci:$dir/erofs:$image" >/dev/null
  touch "$dir/erofs.$image"
done
