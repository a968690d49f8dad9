#!/bin/bash
# Unpacks what the conversion benchmark packs: Python, numpy, scipy and sympy with the libraries below them, as Debian has them.
#   prepare.sh TREE     uses (and builds, if it is not there) the source image of the measured starts
set -euo pipefail
here=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")" && pwd -P)
tree=$(realpath -m -- "${1:?usage: prepare.sh TREE}")
[[ ! -e $tree.ready ]] || exit 0
starts=$(realpath -m -- "$here/../../target/starts")
"$here/../../tests/demo/build-image.sh" "$starts" scipy
# The packages' layer is the larger of the two.
layer=$(find "$starts/scipy/blobs/sha256" -type f -printf '%s %p\n' | sort -n | tail -n 1 | cut -d ' ' -f 2-)
rm -rf "$tree"
mkdir -p "$tree"
lib=./usr/lib/x86_64-linux-gnu
[[ $(uname -m) == x86_64 ]] || lib=./usr/lib/$(uname -m)-linux-gnu
tar -xzf "$layer" -C "$tree" --wildcards './usr/bin/python3*' './usr/lib/python3.*' \
  ./usr/lib/python3/dist-packages/{numpy,scipy,sympy} "$lib/openblas*" "$lib/libgfortran*" "$lib/libpython3*" --exclude='*.a'
touch "$tree.ready"
