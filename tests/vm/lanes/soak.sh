#!/bin/sh
# soak.sh BIN IMAGES TAG [SECONDS] : for so long (30) everything at once: one device is read and compared all the time,
# another image comes and goes, the store is emptied, the registry fails in many ways, the daemon is killed now and then.
# Readers see no error; memory and descriptors of the daemon stay within bounds; nothing is left.
. "$(dirname "$0")/guest.sh"
. "$(dirname "$0")/load.sh"
seconds=${4:-30}
# Limits for a daemon with two small images, many times what it has after it was started.
rss_kb_max=150000 files_max=150
load one two
end=$(($(date +%s) + seconds))
rss_kb=0 files=0 outages=0 kills=0
while [ "$(date +%s)" -lt $end ]; do
  for fault in '"status": {"code": 503}' '"reset": {"after_bytes": 3000}' '"short_body": {"after_bytes": 100}' '"latency": {"latency_ms": 300}' \
    '"too_many_requests": {"retry_after_s": 1}' '"slow": {"bytes_per_s": 500000}'; do
    faults "{\"soak\": {\"path\": \"*\", \"for_ms\": $(below 1200), \"toxic\": {$fault}}}"
    outages=$((outages + 1))
    sleep 1.5
    pid=$(server)
    [ -z "$pid" ] || {
      now_kb=$(sed -n 's/^VmRSS:[^0-9]*\([0-9]*\).*/\1/p' "/proc/$pid/status" 2>/dev/null) || now_kb=0
      now_files=$(ls "/proc/$pid/fd" 2>/dev/null | wc -l)
      [ "${now_kb:-0}" -le $rss_kb ] || rss_kb=$now_kb
      [ "$now_files" -le $files ] || files=$now_files
    }
  done
  faults '{"soak": {"after_ms": 200, "for_ms": 700, "toxic": "refuse"}}'
  sleep 1.2
  pid=$(server)
  [ -z "$pid" ] || { kill -9 "$pid" 2>/dev/null && kills=$((kills + 1)); }
done
over
say "$outages outages, $kills kills; at most $rss_kb KB of memory and $files descriptors"
[ "$rss_kb" -lt $rss_kb_max ] || fail "$rss_kb KB of memory"
[ "$files" -lt $files_max ] || fail "$files descriptors"
gone one two
