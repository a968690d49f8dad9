#!/bin/bash
# Runs the tests that docs/guarantees.md names in its table of faults, and writes the table anew from what they print:
# each row begins with `fault: ` (tests/src/fault_row.rs, tests/vm/lanes/guest.sh). A new row is put into the table by hand
# first, with its test. Nothing is written if a test fails, or a row of the old table was not seen.
#   faults.sh BIN CARGO-OPTION...
set -euo pipefail
here=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")" && pwd -P)
docs=$here/../docs/guarantees.md
bin=${1:?usage: faults.sh BIN CARGO-OPTION...}
shift
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

sed -n '/<!-- faults: begin -->/,/<!-- faults: end -->/p' "$docs" | grep '^| ' >"$work/old"
mapfile -t tests < <(sed -n 's/.*\.rs::\([a-z0-9_]*\)` |$/\1/p' "$work/old" | sort -u)
mapfile -t lanes < <(sed -n 's#.*`tests/vm/lanes/\([a-z]*\)\.sh` |$#\1#p' "$work/old" | sort -u)

cargo test --workspace --lib --tests "$@" -- --nocapture "${tests[@]}" >"$work/tests" 2>&1 ||
  { tail -n 60 "$work/tests"; echo 'faults.sh: a test failed' >&2; exit 1; }
grep SKIP "$work/tests" || true

# On a host with ublk the lanes run right there, and cargo has run the tests that need it.
where=uml
[[ ! -e /dev/ublk-control ]] || where=host
names=("${lanes[@]/#/$where-}")
[[ $where == host ]] || names+=(uml-test-processes uml-test-cli_daemon)
"$here/vm/lanes.sh" --bin "$bin" "${names[@]}"
logs=("${names[@]/#/$here/../target/vm/logs/}")

# The first that was seen of each fault, in the order of their names.
cat "$work/tests" "${logs[@]}" | sed -n 's/^fault: //p' | LC_ALL=C sort -s -t'|' -k2,2 -u >"$work/new"
missing=$(comm -23 <(cut -d'|' -f2 "$work/old" | LC_ALL=C sort -u) <(cut -d'|' -f2 "$work/new"))
[[ -z $missing ]] || { printf 'faults.sh: not seen:\n%s\n' "$missing" >&2; exit 1; }
awk -v new="$work/new" '
  /<!-- faults: end -->/ { skip = 0 }
  !skip { print }
  /<!-- faults: begin -->/ { while ((getline line < new) > 0) print line; skip = 1 }
' "$docs" >"$work/docs"
cat "$work/docs" >"$docs"
echo "$(wc -l <"$work/new") faults in docs/guarantees.md"
