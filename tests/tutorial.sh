#!/bin/bash
# What the commands of docs/tutorial.md are run with: the image that they call app:1, and a script of them, line by line.
#   tutorial.sh DIR     gives DIR/app, an OCI layout, and DIR/run; `sh run ADDRESS` has a registry that serves it at ADDRESS
set -euo pipefail
here=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")" && pwd -P)
dir=${1:?usage: tutorial.sh DIR}
mkdir -p "$dir"
root=$(mktemp -d)
trap 'rm -rf "$root" "$dir/app.tar"' EXIT
mkdir -p "$root"/{bin,etc}
cp "$(command -v busybox)" "$root/bin/busybox"
for name in sh cat echo touch; do ln -s busybox "$root/bin/$name"; done
echo 'hello from app' >"$root/etc/motd"
echo 'root:x:0:0::/:/bin/sh' >"$root/etc/passwd"
head -c 4000000 /dev/urandom >"$root/etc/unread"
chmod 755 "$root"
tar -C "$root" --sort=name --owner=0 --group=0 --numeric-owner -cf "$dir/app.tar" .
"$here/demo/pack-layout.sh" --output "$dir/app" "$dir/app.tar"

lines=$(sed -n '/^```console$/,/^```$/p' "$here/../docs/tutorial.md" | sed -nE 's/^\$ //p')
(($(wc -l <<<"$lines") > 20)) || { echo "tutorial.sh: the tutorial has hardly a line" >&2; exit 1; }
cat >"$dir/run" <<RUN
set -e
cd /root
sed "s/registry\\.example\\.com/\$1/g" >/tmp/tutorial <<'LINES'
$lines
LINES
while read -r line; do
  echo "+ \$line"
  eval "\$line" </dev/null
done </tmp/tutorial
RUN
