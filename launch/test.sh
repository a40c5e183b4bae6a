#!/usr/bin/env bash
# Everything that this machine can check: format, lint, types, tests. Sets itself up.
#
#   bash launch/test.sh [pytest options]
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"

make_environment data llm filter eval gguf plot test
if ! "$PYTHON" -c "import triton" 2>/dev/null; then
    # the interpreter runs kernels on a CPU; GPU builds of torch bring their own
    pip_install "triton==3.6.0" || echo "no Triton for this platform: its tests are skipped"
fi

say "ruff"
"$PYTHON" -m ruff format --check .
"$PYTHON" -m ruff check .
say "mypy"
"$PYTHON" -m mypy
say "import contract"
PYTHONPATH=. "$VENV/bin/lint-imports" --no-cache | tail -n 12
say "pytest"
workers="${MEGAPHI_TEST_WORKERS:-$("$PYTHON" -c 'import os; print(min(8, os.cpu_count() or 1))')}"
"$PYTHON" -m pytest -n "$workers" --dist loadscope "$@"
