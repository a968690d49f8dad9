#!/bin/bash
# Makes images of Debian packages for `make debian-images`: 1 to 20 layers, up to 70,000 files, and what Dockerfiles do to files of
# lower layers. OCI layouts with the tag "latest"; ten minutes and 2 GB, once.
#   debian-images.sh DIR [IMAGE...]     what is in DIR is not built again
set -euo pipefail
here=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")" && pwd -P)
die() { echo "debian-images.sh: $*" >&2; exit 1; }
dir=$(realpath -m -- "${1:?usage: debian-images.sh DIR [IMAGE...]}")
images=("${@:2}")
((${#images[@]})) || images=(base python services icons changes many)
missing=
for image in "${images[@]}"; do [[ -e $dir/$image/index.json ]] || missing=1; done
[[ -n $missing ]] || exit 0
((EUID == 0)) || die "needs root (debootstrap, mount)"
for c in debootstrap unshare chroot; do command -v "$c" >/dev/null || die "no $c here: run 'make deps'"; done
# All mounts below are in a mount namespace of this script's own: they end with it, however it ends.
[[ -n ${DEBIAN_IMAGES_INSIDE:-} ]] || exec env DEBIAN_IMAGES_INSIDE=1 unshare --mount --propagation private "$0" "$dir" "${images[@]}"

# One line a layer: packages to install, or `- COMMAND` to be run in the image.
layers_of() {
  case $1 in
  base) ;;
  python) printf '%s\n' python3 python3-numpy ;;
  services) printf '%s\n' nginx openssh-server '- rm -rf /usr/share/doc /usr/share/man' '- apt-get -y purge openssh-server' ;;
  icons) printf '%s\n' 'papirus-icon-theme' '- rm -rf /usr/share/icons/Papirus/16x16' ;;
  # What Dockerfiles do: change owners and modes of everything, replace a directory by a link and a file by a directory, link to what is below.
  changes)
    printf '%s\n' 'perl git' '- chown -R 1000:1000 /usr/share/perl' '- chmod -R g+w /usr/lib/git-core' \
      '- mv /usr/share/git-core /srv/ && ln -s /srv/git-core /usr/share/git-core' '- ln /usr/bin/git /usr/local/bin/git' \
      '- rm /etc/motd; mkdir -p /etc/motd/d && echo 1 >/etc/motd/d/f' '- truncate -s 300M /var/sparse && echo end >>/var/sparse' \
      '- rm -r /srv && mkdir /srv && touch /srv/new'
    ;;
  many) printf '%s\n' less nano file curl jq tree bc patch rsync make unzip zip xz-utils lsof strace gawk time psmisc '- rm -rf /usr/share/doc' ;;
  *) die "no image is called $1" ;;
  esac
}

. "$here/demo/debian.sh"
clean "$base"
pack "$base" "$work/base.tar" --exclude='./dev/*'

# build IMAGE: each layer is the upper directory of an overlay over all below.
build() {
  local steps step lower=$base tars=("$work/base.tar") number=0 upper
  mapfile -t steps < <(layers_of "$1")
  for step in "${steps[@]}"; do
    number=$((number + 1)) upper=$work/$1-$number
    step "$1: $step"
    mkdir -p "$upper" "$work/overlay"
    mount -t overlay -o "lowerdir=$lower,upperdir=$upper,workdir=$work/overlay" overlay "$root"
    enter_root
    case $step in
    -*) quietly "${inside[@]}" sh -c "${step#- }" ;;
    # shellcheck disable=SC2086 # words on purpose
    *) quietly "${inside[@]}" "${apt[@]}" install -y --no-install-recommends $step ;;
    esac
    leave_root
    umount "$root"
    clean "$upper"
    lower=$upper:$lower
  done
  # Only now: as long as they are lower layers, what they delete must be in overlayfs' own form.
  for number in $(seq 1 ${#steps[@]}); do
    name_whiteouts "$work/$1-$number"
    pack "$work/$1-$number" "$work/$1-$number.tar" -S
    tars+=("$work/$1-$number.tar")
    rm -rf "$work/$1-$number"
  done
  "$here/demo/pack-layout.sh" --output "$work/layout" "${tars[@]}"
  rm -rf "$dir/$1" "$dir/$1.new" "$work/$1"-*.tar "$work/overlay"
  cp -r "$work/layout" "$dir/$1.new"
  mv "$dir/$1.new" "$dir/$1"
  rm -rf "$work/layout"
}

for image in "${images[@]}"; do
  [[ -e $dir/$image/index.json ]] || build "$image"
done
