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

. "$here/debian.sh"

# install PACKAGE... : into the overlay over the base system
install_packages() {
  mkdir -p "$work/upper" "$work/overlay"
  mount -t overlay -o "lowerdir=$base,upperdir=$work/upper,workdir=$work/overlay" overlay "$root"
  enter_root
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
  leave_root
  umount "$root"
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
