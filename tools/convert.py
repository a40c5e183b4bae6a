"""`megaphi convert`: from a checkpoint to what other programs load, and back.

    megaphi convert to-hf CHECKPOINT OUT_DIR     what transformers and vLLM load
    megaphi convert to-gguf MODEL OUT.gguf       what llama.cpp loads
    megaphi convert from-hf HF_DIR OUT_DIR       a checkpoint that training can start from

Tensors stream through memory one at a time. The result appears by one rename when all of it is
written, so a conversion that was killed leaves nothing that looks finished.
"""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tools.model_options import wait_without_spinning
from tools.option_names import flags_of, translated


def _parser() -> argparse.ArgumentParser:
    """The options of the verb."""
    parser = argparse.ArgumentParser(
        prog="megaphi convert",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    directions = parser.add_subparsers(
        dest="direction", required=True, metavar="to-hf|to-gguf|from-hf"
    )
    to_hf = directions.add_parser("to-hf", help="write a Hugging Face directory")
    to_hf.add_argument("source", metavar="CHECKPOINT", help="checkpoint or run directory")
    to_hf.add_argument("out", metavar="OUT_DIR", type=Path)
    to_hf.add_argument(
        "--dtype", choices=("fp32", "bf16", "fp16"), help="format of the weights; default: as is"
    )
    to_hf.add_argument("--max-shard-size", default="5GB", metavar="SIZE", help="default: 5GB")
    to_hf.add_argument(
        "--scores",
        type=Path,
        action="append",
        default=[],
        metavar="DIR",
        help="results of `megaphi evaluate` for the model card; default: those in the run",
    )
    to_hf.add_argument(
        "--verify",
        action="store_true",
        help="before publishing, read back, compare every bit, and compare logits",
    )
    to_gguf = directions.add_parser("to-gguf", help="write a GGUF file")
    to_gguf.add_argument(
        "source", metavar="MODEL", help="run, checkpoint or Hugging Face directory"
    )
    to_gguf.add_argument("out", metavar="OUT.gguf", type=Path)
    to_gguf.add_argument(
        "--type",
        choices=("F32", "F16", "BF16", "Q8_0", "Q4_K"),
        default="F16",
        help="of the matrices; Q4_K needs llama.cpp's llama-quantize; default: F16",
    )
    to_gguf.add_argument("--tokenizer", type=Path, metavar="DIR", help="instead of the model's own")
    to_gguf.add_argument(
        "--verify", action="store_true", help="before publishing, read back and compare"
    )
    for direction in (to_hf, to_gguf):
        direction.add_argument("--name", help="name of the model; default: the run's")
        direction.add_argument("--license", metavar="SPDX", help="for instance mit; default: none")
    from_hf = directions.add_parser("from-hf", help="write a checkpoint")
    from_hf.add_argument("source", metavar="HF_DIR", type=Path)
    from_hf.add_argument("out", metavar="OUT_DIR", type=Path)
    for direction in (to_hf, to_gguf, from_hf):
        direction.add_argument("--json", action="store_true", help="print one JSON object")
    return parser


def main(argv: Sequence[str]) -> int:
    """Run the verb; returns the exit status."""
    wait_without_spinning()
    options = _parser().parse_args(argv)
    with translated(flags_of(options)):
        result = _convert(options)
    if options.json:
        print(json.dumps(result))
        return 0
    print(
        f"{result['out']}: {result['tensors']} tensors, {result['bytes']} bytes of "
        f"{result['dtype']} in {result['files']} file(s){_remarks(result)}"
    )
    return 0


def _convert(options: argparse.Namespace) -> dict[str, Any]:
    """Convert in the direction that was asked for."""
    if options.direction == "to-gguf":
        from megaphi.formats.export_gguf import export_gguf

        return export_gguf(
            options.source,
            options.out,
            type_name=options.type,
            tokenizer_dir=options.tokenizer,
            name=options.name,
            license_id=options.license,
            verify=options.verify,
        )
    from megaphi.formats.export_hugging_face import export_hugging_face, import_hugging_face

    if options.direction == "from-hf":
        return import_hugging_face(options.source, options.out)
    return export_hugging_face(
        options.source,
        options.out,
        dtype_name=options.dtype,
        max_shard_size=options.max_shard_size,
        score_dirs=options.scores,
        name=options.name,
        license_id=options.license,
        verify=options.verify,
    )


def _remarks(result: dict[str, Any]) -> str:
    """What else there is to say of a conversion."""
    remarks = ""
    if result.get("verified"):
        error = result.get("quantization_error", 0.0)
        remarks += (
            f", read back: quantized to within {100 * error:.2g}%"
            if error
            else ", read back and equal bit by bit"
        )
    logits = result.get("logits")
    if logits is not None:
        remarks += (
            f", logits within {logits['max_difference']:.2g} of the checkpoint's (largest "
            f"{logits['largest']:.3g}), same top token at {100 * logits['same_top']:.0f}% of "
            f"{logits['positions']} positions"
        )
    return remarks
