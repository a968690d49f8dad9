# shellcheck shell=dash
# Sourced by the lanes that kill and break things under load, after guest.sh: what goes on meanwhile, and how it ends.
# $WORK/over ends it.

# below N : a random number below N
below() { echo $(($(od -An -N4 -tu4 /dev/urandom) % $1)); }
# pause MS : sleeps for a random time of up to MS
pause() { sleep "$(below "$1" | awk '{ printf "%.3f", $1 / 1000 }')"; }
server() { daemons --server; }

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

# comings TAG : adds, compares and removes TAG again and again. A command whose daemon is killed fails and is given again.
comings() {
  rounds=0
  while [ ! -e "$WORK/over" ]; do
    add_began=$(now_ms)
    if ublkimg add "$REG/sample:$1" --name "$1" --mount "$WORK/$1" --transport ublk >/dev/null 2>"$WORK/add.error"; then
      "$BIN/list-tree" "$WORK/$1" >"$WORK/$1.listed" 2>"$WORK/$1.errors" || fault "a reader of $1 failed: $(cat "$WORK/$1.errors")"
      cmp -s "$WORK/$1.listed" "$IMAGES/$1.list" || fault "the tree of $1 differs"
      rounds=$((rounds + 1))
    else
      # how long the last one took to fail
      echo $(($(now_ms) - add_began)) >"$WORK/failed_ms"
    fi
    ublkimg rm "$1" >/dev/null 2>&1 || true
  done
  echo "$rounds" >"$WORK/rounds"
}

# evictions : empties the store again and again, so that reads have to fetch. What it keeps whole is made to look as old as after
# hours: until then none of that goes.
evictions() {
  while [ ! -e "$WORK/over" ]; do
    find "$WORK/store/objects" "$WORK/store/metadata" -type f -exec touch -d '2020-01-01 00:00' {} + 2>/dev/null || true
    ublkimg cache gc --cache-limit 0 >/dev/null 2>&1 || true
    pause 1500
  done
}

# load STEADY COMING : begins all of it, with these two images
load() {
  registry "$1" "$2"
  steady "$1"
  comings "$2" &
  comings_pid=$!
  evictions &
  evictions_pid=$!
}

# over : ends the load, and checks what the readers saw
over() {
  touch "$WORK/over"
  wait "$steady_pid" || {
    cat "$WORK/steady" "$WORK/steady.errors"
    fail "the steady reader ended with an error"
  }
  wait "$comings_pid" "$evictions_pid"
  [ ! -e "$WORK/faults" ] || { cat "$WORK/faults"; fail "a reader saw a fault"; }
  say "$(cat "$WORK/steady")"
  say "$(cat "$WORK/rounds") times another image was added, read whole, and removed"
}

# gone TAG... : removes what is there, and looks for what is left
gone() {
  for tag; do ublkimg rm "$tag" >/dev/null 2>&1 || ublkimg rm "$tag" >/dev/null 2>&1 || true; done
  [ "$(ublkimg ls | wc -l)" = 1 ] || fail "devices are left: $(ublkimg ls)"
  ! ls "$WORK/store/devices/" 2>/dev/null | grep . || fail "records are left"
  ! find "$WORK/store" -name '*.tmp' | grep . || fail "temporary files are left"
  finish
}
