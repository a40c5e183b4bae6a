#!/usr/bin/env bash
# From Python source to a trained phi that Hugging Face loads, on a CPU, in minutes.
#
#   bash launch/quickstart.sh [OUT_DIR] [--section.key=value …]
#
# Run again, it reuses what is done. Options after OUT_DIR change the recipe.
set -euo pipefail

# a relative OUT_DIR is meant from where the user stands
case "${1:-}" in
    "" | --*) out="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)/quickstart" ;;
    /*) out="$1"; shift ;;
    *) out="$PWD/$1"; shift ;;
esac
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"

make_environment data eval
# OpenMP threads that wait by spinning starve each other where anything else runs: with one busy
# neighbour on two cores, 5,600 tokens/s with this and 3,200 without; 4% lost on a quiet machine
export GOMP_SPINCOUNT="${GOMP_SPINCOUNT:-20000}"
megaphi() { "$PYTHON" -m megaphi "$@"; }

say "1/4 corpus: the standard library of $("$PYTHON" --version) -> records, tokenizer, tokens"
library="$("$PYTHON" -c 'import sysconfig; print(sysconfig.get_path("stdlib"))')"
megaphi data run launch/recipes/quickstart-data.yaml --work "$out" \
    --set variables.library="$library"

say "2/4 train launch/recipes/quickstart.yaml -> $out/run (a few minutes on two cores)"
megaphi train launch/recipes/quickstart.yaml --train.run_dir="$out/run" \
    --data.train="$out/tokens/stdlib" "$@"

newest="$(basename "$(ls -d "$out"/run/step-???????? | tail -n 1)")"
say "3/4 export -> $out/hf-$newest, for transformers.AutoModelForCausalLM.from_pretrained"
if [ -e "$out/hf-$newest/config.json" ]; then
    echo "reused"
else
    megaphi convert to-hf "$out/run/$newest" "$out/hf-$newest"
fi

say "4/4 complete a prompt"
megaphi generate "$out/hf-$newest" --prompt $'import os\nimport sys\n\nclass ' \
    --temperature 0.7 --top-p 0.95 --seed 1 --max-new-tokens 48

say "done"
cat <<END
records      $out/records (raw, clean: before deduplication and before heuristics)
report       $out/report/report.html
tokenizer    $out/tokenizer
token file   $out/tokens/stdlib.bin, .idx, .json
run          $out/run (metrics.jsonl, tensorboard/, checkpoints step-*)
model        $out/hf-$newest

What to try next:
  $VENV/bin/megaphi generate $out/run --prompt "import os" --temperature 0.8 --seed 1
  $VENV/bin/megaphi inspect $out/run
  $VENV/bin/tensorboard --logdir $out/run/tensorboard
END
