#!/usr/bin/env bash
# Finetune on this machine: a new run that starts from the weights of another.
#
#   bash launch/finetune_node.sh BASE RECIPE [--section.key=value …]
#   bash launch/finetune_node.sh runs/phi-1-base/step-00024000 launch/recipes/phi-1.yaml
#
# BASE is a run directory (its newest verified checkpoint), a checkpoint or a Hugging Face directory.
# Run again, it resumes its own newest checkpoint. Settings and exit status: launch/train_node.sh.
set -euo pipefail

if [ $# -lt 2 ] || [ "${2#-}" != "$2" ]; then
    echo "finetune_node: usage: bash launch/finetune_node.sh BASE RECIPE [--section.key=value …]" >&2
    exit 2
fi
base="$1"
recipe="$2"
shift 2
if [ ! -d "$base" ]; then
    echo "finetune_node: $base: no such run, checkpoint or Hugging Face directory" >&2
    exit 2
fi
exec bash "$(dirname "${BASH_SOURCE[0]}")/train_node.sh" "$recipe" \
    --checkpoint.initialize_from="$base" "$@"
