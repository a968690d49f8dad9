#!/bin/sh
# kills.sh BIN IMAGES TAG [N] : the daemon is killed with -9 N times (20) at random moments, every tenth time with its guard,
# while one device is read and compared all the time, another image comes and goes, and the store is emptied. No reader
# sees an error, and nothing is left.
. "$(dirname "$0")/guest.sh"
. "$(dirname "$0")/load.sh"
kills=${4:-20}
load one two
for kill in $(seq "$kills"); do
  # While the logs still end with it.
  [ ! -e "$WORK/faults" ] || break
  began=$(date +%s%N)
  pause 1000
  if [ $((kill % 10)) = 0 ]; then victims=$(daemons); else victims=$(server); fi
  # shellcheck disable=SC2086 # one word each
  [ -z "$victims" ] || kill -9 $victims 2>/dev/null || true
  # Some are killed again while they take their devices back.
  if [ $((kill % 3)) = 0 ]; then
    pause 400
    # shellcheck disable=SC2046 # one word each
    kill -9 $(server) 2>/dev/null || true
  fi
  [ $((kill % 10)) != 0 ] || ublkimg daemon >>"$WORK/run/daemon.out.log" 2>&1 </dev/null &
  # More often than the guard allows would be another test.
  rest_ms=$((2400 - ($(date +%s%N) - began) / 1000000))
  [ $rest_ms -le 0 ] || sleep "$(echo $rest_ms | awk '{ printf "%.3f", $1 / 1000 }')"
done
over
fault_row '`kill -9` of the server, sometimes of the guard too' 'readers wait: data' "$(longest_ms)"
fault_row '`kill -9` during recovery' 'readers wait: data' "$(longest_ms)"
fault_row '`kill -9` during attach or removal' 'the command fails, and can be repeated' "$(cat "$WORK/failed_ms" 2>/dev/null || echo 0)"
gone one two
say "$kills kills"
