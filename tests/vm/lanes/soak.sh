#!/bin/sh
# soak.sh BIN IMAGES TAG [SECONDS] : for so long (30) everything at once: one device is read and compared all the time,
# another image comes and goes, the store is emptied, the registry fails in seven ways, and a server is killed every minute (or
# three times in all) amid an outage. Readers see no error; memory and descriptors grow neither in a server's life nor in the
# guard's; nothing is left.
. "$(dirname "$0")/guest.sh"
. "$(dirname "$0")/load.sh"
seconds=${4:-30}
life_s=$((seconds / 3))
[ $life_s -le 60 ] || life_s=60
# Limits for a daemon with two small images, many times what it has after it was started; and what it may have more at the end of
# its life than before. It has more or less by so much in any case, with the fetches that are under way.
rss_kb_max=150000 files_max=150
rss_kb_growth_max=8000 files_growth_max=15
guard_kb_growth_max=1000 guard_files_growth_max=2
# A server of ten seconds has hardly warmed up: only a gross leak shows there.
[ $life_s -ge 30 ] || rss_kb_growth_max=30000 files_growth_max=40

# sample PID FILE : what a process has: memory in KB, descriptors; by the shell alone, so that it costs nothing
sample() {
  pages=0
  { read -r _ pages _ <"/proc/$1/statm"; } 2>/dev/null || true
  set -- "$2" "/proc/$1/fd"/*
  [ "$pages" = 0 ] || echo "$((pages * 4)) $(($# - 1))" >>"$1"
}
# samples : of the server, a file for each life, and of the guard, until the end
samples() {
  while [ ! -e "$WORK/over" ]; do
    sample "$(server)" "$WORK/life$(cat "$WORK/lives")"
    sample "$guard" "$WORK/guard"
    sleep 0.3
  done
}
# growth FILE : the samples, and the growth of both from the second third to the last, between the lowest of each; the first
# third is the time to warm up
growth() {
  awk '{ kb[NR] = $1; files[NR] = $2 }
    function lowest(of, from, to,   i, low) { low = of[from]; for (i = from; i <= to; i++) if (of[i] < low) low = of[i]; return low }
    END { t = int(NR / 3); if (t == 0) { print NR, 0, 0; exit }
      print NR, lowest(kb, 2 * t + 1, NR) - lowest(kb, t + 1, 2 * t), lowest(files, 2 * t + 1, NR) - lowest(files, t + 1, 2 * t) }' "$1"
}
# flat FILE WHO KB FILES : fails if it grew by more
flat() {
  # shellcheck disable=SC2046 # three words
  set -- "$@" $(growth "$1")
  say "$2 grew by $6 KB and $7 descriptors, in $5 samples"
  [ "$5" -ge 3 ] || fail "$2 was sampled $5 times only"
  [ "$6" -le "$3" ] && [ "$7" -le "$4" ] || { cat "$1"; fail "$2 grew"; }
}

# met : how many requests have met the outage; 0 while the registry is down, where none gets so far
met() { { control /_faults 2>/dev/null || true; } | sed -n 's/^ *"hits": \([0-9]*\).*/\1/p' | grep . || echo 0; }
# outage MS : the registry fails in the next way, for so long; what came of the one before is noted
ways=0 way=none
outage() {
  echo "$way $(met)" >>"$WORK/outages"
  ways=$((ways + 1))
  case $((ways % 7)) in
  0) way=status toxic='{"status": {"code": 503}}' ;;
  1) way=reset toxic='{"reset": {"after_bytes": 3000}}' ;;
  2) way=short_body toxic='{"short_body": {"after_bytes": 100}}' ;;
  3) way=latency toxic='{"latency": {"latency_ms": 300}}' ;;
  4) way=too_many_requests toxic='{"too_many_requests": {"retry_after_s": 1}}' ;;
  5) way=slow toxic='{"slow": {"bytes_per_s": 500000}}' ;;
  6) way=refuse toxic='"refuse"' ;;
  esac
  # One that refuses all answers to nothing meanwhile, so it has to have answered before.
  for _ in $(seq 50); do
    ! control /_faults "{\"soak\": {\"path\": \"*\", \"after_ms\": 200, \"for_ms\": $1, \"toxic\": $toxic}}" 2>/dev/null || return 0
    sleep 0.1
  done
  fail "the registry does not come back"
}

load one two
guard=$(cat "$WORK/run/guard.lock")
end=$(($(date +%s) + seconds))
lives=0 amid=0
echo 0 >"$WORK/lives"
samples &
samples_pid=$!
while [ "$(date +%s)" -lt $end ]; do
  life_end=$(($(date +%s) + life_s))
  while [ "$(date +%s)" -lt $((life_end - 2)) ]; do
    outage $((300 + $(below 900)))
    sleep 1.4
  done
  # One that outlasts the server. What it has is taken away, so that its readers need the registry.
  outage 2500
  sleep 0.5
  ublkimg cache gc --cache-limit 0 >/dev/null 2>&1 || true
  before=$(met)
  # shellcheck disable=SC2046 # one word
  hit $(server) && lives=$((lives + 1)) && echo $lives >"$WORK/lives"
  sleep 1
  [ "$(met)" -le "$before" ] || amid=$((amid + 1))
done
outage 1
over $((seconds / life_s / 2))
wait $samples_pid
say "outages, and requests that met them: $(awk 'NR > 1 { n[$1]++; hits[$1] += $2 } END { for (way in n) printf "%s %d %s; ", way, n[way], way == "refuse" ? "(not counted)" : hits[way] }' "$WORK/outages")after a kill in $amid of $lives"
awk 'NR > 1 { n[$1]++; hits[$1] += $2 } END { for (way in n) if (n[way] > 2 && hits[way] == 0 && way != "refuse") exit 1 }' "$WORK/outages" ||
  fail "a way to fail met no request"
[ $amid -gt 0 ] || fail "no request of a new server met an outage that its predecessor had"
cat "$WORK"/life* | awk -v kb=$rss_kb_max -v files=$files_max '$1 > kb || $2 > files { print; bad = 1 } END { exit bad }' || fail "too much memory, or too many descriptors"
for life in $(seq 0 $((lives - 1))); do flat "$WORK/life$life" "server $life" $rss_kb_growth_max $files_growth_max; done
flat "$WORK/guard" "the guard" $guard_kb_growth_max $guard_files_growth_max
gone one two
