#!/bin/bash
# Makes the lanes' sample: two images of about 25 MB that share their first layer and hold every kind of object and every kind of
# change between layers, as OCI layouts; beside each the list of the tree that must come out.
#   sample.sh DIR BIN-DIR      gives DIR/{one,two} and DIR/{one,two}.list
set -euo pipefail
here=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")" && pwd -P)
dir=$(realpath -m -- "${1:?usage: sample.sh DIR BIN-DIR}") bin=$(realpath -- "${2:?usage: sample.sh DIR BIN-DIR}")
((EUID == 0)) || { echo "sample.sh: needs root (device nodes, owners)" >&2; exit 1; }
[[ ! -e $dir/two.list ]] || exit 0
rm -rf "$dir"
mkdir -p "$dir"
work=$(mktemp -d "$dir/work.XXXXXX")
trap 'rm -rf "$work"' EXIT

# noise FILE BYTES SEED : bytes that do not compress, the same for the same seed
noise() { perl -e 'srand($ARGV[1]); my $n = $ARGV[0]; print substr(pack("L*", map { rand(2**32) } 1 .. $n / 4 + 1), 0, $n)' "$2" "$3" >"$1"; }
words() { seq "$2" "$3" >"$1"; }

base=$work/base
mkdir -p "$base"/{a,big,dev,empty,z,links,odd,usr/bin,opaque,gone/deep,kinds}
for i in $(seq 1 250); do words "$base/a/text$i" "$i" $((i * 40)); done
for i in $(seq 1 60); do noise "$base/a/noise$i" $((i * 977)) "$i"; done
noise "$base/big/noise" 10485760 1000
noise "$base/z/last" 4000000 1001
words "$base/z/zeroless" 1 100000
truncate -s 3M "$base/big/hole" && printf end >>"$base/big/hole"
: >"$base/empty/file"
printf x >"$base/empty/one"
head -c 4096 "$base/big/noise" >"$base/empty/block"
head -c 262144 "$base/big/noise" >"$base/empty/chunk"
head -c 262145 "$base/big/noise" >"$base/empty/chunk-and-one"
echo linked >"$base/links/first"
ln "$base/links/first" "$base/links/second"
ln "$base/links/first" "$base/usr/third"
ln -s first "$base/links/short"
ln -s "/nowhere/$(printf 'long%.0s' {1..60})" "$base/links/long"
mkfifo "$base/kinds/fifo"
mknod "$base/kinds/char" c 1 3
mknod "$base/kinds/block" b 259 70000
cp "$(type -P true)" "$base/usr/bin/setuid" && chmod 4755 "$base/usr/bin/setuid"
mkdir -m 1777 "$base/tmp"
touch "$base/odd/with space" "$base/odd/"$'new\nline' "$base/odd/ünïcode" "$base/odd/back\\slash" "$base/odd/$(printf 'n%.0s' {1..255})"
touch -d '1969-07-20T20:17:40.123456789Z' "$base/odd/old"
touch -d '2106-02-07T06:28:16.999999999Z' "$base/odd/late"
chown 4000000000:3000000000 "$base/odd/old"
chmod 0 "$base/odd/late"
setfattr -n user.note -v "$(printf 'v%.0s' {1..300})" "$base/odd/with space"
setfattr -n user.on-directory -v yes "$base/odd"
setfattr -n security.capability -v 0x0100000200040000000000000000000000000000 "$base/usr/bin/setuid"
for i in $(seq 1 40); do mkdir "$base/gone/deep/d$i"; echo "$i" >"$base/gone/deep/d$i/file"; done
for name in old kept; do echo "$name" >"$base/opaque/$name"; done
echo directory-to-be >"$base/becomes-directory"
mkdir "$base/becomes-file" && echo inside >"$base/becomes-file/inside"
for i in 1 2 3; do echo "base $i" >"$base/changes$i"; done

# The second layers: additions, changes, whiteouts (.wh.NAME hides NAME of the layers below; .wh..wh..opq all of the directory).
one=$work/one
mkdir -p "$one"/{new,opaque,gone,becomes-directory}
echo changed >"$one/changes1"
: >"$one/.wh.changes2"
chmod 600 "$one/changes1"
: >"$one/gone/.wh.deep"
: >"$one/opaque/.wh..wh..opq"
echo fresh >"$one/opaque/kept"
echo inside >"$one/becomes-directory/inside"
echo now-a-file >"$one/becomes-file"
noise "$one/new/noise" 4000000 2000
words "$one/new/text" 1 200000
two=$work/two
mkdir -p "$two/other"
: >"$two/.wh.changes3"
noise "$two/other/noise" 3000000 3000

# Times that do not depend on when this runs, save the few set above.
find "$base" "$one" "$two" -newermt '2020-01-01' ! -newermt '2100-01-01' -exec touch -h -d '2024-05-06T07:08:09.101112131Z' {} +
pack() {
  tar -C "$work/$1" --warning=no-timestamp --sort=name --numeric-owner --xattrs --xattrs-include='*' --format=pax \
    --pax-option=exthdr.name=%d/PaxHeaders/%f,delete=atime,delete=ctime -cf "$work/$1.tar" .
}
pack base
for name in one two; do
  pack "$name"
  "$here/../demo/pack-layout.sh" --output "$dir/$name" "$work/base.tar" "$work/$name.tar"
  "$here/reference.sh" "$dir/$name" "$bin" >"$dir/$name.list.new"
done
for name in one two; do mv "$dir/$name.list.new" "$dir/$name.list"; done
