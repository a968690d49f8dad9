# shellcheck shell=bash
# Sourced by the scripts that run in the Debian guest of tests/vm/reboot.sh. /test has the lanes' programs and images; $KEPT lasts over
# the reboot.
set -euo pipefail
KEPT=/var/lib/reboot-test
REG=127.0.0.1:5000
WORK=$(mktemp -d)
mkdir -p "$KEPT"

say() { echo "$(basename "$0"): $(cut -d. -f1 /proc/uptime) s: $*"; }
fail() {
  say "FAILED: $*"
  journalctl -b --no-pager -o short-monotonic -p info -n 80 | cut -c1-240
  exit 1
}
trap 'say "line $LINENO: $BASH_COMMAND ended with $?"' ERR
# ended CODE : the line that the runner of this machine waits for
ended() {
  echo "$(grep -o 'marker=[^ ]*' /proc/cmdline | cut -d= -f2) $1"
  systemctl poweroff -ff
}

# same_tree DIR TAG : the whole tree below DIR is the image's, as the device gives it now and not the page cache
same_tree() {
  echo 3 >/proc/sys/vm/drop_caches
  /test/list-tree "$1" >"$WORK/listed" || fail "the tree of $2 cannot be read"
  cmp -s "$WORK/listed" "/test/images/$2.list" || { diff "/test/images/$2.list" "$WORK/listed" | head || true; fail "the tree of $2 differs"; }
}

registry_answers() { (exec 3<>"/dev/tcp/${REG/://}") 2>/dev/null; }
active() { systemctl is-active -q "$@" || fail "not active: $(systemctl is-active "$@" | paste -sd' ') of $*"; }
main_pid() { systemctl show -P MainPID ublkimg.service; }
# servers : processes of the unit beside the guard
servers() { grep -vx "$(main_pid)" "/sys/fs/cgroup/system.slice/ublkimg.service/cgroup.procs" || true; }
# mounts : the images that are mounted; a mount that is made again has another number
mounts() { findmnt -rn -t erofs -o ID,SOURCE,TARGET; }
device_of() { findmnt -no SOURCE "$1"; }

# A reader of the device of weights, which compares all that it reads, from `reader` until `no_error`.
reader() {
  local device
  device=$(device_of /mnt/weights)
  cat "$device" >"$WORK/reference"
  rm -f "$WORK/over"
  /test/steady-reader "$device" "$WORK/reference" "$WORK/over" >"$WORK/steady" 2>&1 &
  reader=$!
}
no_error() {
  touch "$WORK/over"
  wait $reader || fail "a reader over $*: $(cat "$WORK/steady")"
  say "$*: $(cat "$WORK/steady")"
}
# another_server BEFORE : waits until devices are served by other processes than those
another_server() {
  for _ in $(seq 300); do
    [[ -z $(servers) || $(servers) == "$1" ]] || ! ublkimg ls >/dev/null 2>&1 || return 0
    sleep 0.2
  done
  fail "no other server than $1"
}
# disturb : what happens to a daemon under systemd, while a reader reads
disturb() {
  local before guard mounted
  mounted=$(mounts)
  reader
  before=$(servers)
  systemctl reload ublkimg || fail "systemctl reload ended with $?"
  another_server "$before"
  no_error "systemctl reload, a takeover"

  reader
  before=$(servers) guard=$(main_pid)
  systemctl restart ublkimg || fail "systemctl restart ended with $?"
  another_server "$before"
  [[ $(main_pid) != "$guard" ]] || fail "a restart left the old guard"
  no_error "systemctl restart"

  reader
  before=$(servers)
  # shellcheck disable=SC2086 # process ids are words
  kill -9 $before
  another_server "$before"
  no_error "kill -9 of the server"

  reader
  before=$(servers) guard=$(main_pid)
  # shellcheck disable=SC2086
  kill -9 $guard $before
  for _ in $(seq 300); do
    [[ $(main_pid) == "$guard" || $(main_pid) == 0 ]] || break
    sleep 0.2
  done
  another_server "$before"
  active ublkimg.service
  no_error "kill -9 of guard and server"
  [[ $(mounts) == "$mounted" ]] || fail "the mounts were $mounted, and are now $(mounts)"
}
