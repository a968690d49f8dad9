#!/bin/sh
# kills.sh BIN IMAGES TAG [N] : the daemon is killed with -9 N times (20) at random moments, every tenth time with its guard,
# every third time again while it takes its devices back, some amid the attach or the removal of an image, while one device is
# read and compared all the time, another image comes and goes, and the store is emptied. No reader sees an error, and
# nothing is left.
. "$(dirname "$0")/guest.sh"
. "$(dirname "$0")/load.sh"
n=${4:-20}

# Kills of a server before it listened, and how long a reader waited then that came just after.
again=0 again_ms=0
# kill_next : kills the server that comes after $victims while it takes its devices back. It is known by then, for another has
# the store's lock until it is.
kill_next() {
  for _ in $(seq 100); do
    next=$(server)
    case " $victims " in *" ${next:-none} "*) ;; *) [ -z "$next" ] || break ;; esac
    sleep 0.01
  done
  kill "$holder" 2>/dev/null || true
  sleep "0.0$(below 9)"
  [ ! -e "$WORK/run/daemon.sock" ] || return 0
  # shellcheck disable=SC2086 # none, or one word
  hit $next || return 0
  again=$((again + 1))
  asked=$(now_ms)
  dd if="$DEV" of=/dev/null bs=4096 count=1 iflag=direct 2>/dev/null || fault "a read during a recovery failed"
  waited_ms=$(($(now_ms) - asked))
  [ $waited_ms -le $again_ms ] || again_ms=$waited_ms
}

load one two
for round in $(seq "$n"); do
  # While the logs still end with it.
  [ ! -e "$WORK/faults" ] || break
  began=$(date +%s%N)
  case $((round % 4)) in
  0 | 2) pause 1000 ;;
  1) amid_attach two ;;
  3) amid_removal && pause 100 ;;
  esac
  # It waits for the lock, and has it before the next server has.
  [ $((round % 3)) != 0 ] || { flock --no-fork "$WORK/store/lock" sleep 10 & holder=$!; }
  if [ $((round % 10)) = 0 ]; then victims=$(daemons | tr '\n' ' '); else victims=$(server); fi
  # shellcheck disable=SC2086 # one word each
  hit $victims || true
  [ $((round % 10)) != 0 ] || ublkimg daemon >>"$WORK/run/daemon.out.log" 2>&1 </dev/null &
  [ $((round % 3)) != 0 ] || kill_next
  # More often than the guard allows would be another test.
  rest_ms=$((2000 - ($(date +%s%N) - began) / 1000000))
  [ $rest_ms -le 0 ] || sleep "$(echo $rest_ms | awk '{ printf "%.3f", $1 / 1000 }')"
done
over $((n / 2))
say "$again kills of a server that did not listen yet"
fault_row '`kill -9` of the server, sometimes of the guard too' 'readers wait: data' "$(longest_ms)"
[ $again = 0 ] || fault_row '`kill -9` during recovery' 'readers wait: data' $again_ms
[ "$(failures adding removing)" = 0 ] ||
  fault_row '`kill -9` during attach or removal' 'the command fails, and can be repeated' "$(longest_failure adding removing)"
# So many cannot all miss.
[ "$n" -lt 20 ] || {
  [ $again -gt 0 ] || fail "no kill hit a recovery"
  [ "$(failures adding removing)" -gt 0 ] || fail "no kill hit an attach or a removal"
}
gone one two
