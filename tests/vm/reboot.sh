#!/bin/bash
# Boots a Debian system with its own kernel and systemd from a virtio disk in an emulated machine, with the package installed: images
# get there, it reboots without their registry, and the units bring them back. What happens in it is in reboot/. Needs root,
# debootstrap and an archive; ten minutes where processors are emulated, and a few more for the first time.
#   reboot.sh VM-DIR PACKAGE BIN-DIR     VM-DIR keeps the system and the kernels
set -euo pipefail
here=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")" && pwd -P)
. "$here/apt-private.sh"
skip() { echo "SKIP reboot: $*"; exit 0; }
(($# == 3)) || die "usage: reboot.sh VM-DIR PACKAGE BIN-DIR"
vm=$(realpath -m -- "$1") package=$(realpath -- "$2") bin=$(realpath -- "$3")
dir=$vm/debian kernels=${VM_CACHE:-$vm/kernels}
((EUID == 0)) || skip "needs root"
for c in qemu-system-x86_64 debootstrap mkfs.ext4 unshare busybox; do command -v "$c" >/dev/null || skip "no $c here: run 'make deps'"; done
# All mounts below are in a mount namespace of this script's own: they end with it, however it ends.
[[ -n ${REBOOT_INSIDE:-} ]] || exec env REBOOT_INSIDE=1 unshare --mount --propagation private "$0" "$@"

mkdir -p "$dir"
"$here/fetch-kernels.sh" "$kernels" 6.12 >"$dir/log" 2>&1 || skip "$(tail -n 1 "$dir/log")"
"$here/images.sh" "$vm" "$dir/images" "$bin" >"$dir/log" 2>&1 || die "$(tail -n 1 "$dir/log")"

# The system without what is tested: Debian's release with kernel 6.12.
make_base() {
  export DEMO_SUITE=trixie DEMO_MIRROR=${DEMO_MIRROR:-$(debian_mirror)}
  . "$here/../demo/debian.sh"
  mount --bind "$base" "$root"
  enter_root
  step "systemd and a kernel"
  quietly "${inside[@]}" "${apt[@]}" install -y --no-install-recommends systemd-sysv udev kmod linux-image-cloud-amd64 initramfs-tools runc
  leave_root
  clean "$root"
  cp "$root"/boot/vmlinuz-* "$dir/vmlinuz"
  cp "$root"/boot/initrd.img-* "$dir/initrd"
  rm -r "$root"/boot/* "$root/usr/share/doc" "$root/usr/share/locale"
  tar -C "$root" --xattrs -cf "$dir/base.tar.new" .
  umount "$root" "$work"
  mv "$dir/base.tar.new" "$dir/base.tar"
}
[[ -e $dir/base.tar ]] || make_base

quietly() { "$@" >"$dir/log" 2>&1 </dev/null || { tail -n 20 "$dir/log" >&2; die "failed: $*"; }; }
root=$(mktemp -d)
mount -t tmpfs -o size=3g,mode=755 root "$root"
trap 'rmdir "$root" 2>/dev/null || true' EXIT
tar -C "$root" --xattrs -xpf "$dir/base.tar"
mkdir "$root/test"
cp "$package" "$root/test/package.deb"
inside=(env -i PATH=/usr/sbin:/usr/bin:/sbin:/bin chroot "$root")
quietly "${inside[@]}" dpkg -i /test/package.deb
cp -r "$dir/images" "$root/test/images"
"$here/../tutorial.sh" "$root/test/tutorial"
cp "$here"/reboot/*.sh "$root/test/"
for program in test-registry list-tree steady-reader; do strip -o "$root/test/$program" "$bin/$program"; done
cp "$here"/reboot/units/*.service "$root/etc/systemd/system/"
quietly "${inside[@]}" systemctl enable first-boot second-boot
quietly "${inside[@]}" systemctl mask apt-daily.timer apt-daily-upgrade.timer
echo reboot-test >"$root/etc/hostname"
: >"$root/etc/machine-id"
rm -f "$dir/disk"
truncate -s 3G "$dir/disk"
quietly mkfs.ext4 -q -F -d "$root" "$dir/disk"
umount "$root"
"$here/run-qemu.sh" --kernel 6.12 --cache "$kernels" --disk "$dir" --mem 1G --timeout 1500
rm "$dir/disk"
echo "reboot: Debian with the package, rebooted without the registry of its images: $SECONDS s"
