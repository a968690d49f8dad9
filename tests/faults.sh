#!/bin/bash
# Runs the tests of a failing registry, and writes what they saw between the marks of docs/guarantees.md.
#   faults.sh COMMAND...
set -euo pipefail
docs=$(realpath -- "$(dirname -- "${BASH_SOURCE[0]}")/../docs/guarantees.md")
seen=$(mktemp)
trap 'rm -f "$seen" "$seen.md"' EXIT
UBLKIMG_FAULTS_OUT=$seen "$@"
sort -o "$seen" "$seen"
# Names of tests as the rest of the page has them.
sed -i -E 's#`([a-z_]+)` \|$#`driver/src/outage_tests.rs::\1` |#' "$seen"
awk -v seen="$seen" '
  /<!-- faults: end -->/ { skip = 0 }
  !skip { print }
  /<!-- faults: begin -->/ { while ((getline line < seen) > 0) print line; skip = 1 }
' "$docs" >"$seen.md"
cat "$seen.md" >"$docs"
echo "$(wc -l <"$seen") faults in docs/guarantees.md"
