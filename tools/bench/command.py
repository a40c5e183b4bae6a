"""`megaphi bench VERB --out DIR`: measure this machine, alongside the tools that others use.

Writes DIR/NAME.json, with everything needed to judge the figures (machine, load, versions, commit,
command line, every single repeat), and DIR/NAME.txt, the table that is also printed; `kernels` and
`train` also draw DIR/NAME.png, where matplotlib is installed. NAME is the verb unless given.
"""

import argparse
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megaphi.errors import EXIT_FAILED, EXIT_OK
from tools.bench.machine import _DATA_PACKAGES, _GPU_PACKAGES, describe_machine, machine_lines


def main(argv: Sequence[str]) -> int:
    """Run a sub-verb; returns the exit status, 1 where something of ours gave a wrong result.

    Raises:
        ValueError: the call is wrong.
        RunError: a measurement of our own failed.
    """
    options = build_parser().parse_args(argv)
    from megaphi.durable import write_durably

    machine = describe_machine(["megaphi", "bench", *argv], options.packages)
    report, lines = options.run(options)
    machine["load_after"] = os.getloadavg()
    report = {"machine": machine, **report}
    options.out.mkdir(parents=True, exist_ok=True)
    name = getattr(options, "result_name", None) or options.name
    if options.packages is _GPU_PACKAGES:
        from tools.bench.plot import plot

        missing = plot(report, options.out / f"{name}.png")
        lines += [missing] if missing else []
    text = "\n".join([*machine_lines(machine), *lines])
    write_durably(options.out / f"{name}.json", json.dumps(report, indent=1) + "\n")
    write_durably(options.out / f"{name}.txt", text + "\n")
    print(json.dumps(report) if options.json else text)
    return EXIT_FAILED if report.get("failed") else EXIT_OK


def build_parser() -> argparse.ArgumentParser:
    """The sub-verbs and their options."""
    parser = argparse.ArgumentParser(
        prog="megaphi bench",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    verbs = parser.add_subparsers(dest="name", required=True, metavar="VERB")
    data = verbs.add_parser(
        "data",
        help="corpus stages, tokenizing, sample order, blending, loading",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    data.add_argument("--out", type=Path, required=True, metavar="DIR", help="where results go")
    data.add_argument("--json", action="store_true", help="print one JSON object")
    data.add_argument("--tokenizer", default="codegen", metavar="NAME_OR_DIR", help="tokenizer")
    data.add_argument(
        "--source", type=Path, metavar="DIR", help="its .py files; None: the standard library"
    )
    data.add_argument("--megabytes", type=float, default=32.0, metavar="N", help="of --source")
    data.add_argument("--index-tokens", type=float, default=2e9, metavar="N", help="made up")
    data.add_argument(
        "--blend-samples", type=float, default=36.9e6, metavar="N", help="of two data sets, 6 to 1"
    )
    data.add_argument(
        "--loader-samples", type=int, default=100_000, metavar="N", help="of 2,048 tokens"
    )
    data.add_argument("--repeats", type=int, default=3, metavar="N", help="of everything")
    cores = len(os.sched_getaffinity(0))
    data.add_argument("--workers", type=int, default=cores, metavar="N", help="of our tokenizing")
    data.add_argument("--groups", metavar="A,B", help="only these tables; None: all")
    data.add_argument(
        "--megatron-lm", type=Path, metavar="DIR", help="checkout, for its preprocess_data.py"
    )
    data.set_defaults(run=_data, packages=_DATA_PACKAGES)
    _add_kernels(verbs)
    _add_train(verbs)
    return parser


def _add_gpu_verb(verbs: Any, name: str, text: str) -> argparse.ArgumentParser:
    """A sub-verb that measures a GPU where there is one, with the options common to them."""
    formatter = argparse.ArgumentDefaultsHelpFormatter
    verb: argparse.ArgumentParser = verbs.add_parser(name, help=text, formatter_class=formatter)
    verb.add_argument("--out", type=Path, required=True, metavar="DIR", help="where results go")
    verb.add_argument("--json", action="store_true", help="print one JSON object")
    verb.add_argument("--result-name", metavar="NAME", help="of the files; None: the verb")
    verb.add_argument(
        "--seconds", type=float, default=float("inf"), help="what is not begun by then is left out"
    )
    verb.set_defaults(packages=_GPU_PACKAGES)
    return verb


def _add_kernels(verbs: Any) -> None:
    """`bench kernels` and its options."""
    kernels = _add_gpu_verb(verbs, "kernels", "every operation against torch.compile and others")
    add = kernels.add_argument
    add("--dtype", choices=("bf16", "fp16", "fp32"), help="None: bf16, without a GPU fp32")
    add("--rows", type=int, metavar="N", help="tokens; None: 16384, without a GPU 64")
    add("--quick", action="store_true", help="small shapes, as without a GPU")
    add("--tune", action="store_true", help="also other block sizes and warps of our kernels")
    add("--operations", metavar="A,B", help="only these; None: all")
    add("--providers", metavar="A,B", help="only these, of eager, compile, triton, …; None: all")
    kernels.set_defaults(run=_kernels)


def _add_train(verbs: Any) -> None:
    """`bench train` and its options."""
    train = _add_gpu_verb(verbs, "train", "tokens a second of real steps, and where time goes")
    add = train.add_argument
    add("--recipe", type=Path, help="None: phi-1-base, without a GPU a tiny model")
    add("--precisions", metavar="A,B", help="of precision.dtype; None: bf16, without a GPU fp32")
    add("--micro-batches", metavar="N,N", help="sequences a pass; None: 8, without a GPU 2")
    add("--accumulate", type=int, default=1, metavar="N", help="micro-batches a step")
    add("--attention", default="auto", metavar="A,B", help="of compute.attention")
    add("--dropout", default="0", metavar="P,P", help="residual and attention dropout")
    add("--kernels", metavar="A,B", help="of triton, torch; None: both, without a GPU torch")
    add("--compile", default="off", metavar="A,B", help="compute.compile: off, on or both")
    add("--peer", metavar="A,B", help="transformers (compiled), transformers-eager")
    add("--steps", type=int, default=10, metavar="N", help="timed")
    add("--warmup-steps", type=int, default=3, metavar="N", help="not timed")
    add("--profile-steps", type=int, default=2, metavar="N", help="split by kind of work; or 0")
    add("--curve", type=int, metavar="N", help="run N steps and compare the losses instead")
    add("--limit", type=float, default=180.0, metavar="SECONDS", help="for a configuration")
    add("--work", type=Path, metavar="DIR", help="for token files; None: the system's choice")
    set_help = "further recipe keys; may be repeated"
    add("--set", action="append", default=[], metavar="SECTION.KEY=VALUE", help=set_help)
    train.set_defaults(run=_train)


def _kernels(options: argparse.Namespace) -> tuple[dict[str, Any], list[str]]:
    from tools.bench.kernels.command import run_kernels

    return run_kernels(options)


def _train(options: argparse.Namespace) -> tuple[dict[str, Any], list[str]]:
    from tools.bench.train.command import run_train

    return run_train(options)


def _data(options: argparse.Namespace) -> tuple[dict[str, Any], list[str]]:
    from tools.bench.data.command import run_data

    return run_data(options)
