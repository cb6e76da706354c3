#!/bin/bash
# Before the runner of a pod, as its user: folders on the node's disk, and of what the image brought that which is
# not there yet. With --fresh nothing of jobs before stays: caches are the image's again.
set -euo pipefail
PATH=/usr/sbin:/usr/bin:/sbin:/bin
srv=/srv/gguf-fleet
brought=/opt/gguf-fleet/cache

if [ "${1:-}" = --fresh ]; then
  rm -rf --one-file-system -- "${srv:?}/cache" "${srv:?}/dvc" "${srv:?}/home"
fi
mkdir -p -- "$srv/home" "$srv/cache" "$srv/dvc/cache" "$srv/runner/_work"
for part in environments toolchain ollama; do
  mkdir -p -- "$srv/cache/$part"
  for source in "$brought/$part"/*; do
    target="$srv/cache/$part/${source##*/}"
    if [ -e "$source" ] && [ ! -e "$target" ]; then
      # Its own name only when it is whole: the pod may be stopped at any moment.
      rm -rf --one-file-system -- "$srv/cache/$part/.new"
      cp -a -- "$source" "$srv/cache/$part/.new"
      mv -- "$srv/cache/$part/.new" "$target"
    fi
  done
done
