#!/bin/bash
# Builds the demo's source image: a base system, and python3 with numpy on it, as two gzip layers in an OCI layout.
# Packages come from the archive that this machine's own apt uses, for the release that this machine runs.
set -euo pipefail
here=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")" && pwd -P)
die() { echo "build-image.sh: $*" >&2; exit 1; }
usage() {
  cat <<'U'
usage: build-image.sh [DIR]
  DIR  gets source/ (the layout, tag "latest") and cache/ (packages); default target/demo. Nothing is done if source/ is there.
  environment: DEMO_MIRROR (default: from this machine's apt sources), DEMO_SUITE (default: this machine's release)
U
}
case ${1:-} in -h | --help) usage; exit 0 ;; esac
dir=$(realpath -m -- "${1:-$here/../../target/demo}")
[[ ! -e $dir/source/index.json ]] || exit 0
((EUID == 0)) || die "needs root (debootstrap, mount)"
for c in debootstrap unshare chroot; do command -v "$c" >/dev/null || die "no $c here: run 'make deps'"; done
# All mounts below are in a mount namespace of this script's own: they end with it, however it ends.
[[ -n ${BUILD_IMAGE_INSIDE:-} ]] || exec env BUILD_IMAGE_INSIDE=1 unshare --mount --propagation private "$0" "$dir"

suite=${DEMO_SUITE:-$(. /etc/os-release && echo "${VERSION_CODENAME:-}")}
[[ -n $suite ]] || die "/etc/os-release names no release; set DEMO_SUITE and DEMO_MIRROR"

# The archive of SUITE's component main: apt's own view of its sources, whatever their syntax. Mirror lists are not archives.
mirror_of() {
  [[ -z ${DEMO_MIRROR:-} ]] || { echo "$DEMO_MIRROR"; return; }
  apt-get indextargets --no-release-info --format '$(REPO_URI) $(RELEASE) $(COMPONENT)' 'Created-By: Packages' 2>/dev/null |
    awk -v suite="$suite" '$2 == suite && $3 == "main" && $1 !~ /^mirror/ { print $1; exit }'
}
mirror=$(mirror_of)
[[ -n $mirror ]] || die "this machine's apt has no archive for $suite; set DEMO_MIRROR (and DEMO_SUITE)"
eval "$(apt-config shell http_proxy Acquire::http::Proxy https_proxy Acquire::https::Proxy)"
[[ -z ${http_proxy:-} ]] || export http_proxy
[[ -z ${https_proxy:-} ]] || export https_proxy

# In memory: dpkg's many small synced writes cost nothing there, and an overlay's upper directory may not lie on an overlay, which
# is what / is in many containers.
work=$dir/work cache=$dir/cache/$suite
mkdir -p "$work" "$cache/base" "$cache/packages/partial"
mount -t tmpfs -o size=2g,mode=755 demo-image "$work" || die "cannot mount a tmpfs: is this an unprivileged container?"
base=$work/base root=$work/root
mkdir "$base" "$root" "$work/upper" "$work/overlay"
started=$SECONDS
step() { echo "build-image.sh: $((SECONDS - started)) s: $*" >&2; }

quietly() { # the output matters only if the command fails
  "$@" >"$work/log" 2>&1 </dev/null || { tail -n 20 "$work/log" >&2; die "failed: $*"; }
}

step "base system $suite"
quietly debootstrap --variant=minbase --cache-dir="$cache/base" "$suite" "$base" "$mirror"

step "python3 with numpy"
mount -t overlay -o "lowerdir=$base,upperdir=$work/upper,workdir=$work/overlay" overlay "$root"
mount -t proc proc "$root/proc"
mkdir -p "$root/var/cache/apt/archives"
mount --bind "$cache/packages" "$root/var/cache/apt/archives"
mount -t tmpfs lists "$root/var/lib/apt/lists"
components=main
case $(. /etc/os-release && echo "$ID") in ubuntu) components='main universe' ;; esac
mkdir -p "$work/apt.d"
echo "deb $mirror $suite $components" >"$work/apt.d/sources.list"
mkdir "$root/tmp/apt.d"
mount --bind "$work/apt.d" "$root/tmp/apt.d"
inside=(env -i PATH=/usr/sbin:/usr/bin:/sbin:/bin HOME=/root LC_ALL=C.UTF-8 DEBIAN_FRONTEND=noninteractive
  http_proxy="${http_proxy:-}" https_proxy="${https_proxy:-}" chroot "$root")
apt=(apt-get -qq -o Dir::Etc::sourcelist=/tmp/apt.d/sources.list -o Dir::Etc::sourceparts=/dev/null
  -o APT::Sandbox::User=root -o APT::Keep-Downloaded-Packages=true -o Binary::apt-get::APT::Keep-Downloaded-Packages=true
  -o Acquire::Languages=none -o Dir::Cache::pkgcache= -o Dir::Cache::srcpkgcache=)
quietly "${inside[@]}" "${apt[@]}" update
quietly "${inside[@]}" "${apt[@]}" install -y --no-install-recommends python3 python3-numpy
umount "$root/tmp/apt.d" "$root/var/lib/apt/lists" "$root/var/cache/apt/archives" "$root/proc"
rmdir "$root/tmp/apt.d"
umount "$root"

step "layers"
clean() { # what a machine makes for itself again, or must not share: package caches, logs, device nodes
  rm -rf "$1"/var/cache/apt/*.bin "$1"/var/cache/apt/archives/*.deb "$1"/var/lib/apt/lists/* "$1"/var/log/*.log "$1"/var/log/apt
  rm -rf "$1"/var/cache/debconf/*-old "$1"/var/cache/ldconfig/aux-cache "$1"/var/lib/dpkg/*-old "$1"/tmp/* "$1"/debootstrap
}
clean "$base"
find "$base/dev" -mindepth 1 -delete
clean "$work/upper"
# overlayfs marks what the upper layer deletes with 0:0 devices and opaque directories; OCI layers have names for both.
while IFS= read -r -d '' node; do
  [[ $(stat -c %t:%T "$node") == 0:0 ]] || continue
  rm "$node"
  : >"${node%/*}/.wh.${node##*/}"
done < <(find "$work/upper" -type c -print0)
while IFS= read -r -d '' folder; do
  [[ $(getfattr --only-values -n trusted.overlay.opaque "$folder" 2>/dev/null) == y ]] || continue
  : >"$folder/.wh..wh..opq"
done < <(find "$work/upper" -type d -print0)
pack() {
  tar -C "$1" --sort=name --numeric-owner --xattrs --xattrs-exclude='trusted.overlay.*' --format=pax \
    --pax-option=exthdr.name=%d/PaxHeaders/%f,delete=atime,delete=ctime -cf "$2" .
}
pack "$base" "$work/base.tar" &
pack "$work/upper" "$work/python.tar"
wait $! || die "tar failed"

step "gzip"
"$here/pack-layout.sh" --output "$work/layout" --cmd '["python3","-c","import numpy"]' "$work/base.tar" "$work/python.tar"
rm -rf "$dir/source.new"
cp -r "$work/layout" "$dir/source.new"
mv "$dir/source.new" "$dir/source"
step "$dir/source: $(du -sm "$dir/source" | cut -f 1) MB in 2 layers, $(($(stat -c %s "$work"/*.tar | paste -sd+))) bytes unpacked"
