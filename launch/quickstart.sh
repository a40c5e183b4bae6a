#!/usr/bin/env bash
# From Python source to a phi that solves problems it has never seen, on a CPU, in minutes.
#
#   bash launch/quickstart.sh [OUT_DIR] [--section.key=value …]
#   bash launch/quickstart.sh --environment     create .venv and stop
#
# Real code and textbooks first, then exercises: the method of phi-1 with the commands that train the
# 1.3B model. Finished steps are skipped when it is run again. Options after OUT_DIR (default:
# quickstart/ in the checkout) change the recipes of both trainings.
set -euo pipefail

case "${1:-}" in
    -h | --help) sed -n '2,/^set /{/^set /d;s/^# \{0,1\}//p;}' "${BASH_SOURCE[0]}"; exit 0 ;;
esac
# a relative OUT_DIR starts where the user stands
case "${1:-}" in
    "" | --*) out="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)/quickstart" ;;
    /*) out="$1"; shift ;;
    *) out="$PWD/$1"; shift ;;
esac
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"

make_environment data eval
[ "${1:-}" != --environment ] || exit 0
# OpenMP threads that wait by spinning starve each other where anything else runs: with one busy
# neighbour on two cores, 5,600 tokens/s with this and 3,200 without; 4% lost on a quiet machine
export GOMP_SPINCOUNT="${GOMP_SPINCOUNT:-20000}"
megaphi() { "$PYTHON" -m megaphi "$@"; }
newest() { ls -d "$1"/step-???????? | tail -n 1; }

say "1/5 corpus: the standard library of $("$PYTHON" --version), textbooks, exercises -> tokens"
library="$("$PYTHON" -c 'import sysconfig; print(sysconfig.get_path("stdlib"))')"
megaphi data run launch/recipes/quickstart-data.yaml --work "$out" \
    --set variables.library="$library"

say "2/5 pretrain on code and textbooks -> $out/run"
megaphi train launch/recipes/quickstart.yaml --train.run_dir="$out/run" \
    --data.train="[1.0, $out/tokens/stdlib, 1.0, $out/tokens/textbooks]" "$@"
before="$(newest "$out/run")"

say "3/5 finetune on exercises -> $out/finetuned"
megaphi train launch/recipes/quickstart-exercises.yaml --train.run_dir="$out/finetuned" \
    --data.train="$out/tokens/exercises" --checkpoint.initialize_from="$before" "$@"
after="$(newest "$out/finetuned")"

say "4/5 score both on problems that no training text holds -> $out/scores"
if command -v bwrap >/dev/null; then
    for model in "$before" "$after"; do
        name="$(basename "$(dirname "$model")")"
        megaphi evaluate "$model" --suite "$out/suite.jsonl" --out "$out/scores/$name-$(basename "$model")" \
            --max-new-tokens 96 --batch-size 64 --timeout 1
    done
    megaphi reproduce summary --before "$out/scores/run-$(basename "$before")" \
        --after "$out/scores/finetuned-$(basename "$after")" --suite "$out/suite.jsonl" \
        --run-dir "$out/run" --seconds "$SECONDS" --out "$out/result.json"
else
    echo "skipped: generated programs run in bubblewrap, which is not installed;" \
        "apt-get install bubblewrap, and run this again"
fi

say "5/5 export -> $out/hf-$(basename "$after"), for transformers.AutoModelForCausalLM.from_pretrained"
if [ -e "$out/hf-$(basename "$after")/config.json" ]; then
    echo "reused"
else
    megaphi convert to-hf "$after" "$out/hf-$(basename "$after")"
fi

say "done in $SECONDS s"
cat <<END
records      $out/records (Python source), textbooks/, exercises/
report       $out/report/report.html
token files  $out/tokens/
runs         $out/run, then $out/finetuned (metrics.jsonl, tensorboard/, checkpoints step-*)
problems     $out/suite.jsonl
scores       $out/scores/, $out/result.json
model        $out/hf-$(basename "$after")

What to try next:
  $VENV/bin/megaphi inspect $out/finetuned
  $VENV/bin/megaphi evaluate $out/finetuned --suite $out/suite.jsonl --perturb all --out $out/perturbed
  $VENV/bin/megaphi reproduce figure --out $out/figure     # the claim of phi-1, in a quarter of an hour
END
