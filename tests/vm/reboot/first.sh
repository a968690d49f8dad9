#!/bin/bash
# The first boot: a host gets its images as docs/services.md says, by a file in images.d and by a line in fstab, while the registry is
# there, and is used under the unit's sandbox. Then it reboots.
. /test/guest.sh
trap 'code=$?; [[ $code == 0 ]] || ended $code' EXIT

say "the tutorial, on a kernel with ublk and without the unit"
[[ -c /dev/ublk-control ]] || fail "modules-load.d has not loaded ublk_drv"
systemctl start test-registry
for _ in $(seq 60); do ! registry_answers || break; sleep 1; done
sh /test/tutorial/run "$REG" >"$WORK/tutorial" 2>&1 || { cat "$WORK/tutorial"; fail "a line of the tutorial failed"; }
grep -q '^hello$' "$WORK/tutorial" || fail "the container said nothing"
grep -q '^full pull ' "$WORK/tutorial" || fail "compare printed no table"
grep -q '^/dev/ublkb[0-9]* /mnt/app$' "$WORK/tutorial" || fail "the tutorial did not use ublk"
rm /etc/ublkimg/images.d/app.toml

say "the unit"
active systemd-modules-load.service
systemctl enable --now ublkimg || fail "the daemon does not start"
say "$(systemd-analyze security --no-pager ublkimg.service | tail -n 1)"
for line in 'Seccomp:.2' 'NoNewPrivs:.1'; do
  grep -q "^$line" "/proc/$(main_pid)/status" || fail "the daemon has no $line"
done
ublkimg doctor

say "an image by a file in images.d"
cat >/etc/ublkimg/images.d/weights.toml <<T
reference = "$REG/sample:one"
mount = "/mnt/weights"
T
systemctl enable --now ublkimg@weights || fail "ublkimg@weights does not start"
[[ $(device_of /mnt/weights) == /dev/ublkb* ]] || fail "/mnt/weights is no ublk device: $(device_of /mnt/weights)"
same_tree /mnt/weights one

say "an image by a line in fstab"
mkdir /mnt/two
echo "$REG/sample:two /mnt/two ublkimg _netdev,nofail 0 0" >>/etc/fstab
systemctl daemon-reload
systemctl start mnt-two.mount || fail "mnt-two.mount does not start"
same_tree /mnt/two two

say "add and rm"
ublkimg add "$REG/sample:two" --name third --mount /mnt/third >/dev/null || fail "add ended with $?"
same_tree /mnt/third two
ublkimg rm third || fail "rm ended with $?"

disturb

say "filled, and the registry goes"
for device in weights /mnt/two; do ublkimg fill "$device" || fail "fill $device ended with $?"; done
systemctl stop test-registry
rm /etc/systemd/system/test-registry.service
systemctl enable uses-weights uses-two
! journalctl -b -u ublkimg.service | grep -iE 'not permitted|permission denied|EPERM' || fail "the sandbox forbids what the daemon wants"
cp /proc/sys/kernel/random/boot_id "$KEPT/first-boot"
say "reboot"
# It would complain that there is no logind to ask.
systemctl reboot 2>/dev/null
