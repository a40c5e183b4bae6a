"""`megaphi data generate`: a language model writes textbooks and exercises."""

import argparse
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

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

if TYPE_CHECKING:
    from data_pipeline.generation.stage import Writing


def add_parser(verbs: Any) -> None:
    """Add the verb."""
    text = "a plan -> records: textbook sections and exercises written by a language model"
    parser: argparse.ArgumentParser = verbs.add_parser(
        "generate",
        help=text,
        description=f"{text}. Answers are kept in a ledger: no prompt is paid for twice.",
        allow_abbrev=False,
        formatter_class=HelpFormatter,
    )
    parser.add_argument("plan", type=Path, metavar="PLAN.jsonl")
    parser.add_argument("--max-tokens", type=int, default=1024, metavar="N", help="of an answer")
    parser.add_argument("--temperature", type=float, default=1.0, metavar="T")
    parser.add_argument("--seed", type=int, metavar="S", help="sent to the server")
    parser.add_argument(
        "--prompt", type=Path, metavar="FILE", help="template with the plan's $fields"
    )
    parser.add_argument(
        "--min-words", type=int, default=80, metavar="N", help="of prose in a textbook section"
    )
    parser.add_argument(
        "--window", type=int, default=1000, metavar="N", help="samples a point of the growth curve"
    )
    parser.add_argument(
        "--stop-below",
        type=float,
        default=0.0,
        metavar="SHARE",
        help="stop paying once fewer of a window's sound samples than this are new",
    )
    parser.add_argument(
        "--partial", action="store_true", help="publish what there is when the cost cap is reached"
    )
    parser.add_argument(
        "--tokenizer",
        metavar="NAME_OR_DIR",
        help="count prompt tokens with it in the estimate (the cap keeps reserving their bytes)",
    )
    add_output(parser, max_reject=0.5)
    add_server(parser)
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> tuple[dict[str, Any], str]:
    """Run the verb; returns the JSON result and the line of text.

    Raises:
        ValueError, FileNotFoundError: the call is wrong.
        RunError: see `data_pipeline.generation.stage.generate`.
    """
    need_llm()
    from data_pipeline.generation.stage import estimate, generate
    from data_pipeline.llm.prices import dollars
    from data_pipeline.llm.secrets import Redactor, guarded

    started = time.monotonic()
    if len(arguments.model) > 1:
        raise ValueError("--model: one model writes; run again for another, with another --out")
    (server,) = read_servers(arguments)
    sending, writing = read_sending(arguments), _writing(arguments)
    redact = Redactor([server.key] if server.key is not None else [])
    options = stage_options(arguments)
    with guarded(redact), open_ledger(arguments, [server]) as ledger:
        count = _counter(arguments.tokenizer)
        found = estimate(arguments.plan, writing, server.price, ledger.__contains__, count)
        said = consent(arguments, found, ledger)
        if said is not None:
            return said
        made = generate(
            arguments.plan,
            arguments.out,
            writing,
            server,
            sending,
            ledger,
            redact,
            options,
            samples=found.samples,
            partial=arguments.partial,
        )
        spent, path = ledger.spent, ledger.path
    manifest = made.manifest
    result = llm_result(arguments, "generate", manifest, made.reused, spent, path, started)
    result |= {"stopped": made.report["stopped"], "growth_curve": made.report["growth_curve"]}
    reasons = ", ".join(f"{reason} {count}" for reason, count in manifest.rejected.items())
    stopped = f" | stopped: {made.report['stopped']}" if made.report["stopped"] else ""
    line = (
        f"{'reused' if made.reused else 'generated'} {arguments.out}: {manifest.records_out} "
        f"records of {manifest.records_in} asked for | {manifest.num_rejected} rejected"
        f"{f' ({reasons})' if reasons else ''}{stopped} | {dollars(spent)} in all | "
        f"{time.monotonic() - started:.1f} s{unanswered(manifest.rejected)}"
    )
    return result, line


def _writing(arguments: argparse.Namespace) -> "Writing":
    """What to ask for, as the command line says.

    Raises:
        ValueError, FileNotFoundError: the template cannot be used.
    """
    from data_pipeline.generation.plan import read_plan
    from data_pipeline.generation.stage import Writing
    from data_pipeline.llm.prompts import DEFAULT_PROMPTS, check_template

    prompts = dict(DEFAULT_PROMPTS)
    if arguments.prompt is not None:
        if not arguments.prompt.is_file():
            raise FileNotFoundError(f"--prompt {arguments.prompt}: no such file")
        template = arguments.prompt.read_text(encoding="utf-8")
        first = next(read_plan(arguments.plan), None)
        if first is None:
            raise ValueError(f"{arguments.plan}: an empty plan")
        check_template(template, first.fields, str(arguments.prompt))
        prompts[first.kind] = template
    return Writing(
        model=arguments.model[0],
        prompts=prompts,
        max_tokens=arguments.max_tokens,
        temperature=arguments.temperature,
        seed=arguments.seed,
        min_words=arguments.min_words,
        window=arguments.window,
        stop_below=arguments.stop_below,
        adjustments=adjustments(arguments),
    )


def _counter(name: str | None) -> Callable[[str], int] | None:
    """Counts tokens with a tokenizer; None for the default."""
    if name is None:
        return None
    from data_pipeline.tokens.tokenizer import load_tokenizer

    tokenizer = load_tokenizer(name)
    return lambda text: len(tokenizer.encode_batch([text])[0])
