#!/bin/bash
# Runs a script on a User-Mode-Linux kernel (an ordinary process) that has ublk, EROFS and io_uring.
set -euo pipefail
here=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")" && pwd -P)
usage() {
  cat <<'U'
usage: run-uml.sh SCRIPT [--timeout S] [--mem 2G] [--cpus 1] [--out DIR] [-- ARG...]
  SCRIPT     run as root in the guest, in the directory from which run-uml.sh was called; executed if it is executable, else by bash
  --out DIR  /mnt/out of the guest: the only place where the guest writes to the host
  In the guest: / is the host's / read-only; /tmp, /run, /mnt and /dev/shm are empty and writable, save that the entry of
  /tmp (/run, /mnt) with the script or the working directory stays visible; the host's whole tree is also at /mnt/host.
  Exit code: the script's; 124 after the timeout (default 300 s); 125 if the guest could not run it.
  Kernel: $UML_KERNEL, else target/vm/linux-uml (make uml-kernel), else ../shared/vm/linux-uml beside the checkout.
          --find-kernel prints the one that would be used, and ends.
U
}
die() { echo "run-uml.sh: $*" >&2; exit 125; }

find_kernel() {
  local root=$here/../.. candidate
  if [[ -n ${UML_KERNEL:-} ]]; then
    [[ -x $UML_KERNEL ]] || die "UML_KERNEL=$UML_KERNEL is not a program"
    echo "$UML_KERNEL"
    return
  fi
  for candidate in "$root/target/vm/linux-uml" "$root/../shared/vm/linux-uml"; do
    [[ ! -x $candidate ]] || { realpath -- "$candidate"; return; }
  done
  die "no UML kernel: run 'make uml-kernel' once (about 8 minutes on two cores), or set UML_KERNEL"
}

script= timeout=300 mem=2G cpus=1 out= args=()
while (($#)); do
  case $1 in
  --timeout | --mem | --cpus | --out)
    (($# >= 2)) || die "$1 needs a value"
    printf -v "${1#--}" %s "$2"; shift 2 ;;
  --) shift; args=("$@"); break ;;
  --find-kernel) find_kernel; exit ;;
  -h | --help) usage; exit 0 ;;
  -*) usage >&2; die "unknown option $1" ;;
  *) [[ -z $script ]] || die "one SCRIPT only; its arguments go after --"; script=$1; shift ;;
  esac
done
[[ -n $script ]] || { usage >&2; exit 125; }
[[ -f $script ]] || die "no such script: $script"
script=$(realpath -- "$script")
[[ $timeout =~ ^[0-9]+$ && $cpus =~ ^[1-4]$ ]] || die "--timeout wants seconds, --cpus 1 to 4"
bytes=$(numfmt --from=iec -- "${mem^^}" 2>/dev/null) || die "--mem wants a size such as 512M or 2G"
kernel=$(find_kernel)
[[ $(uname -m) == x86_64 ]] || die "the kernel is for x86_64"
for c in mount:util-linux ip:iproute2 stty:coreutils perl:perl-base; do
  command -v "${c%:*}" >/dev/null || die "missing package ${c#*:} (the guest uses the host's ${c%:*})"
done

job=$(mktemp -d)
pid=
cleanup() {
  trap - INT TERM HUP
  [[ -z $pid ]] || { kill "$pid" 2>/dev/null && wait "$pid" 2>/dev/null; } || true
  rm -rf "$job"
}
trap cleanup EXIT
trap 'exit 130' INT
trap 'exit 143' TERM HUP
if [[ -n $out ]]; then mkdir -p "$out"; out=$(realpath -- "$out"); else out=$job/out; mkdir "$out"; fi
rm -f "$out/exit-code"
printf '%s\0' "$PWD" "$out" "$script" "${args[@]}" >"$job/job"

# The guest's memory is an unlinked sparse file, in TMPDIR or /dev/shm; a container's /dev/shm is often too small for it.
if [[ -z ${TMPDIR:-} ]] && (($(df --output=avail -B1 /dev/shm 2>/dev/null | tail -n 1 || echo 0) < bytes)); then
  export TMPDIR=/tmp
fi
# A guest with one processor is kept on one of the host's: its kernel and its programs are processes that take turns, and across
# processors each turn costs a wake-up, which makes a read ten times as slow and no two alike.
pinned=()
((cpus > 1)) || pinned=(taskset -c "$(taskset -cp $$ | grep -oE '[0-9]+$')")
"${pinned[@]}" timeout --kill-after=5 "$timeout" "$kernel" mem="$mem" ncpus="$cpus" seccomp=auto \
  rootfstype=hostfs rootflags=/ ro "init=\"$here/guest-init.sh\"" "uml_job=\"$job\"" \
  uml_dir="$job/" umid=uml con0=fd:0,fd:1 con=null quiet loglevel=0 </dev/null &
pid=$!
rc=0
wait "$pid" || rc=$?
pid=
code=$(cat "$out/exit-code" 2>/dev/null || true)
if [[ $code =~ ^[0-9]+$ ]]; then exit "$code"; fi
if ((rc == 124 || rc == 137)); then
  echo "run-uml.sh: timed out after $timeout s" >&2
  exit 124
fi
die "the guest ended without running the script to its end (kernel exit $rc)"
