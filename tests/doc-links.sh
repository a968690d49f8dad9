#!/bin/bash
# Every relative link in the repository's Markdown files leads to something.
set -euo pipefail
cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.."
broken=0
while IFS= read -r file; do
  while IFS= read -r link; do
    path=${link%%#*}
    [[ -z $path || $path == *://* || $path == mailto:* ]] && continue
    [[ -e $(dirname -- "$file")/$path ]] || { echo "$file: broken link $link" >&2; broken=1; }
  done < <(sed '/^```/,/^```/d' "$file" | grep -oE '\]\([^) ]+\)' | sed -E 's/^\]\((.*)\)$/\1/' || true)
done < <(git ls-files --cached --others --exclude-standard '*.md')
exit $broken
