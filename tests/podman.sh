#!/bin/bash
# Runs what docs/containers.md says about podman, with podman's own storage and configuration in a directory of this test. Skipped where
# there is no podman (`apt install --no-install-recommends podman`). Part of `make test-full`; half a minute.
#   podman.sh BIN-DIR
set -euo pipefail
here=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")" && pwd -P)
bin=$(realpath -- "${1:?usage: podman.sh BIN-DIR}")
die() { echo "podman.sh: $*" >&2; exit 1; }
skip() { echo "SKIP podman: $*"; exit 0; }
((EUID == 0)) || skip "needs root"
for c in podman runc busybox unshare; do command -v "$c" >/dev/null || skip "no $c here"; done
[[ -e /dev/ublk-control || (-e /dev/fuse && -e /dev/loop-control) ]] || skip "this kernel serves no devices"
# All mounts below are in a mount namespace of this script's own: they end with it, however it ends.
[[ -n ${PODMAN_INSIDE:-} ]] || exec env PODMAN_INSIDE=1 unshare --mount --propagation private "$0" "$bin"

work=$(mktemp -d)
registry=
finish() {
  "$bin/ublkimg" daemon --stop >/dev/null 2>&1 || true
  [[ -z $registry ]] || kill "$registry" 2>/dev/null || true
  awk -v below="$work/" 'index($5, below) == 1 { print $5 }' /proc/self/mountinfo | tac | xargs -r umount -l
  rm -rf --one-file-system "$work"
}
trap finish EXIT
# What a host has in /etc and /run: runtimes and hooks are called without an environment, and read it there.
mkdir -p /etc/ublkimg /etc/cdi "$work"/{etc,cdi,empty,app/bin,app/etc,weights,hooks.d}
mount --bind "$work/etc" /etc/ublkimg
mount --bind "$work/cdi" /etc/cdi
printf 'root = "%s"\nrun-dir = "%s"\n' "$work/store" "$work/run" >/etc/ublkimg/config.toml
[[ -e /dev/ublk-control ]] || echo 'transport = "fuse"' >>/etc/ublkimg/config.toml
export UBLKIMG_CONFIG=/etc/ublkimg/config.toml PATH=$bin:$PATH
ln -s "$bin/ublkimg" "$work/ublkimg-runc"

cp "$(command -v busybox)" "$work/app/bin/busybox"
for name in sh cat echo touch; do ln -s busybox "$work/app/bin/$name"; done
echo 'hello from app' >"$work/app/etc/motd"
echo 'one weight' >"$work/weights/w.bin"
for image in app weights; do
  tar -C "$work/$image" --numeric-owner -cf "$work/$image.tar" .
  "$here/demo/pack-layout.sh" --output "$work/$image.oci" "$work/$image.tar"
done
"$bin/test-registry" --load "app:1=$work/app.oci" --load "weights:1=$work/weights.oci" >"$work/registry.out" 2>&1 &
registry=$!
for _ in $(seq 50); do address=$(grep -oE '127\.0\.0\.1:[0-9]+' "$work/registry.out" | head -n 1) && break; sleep 0.1; done
[[ -n ${address:-} ]] || die "the registry did not come up"
for image in app weights; do ublkimg convert "$address/$image:1" "$address/$image:ublk" >/dev/null 2>&1; done

podman=(podman --root "$work/podman" --runroot "$work/podman-run" --storage-driver vfs --cgroup-manager cgroupfs --events-backend file)
# The limits of this host: not everywhere may root raise them.
options=(--network none --ulimit "nofile=$(ulimit -Sn):$(ulimit -Hn)" --ulimit nproc=4096:4096)
run=("${podman[@]}" run --rm "${options[@]}")
# expect TEXT COMMAND... : COMMAND prints TEXT
expect() {
  local said
  said=$("${@:2}" 2>"$work/said") || { cat "$work/said" >&2; die "failed: ${*:2}"; }
  [[ $said == "$1" ]] || die "it said '$said', not '$1': ${*:2}"
}

echo "podman.sh: $(podman --version): --rootfs"
ublkimg add "$address/app:ublk" --name app --mount "$work/root" --overlay >/dev/null
expect 'hello from app' "${run[@]}" --runtime runc --rootfs "$work/root" /bin/cat /etc/motd
expect written "${run[@]}" --runtime runc --rootfs "$work/root" /bin/sh -c 'echo written >/x; cat /x'
ublkimg rm app

echo "podman.sh: --runtime ublkimg-runc"
of_image=(--runtime "$work/ublkimg-runc" --annotation "dev.ublkimg.image=$address/app:ublk")
empty=(--rootfs "$work/empty")
expect 'hello from app' "${run[@]}" "${of_image[@]}" "${empty[@]}" /bin/cat /etc/motd
[[ $(ublkimg ls --json) == '[]' ]] || die "a container is gone and its device is not: $(ublkimg ls)"
[[ -z $(ls -A "$work/empty" | grep -vE '^(dev|etc|proc|run|sys)$') ]] || die "the container wrote into the empty root"
"${podman[@]}" run -d --name lasting "${options[@]}" "${of_image[@]}" "${empty[@]}" /bin/sh -c 'while :; do sleep 1; done' >/dev/null
name=$(ublkimg ls --json | sed -nE 's/^ *"name": "(.*)",$/\1/p' | head -n 1)
ublkimg rm "$name" 2>"$work/said" && die "the root of a container that runs was removed"
grep -qE 'leased|in use' "$work/said" || die "rm said: $(cat "$work/said")"
expect 'hello from app' "${podman[@]}" exec lasting /bin/cat /etc/motd
"${podman[@]}" rm -f -t 0 lasting >/dev/null
[[ $(ublkimg ls --json) == '[]' ]] || die "a container was killed and its device is still there: $(ublkimg ls)"

echo "podman.sh: an image inside the container, by hooks"
for phase in createRuntime poststop; do
  printf '{"version": "1.0.0", "hook": {"path": "%s", "args": ["ublkimg", "hook", "%s"]}, "when": {"annotations": {"^dev\\\\.ublkimg\\\\.": "."}}, "stages": ["%s"]}\n' \
    "$bin/ublkimg" "$phase" "$phase" >"$work/hooks.d/ublkimg-$phase.json"
done
expect 'one weight' "${podman[@]}" --hooks-dir "$work/hooks.d" run --rm "${options[@]}" "${of_image[@]}" \
  --annotation "dev.ublkimg.mount./models=$address/weights:ublk" "${empty[@]}" /bin/cat /models/w.bin
[[ $(ublkimg ls --json) == '[]' ]] || die "the image of a hook is still attached: $(ublkimg ls)"

echo "podman.sh: an image inside the container, as a CDI device"
ublkimg add "$address/weights:ublk" --name weights --mount "$work/mounted" >/dev/null
ublkimg cdi generate weights --path /models -o /etc/cdi/weights.json
expect 'one weight' "${run[@]}" "${of_image[@]}" --device ublkimg.dev/tree=weights "${empty[@]}" /bin/cat /models/w.bin
ublkimg rm weights
echo "podman.sh: all recipes ran"
