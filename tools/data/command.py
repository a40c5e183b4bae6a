"""`megaphi data`: build a corpus, stage by stage.

    megaphi data ingest SOURCE... --out DIR
    megaphi data annotate RECORDS_DIR... --model NAME --base-url URL --samples N --out DIR
    megaphi data compose --kind exercises|textbooks|suite --samples N --out DIR|SUITE.jsonl
    megaphi data plan-generation --kind textbooks|exercises --samples N --out PLAN.jsonl
    megaphi data generate PLAN.jsonl --model NAME --base-url URL --out DIR
    megaphi data train-filter LABELS_DIR RECORDS_DIR... --features hashed|MODEL --out DIR
    megaphi data filter RECORDS_DIR... --filter DIR --threshold X --out DIR
    megaphi data report RECORDS_DIR... [--before RECORDS_DIR...] --out DIR
    megaphi data train-tokenizer RECORDS_DIR --vocab-size N --out DIR
    megaphi data tokenize RECORDS_DIR --tokenizer NAME_OR_DIR --out PREFIX
    megaphi data merge PREFIX... --out PREFIX
    megaphi data trace PREFIX|RECORDS_DIR --repo OWNER/NAME
    megaphi data blend PREFIX=EPOCHS... --out FILE.yaml
    megaphi data run RECIPE.yaml [--engine local|ray|slurm]

Progress goes to stderr, one line of result to stdout; `--json` prints one
JSON object instead. A finished output of the same inputs and options is reused.
"""

import json
from collections.abc import Sequence

from tools.data.parser import find_verb, parse
from tools.data.stage_options import flags_of_stage
from tools.option_names import translate, translated


def main(argv: Sequence[str]) -> int:
    """Run a sub-verb; returns the exit status.

    Raises:
        ValueError: the call is wrong.
        RunError: the data are broken, or too many documents were refused.
    """
    verb = find_verb(argv)
    options, as_json = parse(verb, argv)
    from tools.data.execution import run_verb

    typed = flags_of_stage(verb.stage)
    with translated(typed):
        done = run_verb(argv[0], verb, options)
    result = {"verb": argv[0], **done.result}
    print(json.dumps(result) if as_json else translate(done.line, typed))
    return 0
