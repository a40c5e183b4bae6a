#!/usr/bin/env bash
# Checks a change: format, lint, types, import contract, tests. Sets itself up.
#
#   bash launch/test.sh [pytest options]         what a contributor runs; prints the coverage
#   bash launch/test.sh --all [pytest options]   also the tests marked `slow`; what CI runs
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"

make_environment data llm filter eval gguf plot test
if ! "$PYTHON" -c "import triton" 2>/dev/null; then
    # the interpreter runs kernels on a CPU; GPU builds of torch bring their own
    pip_install "triton==3.6.0" || echo "no Triton for this platform: its tests are skipped"
fi

if [ "${1:-}" = --all ]; then
    short=0
    shift
else
    short=1
    set -- -m "not slow" --cov --cov-report= "$@"
fi

say "ruff"
"$PYTHON" -m ruff format --check .
"$PYTHON" -m ruff check .
say "mypy"
"$PYTHON" -m mypy
"$PYTHON" -m mypy --package tests
say "import contract"
PYTHONPATH=. "$VENV/bin/lint-imports" --no-cache | tail -n 12
say "pytest"
workers="${MEGAPHI_TEST_WORKERS:-$("$PYTHON" -c 'import os; print(min(8, os.cpu_count() or 1))')}"
"$PYTHON" -m pytest -n "$workers" --dist loadscope "$@"
if [ "$short" = 1 ]; then
    say "coverage of these tests (lines that ran in the test processes; $PYTHON -m coverage html)"
    for package in kernels megaphi data_pipeline tools; do
        printf '%-14s %s%%\n' "$package" \
            "$("$PYTHON" -m coverage report --include="$package/*" --format=total)"
    done
fi
