"""`megaphi data`: build a corpus, stage by stage.

    megaphi data ingest SOURCE... --out DIR
    megaphi data annotate RECORDS_DIR... --model NAME --base-url URL --samples N --out DIR
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

from tools.data.options.executor import run_verb
from tools.data.parser import make_parser
from tools.data.run import command as data_run


def main(argv: Sequence[str]) -> int:
    """Run a sub-verb; returns the exit status.

    Raises:
        ValueError: the call is wrong.
        RunError: the data are broken, or too many documents were refused.
    """
    parser, verbs = make_parser()
    data_run.add_parser(verbs)
    arguments = parser.parse_args(list(argv))
    result, line = run_verb(arguments, argv)
    print(json.dumps(result) if arguments.json else line)
    return 0
