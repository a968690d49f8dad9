#!/bin/sh
# rust-test.sh BIN IMAGES NAME : a test program of the workspace, on a kernel that has what it needs.
exec "$1/guest-tests/$3" --nocapture --test-threads=1
