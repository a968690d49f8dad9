#!/bin/bash
# The demo in a User-Mode-Linux guest, over a real ublk device: demo-vm.sh BIN-DIR [DEMO-OPTION...]
set -euo pipefail
here=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")" && pwd -P)
bin=$(realpath -- "${1:?usage: demo-vm.sh BIN-DIR [DEMO-OPTION...]}")
shift
source=$(realpath -- "$here/../../target/demo/source")
# Registry, store and unpacked layers all lie in the guest's memory.
exec "$here/../vm/run-uml.sh" "$here/demo-guest.sh" --mem 4G --timeout 600 -- "$bin" "$source" "$@"
