#!/usr/bin/env bash
# Writes anew what the image is made of: requirements.txt (what the daemon needs, with hashes, in the releases that the
# tests run with), build-requirements.txt, and sbom.cdx.json, its CycloneDX bill of materials. Needs python3.12 and PyPI.
set -euo pipefail
unset PYTHONPATH  # or packages of it would be in the bill
cd "$(dirname "$0")/../.."
here=$PWD/deploy/container
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3.12 -m venv "$work/tools"
"$work/tools/bin/pip" install --quiet --disable-pip-version-check pip-tools==7.6.2 cyclonedx-bom==7.5.0
compile=("$work/tools/bin/pip-compile" --quiet --allow-unsafe --generate-hashes --strip-extras --no-header --no-annotate
    --no-emit-index-url --no-emit-trusted-host --no-emit-find-links)

grep -h '==' tests/requirements-cpu.txt | sed 's/ *#.*//' > "$work/tested.txt"
cp pyproject.toml "$work"
(
    cd "$work"
    "${compile[@]}" --constraint tested.txt --output-file requirements.txt pyproject.toml
    grep '^setuptools==' tested.txt > build.in
    "${compile[@]}" --output-file build-requirements.txt build.in
)
python3.12 -m venv --without-pip "$work/image"
"$work/tools/bin/pip" --python "$work/image/bin/python" install --quiet --disable-pip-version-check --require-hashes \
    --only-binary :all: -r "$work/requirements.txt"
"$work/tools/bin/cyclonedx-py" environment --output-reproducible --of JSON -o "$work/sbom.cdx.json" \
    "$work/image/bin/python"
echo >> "$work/sbom.cdx.json"
cp "$work/requirements.txt" "$work/build-requirements.txt" "$work/sbom.cdx.json" "$here"
