#!/bin/bash
# Runs a script on a stock Debian kernel in an emulated machine that holds nothing but busybox and what is added, or a system on a disk.
set -euo pipefail
here=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")" && pwd -P)
usage() {
  cat <<'U'
usage: run-qemu.sh --kernel 6.12|7.2 --cache DIR --init SCRIPT [--add HOSTPATH:GUESTPATH]... [--timeout S] [--mem 1G]
                   [--accel auto|kvm|tcg]
       run-qemu.sh --kernel 6.12|7.2 --cache DIR --disk DIR [--timeout S] [--mem 1G] [--accel auto|kvm|tcg]
  --cache DIR   filled by fetch-kernels.sh
  --init SCRIPT run as root by busybox sh, after the modules are loaded and /proc, /sys, /dev, cgroup2, /run, /tmp, /mnt are mounted
  --add         puts a file or directory into the guest, below its root; programs must be static, the guest has no libraries
  --disk DIR    boots DIR/vmlinuz with DIR/initrd and the root file system DIR/disk (/dev/vda) instead; what is written to the disk lasts
                until the end, through reboots too. It ends by a line "MARKER CODE" on the console, MARKER being on its command line
  --accel       auto (default) takes KVM only where it has really booted this kernel since the host's last boot, else TCG
  Exit code: the script's; 124 after the timeout (default 180 s); 125 if the guest could not run it.
U
}
die() { echo "run-qemu.sh: $*" >&2; exit 125; }
kernel= cache= init= disk= timeout=180 mem=1G accel=auto add=()
while (($#)); do
  case $1 in
  --kernel | --cache | --init | --disk | --timeout | --mem | --accel | --add)
    (($# >= 2)) || die "$1 needs a value"
    if [[ $1 == --add ]]; then add+=("$2"); else printf -v "${1#--}" %s "$2"; fi
    shift 2 ;;
  -h | --help) usage; exit 0 ;;
  *) usage >&2; die "unknown argument $1" ;;
  esac
done
[[ -n $kernel && -n $cache && (-n $init || -n $disk) ]] || { usage >&2; exit 125; }
if [[ -n $disk ]]; then [[ -f $disk/disk ]] || die "no disk in $disk"; else [[ -f $init ]] || die "no such script: $init"; fi
[[ $timeout =~ ^[0-9]+$ ]] || die "--timeout wants seconds"
vm=$cache/$kernel
[[ -e $vm/vmlinuz ]] || die "no kernel $kernel in $cache: run fetch-kernels.sh $cache $kernel"
for c in qemu-system-x86_64:qemu-system-x86 cpio:cpio busybox:busybox-static; do
  command -v "${c%:*}" >/dev/null || die "missing package: run apt-get install -y --no-install-recommends ${c#*:}"
done
dynamic() { head -c 4096 -- "$1" | grep -qaF /ld-linux; } # has a program interpreter
busybox=$(command -v busybox)
! dynamic "$busybox" || die "$busybox is not static: run apt-get install -y --no-install-recommends busybox-static"

# /dev/kvm may be there and unable to run a guest (a nested machine), so the choice is made by a boot and kept in the cache.
if [[ $accel == auto ]]; then
  boot_id=$(cat /proc/sys/kernel/random/boot_id)
  read -r seen accel 2>/dev/null <"$vm/accel" || true
  if [[ ${seen:-} != "$boot_id" || -z $accel ]]; then
    accel=tcg
    if [[ -w /dev/kvm ]]; then
      nothing=$(mktemp)
      if "${BASH_SOURCE[0]}" --kernel "$kernel" --cache "$cache" --init "$nothing" --accel kvm --timeout 15 >/dev/null 2>&1; then
        accel=kvm
      fi
      rm -f "$nothing"
    fi
    echo "$boot_id $accel" >"$vm/accel"
  fi
fi
# Without ",-cx16" an emulated guest kernel once took a double fault in cmpxchg16b.
case $accel in
kvm) machine=(-accel kvm -cpu host) ;;
tcg) machine=(-accel tcg -cpu max,-cx16) ;;
*) die "--accel is auto, kvm or tcg" ;;
esac

work=$(mktemp -d)
pid=
cleanup() {
  trap - INT TERM HUP
  [[ -z $pid ]] || { kill "$pid" 2>/dev/null && wait "$pid" 2>/dev/null; } || true
  rm -rf "$work"
}
trap cleanup EXIT
trap 'exit 130' INT
trap 'exit 143' TERM HUP

# initramfs FILE : busybox, the modules, the script and what is added
initramfs() {
  local root=$work/root a from to
  mkdir -p "$root"/{bin,sbin,usr/bin,usr/sbin,dev,etc,proc,sys,run,tmp,mnt,root,lib/modules}
  cp "$busybox" "$root/bin/busybox"
  cp "$vm"/modules/* "$root/lib/modules/"
  cp "$here/guest-init-busybox.sh" "$root/init"
  cp "$init" "$root/script"
  chmod 755 "$root/init" "$root/script"
  for a in "${add[@]}"; do
    from=${a%:*} to=${a##*:}
    [[ $a == *:/* ]] || die "--add wants HOSTPATH:/GUESTPATH, not $a"
    [[ -e $from ]] || die "no such file: $from"
    mkdir -p "$root$(dirname -- "$to")"
    cp -rL --preserve=mode,timestamps -- "$from" "$root$to"
    if [[ -f $from && -x $from ]] && dynamic "$from"; then
      echo "run-qemu.sh: warning: $from is dynamically linked and will not start in the guest" >&2
    fi
  done
  (cd "$root" && find . | cpio -o -H newc -R 0:0 --quiet) >"$1"
}
marker="guest-exit-$RANDOM$RANDOM"
words="console=ttyS0 quiet loglevel=1 mitigations=off nokaslr marker=$marker"
if [[ -n $disk ]]; then
  system=(-kernel "$disk/vmlinuz" -initrd "$disk/initrd" -drive "file=$disk/disk,format=raw,if=virtio,snapshot=on")
  words+=' root=/dev/vda rw systemd.show_status=no systemd.getty_auto=no'
else
  initramfs "$work/initramfs"
  system=(-kernel "$vm/vmlinuz" -initrd "$work/initramfs" -no-reboot)
  words+=' panic=-1'
fi
mkfifo "$work/serial"
# More than one processor makes wake-ups 50 times slower under TCG.
timeout --kill-after=5 "$timeout" qemu-system-x86_64 -machine q35 "${machine[@]}" -smp 1 -m "$mem" \
  -nodefaults -no-user-config -display none -serial stdio -monitor none "${system[@]}" -append "$words" </dev/null >"$work/serial" &
pid=$!
code=
while IFS= read -r line || [[ -n $line ]]; do
  line=${line%$'\r'}
  if [[ $line == *"$marker "* ]]; then
    code=${line##*"$marker "}
    printf %s "${line%%"$marker "*}"
    break
  fi
  printf '%s\n' "$line"
done <"$work/serial"
if [[ $code =~ ^[0-9]+$ ]]; then
  for ((i = 0; i < 30; i++)); do # the guest is powering off
    kill -0 "$pid" 2>/dev/null || break
    sleep 0.1
  done
  exit "$code"
fi
rc=0
wait "$pid" || rc=$?
pid=
if ((rc == 124 || rc == 137)); then
  echo "run-qemu.sh: timed out after $timeout s" >&2
  exit 124
fi
die "the guest ended without running the script to its end (QEMU exit $rc)"
