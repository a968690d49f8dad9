#!/bin/bash
# Builds the source images of the demo and of the measured starts: a base system, and packages on it, as two gzip layers in an OCI
# layout each. Images built by one call share the base layer.
# Packages come from the archive that this machine's own apt uses, for the release that this machine runs.
set -euo pipefail
here=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")" && pwd -P)
die() { echo "build-image.sh: $*" >&2; exit 1; }
usage() {
  cat <<'U'
usage: build-image.sh [DIR [IMAGE...]]
  DIR    gets a layout (tag "latest") per image, named as it, and cache/ (packages); default target/demo.
         Nothing is done if the layouts are there.
  IMAGE  source: python3 with numpy, the demo (the default)
         scipy:  python3 with scipy and matplotlib, and a plot as its command
         nginx:  as packaged, on port 18080
         node:   nodejs with express and other packages, and a small server on port 18081
  environment: DEMO_MIRROR (default: from this machine's apt sources), DEMO_SUITE (default: this machine's release)
U
}
case ${1:-} in -h | --help) usage; exit 0 ;; esac
dir=$(realpath -m -- "${1:-$here/../../target/demo}")
images=("${@:2}")
((${#images[@]})) || images=(source)
missing=
for image in "${images[@]}"; do
  case $image in source | scipy | nginx | node) ;; *) usage >&2; die "no image is called $image" ;; esac
  [[ -e $dir/$image/index.json ]] || missing=1
done
[[ -n $missing ]] || exit 0
((EUID == 0)) || die "needs root (debootstrap, mount)"
for c in debootstrap unshare chroot; do command -v "$c" >/dev/null || die "no $c here: run 'make deps'"; done
# All mounts below are in a mount namespace of this script's own: they end with it, however it ends.
[[ -n ${BUILD_IMAGE_INSIDE:-} ]] || exec env BUILD_IMAGE_INSIDE=1 unshare --mount --propagation private "$0" "$dir" "${images[@]}"

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
mount -t tmpfs -o size=4g,mode=755 demo-image "$work" || die "cannot mount a tmpfs: is this an unprivileged container?"
base=$work/base root=$work/root
mkdir "$base" "$root"
started=$SECONDS
step() { echo "build-image.sh: $((SECONDS - started)) s: $*" >&2; }

quietly() { # the output matters only if the command fails
  "$@" >"$work/log" 2>&1 </dev/null || { tail -n 20 "$work/log" >&2; die "failed: $*"; }
}

step "base system $suite"
quietly debootstrap --variant=minbase --cache-dir="$cache/base" "$suite" "$base" "$mirror"

components=main
case $(. /etc/os-release && echo "$ID") in ubuntu) components='main universe' ;; esac
mkdir -p "$work/apt.d"
echo "deb $mirror $suite $components" >"$work/apt.d/sources.list"
inside=(env -i PATH=/usr/sbin:/usr/bin:/sbin:/bin HOME=/root LC_ALL=C.UTF-8 DEBIAN_FRONTEND=noninteractive
  http_proxy="${http_proxy:-}" https_proxy="${https_proxy:-}" chroot "$root")
apt=(apt-get -qq -o Dir::Etc::sourcelist=/tmp/apt.d/sources.list -o Dir::Etc::sourceparts=/dev/null
  -o APT::Sandbox::User=root -o APT::Keep-Downloaded-Packages=true -o Binary::apt-get::APT::Keep-Downloaded-Packages=true
  -o Acquire::Languages=none -o Dir::Cache::pkgcache= -o Dir::Cache::srcpkgcache=)

