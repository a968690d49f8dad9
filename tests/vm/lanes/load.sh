# shellcheck shell=dash
# Sourced by the lanes that kill and break things under load, after guest.sh: what goes on meanwhile, and how it ends.
# $WORK/over ends it. What it did is counted, and a load that did nothing is a failure: it would have shown nothing.

# below N : a random number below N
below() { echo $(($(od -An -N4 -tu4 /dev/urandom) % $1)); }
# pause MS : sleeps for a random time of up to MS
pause() { sleep "$(below "$1" | awk '{ printf "%.3f", $1 / 1000 }')"; }
server() { daemons --server; }

# hit [PID...] : kills them with -9, and counts it; false if there was nobody
kills=0
hit() {
  [ $# -gt 0 ] && kill -9 "$@" 2>/dev/null || return 1
  kills=$((kills + 1))
}

# fault WHAT : what a reader saw, and when, in the words of the logs
fault() { echo "$(date -u +%FT%TZ) $*" >>"$WORK/faults"; }

# steady TAG : attaches TAG, checks its whole tree, and reads its device until the end
steady() {
  attach "$1"
  same_tree "$WORK/$1" "$1"
  cat "$DEV" >"$WORK/reference"
  "$BIN/steady-reader" "$DEV" "$WORK/reference" "$WORK/over" >"$WORK/steady" 2>"$WORK/steady.errors" &
  steady_pid=$!
}

# failed DOING SINCE-MS : a command failed, since its daemon was killed: how long it took to
failed() { echo $(($(now_ms) - $2)) >>"$WORK/failed.$1"; }
# failures DOING... : how many did; longest_failure DOING... : how long the longest took
failures() { for doing; do cat "$WORK/failed.$doing" 2>/dev/null || true; done | wc -l; }
longest_failure() { for doing; do cat "$WORK/failed.$doing" 2>/dev/null || true; done | sort -n | tail -n 1; }

# comings TAG : adds, compares and removes TAG again and again. $WORK/doing says what it is at. A command whose daemon is killed
# fails and is given again.
comings() {
  rounds=0
  while [ ! -e "$WORK/over" ]; do
    echo adding >"$WORK/doing"
    began=$(now_ms)
    if ublkimg add "$REG/sample:$1" --name "$1" --mount "$WORK/$1" --transport ublk >/dev/null 2>"$WORK/add.error"; then
      echo reading >"$WORK/doing"
      "$BIN/list-tree" "$WORK/$1" >"$WORK/$1.listed" 2>"$WORK/$1.errors" || fault "a reader of $1 failed: $(cat "$WORK/$1.errors")"
      cmp -s "$WORK/$1.listed" "$IMAGES/$1.list" || fault "the tree of $1 differs"
      rounds=$((rounds + 1))
    else
      failed adding "$began"
    fi
    echo removing >"$WORK/doing"
    for attempt in 1 2 3 4 5; do
      began=$(now_ms) rc=0
      ublkimg rm "$1" >/dev/null 2>"$WORK/rm.error" || rc=$?
      # 3: it is not there
      case $rc in 0 | 3) break ;; esac
      failed removing "$began"
      [ $attempt -lt 5 ] || fault "$1 cannot be removed: $(cat "$WORK/rm.error")"
    done
  done
  echo "$rounds" >"$WORK/rounds"
}

# amid_attach TAG : waits, not for ever, until the server is at attaching TAG, and makes that last a little
amid_attach() {
  faults "{\"attach\": {\"path\": \"*/manifests/$1\", \"times\": 1, \"toxic\": {\"latency\": {\"latency_ms\": 1000}}}}"
  for _ in $(seq 40); do
    ! control /_faults | grep -q '"hits": 1' || return 0
    sleep 0.05
  done
}
# amid_removal : waits, not for ever, until the image that comes and goes is being removed
amid_removal() {
  for _ in $(seq 100); do
    { read -r doing <"$WORK/doing"; } 2>/dev/null || doing=
    [ "$doing" != removing ] || return 0
    sleep 0.01
  done
}

# evictions : empties the store again and again, so that reads have to fetch. What it keeps whole is made to look as old as after
# hours: until then none of that goes.
evictions() {
  evicted=0
  while [ ! -e "$WORK/over" ]; do
    find "$WORK/store/objects" "$WORK/store/metadata" -type f -exec touch -d '2020-01-01 00:00' {} + 2>/dev/null || true
    ! ublkimg cache gc --cache-limit 0 >/dev/null 2>&1 || evicted=$((evicted + 1))
    pause 1500
  done
  echo "$evicted" >"$WORK/evicted"
}

# load STEADY COMING : begins all of it, with these two images
load() {
  registry "$1" "$2"
  steady "$1"
  sent_before=$(stat_of bytes_sent)
  comings "$2" &
  comings_pid=$!
  evictions &
  evictions_pid=$!
}

# over KILLS : ends the load, and checks what the readers saw; and that there was something to see, at least so many kills
over() {
  touch "$WORK/over"
  wait "$steady_pid" || {
    cat "$WORK/steady" "$WORK/steady.errors"
    fail "the steady reader ended with an error"
  }
  wait "$comings_pid" "$evictions_pid"
  [ ! -e "$WORK/faults" ] || { cat "$WORK/faults"; fail "a reader saw a fault"; }
  rounds=$(cat "$WORK/rounds") evicted=$(cat "$WORK/evicted") taken_back=$(cat "$WORK"/run/*.log | grep -c 'taken back') || true
  fetched_kb=$((($(stat_of bytes_sent) - sent_before) / 1024))
  say "$(cat "$WORK/steady")"
  say "$kills kills; devices taken back $taken_back times; another image added, read whole and removed $rounds times, with \
$(failures adding) adds and $(failures removing) removals that failed; the store emptied $evicted times, $fetched_kb KiB fetched"
  [ "$kills" -ge "$1" ] || fail "$kills kills of at least $1"
  [ "$taken_back" -ge "$1" ] || fail "devices were taken back $taken_back times, after $kills kills"
  [ "$rounds" -gt 0 ] || fail "no other image came and went: $(cat "$WORK/add.error")"
  [ "$evicted" -gt 0 ] || fail "the store was never emptied"
  [ "$fetched_kb" -gt 10000 ] || fail "the readers had only $fetched_kb KiB fetched"
}

# gone TAG... : removes what is there, and looks for what is left
gone() {
  for tag; do ublkimg rm "$tag" >/dev/null 2>&1 || ublkimg rm "$tag" >/dev/null 2>&1 || true; done
  [ "$(ublkimg ls | wc -l)" = 1 ] || fail "devices are left: $(ublkimg ls)"
  ! ls -A "$WORK/store/devices/" | grep . || fail "records are left"
  finish
}
