# For scripts that make layers of Debian packages: sourced, with $dir (gets work/, in memory while the script runs, and cache/) and
# die() set, in a mount namespace of the script's own. Sets $suite, $mirror, $work, $base (the base system) and $root (where it and
# what is built on it is mounted); apt works there between enter_root and leave_root.
# shellcheck shell=bash
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
mount -t tmpfs -o size=4g,mode=755 layers "$work" || die "cannot mount a tmpfs: is this an unprivileged container?"
base=$work/base root=$work/root
mkdir "$base" "$root"
started=$SECONDS
step() { echo "${0##*/}: $((SECONDS - started)) s: $*" >&2; }
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

enter_root() {
  mount -t proc proc "$root/proc"
  mkdir -p "$root/var/cache/apt/archives"
  mount --bind "$cache/packages" "$root/var/cache/apt/archives"
  mount -t tmpfs lists "$root/var/lib/apt/lists"
  mkdir "$root/tmp/apt.d"
  mount --bind "$work/apt.d" "$root/tmp/apt.d"
  quietly "${inside[@]}" "${apt[@]}" update
}
leave_root() {
  umount "$root/tmp/apt.d" "$root/var/lib/apt/lists" "$root/var/cache/apt/archives" "$root/proc"
  rmdir "$root/tmp/apt.d"
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
