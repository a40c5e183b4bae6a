# Sourced by the other scripts: makes .venv alongside this folder once, and defines PYTHON.
#
# A torch of 2.11 or newer that the calling python already has (as on GPU images) is kept; else the
# pinned build below is installed first, because a plain `pip install torch` would bring another.
# MEGAPHI_PYTHON names the python to start from (default: python3), MEGAPHI_VENV the environment.
# MEGAPHI_LOCKED=1 installs exactly the files of launch/requirements.lock (for a CPU, all extras).

TORCH_PIN="torch==2.13.0"

cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit 1
VENV="${MEGAPHI_VENV:-$PWD/.venv}"
PYTHON="$VENV/bin/python"

say() { printf '\n== %s\n' "$*"; }

make_environment() { # extras…: data, eval, test
    local base="${MEGAPHI_PYTHON:-python3}" extras stamp torch_dir
    extras="$(IFS=,; echo "$*")"
    stamp="$VENV/.megaphi-$extras-$(cat setup.py launch/requirements.lock | cksum | cut -d' ' -f1)"
    if [ -e "$stamp" ] && "$PYTHON" -c "" 2>/dev/null; then
        return
    fi
    say "environment: $VENV (once; one to three minutes)"
    "$base" -c 'import sys; sys.exit(sys.version_info < (3, 11))' ||
        { echo "megaphi needs Python 3.11 or newer; set MEGAPHI_PYTHON to one" >&2; exit 2; }
    if [ ! -x "$PYTHON" ]; then
        "$base" -m venv "$VENV" ||
            { echo "could not make $VENV; is the venv module installed (python3-venv)?" >&2; exit 1; }
        # where the calling python's torch is, if it is new enough
        torch_dir="$("$base" - <<'END' || true
try:
    import os, torch
    if tuple(int(part) for part in torch.__version__.split("+")[0].split(".")[:2]) >= (2, 11):
        print(os.path.dirname(os.path.dirname(torch.__file__)))
except ImportError:
    pass
END
)"
        if [ -n "$torch_dir" ]; then
            echo "keeping the torch in $torch_dir"
            echo "$torch_dir" >"$("$PYTHON" -c 'import site; print(site.getsitepackages()[0])')/torch-here.pth"
        fi
    fi
    "$PYTHON" -c "import torch" 2>/dev/null || pip_install "$TORCH_PIN"
    if [ "${MEGAPHI_LOCKED:-0}" = 1 ]; then
        pip_install --require-hashes --no-deps -r launch/requirements.lock
        pip_install --no-deps --no-build-isolation -e .
    else
        pip_install -e ".[$extras]"
    fi
    touch "$stamp"
}

pip_install() {
    "$PYTHON" -m pip install --quiet --disable-pip-version-check "$@"
}
