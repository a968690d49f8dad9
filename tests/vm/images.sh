#!/bin/bash
# What the lanes read: the sample images and the lists of their trees, converted on this host, because an emulated machine would take
# minutes for it.
#   images.sh VM-DIR IMAGES BIN-DIR      gives IMAGES/erofs (a layout with the tags one, two and verity, which is one with a tree) and IMAGES/TAG.list
set -euo pipefail
here=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")" && pwd -P)
(($# == 3)) || { echo "usage: images.sh VM-DIR IMAGES BIN-DIR" >&2; exit 1; }
sample=$1/sample images=$2 bin=$3
((EUID == 0)) || { echo "images.sh: needs root" >&2; exit 1; }
"$here/sample.sh" "$sample" "$bin"
rm -rf "$images"
mkdir -p "$images"
for tag in one two; do
  "$bin/ublkimg" convert "oci:$sample/$tag:latest" "oci:$images/erofs:$tag"
  cp "$sample/$tag.list" "$images/"
done
"$bin/ublkimg" convert --verity "oci:$sample/one:latest" "oci:$images/erofs:verity"
cp "$sample/one.list" "$images/verity.list"
