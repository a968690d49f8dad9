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

# killed at moments of a start
for ms in 0 20 40 60 80 100 140 180 240 300; do
  ublkimg add "$REG/sample:one" --name one --transport ublk >/dev/null 2>&1 &
  adding=$!
  sleep "$(awk "BEGIN { print $ms / 1000 }")"
  victim=$(daemons --server)
  [ -z "$victim" ] || kill -9 "$victim" 2>/dev/null || true
  began=$(now_ms)
  wait $adding || true
  took_ms=$(($(now_ms) - began))
  [ $took_ms -le ${slowest_ms:=0} ] || slowest_ms=$took_ms
  ublkimg rm one >/dev/null 2>&1 || true
done
[ "$(ublkimg ls | wc -l)" = 1 ] || fail "devices are left: $(ublkimg ls)"
fault_row '`kill -9` during START_DEV' 'the command fails or a new server ends it; nothing hangs' "$slowest_ms"
say "no reads at the start of a device; ten servers killed at moments of one left nothing"
finish
