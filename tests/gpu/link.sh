#!/usr/bin/env bash
# Prints a folder in which the three packages can be imported under their names, without installing anything:
# the GPU machine brings its own torch and triton, and may have no network.
set -euo pipefail
here=$(cd "$(dirname "$0")/../.." && pwd)
packages=$(mktemp -d)
mkdir "$packages/weightsync"
for name in orchestrator agents kernels; do ln -s "$here/$name" "$packages/weightsync/$name"; done
echo "$packages${PYTHONPATH:+:$PYTHONPATH}"
