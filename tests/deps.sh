#!/bin/bash
# Installs with apt what `make test` and `make demo` need beside Rust. Says nothing when all of it is there.
set -euo pipefail
die() { echo "deps.sh: $*" >&2; exit 1; }

# What must be there, and the package that brings it: a command by its name, a file by its path. A command that is there already is
# taken as it is, because its package may have another name on this machine (Docker's containerd brings runc).
needed=(
  gcc:gcc g++:g++ make:make /usr/include/stdlib.h:libc6-dev
  tar:tar gzip:gzip xz:xz-utils zstd:zstd cpio:cpio setfattr:attr perl:perl-base
  mount:mount unshare:util-linux losetup:mount ip:iproute2 depmod:kmod
  mkfs.erofs:erofs-utils runc:runc debootstrap:debootstrap
)
# Without these some tests are skipped, so a machine whose archive lacks one can still run the others.
wanted=(
  qemu-system-x86_64:qemu-system-x86 busybox:busybox-static docker-registry:docker-registry nginx:nginx umoci:umoci crun:crun
  openssl:openssl strace:strace systemd-analyze:systemd veritysetup:cryptsetup-bin
  /usr/share/keyrings/debian-archive-keyring.gpg:debian-archive-keyring
)

present() {
  case $1 in
  /*) [[ -e $1 ]] ;;
  *) PATH=$PATH:/usr/local/sbin:/usr/sbin:/sbin command -v "$1" >/dev/null ;;
  esac
}

missing_of() {
  local item
  for item; do present "${item%%:*}" || echo "${item#*:}"; done
}

# libublk's bindings are made by bindgen, which loads libclang and reads the compiler's own headers. Both must be of one version; the
# metapackage libclang-dev would bring them with 400 MB of C++ headers and libraries besides.
have_libclang() {
  local library version
  for library in /usr/lib/llvm-*/lib/libclang.so.1 /usr/lib/llvm-*/lib/libclang-*.so.*; do
    [[ -e $library ]] || continue
    version=${library#/usr/lib/llvm-} version=${version%%/*}
    ! compgen -G "/usr/lib/llvm-$version/lib/clang/*/include/stddef.h" >/dev/null || return 0
  done
  [[ -n ${LIBCLANG_PATH:-} ]]
}

libclang_packages() {
  local version
  version=$(apt-cache depends libclang-dev | sed -nE 's/^ *Depends: libclang-([0-9]+)-dev$/\1/p' | head -n 1)
  [[ -n $version ]] || die "apt knows no libclang-dev"
  apt-cache depends "libclang-$version-dev" | sed -nE 's/^ *Depends: (libclang1-[0-9a-z]+|libclang-common-[0-9]+-dev)$/\1/p'
}

required=$(missing_of "${needed[@]}")
optional=$(missing_of "${wanted[@]}")
if have_libclang && [[ -z $required && -z $optional ]]; then exit 0; fi
command -v apt-get >/dev/null || die "no apt-get here; install by hand: libclang ${required//$'\n'/ } ${optional//$'\n'/ }"
if ((EUID != 0)); then
  ! have_libclang || [[ -n $required ]] || exit 0
  die "missing packages: $(have_libclang || echo libclang) ${required//$'\n'/ }; run 'sudo make deps' once"
fi

export DEBIAN_FRONTEND=noninteractive
# An old list names packages that the mirror no longer has.
apt-get -qq update || echo "deps.sh: apt-get update failed, going on with the lists that are there" >&2
packages=()
while read -r package; do [[ -z $package ]] || packages+=("$package"); done < <(
  have_libclang || libclang_packages
  echo "$required"
)
while read -r package; do
  [[ -n $package ]] || continue
  if apt-cache show "$package" >/dev/null 2>&1; then
    packages+=("$package")
  else
    echo "deps.sh: apt has no $package; what needs it is skipped" >&2
  fi
done <<<"$optional"
((${#packages[@]})) || exit 0

echo "deps.sh: installing ${packages[*]}" >&2
# Tests start a docker-registry and an nginx of their own; the packages' services would hold ports 5000 and 80 of this machine.
for service in docker-registry nginx; do
  if [[ " ${packages[*]} " == *" $service "* && -d /run/systemd/system ]]; then
    systemctl mask "$service.service" >/dev/null 2>&1 || true
  fi
done
apt-get -qq install -y --no-install-recommends "${packages[@]}" >/dev/null || die "apt-get install failed for ${packages[*]}"
have_libclang || die "libclang is still not found"
