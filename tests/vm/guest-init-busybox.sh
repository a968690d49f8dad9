#!/bin/busybox sh
# The first process of a guest started by run-qemu.sh.
# shellcheck shell=dash
/bin/busybox --install -s /bin
export PATH=/bin:/sbin:/usr/bin:/usr/sbin HOME=/root TERM=dumb
mount -t proc proc /proc
mount -t sysfs sys /sys
mount -t devtmpfs dev /dev
exec </dev/null >/dev/console 2>&1
ln -s /proc/self/fd /dev/fd; ln -s fd/0 /dev/stdin; ln -s fd/1 /dev/stdout; ln -s fd/2 /dev/stderr
mount -t cgroup2 cgroup2 /sys/fs/cgroup
mount -t tmpfs -o mode=755 run /run
mount -t tmpfs -o mode=1777 tmp /tmp
mount -t tmpfs -o mode=755 mnt /mnt
ip link set lo up
while read -r m; do insmod "/lib/modules/$m" || echo "guest-init: cannot load $m"; done </lib/modules/order
marker=$(sed -n 's/.*marker=\([^ ]*\).*/\1/p' /proc/cmdline)
cd /root
sh /script
echo "$marker $?"
poweroff -n -f
