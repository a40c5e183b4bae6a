#!/usr/bin/env bash
# Break saves and trainings in every way that the tests know, and count what was survived.
#
#   bash launch/soak.sh [MINUTES] [SEED] [--json FILE] [--first TRIAL]
#
# Runs on the CPU, for an hour unless MINUTES says otherwise; a trial that has begun is ended. SEED
# and the number of a trial repeat it: --first begins there. As root it also fills a file system of
# its own. Prints a table; --json writes the figures to FILE.
#
#   PYTHON=…   a python that has megaphi's requirements (default: .venv, made if it is not there)
#
# Exit status: 1 if anything was not as promised, with the seed and the trial.
set -euo pipefail

root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
case "${1:-}" in
    -h | --help) sed -n '2,/^set /{/^set /d;s/^# \{0,1\}//p;}' "${BASH_SOURCE[0]}"; exit 2 ;;
esac
if [ -z "${PYTHON:-}" ]; then
    here="$PWD"
    source "$root/launch/environment.sh"
    make_environment data test
    cd "$here"
fi
export PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}" OMP_NUM_THREADS=1
exec "$PYTHON" -m tests.faults.soak "$@"
