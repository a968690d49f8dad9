#!/bin/bash
# Installs the Debian package in a clean Debian root and uses it there as docs/tutorial.md says, line by line; looks at its units,
# directories and maintainer scripts. Two minutes; needs root, debootstrap and an archive. Part of `make test-full`.
#   package.sh DIR PACKAGE BIN-DIR     DIR keeps what is downloaded; BIN-DIR has the test registry
set -euo pipefail
here=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")" && pwd -P)
die() { echo "package.sh: $*" >&2; exit 1; }
skip() { echo "SKIP package: $*"; exit 0; }
(($# == 3)) || die "usage: package.sh DIR PACKAGE BIN-DIR"
dir=$(realpath -m -- "$1") package=$(realpath -- "$2") bin=$(realpath -- "$3")
((EUID == 0)) || skip "needs root"
for c in debootstrap unshare pivot_root dpkg-deb busybox; do command -v "$c" >/dev/null || skip "no $c here: run 'make deps'"; done
[[ -e /dev/fuse && -e /dev/loop-control ]] || skip "this kernel has no FUSE or loop devices"
# All mounts below are in a mount namespace of this script's own: they end with it, however it ends.
[[ -n ${PACKAGE_INSIDE:-} ]] || exec env PACKAGE_INSIDE=1 unshare --mount --propagation private "$0" "$@"

. "$here/demo/debian.sh"
step "systemd and runc in it"
mount --bind "$base" "$root"
enter_root
quietly "${inside[@]}" "${apt[@]}" install -y --no-install-recommends systemd runc kmod
leave_root
cp "$package" "$root/ublkimg.deb"

step "the package: $(basename "$package")"
# As on a system that is being built: no systemd runs, so maintainer scripts have nobody to tell.
mount -t proc proc "$root/proc"
quietly "${inside[@]}" dpkg -i /ublkimg.deb
quietly "${inside[@]}" systemd-tmpfiles --create ublkimg.conf
[[ $(stat -c %a "$root/var/lib/ublkimg") == 700 ]] || die "systemd-tmpfiles made no /var/lib/ublkimg of 0700"
said=$("${inside[@]}" systemd-analyze verify --man=no ublkimg.service ublkimg@weights.service 2>&1 | grep ublkimg) || true
[[ -z $said ]] || die "systemd-analyze verify: $said"
grep -qx ublk_drv "$root/usr/lib/modules-load.d/ublkimg.conf" || die "modules-load.d does not name ublk_drv"
! grep -qs ublkimg "$root"/usr/lib/sysusers.d/*.conf || die "a user is made, but the program runs as root"

# What the scripts tell systemd, where it runs: a stand-in writes it down. Is the daemon active? As $1 says.
telling() {
  mkdir -p "$root/run/systemd/system" "$root/usr/local/bin"
  printf '#!/bin/sh\necho "$@" >>/told\n[ "$1" != is-active ] || exit %s\n' "$1" >"$root/usr/local/bin/systemctl"
  chmod 755 "$root/usr/local/bin/systemctl"
  : >"$root/told"
}
scripts=(env -i PATH=/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin chroot "$root")
telling 3
quietly "${scripts[@]}" dpkg -i /ublkimg.deb
grep -qx daemon-reload "$root/told" || die "an upgrade does not tell systemd to read the units again"
! grep -qE 'start|stop|reload .*ublkimg' <(grep -v is-active "$root/told" | grep -v '^daemon-reload') || die "an upgrade touches a daemon that does not run"
telling 0
quietly "${scripts[@]}" dpkg -i /ublkimg.deb
grep -qx 'reload ublkimg.service' "$root/told" || die "an upgrade has no takeover"
! grep -qE '^(stop|restart|kill)' "$root/told" || die "an upgrade stops a daemon that serves devices"

step "a registry with app:1"
"$here/tutorial.sh" "$work/tutorial"
"$bin/test-registry" --load "app:1=$work/tutorial/app" >"$work/registry.out" 2>"$work/registry.log" &
registry=$!
trap 'kill $registry 2>/dev/null || true' EXIT
for _ in $(seq 50); do address=$(grep -oE '127\.0\.0\.1:[0-9]+' "$work/registry.out" | head -n 1) && break; sleep 0.1; done
[[ -n ${address:-} ]] || die "the registry did not come up"

step "the tutorial, over the fallback transport"
cp "$work/tutorial/run" "$root/run-tutorial"
umount "$root/proc"
for place in dev proc sys; do mount --rbind "/$place" "$root/$place"; done
rm -rf "$root/run/systemd" "$root/usr/local/bin/systemctl"
mkdir -p "$root/old"
# The root of this namespace, not a chroot: runc changes its own root once more.
in_root() { unshare --mount --propagation private sh -c 'cd "$1" && pivot_root . old && umount -l /old && shift && exec env -i PATH=/usr/sbin:/usr/bin:/sbin:/bin HOME=/root UBLKIMG_TRANSPORT=fuse "$@"' sh "$root" "$@"; }
in_root sh /run-tutorial "$address" >"$work/tutorial.out" 2>&1 || { cat "$work/tutorial.out" >&2; die "a line of the tutorial failed"; }
grep -q '^hello$' "$work/tutorial.out" || die "the container said nothing"
grep -q '^full pull ' "$work/tutorial.out" || die "compare printed no table"
[[ -n $(find "$root" -xdev -maxdepth 2 -name start.html -size +0) ]] || die "there is no report"

step "mount -t ublkimg, as fstab and mount units call it"
in_root sh -ec "mkdir /mnt/llama
echo '$address/app:1-ublk /mnt/llama ublkimg noauto,_netdev,x-systemd.automount,fill=idle,io-timeout=60s 0 0' >/etc/fstab
mount /mnt/llama
grep -q hello /mnt/llama/etc/motd
ublkimg status --json /mnt/llama | grep -q '\"mode\": \"idle\"'
umount /mnt/llama; ublkimg rm app-1-ublk; ublkimg daemon --stop" || die "mount -t ublkimg"

step "removal is refused while a device is served, and leaves nothing after"
in_root sh -ec "ublkimg add $address/app:1-ublk --name kept >/dev/null
mkdir -p /run/systemd/system /usr/local/bin; ln -sf /bin/true /usr/local/bin/systemctl; export PATH=/usr/local/bin:\$PATH
! dpkg -r ublkimg >/removal 2>&1 || { echo 'a removal took the program away from under a device'; exit 1; }
ublkimg ls --json | grep -q '\"kept\"'
ublkimg rm kept; dpkg -r ublkimg >>/removal 2>&1
! test -e /usr/bin/ublkimg; ! test -e /usr/lib/systemd/system/ublkimg.service; test -e /etc/ublkimg/config.toml
dpkg -P ublkimg >>/removal 2>&1; rm /ublkimg.deb
! find / -xdev -name '*ublkimg*' ! -path '/root/*' | grep ." || { cat "$root/removal" >&2; die "removal"; }
echo "package: installed, used as the tutorial says, and removed in a clean $suite root: $((SECONDS - started)) s"
