#!/usr/bin/env bash
# Train a recipe on this machine: preflight, then one process for each GPU.
#
#   bash launch/train_node.sh RECIPE [--section.key=value …]
#
#   GPUS=N        processes (default: the GPUs of this machine; without any, 1, over gloo on the CPU)
#   PREFLIGHT=0   skip `megaphi preflight`
#   RESTARTS=N    start again up to N times after a crash or a hang (default: 3), but not when the
#                 run got no further than the time before; each is recorded in restarts.jsonl
#   EVALUATE=SUITE  score each checkpoint as it is published (humaneval, mbpp, FILE.jsonl) in a process
#                 of its own alongside the training, on EVALUATE_DEVICE (default: cpu)
#   PYTHON=…      a python that has megaphi's requirements (default: .venv, made if it is not there)
#
# Exit status: the trainer's own, which torchrun would hide. 0 done, 1 failed, 2 wrong call,
# 4 hung, 75 saved after SIGTERM or SIGUSR1: run me again. Paths are meant from where you stand.
#
# One node of several: launch/train_slurm.sbatch sets NODES, NODE (from 0), JOB and RENDEZVOUS
# (host of node 0), PORT; the same five work under any other scheduler.
set -euo pipefail

root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
case "${1:-}" in
    "" | -h | --help) sed -n '2,/^set /{/^set /d;s/^# \{0,1\}//p;}' "${BASH_SOURCE[0]}"; exit 2 ;;
esac
if [ -z "${PYTHON:-}" ]; then
    here="$PWD"
    source "$root/launch/environment.sh"
    make_environment data eval
    cd "$here"
fi
export PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}"

RESTARTS="${RESTARTS:-3}"
attempt=0

say() { echo "train_node: $*" >&2; }
restarts() { "$PYTHON" -m megaphi.resilience.restarts "$@"; }

[[ "$RESTARTS" =~ ^[0-9]+$ ]] || { say "RESTARTS=$RESTARTS is not a number"; exit 2; }
[[ "${GPUS:-1}" =~ ^[1-9][0-9]*$ ]] || { say "GPUS=$GPUS is not a number of processes"; exit 2; }
# where the run stands: what it gets beyond that is progress. A wrong recipe ends here, reported once
reached="$(restarts begin "$@")"
if [ -z "${GPUS:-}" ]; then
    GPUS="$("$PYTHON" -c 'import torch; print(max(1, torch.cuda.device_count()))')"
fi
cores="$(nproc)"
state="$(mktemp -d "${TMPDIR:-/tmp}/megaphi-node.XXXXXX")"
trap 'rm -rf "$state"' EXIT

# What is set already is kept.
# threads of each process: torchrun's 1 leaves cores idle, the default would start all cores' worth
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-$((cores > GPUS ? cores / GPUS : 1))}"
# the allocator grows segments in place: no out-of-memory from fragments at a full GPU
export PYTORCH_ALLOC_CONF="${PYTORCH_ALLOC_CONF:-expandable_segments:True}"
# NCCL is silent by default; WARN names the adapter, port or rank when a connection fails
export NCCL_DEBUG="${NCCL_DEBUG:-WARN}"
# TORCH_NCCL_ASYNC_ERROR_HANDLING stays at its default, 3: a failed or timed-out collective ends the
# process, so that a dead node ends the run instead of hanging it

# Compilers keep caches in the home directory, which nodes share and which is small and slow.
cache="${MEGAPHI_CACHE:-${TMPDIR:-/tmp}/megaphi-cache-$(id -u)}"
export TRITON_CACHE_DIR="${TRITON_CACHE_DIR:-$cache/triton}"             # default ~/.triton
export TORCHINDUCTOR_CACHE_DIR="${TORCHINDUCTOR_CACHE_DIR:-$cache/inductor}"
export CUDA_CACHE_PATH="${CUDA_CACHE_PATH:-$cache/cuda}"                 # default ~/.nv
# where the last collectives of each rank are written when one hangs; default ~/.cache/torch
export TORCH_FR_DUMP_TEMP_FILE="${TORCH_FR_DUMP_TEMP_FILE:-$cache/collectives-${JOB:-$$}-rank-}"
mkdir -p "$cache"

# Signals. Torchrun kills its ranks 30 s after a signal (fixed before torch 2.12), less than a save
# may take, and SIGUSR1 kills torchrun itself. So it ignores both, and the ranks, which inherit that
# until the trainer listens, get SIGUSR1 from here, again and again until they have left. SIGHUP is
# a terminal that went away. An interrupt is torchrun's to pass on, and it gets it once: from here.
stop=""
launcher=""
trap 'stop=1' TERM USR1 HUP
trap '[ -n "$launcher" ] || exit 130; kill -INT "$launcher" 2>/dev/null || true' INT

signal_ranks() { # name of the signal
    local group
    while read -r group; do
        kill "-$1" -- "-$group" 2>/dev/null || true
    done < <(cat "$state/groups" 2>/dev/null)
}

