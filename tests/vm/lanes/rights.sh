#!/bin/sh
# What a server is and may do: few capabilities, its queue threads none; last to be killed for memory; an I/O flusher. And
# what follows from it: a new device is not scanned for partitions, so a server that is killed while one starts leaves
# nothing that hangs, also on 6.12.
. "$(dirname "$0")/guest.sh"
registry one
ublkimg add "$REG/sample:one" --name one --transport ublk >"$WORK/added" || fail "add ended with $?"
DEV=$(cat "$WORK/added")
# Nobody has read the device: not we, and there is no udev here.
read -r reads _ <"/sys/block/${DEV#/dev/}/stat"
[ "$reads" = 0 ] || fail "$reads reads by the kernel while the device started"

server=$(daemons --server)
# of FILE FIELD : a field of a status file
of() { sed -n "s/^$2:[^0-9a-f]*\([0-9a-f]*\).*/\1/p" "$1"; }
# DAC_OVERRIDE, SYS_ADMIN, SYS_RESOURCE
[ "$(of "/proc/$server/status" CapEff)" = 0000000001200002 ] || fail "capabilities $(of "/proc/$server/status" CapEff)"
[ "$(of "/proc/$server/status" CapBnd)" = 0000000001200002 ] || fail "bounding set $(of "/proc/$server/status" CapBnd)"
[ "$(of "/proc/$server/status" NoNewPrivs)" = 1 ] || fail "its children may gain privileges"
[ "$(cat "/proc/$server/oom_score_adj")" = -900 ] || fail "oom_score_adj is $(cat "/proc/$server/oom_score_adj")"
queues=0
for task in "/proc/$server/task"/*; do
  read -r stat <"$task/stat"
  # shellcheck disable=SC2086 # the fields behind the name: the seventh are the flags
  set -- ${stat##*) }
  [ $(($7 & 0x80000)) != 0 ] || fail "$(cat "$task/comm") is no I/O flusher"
  case $(cat "$task/comm") in ublk[0-9]*)
    queues=$((queues + 1))
    [ "$(of "$task/status" CapPrm)" = 0000000000000000 ] || fail "the queue thread has $(of "$task/status" CapPrm)"
    ;;
  esac
done
[ $queues = 1 ] || fail "$queues queue threads"
ublkimg rm one || fail "rm ended with $?"

# killed at moments of a start: its record is there from before it starts
hits=0 slowest_ms=0
for moment in 0 1 2 3 4 5 6 7 8 9; do
  ublkimg ls >/dev/null
  victim=$(daemons --server)
  ublkimg add "$REG/sample:one" --name one --transport ublk >/dev/null 2>&1 &
  adding=$!
  # Nothing is run meanwhile: that would take longer than a start.
  until [ -e "$WORK/store/devices/one.json" ] || ! kill -0 $adding 2>/dev/null; do :; done
  spins=0
  while [ $spins -lt $((moment * 100)) ]; do spins=$((spins + 1)); done
  kill -9 "$victim"
  began=$(now_ms)
  # Its command fails if its server had not ended the start.
  wait $adding || hits=$((hits + 1))
  took_ms=$(($(now_ms) - began))
  [ $took_ms -le $slowest_ms ] || slowest_ms=$took_ms
  ublkimg rm one >/dev/null 2>&1 || true
done
[ "$(ublkimg ls | wc -l)" = 1 ] || fail "devices are left: $(ublkimg ls)"
[ $hits -gt 0 ] || fail "no server was killed while a device started"
fault_row '`kill -9` during START_DEV' 'the command fails or a new server ends it; nothing hangs' "$slowest_ms"

# killed while a device is deleted, for which the kernel waits as long as somebody has it open
ublkimg add "$REG/sample:one" --name one --transport ublk >"$WORK/added" || fail "add ended with $?"
DEV=$(cat "$WORK/added")
exec 9<"$DEV"
ublkimg rm --force one >/dev/null 2>&1 &
removing=$!
for _ in $(seq 100); do [ -e "/sys/block/${DEV#/dev/}" ] || break; sleep 0.02; done
[ ! -e "/sys/block/${DEV#/dev/}" ] || fail "$DEV is not being removed"
kill -0 $removing 2>/dev/null || fail "rm did not wait for who has $DEV open"
began=$(now_ms)
kill -9 "$(daemons --server)"
wait $removing && fail "rm ended well although its server was killed"
exec 9<&-
for _ in $(seq 500); do [ "$(devices)" != "$devices_before" ] || break; sleep 0.02; done
[ "$(devices)" = "$devices_before" ] || fail "a device that was half deleted is left: $(devices)"
fault_row '`kill -9` while a device in use is deleted' 'the command fails; the device goes when it is closed' $(($(now_ms) - began))
# Only a server that is there can be stopped: ls says on stderr that there is none.
for _ in $(seq 500); do
  ublkimg ls >"$WORK/list" 2>"$WORK/list.errors"
  [ -s "$WORK/list.errors" ] || break
  sleep 0.02
done
[ "$(wc -l <"$WORK/list")" = 1 ] || fail "devices are left: $(cat "$WORK/list")"
say "no reads at the start of a device; of ten servers killed at moments of one $hits were at starting it"
finish
