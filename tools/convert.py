"""`megaphi convert`: from a checkpoint to a Hugging Face directory, and back.

    megaphi convert to-hf CHECKPOINT OUT_DIR     what transformers, llama.cpp and vLLM load
    megaphi convert from-hf HF_DIR OUT_DIR       a checkpoint that training can start from

Tensors stream through memory one output file at a time. OUT_DIR appears by one rename when all of
it is written, so a conversion that was killed leaves nothing that looks finished.
"""

import argparse
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

    from megaphi.checkpoint.weights import CheckpointWeights
    from megaphi.config import Model


def _parser() -> argparse.ArgumentParser:
    """The options of the verb."""
    parser = argparse.ArgumentParser(
        prog="megaphi convert",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    directions = parser.add_subparsers(dest="direction", required=True, metavar="to-hf|from-hf")
    to_hf = directions.add_parser("to-hf", help="write a Hugging Face directory")
    to_hf.add_argument("source", metavar="CHECKPOINT", help="checkpoint or run directory")
    to_hf.add_argument("out_dir", metavar="OUT_DIR", type=Path)
    to_hf.add_argument(
        "--dtype", choices=("fp32", "bf16", "fp16"), help="format of the weights; default: as is"
    )
    to_hf.add_argument("--max-shard-size", default="5GB", metavar="SIZE", help="default: 5GB")
    to_hf.add_argument(
        "--verify", action="store_true", help="read back and compare every bit before publishing"
    )
    from_hf = directions.add_parser("from-hf", help="write a checkpoint")
    from_hf.add_argument("source", metavar="HF_DIR", type=Path)
    from_hf.add_argument("out_dir", metavar="OUT_DIR", type=Path)
    for direction in (to_hf, from_hf):
        direction.add_argument("--json", action="store_true", help="print one JSON object")
    return parser


def main(argv: Sequence[str]) -> int:
    """Run the verb; returns the exit status."""
    options = _parser().parse_args(argv)
    if options.direction == "to-hf":
        result = export_hugging_face(
            options.source,
            options.out_dir,
            dtype_name=options.dtype,
            max_shard_size=options.max_shard_size,
            verify=options.verify,
        )
    else:
        result = import_hugging_face(options.source, options.out_dir)
    if options.json:
        print(json.dumps(result))
    else:
        checked = ", read back and equal bit by bit" if result.get("verified") else ""
        print(
            f"{result['out_dir']}: {result['tensors']} tensors, {result['bytes']} bytes of "
            f"{result['dtype']} in {result['files']} file(s){checked}"
        )
    return 0


def export_hugging_face(
    source: str | Path,
    out_dir: Path,
    *,
    dtype_name: str | None = None,
    max_shard_size: str = "5GB",
    verify: bool = False,
) -> dict[str, Any]:
    """Write a `PhiForCausalLM` directory from a checkpoint.

    Args:
        source: checkpoint or run directory.
        out_dir: directory to create; it may exist only if it is empty.
        dtype_name: fp32, bf16 or fp16; None keeps the checkpoint's format.
        max_shard_size: most data of one safetensors file, as in `5GB`.
        verify: read everything back and compare it with the checkpoint before publishing.

    Returns:
        What was written, for people and scripts.

    Raises:
        ValueError: the source is no checkpoint, `out_dir` is not free, or a weight is too large
            for the format.
        CheckpointError: the checkpoint is damaged.
    """
    from megaphi.checkpoint.files import (
        DTYPE_NAMES,
        new_directory,
        parse_size,
        require_free,
        write_shards,
    )
    from megaphi.checkpoint.manifest import read_manifest
    from megaphi.checkpoint.tokenizer_files import copy_tokenizer, end_of_text_id, find_tokenizer
    from megaphi.checkpoint.weights import CheckpointWeights, is_checkpoint, resolve_model

    max_bytes = parse_size(max_shard_size)
    require_free(out_dir)
    directory = resolve_model(source)
    if not is_checkpoint(directory):
        raise ValueError(f"{directory} is a Hugging Face directory already")
    weights = CheckpointWeights(directory)
    dtype = DTYPE_NAMES[dtype_name] if dtype_name else _common_dtype(weights)
    with new_directory(out_dir) as temporary:
        stream = _hugging_face_tensors(weights, dtype)
        written = write_shards(temporary, stream, max_bytes=max_bytes, metadata={"format": "pt"})
        if len(set(written.files.values())) > 1:
            index = {"metadata": {"total_size": written.bytes}, "weight_map": written.files}
            _write_json(temporary / "model.safetensors.index.json", index)
        tokenizer_dir = find_tokenizer(directory)
        if tokenizer_dir is not None:
            copy_tokenizer(tokenizer_dir, temporary)
        end_of_text = end_of_text_id(tokenizer_dir, weights.config.vocab_size)
        _write_configs(temporary, weights.config, dtype, end_of_text)
        card = _model_card(weights.config, read_manifest(directory), directory.name, dtype)
        (temporary / "README.md").write_text(card, encoding="utf-8")
        if verify:
            _verify_export(temporary, weights, dtype)
    return {
        "source": str(directory),
        "out_dir": str(out_dir),
        "tensors": len(written.files),
        "bytes": written.bytes,
        "files": len(set(written.files.values())),
        "dtype": str(dtype).removeprefix("torch."),
        "tokenizer": tokenizer_dir is not None,
        "verified": verify,
    }


def import_hugging_face(source: Path, out_dir: Path) -> dict[str, Any]:
    """Write a weights-only checkpoint from a Hugging Face phi directory.

    Raises:
        FileNotFoundError, ValueError: there is no such directory, it is not one that we read, or
            `out_dir` is not free.
        CheckpointError: a tensor file is damaged.
    """
    from megaphi.checkpoint.hf import HuggingFaceWeights
    from megaphi.checkpoint.tokenizer_files import find_tokenizer
    from megaphi.checkpoint.weights import write_weights_checkpoint

    if not source.is_dir():
        raise FileNotFoundError(
            f"{source}: no such directory (names of the Hugging Face hub are not looked up: "
            "download first)"
        )
    weights = HuggingFaceWeights(source)
    tokenizer_dir = find_tokenizer(source)
    details = {"kind": "weights", "converted_from": source.resolve().name}
    written = write_weights_checkpoint(
        out_dir, weights.config, weights.items(), tokenizer_dir, details
    )
    return {
        "source": str(source),
        "out_dir": str(out_dir),
        "tensors": len(written.files),
        "bytes": written.bytes,
        "files": len(set(written.files.values())),
        "dtype": " and ".join(sorted(str(d).removeprefix("torch.") for d in weights.dtypes)),
        "tokenizer": tokenizer_dir is not None,
    }


def _common_dtype(weights: "CheckpointWeights") -> "torch.dtype":
    """The one format of a checkpoint; fp32 for a mixture, which loses nothing."""
    import torch

    return next(iter(weights.dtypes)) if len(weights.dtypes) == 1 else torch.float32


def _hugging_face_tensors(
    weights: "CheckpointWeights", dtype: "torch.dtype"
) -> "Iterator[tuple[str, torch.Tensor]]":
    """The tensors of `PhiForCausalLM` one after the other, in `dtype`."""
    from megaphi.checkpoint.hf import to_hugging_face

    for name, tensor in weights.items():
        converted = tensor.to(dtype)
        if bool(converted.isinf().any()) and not bool(tensor.isinf().any()):
            raise ValueError(f"{name} has values too large for {dtype}; use --dtype bf16 or fp32")
        yield from to_hugging_face(name, converted, weights.config)


def _verify_export(directory: Path, weights: "CheckpointWeights", dtype: "torch.dtype") -> None:
    """Compare every bit of a written directory with its source.

    Raises:
        RunError: names the tensor that differs.
    """
    from megaphi.checkpoint.files import read_header, same_bits
    from megaphi.errors import RunError

    written = {
        stored.name: stored
        for path in sorted(directory.glob("*.safetensors"))
        for stored in read_header(path)[0]
    }
    for name, tensor in _hugging_face_tensors(weights, dtype):
        stored = written.pop(name, None)
        if stored is None or not same_bits(stored.read(), tensor):
            raise RunError(f"{name} was not written as it is in {weights.directory}; try again")
    if written:
        raise RunError(f"{next(iter(written))} was written but is not in {weights.directory}")


def _write_configs(
    directory: Path, config: "Model", dtype: "torch.dtype", end_of_text: int | None
) -> None:
    """Write config.json and generation_config.json."""
    from megaphi.checkpoint.hf_config import config_to_hugging_face

    _write_json(directory / "config.json", config_to_hugging_face(config, dtype, end_of_text))
    generation = {
        "bos_token_id": end_of_text,
        "do_sample": False,
        "eos_token_id": end_of_text,
        "pad_token_id": end_of_text,
    }
    _write_json(directory / "generation_config.json", generation)


def _write_json(path: Path, values: dict[str, Any]) -> None:
    """Write a JSON file as Hugging Face does: sorted, indented."""
    path.write_text(json.dumps(values, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _model_card(
    config: "Model", manifest: dict[str, Any], checkpoint: str, dtype: "torch.dtype"
) -> str:
    """The README of an exported model: what it is and which recipe made it."""
    from megaphi.model.phi import num_parameters

    recipe = manifest["files"].get("config.yaml", {}).get("sha256")
    rows = {
        "architecture": "phi (`PhiForCausalLM`)",
        "parameters": f"{num_parameters(config):,}",
        "layers x hidden x heads": f"{config.num_layers} x {config.hidden_size} x "
        f"{config.num_heads}",
        "MLP width": str(config.ffn_size),
        "vocabulary": str(config.vocab_size),
        "context": str(config.max_sequence_length),
        "weights": str(dtype).removeprefix("torch."),
        "checkpoint": f"`{checkpoint}`, manifest {manifest['sha256'][:16]}",
        "step": str(manifest.get("step", "not recorded")),
        "recipe (SHA-256 of config.yaml)": recipe or "not recorded",
    }
    table = "\n".join(f"| {name} | {value} |" for name, value in rows.items())
    return (
        "---\nlibrary_name: transformers\npipeline_tag: text-generation\n---\n\n"
        "# A phi model trained with megaphi\n\n"
        f"| | |\n|---|---|\n{table}\n\n"
        "This is a base model: it continues text and follows no instructions. Run the code that "
        "it writes only in a sandbox.\n"
    )
