#!/bin/bash
# Before each start of gguf-fleet-runner-jit.service, as root: a fresh copy of the runner, and a
# registration with GitHub that is good for one job. Reads jit.json beside this file.
set -eu
PATH=/usr/sbin:/usr/bin:/sbin:/bin
umask 077
here="$(dirname -- "$(readlink -f -- "$0")")"
user=gguf-runner
runner=/srv/gguf-fleet/runner
template=/srv/gguf-fleet/template

# Hard links: nothing is copied, and a file of root's cannot be changed through one of its names.
rm -rf --one-file-system -- "$runner.new" "$runner.old"
cp -a --link -- "$template" "$runner.new"
find "$runner.new" -type d -exec chown -- "$user:$user" {} +
if [ -e "$runner" ]; then mv -- "$runner" "$runner.old"; fi
mv -- "$runner.new" "$runner"
rm -rf --one-file-system -- "$runner.old"

install -d -m 700 /run/gguf-fleet
python3 -I "$here/jit_register.py" "$here/jit.json" /run/gguf-fleet/jit.env
