#!/bin/bash
# Runs in the guest: the host's tree is at /mnt/host, /tmp is empty, /mnt/out is kept. Nothing else runs here.
set -euo pipefail
bin=/mnt/host$1 images=/mnt/host$2
shift 2
export TMPDIR=/tmp
# The guest's memory is a sparse file of the host, where a page that was never used costs a fault and is cleared first. A start that
# fills an empty store would pay for that, one whose store is full would not; so all memory is used once before anything is measured.
perl -e 'open my $info, "<", "/proc/meminfo" or die; my ($kb) = map { /^MemAvailable:\s+(\d+)/ ? $1 : () } <$info>;
  my $share = "x" x (1024 * int($kb * 0.9));'
exec "$bin/start" --images "$images" --work /tmp/starts --transport ublk --alone --json /mnt/out/starts.json "$@"