# shellcheck disable=SC2153,SC2329 # torchrun's ranks call it, and torchrun sets RANK
run_rank() { # runs as the leader of a rank's process group: torchrun gives each a session
    local status=0
    trap : INT # the rank answers it; its status is still to be written
    echo "$$" >>"$state/groups"
    "$@" || status=$?
    echo "$RANK $status" >>"$state/statuses"
    return "$status"
}
export -f run_rank
export state

failed_hard() { # whether a rank was killed or hung: the others cannot do anything without it
    awk '$2 == 4 || ($2 > 128 && $2 != 130 && $2 != 138) {found = 1} END {exit !found}' \
        "$state/statuses"
}

run_ranks() { # port offset, command…: one process for each GPU; returns the status of the ranks
    local offset="$1" launcher_status=0 rank status doomed=""
    local where=(--standalone)
    shift
    [ -z "$stop" ] || return 75
    if [ "${NODES:-1}" -gt 1 ]; then
        : "${NODE:?number of this node, from 0}" "${JOB:?name of the job, the same on all nodes}"
        : "${RENDEZVOUS:?host of node 0}" "${PORT:?port on it; the next one is used as well}"
        # the default is to compare host names, which aliases of a node's network cards defeat
        where=(--nnodes "$NODES" --rdzv-backend c10d --rdzv-endpoint "$RENDEZVOUS:$((PORT + offset))"
            --rdzv-id "$JOB-$offset-$attempt" --rdzv-conf "is_host=$((NODE == 0))")
    fi
    : >"$state/groups"
    : >"$state/statuses"
    (
        trap '' TERM USR1
        exec setsid "$PYTHON" -m torch.distributed.run --signals-to-handle SIGINT,SIGQUIT \
            "${where[@]}" --nproc-per-node "$GPUS" --no-python bash -c 'run_rank "$@"' rank "$@"
    ) &
    launcher=$!
    while kill -0 "$launcher" 2>/dev/null; do
        if [ -n "$stop" ] && [ -s "$state/groups" ]; then
            signal_ranks USR1
        elif [ -n "$stop" ]; then
            kill -KILL "$launcher" 2>/dev/null || true # it still waits for other nodes
        fi
        if [ -n "$doomed" ]; then
            signal_ranks KILL
        elif failed_hard; then
            doomed=1 # they get a moment to say something; torchrun would give them 30 s
        fi
        sleep 2 >/dev/null 2>&1 & # a signal can come just before a `wait`, which would not see it
        wait -n "$launcher" $! || true
    done
    wait "$launcher" && launcher_status=0 || launcher_status=$?
    launcher=""
    [ "$launcher_status" -le 128 ] || signal_ranks KILL # torchrun was killed and left its ranks
    [ "$launcher_status" -ne 0 ] || return 0
    # the first to fail is the cause; torchrun ends the others because of it
    read -r rank status < <(grep -v ' 0$' "$state/statuses" 2>/dev/null) || true
    if [ -z "${status:-}" ]; then
        [ -z "$stop" ] || return 75 # stopped before any rank ran: nothing is lost
        say "torchrun failed on $(hostname), see its message above"
        return 1
    fi
    # while it ends, Python no longer catches the signal that told it to stop (128 + SIGUSR1)
    [ -z "$stop" ] || [ "$status" -ne 138 ] || return 75
    if [ "$status" -gt 128 ] && [ "$status" -ne 130 ]; then
        say "rank $rank on $(hostname) was killed by signal $((status - 128)); run again, and it" \
            "resumes from the newest checkpoint"
        return 1
    fi
    return "$status"
}

status=0
if [ "${PREFLIGHT:-1}" != 0 ]; then
    run_ranks 1 "$PYTHON" -m megaphi preflight "$@" || status=$?
fi
follower=""
if [ -n "${EVALUATE:-}" ] && [ "$status" -eq 0 ] && [ "${NODE:-0}" -eq 0 ]; then
    run_dir="$("$PYTHON" -c 'import sys
from megaphi.recipe_file import load_recipe
print(load_recipe(sys.argv[1:]).train.run_dir)' "$@")" || exit 2
    "$PYTHON" -m megaphi evaluate "$run_dir" --suite "$EVALUATE" --follow \
        --device "${EVALUATE_DEVICE:-cpu}" >&2 &
    follower=$!
fi
while [ "$status" -eq 0 ]; do
    run_ranks 0 "$PYTHON" -m megaphi.train "$@" || status=$?
    [ "$status" -eq 1 ] || [ "$status" -eq 4 ] || break
    [ -z "$stop" ] || break
    attempt=$((attempt + 1))
    reached="$(restarts decide "$attempt" "$RESTARTS" "$status" "$reached" "$@")" || break
    status=0
done
if [ -n "$follower" ]; then
    # a run that is done has its last checkpoint scored; else the next start takes up what is missing
    [ "$status" -eq 0 ] || kill "$follower" 2>/dev/null || true
    wait "$follower" || [ "$status" -ne 0 ] || say "the evaluation failed; see its message above"
    [ -z "$stop" ] || kill "$follower" 2>/dev/null || true
fi
[ "$status" -ne 75 ] || say "stopped on request; run me again"
exit "$status"
