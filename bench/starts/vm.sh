#!/bin/bash
# The measured starts in a User-Mode-Linux guest, over a real ublk device: vm.sh BIN-DIR [START-OPTION...]
# The JSON is left in target/starts/vm/starts.json.
set -euo pipefail
here=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")" && pwd -P)
bin=$(realpath -- "${1:?usage: vm.sh BIN-DIR [START-OPTION...]}")
shift
images=$(realpath -- "$here/../../target/starts")
# Registry, stores and unpacked layers all lie in the guest's memory, of which half is /tmp.
exec "$here/../../tests/vm/run-uml.sh" "$here/guest.sh" --mem 8G --timeout "${STARTS_TIMEOUT:-7200}" --out "$images/vm" -- "$bin" "$images" "$@"
