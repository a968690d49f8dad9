#!/bin/bash
# Builds the Debian package of a program that is built: deb.sh PROGRAM OUTPUT_DIRECTORY. Prints the package's path.
# The same program gives the same package, byte for byte.
set -euo pipefail
[[ $# == 2 ]] || { echo 'usage: deb.sh PROGRAM OUTPUT_DIRECTORY' >&2; exit 2; }
command -v dpkg-deb >/dev/null || { echo 'deb.sh: there is no dpkg-deb (package dpkg)' >&2; exit 1; }
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
program=$1 output=$2
# The time of the last change to what is packaged, where the sources are a checkout.
SOURCE_DATE_EPOCH=${SOURCE_DATE_EPOCH:-$(git -C "$here" log -1 --format=%ct 2>/dev/null || echo 0)}
export SOURCE_DATE_EPOCH

root=$(mktemp -d)
trap 'rm -rf "$root"' EXIT
chmod 755 "$root"
umask 022
tree=$root/tree
install -D -m 755 "$program" "$tree/usr/bin/ublkimg"
strip "$tree/usr/bin/ublkimg" 2>/dev/null || true
ln -s ublkimg "$tree/usr/bin/ublkimg-runc"
install -D -m 755 -t "$tree/usr/sbin" "$here/mount.ublkimg"
install -D -m 644 -t "$tree/usr/lib/systemd/system" "$here"/systemd/*.service
install -D -m 644 -t "$tree/usr/lib/tmpfiles.d" "$here/tmpfiles.d/ublkimg.conf"
install -D -m 644 -t "$tree/usr/lib/modules-load.d" "$here/modules-load.d/ublkimg.conf"

"$tree/usr/bin/ublkimg" docs "$root/docs"
mkdir -p "$tree/usr/share/man/man1" "$tree/etc/ublkimg/images.d" "$tree/etc/ublkimg/certs.d"
for page in "$root"/docs/*.1; do gzip -9n <"$page" >"$tree/usr/share/man/man1/${page##*/}.gz"; done
install -D -m 644 "$root/docs/ublkimg.bash" "$tree/usr/share/bash-completion/completions/ublkimg"
install -D -m 644 "$root/docs/_ublkimg" "$tree/usr/share/zsh/vendor-completions/_ublkimg"
install -D -m 644 "$root/docs/ublkimg.fish" "$tree/usr/share/fish/vendor_completions.d/ublkimg.fish"
install -D -m 644 "$root/docs/config.toml" "$tree/etc/ublkimg/config.toml"
install -D -m 644 -t "$tree/usr/share/doc/ublkimg" "$here/../LICENSE" "$here/../CHANGELOG.md" "$here"/../docs/*.md "$here/grafana.json"
mv "$tree/usr/share/doc/ublkimg/LICENSE" "$tree/usr/share/doc/ublkimg/copyright"

version=$("$tree/usr/bin/ublkimg" --version | cut -d' ' -f2)
architecture=$(dpkg --print-architecture)
install -d "$tree/DEBIAN"
sed -e "s/@VERSION@/$version/" -e "s/@ARCHITECTURE@/$architecture/" -e "s/@KIB@/$(du -sk "$tree" | cut -f1)/" \
  "$here/debian/control" >"$tree/DEBIAN/control"
echo /etc/ublkimg/config.toml >"$tree/DEBIAN/conffiles"
install -m 755 "$here/debian/postinst" "$here/debian/prerm" "$here/debian/postrm" "$tree/DEBIAN/"

mkdir -p "$output"
package=$output/ublkimg_${version}_$architecture.deb
# zstd: known to dpkg since Debian 12 and Ubuntu 21.10.
dpkg-deb --root-owner-group -Zzstd -z12 --build "$tree" "$package" >/dev/null
echo "$package"
