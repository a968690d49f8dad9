#!/bin/bash
# Runs in the guest: the host's tree is at /mnt/host, /tmp is empty, /mnt/out is kept. Nothing else runs here.
set -euo pipefail
bin=/mnt/host$1 images=/mnt/host$2
shift 2
export TMPDIR=/tmp
exec "$bin/start" --images "$images" --work /tmp/starts --transport ublk --alone --json /mnt/out/starts.json "$@"
