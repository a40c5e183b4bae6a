"""`megaphi data annotate`: records -> a sample of them, judged by a language model."""

import argparse
import time
from pathlib import Path
from typing import Any

from tools.data.options.executor import HelpFormatter
from tools.data.options.llm import (
    add_server,
    adjustments,
    consent,
    llm_result,
    need_llm,
    open_ledger,
    read_sending,
    read_servers,
    stage_options,
    unanswered,
)
from tools.data.options.stage import add_output


def add_parser(verbs: Any) -> None:
    """Add the verb."""
    text = "records -> a sample, judged for educational value by a language model"
    parser: argparse.ArgumentParser = verbs.add_parser(
        "annotate",
        help=text,
        description=f"{text}. Answers are kept in a ledger: no prompt is paid for twice.",
        allow_abbrev=False,
        formatter_class=HelpFormatter,
    )
    parser.add_argument("records", nargs="+", type=Path, metavar="RECORDS_DIR")
    parser.add_argument("--samples", type=int, required=True, metavar="N", help="how many to judge")
    parser.add_argument("--seed", type=int, default=1234, metavar="S", help="of the sample")
    parser.add_argument(
        "--question", metavar="TEXT", help="what to determine (default: the sentence of phi-1)"
    )
    parser.add_argument(
        "--answers",
        choices=("schema", "text"),
        default="schema",
        help="schema: the server constrains answers to a JSON schema; text: for those that cannot",
    )
    parser.add_argument(
        "--max-chars", type=int, default=8000, metavar="N", help="of a document that are shown"
    )
    parser.add_argument(
        "--batch-documents", type=int, default=50, metavar="N", help="documents between canaries"
    )
    parser.add_argument(
        "--min-canaries",
        type=float,
        default=0.8,
        metavar="SHARE",
        help="of the canaries that an annotator must judge rightly",
    )
    add_output(parser, max_reject=0.5)
    add_server(parser)
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> tuple[dict[str, Any], str]:
    """Run the verb; returns the JSON result and the line of text.

    Raises:
        ValueError, FileNotFoundError: the call is wrong.
        RunError: see `data_pipeline.annotation.stage.annotate`.
    """
    need_llm()
    from data_pipeline.annotation.stage import Annotation, Judging, annotate
    from data_pipeline.llm.prices import dollars
    from data_pipeline.llm.prompts import QUESTION
    from data_pipeline.llm.secrets import Redactor, guarded

    started = time.monotonic()
    servers, sending = read_servers(arguments), read_sending(arguments)
    redact = Redactor([server.key for server in servers if server.key is not None])
    judging = Judging(
        models=tuple(arguments.model),
        samples=arguments.samples,
        seed=arguments.seed,
        question=arguments.question or QUESTION,
        answers=arguments.answers,
        max_chars=arguments.max_chars,
        batch=arguments.batch_documents,
        min_canaries=arguments.min_canaries,
        adjustments=adjustments(arguments),
    )
    options = stage_options(arguments)
    with guarded(redact):
        annotation = Annotation(arguments.records, judging)
        with open_ledger(arguments, servers) as ledger:
            said = consent(arguments, annotation.estimate(servers, ledger), ledger)
            if said is not None:
                return said
            made = annotate(annotation, arguments.out, servers, sending, ledger, redact, options)
            spent, path = ledger.spent, ledger.path
    manifest, report = made.manifest, made.report
    result = llm_result(arguments, "annotate", manifest, made.reused, spent, path, started)
    result |= {"annotators": report["annotators"], "agreement": report["agreement"]}
    canaries = ", ".join(
        f"{each['model']} {each['canaries_right']:.0%} of {each['canaries']} canaries right"
        for each in report["annotators"]
    )
    for pair in report["agreement"]:
        kappa = pair["weighted_kappa"]
        canaries += f", weighted kappa {'n/a' if kappa is None else format(kappa, '.2f')}"
    audit = report["text_classifier"]
    flagged = "" if audit is None else f", {len(audit['flagged'])} flagged"
    line = (
        f"{'reused' if made.reused else 'annotated'} {arguments.out}: {manifest.records_out} "
        f"records, {manifest.num_rejected} rejected | {canaries}{flagged} | "
        f"{dollars(spent)} in all | {time.monotonic() - started:.1f} s"
        f"{unanswered(manifest.rejected)}"
    )
    return result, line
