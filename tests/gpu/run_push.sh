#!/usr/bin/env bash
# The whole product on this machine's GPU, each model in a pytest of its own, all at once: most of the time is vLLM's
# start, and each needs little of a GPU. Prints what failed and the figures of every round; logs go to $OUT.
#
#   tests/gpu/run_push.sh [TEST...]      default: dense graphs rows experts compiled returns
#
# Needs vLLM >= 0.24, NIXL, torch, triton and pytest for python3.
set -uo pipefail
cd "$(dirname "$0")/../.."
tests=("$@")
[ $# -gt 0 ] || tests=(dense graphs rows experts compiled returns)
out=${OUT:-$(mktemp -d)}
export PYTHONPATH
PYTHONPATH=$(tests/gpu/link.sh)
running=()
for name in "${tests[@]}"; do
  python3 -m pytest tests/gpu/test_push.py -m gpu -k "$name" -x -s -q -p no:cacheprovider --basetemp "$out/work-$name" \
    > "$out/$name.log" 2>&1 &
  running+=($!)
done
failed=0
for index in "${!tests[@]}"; do
  name=${tests[$index]}
  if wait "${running[$index]}"; then verdict=passed; else verdict=FAILED failed=1; fi
  echo "== $name: $verdict"
  grep -h '^{"step"' "$out/$name.log"
  [ "$verdict" = passed ] || tail -n 60 "$out/$name.log"
  tar -C "$out" --exclude='*.safetensors' -czf "$out/$name-logs.tgz" "work-$name" && rm -rf "$out/work-$name"
done
exit $failed
