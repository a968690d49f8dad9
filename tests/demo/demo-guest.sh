#!/bin/bash
# Runs in the guest: the host's tree is at /mnt/host, /tmp is empty.
set -euo pipefail
bin=/mnt/host$1 source=/mnt/host$2
shift 2
export TMPDIR=/tmp
exec "$bin/demo" --source "$source" --work /tmp/demo --transport ublk "$@"
