#!/bin/sh
# New programs take the devices over while one device is read and compared all the time: the reader sees no error, and hardly a
# pause. Then what a new program must not take over, and programs that are broken: the old one serves on, or its guard starts it
# again, and the reader sees no error either.
. "$(dirname "$0")/guest.sh"
. "$(dirname "$0")/load.sh"
rounds=5 takeovers=2 pause_ms_max=200
export UBLKIMG_RECOVERY_TIMEOUT=5s
registry one two
steady one
device=$DEV
attach two
export UBLKIMG_LOG=info
new() { "$WORK/new" --root "$WORK/store" --run-dir "$WORK/run" "$@"; }
cp "$BIN/ublkimg" "$WORK/new"
# read_again : the steady reader, from the start
read_again() {
  rm "$WORK/over"
  "$BIN/steady-reader" "$device" "$WORK/reference" "$WORK/over" >"$WORK/steady" 2>"$WORK/steady.errors" &
  steady_pid=$!
}
# read_enough : ends it; it has seen no error
read_enough() {
  touch "$WORK/over"
  wait "$steady_pid" || { cat "$WORK/steady" "$WORK/steady.errors"; fail "the steady reader ended with an error"; }
}
# The host may be busy with something else for a moment; a takeover that is slow is slow in every round.
shortest_ms=
for round in $(seq $rounds); do
  [ "$round" = 1 ] || read_again
  for number in $(seq $takeovers); do
    before=$(daemons --server)
    new daemon --takeover || fail "takeover $number ended with $?"
    after=$(daemons --server)
    [ -n "$after" ] && [ "$after" != "$before" ] || fail "takeover $number: server $before became '$after'"
    [ "$(readlink "/proc/$after/exe")" = "$WORK/new" ] || fail "server $after is of another program"
    guard=$(cat "$WORK/run/guard.lock")
    [ "$(readlink "/proc/$guard/exe")" = "$WORK/new" ] || fail "guard $guard is of another program"
    same_tree "$WORK/two" two
  done
  read_enough
  say "$takeovers takeovers of two devices: $(cat "$WORK/steady")"
  shortest_ms=$(printf '%s\n' $shortest_ms "$(longest_ms)" | sort -n | head -n 1)
done
new ls | grep -q "^two " || fail "the new server does not know two: $(new ls)"
awk -v ms="$shortest_ms" -v max=$pause_ms_max 'BEGIN { exit !(ms <= max) }' || fail "a reader waited $shortest_ms ms in every round"
fault_row 'a takeover by another program, ten times' 'readers wait: data' "$shortest_ms"

read_again
server=$(daemons --server)
# is_refused WHAT WORD : a takeover fails before anything has changed, and names WORD
is_refused() {
  ! new daemon --takeover 2>"$WORK/refused" || fail "a takeover went through with $1"
  cat "$WORK/refused" "$WORK"/run/*.log | grep -q "$2" || fail "$1: nobody says $2: $(cat "$WORK/refused")"
  [ "$(daemons --server)" = "$server" ] || fail "$1: server $server became '$(daemons --server)'"
}
refused=$(now_ms)
cp "$WORK/store/devices/two.json" "$WORK/two.json"
sed -i 's/^{/{ "later": 1,/' "$WORK/store/devices/two.json"
is_refused 'a record of a later version' two.json
cp "$WORK/two.json" "$WORK/store/devices/two.json"
manifest=$(sed -n 's/.*"manifest": *"sha256:\([0-9a-f]*\)".*/\1/p' "$WORK/two.json")
object=$(find "$WORK/store" -name "*$manifest*" -type f | head -n 1)
[ -n "$object" ] || fail "the store has no manifest $manifest"
mv "$object" "$WORK/object"
is_refused 'a manifest that the store has lost' "$manifest"
mv "$WORK/object" "$object"
fault_row 'a takeover by a program that cannot read a record, or without what the store has lost' 'refused: the old server serves on' $((($(now_ms) - refused) / 2))

# by PROGRAM : has a program take over that cannot ask for it itself, and waits until it has failed
by() {
  rm -f "$WORK/run/takeover.outcome"
  printf %s "$1" >"$WORK/run/takeover.request"
  kill -USR1 "$(cat "$WORK/run/guard.lock")"
  for _ in $(seq 300); do
    [ ! -e "$WORK/run/takeover.outcome" ] || break
    sleep 0.1
  done
  grep -q Failed "$WORK/run/takeover.outcome" || fail "$1: $(cat "$WORK/run/takeover.outcome")"
  for _ in $(seq 100); do
    ! ublkimg ls 2>/dev/null | grep -q "^two " || return 0
    sleep 0.1
  done
  fail "$1: no server afterwards"
}
# program NAME LINE : a broken program
program() {
  printf '#!/bin/sh\n%s\n' "$2" >"$WORK/$1"
  chmod +x "$WORK/$1"
}
program dies-at-once 'exit 3'
began=$(now_ms)
by "$WORK/dies-at-once"
by "$WORK/is-not-there"
at_once_ms=$(($(now_ms) - began))
[ "$(daemons --server)" = "$server" ] || fail "the old server is gone: $server became $(daemons --server)"
asks="\"$WORK/new\" \"\$@\" & while kill -0 $server 2>/dev/null; do sleep 0.01; done; kill -9 \$!"
program dies-when-it-has-asked "$asks; exit 1"
by "$WORK/dies-when-it-has-asked"
[ "$(daemons --server)" != "$server" ] || fail "the program did not ask"
server=$(daemons --server)
program hangs-when-it-has-asked "$asks; exec sleep 1000"
sed -i "s/kill -0 [0-9]*/kill -0 $server/" "$WORK/hangs-when-it-has-asked"
by "$WORK/hangs-when-it-has-asked"
new daemon --takeover || fail "a takeover after some that failed ended with $?"
read_enough
say "four programs that are broken: $(cat "$WORK/steady")"
fault_row 'a takeover by a program that ends at once, or is not there' 'the old server serves on: data' "$at_once_ms"
fault_row 'a takeover by a program that dies or hangs after it has asked' 'readers wait, the old program is started again: data' "$(longest_ms)"
gone one two
