#!/bin/bash
# Prints what the tree of an image is by the OCI rules, applied by tar and rm: reference.sh LAYOUT BIN-DIR, needs root.
set -euo pipefail
layout=$(realpath -- "${1:?usage: reference.sh LAYOUT BIN-DIR}") bin=$(realpath -- "${2:?usage: reference.sh LAYOUT BIN-DIR}")
work=$(mktemp -d "$layout.tree.XXXXXX")
trap 'rm -rf "$work"' EXIT
tree=$work/tree
mkdir "$tree"
digests() { grep -oE '"(application/[^"]*)","digest":"sha256:[0-9a-f]{64}' "$1" | grep -E "$2" | grep -oE '[0-9a-f]{64}$'; }
manifest=$layout/blobs/sha256/$(digests "$layout/index.json" 'image\.manifest')
for layer in $(digests "$manifest" 'image\.layer'); do
  archive=$layout/blobs/sha256/$layer
  # A layer's whiteouts hide what lies below it, wherever they stand in the archive.
  while IFS= read -r marker; do
    parent=$tree/${marker%/*} name=${marker##*/}
    if [[ $name == .wh..wh..opq ]]; then
      [[ ! -d $parent ]] || find "$parent" -mindepth 1 -delete
    else
      rm -rf "${parent:?}/${name#.wh.}"
    fi
  done < <(tar -tzf "$archive" | grep -E '(^|/)\.wh\.' || true)
  # tar does not put a file in the place of a directory that has something in it
  while IFS= read -r path; do
    if [[ -d $tree/$path && ! -L $tree/$path ]]; then rm -rf "${tree:?}/$path"; fi
  done < <(tar --quoting-style=literal -tzf "$archive" | grep -v '/$')
  tar --warning=no-timestamp --numeric-owner --xattrs --xattrs-include='*' --exclude='.wh.*' -xzpf "$archive" -C "$tree"
done
"$bin/list-tree" "$tree"
