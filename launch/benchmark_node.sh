#!/usr/bin/env bash
# Everything that one GPU should be measured for, in one call of at most ten minutes.
#
#   bash launch/benchmark_node.sh OUT [--dry-run]
#
# Parts run in the order of their value, each under a limit of its own; one that fails does not stop
# the others, and the exit status is 1 if any did. At most eight files appear in OUT:
#   summary.txt doctor.json gpu-tests.txt train.txt train.json train.png kernels.txt, and in
#   everything.tar.gz all results, plots and logs.
# Without a GPU, or with --dry-run, all parts run at tiny sizes on the CPU (five minutes on two cores;
# the limits are doubled).
# Uses the python that is active (PYTHON names another) and installs nothing.
# MEGAPHI_BENCH_SECONDS (default 570, dry run 1200): when everything must have ended.
set -uo pipefail

case "${1:-}" in
    "" | -*) echo "usage: bash launch/benchmark_node.sh OUT [--dry-run]" >&2; exit 2 ;;
    /*) out="$1" ;;
    *) out="$PWD/$1" ;;
esac
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit 1
PYTHON="${PYTHON:-python3}"
export PYTHONUNBUFFERED=1 PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"
has_gpu="$("$PYTHON" -c 'import torch; print(int(torch.cuda.is_available()))')" ||
    { echo "$PYTHON cannot import torch; activate megaphi's environment, or set PYTHON" >&2; exit 2; }
dry=0
if [ "${2:-}" = --dry-run ] || [ "$has_gpu" = 0 ]; then
    dry=1
    export CUDA_VISIBLE_DEVICES="" # every part must take the CPU's path
    # waiting threads that spin starve each other at these sizes
    export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
fi

seconds="${MEGAPHI_BENCH_SECONDS:-$((dry ? 1200 : 570))}"
factor=$((1 + dry))

mkdir -p "$out" || exit 1
work="$(mktemp -d "${TMPDIR:-/tmp}/megaphi-bench-XXXXXX")" || exit 1
trap 'rm -rf "$work"' EXIT
parts="$work/parts" all="$work/all"
mkdir -p "$all"
: >"$parts"
started=$SECONDS
failed=0

part() { # NAME LIMIT_SECONDS COMMAND…: output goes to NAME.log
    local name="$1" limit=$((factor * $2)) left=$((seconds - (SECONDS - started))) begun=$SECONDS status
    shift 2
    [ "$left" -lt "$limit" ] && limit="$left"
    if [ "$limit" -lt 10 ]; then
        printf '%-14s %-16s %4s s\n' "$name" "no time left" 0 | tee -a "$parts"
        failed=1
        return
    fi
    printf '\n== %s (at most %s s)\n' "$name" "$limit"
    timeout --kill-after=10 "$limit" "$@" >"$all/$name.log" 2>&1
    status=$?
    local word="ok"
    [ "$status" -eq 124 ] || [ "$status" -eq 137 ] && word="over its limit"
    [ "$word" = ok ] && [ "$status" -ne 0 ] && word="failed ($status)"
    [ "$status" -eq 0 ] || failed=1
    tail -n "${SHOWN:-12}" "$all/$name.log"
    printf '%-14s %-16s %4s s\n' "$name" "$word" "$((SECONDS - begun))" >>"$parts"
}
bench() { # VERB NAME LIMIT OPTIONS…
    local verb="$1" name="$2" limit="$3" left=$((seconds - (SECONDS - started))) own
    shift 3
    own=$((factor * limit < left ? factor * limit : left))
    # it stops by itself before it would be stopped, so that what it has is written down
    SHOWN=25 part "$name" "$limit" "$PYTHON" -m megaphi bench "$verb" --out "$all" \
        --result-name "$name" --seconds $((own - own / 5)) "$@"
}

if [ "$dry" = 1 ]; then
    export MEGAPHI_GPU_TESTS_ON_CPU=1
    base=fp32 fp8=fp8-auto ours=torch steps="--steps 3 --warmup-steps 1 --profile-steps 1"
    quick="--limit 150" curve=30 batches=2 wide=2
    rows="--dtype fp32 --operations layer_norm,bias_gelu,linear_cross_entropy,sum_of_squares"
    test_command=(env TRITON_INTERPRET=1 "$PYTHON")
else
    base=bf16 fp8=fp8 ours=triton steps="--steps 8 --warmup-steps 3 --profile-steps 2"
    quick="--limit 75" curve=60 rows="" batches=8 wide=16
    test_command=("$PYTHON")
fi

# shellcheck disable=SC2086  # options of several words
{
    part doctor 60 bash -c "'$PYTHON' -m megaphi doctor --json >'$out/doctor.json' &&
        '$PYTHON' -m megaphi doctor"
    bench train headline 170 --precisions "$base,$fp8" --dropout 0,0.1 --kernels "$ours" \
        --micro-batches "$batches" $steps $quick
    part gpu-tests 150 "${test_command[@]}" -m pytest -p no:cacheprovider -rs --durations=10 \
        tests/gpu
    bench train peers 180 --precisions "$base" --kernels "$ours,torch" --compile off,on \
        --micro-batches "$batches" --peer transformers $steps $quick
    bench kernels kernels 150 $rows
    bench train curve 80 --precisions "$base,$fp8" --kernels "$ours" --curve "$curve" $quick \
        --micro-batches "$batches"
    bench train wide 60 --precisions "$base,$fp8" --kernels "$ours" --micro-batches "$wide" \
        $steps $quick
    bench kernels tune 60 --tune --providers triton --operations \
        linear_cross_entropy,bias_dropout_add_layer_norm,layer_norm,bias_gelu,rotary_packed
}

# at most eight files: what is read first, and an archive of the rest
cp "$all/gpu-tests.log" "$out/gpu-tests.txt" 2>/dev/null
for name in headline peers curve; do
    [ -f "$all/$name.txt" ] && { cat "$all/$name.txt"; echo; }
done >"$out/train.txt"
cp "$all/headline.json" "$out/train.json" 2>/dev/null
cp "$all/kernels.txt" "$out/kernels.txt" 2>/dev/null
cp "$all/headline.png" "$out/train.png" 2>/dev/null
tar -C "$all" -czf "$out/everything.tar.gz" .
{
    echo "benchmark_node.sh$([ "$dry" = 1 ] && echo ' (dry run on the CPU: the figures mean nothing)')"
    cat "$parts"
    printf '%-14s %-16s %4s s\n' total "" "$((SECONDS - started))"
    for name in headline peers curve wide; do
        [ -f "$all/$name.txt" ] && { printf '\n%s\n' "$name"; sed -n '/^configuration/,/^$/p' "$all/$name.txt"; }
    done
    for name in kernels tune; do
        [ -f "$all/$name.txt" ] && { printf '\n%s\n' "$name"; grep -E '^\S.*\(.*\) +pass|^  ->|^FAILED' "$all/$name.txt" | sed 's/ *pass .*//'; }
    done
} >"$out/summary.txt"
printf '\n'
cut -c1-160 "$out/summary.txt"
exit "$failed"
