#!/usr/bin/env bash
# Prints a PYTHONPATH under which the three packages have their names and vLLM finds the plugin, without installing
# anything: the GPU machine brings its own torch, triton and vLLM, and may have no network.
set -euo pipefail
here=$(cd "$(dirname "$0")/../.." && pwd)
packages=$(mktemp -d)
mkdir "$packages/weightsync"
for name in orchestrator agents kernels; do ln -s "$here/$name" "$packages/weightsync/$name"; done
about=$packages/weightsync_orchestrator-0.dist-info
mkdir "$about"
printf 'Metadata-Version: 2.1\nName: weightsync-orchestrator\nVersion: 0\n' > "$about/METADATA"
printf '[vllm.general_plugins]\nweightsync = weightsync.agents.vllm.plugin:register\n' > "$about/entry_points.txt"
echo "$packages${PYTHONPATH:+:$PYTHONPATH}"
