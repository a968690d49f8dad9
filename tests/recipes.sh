#!/bin/bash
# Runs what docs/containers.md says about docker and docs/slurm.md about Slurm, with Debian's packages of both, in a clean Debian root
# and a network namespace with nothing but loopback. Three minutes; needs root, debootstrap and an archive. Part of `make test-full`.
#   recipes.sh DIR BIN-DIR     DIR keeps what is downloaded
set -euo pipefail
here=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")" && pwd -P)
die() { echo "recipes.sh: $*" >&2; exit 1; }
skip() { echo "SKIP recipes: $*"; exit 0; }
dir=$(realpath -m -- "${1:?usage: recipes.sh DIR BIN-DIR}") bin=$(realpath -- "${2:?usage: recipes.sh DIR BIN-DIR}")
((EUID == 0)) || skip "needs root"
for c in debootstrap unshare pivot_root busybox; do command -v "$c" >/dev/null || skip "no $c here: run 'make deps'"; done
[[ -e /dev/ublk-control || (-e /dev/fuse && -e /dev/loop-control) ]] || skip "this kernel serves no devices"
# All mounts below are in a mount namespace of this script's own: they end with it, however it ends.
[[ -n ${RECIPES_INSIDE:-} ]] || exec env RECIPES_INSIDE=1 unshare --mount --propagation private "$0" "$dir" "$bin"

# Debian 13: the docker of 12 hands no annotations to runtimes.
export DEMO_SUITE=${DEMO_SUITE:-trixie}
DEMO_MIRROR=${DEMO_MIRROR:-$(. "$here/vm/apt-private.sh" && debian_mirror)}
. "$here/demo/debian.sh"
mount --bind "$base" "$root"
step "docker and Slurm in it"
enter_root
quietly "${inside[@]}" "${apt[@]}" install -y --no-install-recommends docker.io docker-cli runc iproute2 bsdutils \
  slurmctld slurmd slurm-client slurm-wlm-basic-plugins munge
leave_root

step "an image of busybox"
mkdir -p "$work/app/bin" "$work/app/etc" "$root/recipes"
cp "$(command -v busybox)" "$work/app/bin/busybox"
for name in sh cat echo; do ln -s busybox "$work/app/bin/$name"; done
echo 'hello from app' >"$work/app/etc/motd"
pack "$work/app" "$work/app.tar"
"$here/demo/pack-layout.sh" --output "$root/recipes/app" "$work/app.tar"
cp "$bin/ublkimg" "$root/usr/bin/ublkimg"
cp "$bin/test-registry" "$here/../docs/slurm.md" "$here/recipes/inside.sh" "$root/recipes/"
ln -s ublkimg "$root/usr/bin/ublkimg-runc"

for place in dev proc sys; do mount --rbind "/$place" "$root/$place"; done
mkdir -p "$root/old"
# The root of this namespace, not a chroot: runc changes its own root once more. Processes that stay end with their namespace.
unshare --mount --propagation private --net --pid --fork --kill-child sh -c \
  'cd "$1" && pivot_root . old && umount -l /old && mount -t proc proc /proc && exec env -i PATH=/usr/sbin:/usr/bin:/sbin:/bin HOME=/root LC_ALL=C.UTF-8 bash /recipes/inside.sh' \
  sh "$root" || die "a recipe failed"
echo "recipes: docker and Slurm started images as the pages say: $((SECONDS - started)) s"
