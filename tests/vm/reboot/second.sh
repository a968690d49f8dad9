#!/bin/bash
# The second boot: no registry. The units bring the images back, and what uses them is started after.
. /test/guest.sh
trap 'ended $?' EXIT
! cmp -s "$KEPT/first-boot" /proc/sys/kernel/random/boot_id || fail "there was no reboot"
state=$(systemctl is-system-running --wait) || true
[[ $state == running ]] || { systemctl --failed --no-pager --no-legend; fail "the system is $state"; }
say "booted: $state"
! registry_answers || fail "something answers at $REG"
active ublkimg.service ublkimg@weights.service mnt-two.mount uses-weights.service uses-two.service
[[ $(device_of /mnt/weights) == /dev/ublkb* && $(device_of /mnt/two) == /dev/ublkb* ]] || fail "$(findmnt -t erofs)"
same_tree /mnt/weights one
same_tree /mnt/two two
! journalctl -b -u ublkimg.service | grep -iE 'not permitted|permission denied|EPERM' || fail "the sandbox forbids what the daemon wants"

disturb
same_tree /mnt/two two

say "stop, and removal of the package"
! dpkg -P ublkimg >"$WORK/purge" 2>&1 || fail "the package was removed under a device that is mounted"
systemctl stop ublkimg@weights || fail "stop ublkimg@weights ended with $?"
umount /mnt/two
ublkimg rm sample-two || fail "rm ended with $?"
dpkg -P ublkimg >"$WORK/purge" 2>&1 || fail "purge: $(cat "$WORK/purge")"
for left in /usr/bin/ublkimg /etc/ublkimg /var/lib/ublkimg /run/ublkimg /dev/ublkb*; do [[ ! -e $left ]] || fail "$left is left"; done
! grep -lx ublkimg /proc/[0-9]*/comm || fail "processes are left"
! systemctl list-units --plain --no-legend 'ublkimg*' | grep . || fail "units are left"
