#!/usr/bin/env bash
# Write launch/requirements.lock: every Python package of the CPU paths, by version and SHA-256.
#
#   bash launch/lock.sh [--upgrade]
#
# torch, and what only it needs, is left out: environment.sh pins it, and it differs by machine.
# Needs `uv` on PATH (pip install uv).
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

overrides="$(mktemp)"
trap 'rm -rf "$overrides"' EXIT
echo 'torch; sys_platform == "none"' >"$overrides"
extras=()
for extra in data llm filter eval gguf plot ray test; do extras+=(--extra "$extra"); done
uv pip compile setup.py "${extras[@]}" --universal --python-version 3.11 --generate-hashes \
    --override "$overrides" --no-annotate --no-header --quiet "$@" -o launch/requirements.lock - \
    <<<"setuptools>=70"
