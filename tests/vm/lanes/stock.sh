#!/bin/sh
# In an emulated machine with a stock kernel: the lanes that /lanes.list names with their arguments, one after another.
set -u
failed=0
while read -r name arguments; do
  # shellcheck disable=SC2086 # arguments are words
  if sh "/lanes/$name.sh" /programs /images $arguments </dev/null; then
    echo "ok $name $arguments"
  else
    failed=1
  fi
  rm -rf /tmp/tmp.*
done </lanes.list
exit $failed
