#!/bin/bash
# Runs in the guest: the host's tree is at /mnt/host, /tmp is empty, /mnt/out is kept. Nothing else runs here.
set -euo pipefail
bin=/mnt/host$1 target=/mnt/host$2
shift 2
export TMPDIR=/tmp
# As bench/starts/guest.sh: all memory is used once before anything is measured, so that none of it costs a fault of the host.
perl -e 'open my $info, "<", "/proc/meminfo" or die; my ($kb) = map { /^MemAvailable:\s+(\d+)/ ? $1 : () } <$info>;
  my $share = "x" x (1024 * int($kb * 0.9));'
exec "$bin/performance" --images "$target/bench/images" --tree "$target/starts/erofs:node" --work /tmp/performance \
  --json /mnt/out/performance.json "$@"