# install PACKAGE... : into the overlay over the base system
install_packages() {
  mkdir -p "$work/upper" "$work/overlay"
  mount -t overlay -o "lowerdir=$base,upperdir=$work/upper,workdir=$work/overlay" overlay "$root"
  mount -t proc proc "$root/proc"
  mkdir -p "$root/var/cache/apt/archives"
  mount --bind "$cache/packages" "$root/var/cache/apt/archives"
  mount -t tmpfs lists "$root/var/lib/apt/lists"
  mkdir "$root/tmp/apt.d"
  mount --bind "$work/apt.d" "$root/tmp/apt.d"
  quietly "${inside[@]}" "${apt[@]}" update
  quietly "${inside[@]}" "${apt[@]}" install -y --no-install-recommends "$@"
}
# What the image has beside its packages; sets $cmd.
finish_source() { cmd='["python3","-c","import numpy"]'; }
finish_scipy() {
  cmd='["python3","/srv/plot.py"]'
  cp "$here/images/scipy/plot.py" "$root/srv/"
  quietly "${inside[@]}" python3 /srv/plot.py # writes the list of fonts
}
finish_nginx() {
  cmd='["nginx","-g","daemon off;"]'
  # Not a port that this machine may use: the measured containers have its network.
  sed -i 's/listen 80 /listen 127.0.0.1:18080 /; /listen \[::\]:80 /d' "$root/etc/nginx/sites-available/default"
}
finish_node() {
  cmd='["node","/srv/server.js"]'
  cp "$here/images/node/server.js" "$root/srv/"
}
close_overlay() {
  umount "$root/tmp/apt.d" "$root/var/lib/apt/lists" "$root/var/cache/apt/archives" "$root/proc"
  rmdir "$root/tmp/apt.d"
  umount "$root"
}

clean() { # what a machine makes for itself again, or must not share: package caches, logs, device nodes
  rm -rf "$1"/var/cache/apt/*.bin "$1"/var/cache/apt/archives/*.deb "$1"/var/lib/apt/lists/* "$1"/var/log/*.log "$1"/var/log/apt
  rm -rf "$1"/var/cache/debconf/*-old "$1"/var/cache/ldconfig/aux-cache "$1"/var/lib/dpkg/*-old "$1"/tmp/* "$1"/debootstrap
}
# overlayfs marks what the upper layer deletes with 0:0 devices and opaque directories; OCI layers have names for both.
name_whiteouts() {
  local node folder
  while IFS= read -r -d '' node; do
    [[ $(stat -c %t:%T "$node") == 0:0 ]] || continue
    rm "$node"
    : >"${node%/*}/.wh.${node##*/}"
  done < <(find "$1" -type c -print0)
  while IFS= read -r -d '' folder; do
    [[ $(getfattr --only-values -n trusted.overlay.opaque "$folder" 2>/dev/null) == y ]] || continue
    : >"$folder/.wh..wh..opq"
  done < <(find "$1" -type d -print0)
}
pack() { # pack DIR FILE [TAR-OPTION...]
  tar -C "$1" "${@:3}" --sort=name --numeric-owner --xattrs --xattrs-exclude='trusted.overlay.*' --format=pax \
    --pax-option=exthdr.name=%d/PaxHeaders/%f,delete=atime,delete=ctime -cf "$2" .
}

declare -A packages=(
  [source]='python3 python3-numpy'
  [scipy]='python3 python3-numpy python3-scipy python3-matplotlib'
  [nginx]='nginx'
  [node]='nodejs node-body-parser node-express node-lodash node-moment node-semver node-winston node-ws node-yargs'
)
# build IMAGE
build() {
  local cmd
  step "$1: ${packages[$1]}"
  # shellcheck disable=SC2086 # words on purpose
  install_packages ${packages[$1]}
  "finish_$1"
  close_overlay
  step "$1: layers"
  clean "$work/upper"
  name_whiteouts "$work/upper"
  pack "$work/upper" "$work/packages.tar"
  "$here/pack-layout.sh" --output "$work/layout" --cmd "$cmd" "$work/base.tar" "$work/packages.tar"
  rm -rf "$dir/$1" "$dir/$1.new"
  cp -r "$work/layout" "$dir/$1.new"
  mv "$dir/$1.new" "$dir/$1"
  step "$dir/$1: $(du -sm "$dir/$1" | cut -f 1) MB in 2 layers, $(($(stat -c %s "$work"/*.tar | paste -sd+))) bytes unpacked"
  rm -rf "$work/upper" "$work/overlay" "$work/packages.tar" "$work/layout"
}

clean "$base"
pack "$base" "$work/base.tar" --exclude='./dev/*' # which the installations need
# All of them, also those that are there: a base system built anew is another layer.
for image in "${images[@]}"; do build "$image"; done
