#!/bin/sh
# New programs take the devices over while one device is read and compared all the time: the reader sees no error. Then
# programs that are broken: the old one serves on, or its guard starts it again, and the reader sees no error either.
. "$(dirname "$0")/guest.sh"
. "$(dirname "$0")/load.sh"
takeovers=10
export UBLKIMG_RECOVERY_TIMEOUT=5s
registry one two
steady one
device=$DEV
attach two
export UBLKIMG_LOG=info
new() { "$WORK/new" --root "$WORK/store" --run-dir "$WORK/run" "$@"; }
cp "$BIN/ublkimg" "$WORK/new"
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
new ls | grep -q "^two " || fail "the new server does not know two: $(new ls)"
touch "$WORK/over"
wait "$steady_pid" || { cat "$WORK/steady" "$WORK/steady.errors"; fail "the steady reader ended with an error"; }
say "$takeovers takeovers of two devices: $(cat "$WORK/steady")"
fault_row 'a takeover by another program, ten times' 'readers wait: data' "$(longest_ms)"

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
rm "$WORK/over"
"$BIN/steady-reader" "$device" "$WORK/reference" "$WORK/over" >"$WORK/steady" 2>"$WORK/steady.errors" &
steady_pid=$!
server=$(daemons --server)
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
touch "$WORK/over"
wait "$steady_pid" || { cat "$WORK/steady" "$WORK/steady.errors"; fail "the steady reader ended with an error"; }
say "four programs that are broken: $(cat "$WORK/steady")"
fault_row 'a takeover by a program that ends at once, or is not there' 'the old server serves on: data' "$at_once_ms"
fault_row 'a takeover by a program that dies or hangs after it has asked' 'readers wait, the old program is started again: data' "$(longest_ms)"
gone one two
