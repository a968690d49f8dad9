#!/bin/bash
# Unpacks Python wheels, with what they depend on, over a copy of this system's python3: a tree for `make bench-convert BENCH_TREE=TREE`.
#   wheels.sh TREE PACKAGE...     numpy scipy: 272 MB, 6,800 files; torch: 5.6 GB, of 2.9 GB of wheels
set -euo pipefail
tree=$(realpath -m -- "${1:?usage: wheels.sh TREE PACKAGE...}")
shift
[[ ! -e $tree.ready ]] || exit 0
wheels=$(mktemp -d -p "${TMPDIR:-/var/tmp}")
trap 'rm -rf "$wheels"' EXIT
pip download -q -d "$wheels" "$@"
rm -rf "$tree"
mkdir -p "$tree"/usr/{bin,lib/python3/dist-packages}
cp -a /usr/lib/python3 /usr/lib/python3.* "$tree/usr/lib/"
cp -a /usr/bin/python3* "$tree/usr/bin/"
for wheel in "$wheels"/*.whl; do
  python3 -m zipfile -e "$wheel" "$tree/usr/lib/python3/dist-packages"
done
touch "$tree.ready"
