"""Hugging Face directories: written from a checkpoint, and read back into one."""

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megaphi.durable import partial_directory, require_free

if TYPE_CHECKING:
    import torch

    from megaphi.config import Model
    from megaphi.formats.logit_comparison import LogitComparison
    from megaphi.formats.model_card import Score
    from megaphi.formats.provenance import Provenance
    from megaphi.formats.weights import CheckpointWeights


def export_hugging_face(
    source: str | Path,
    out_dir: Path,
    *,
    dtype_name: str | None = None,
    max_shard_size: str = "5GB",
    score_dirs: Sequence[Path] = (),
    name: str | None = None,
    license_id: str | None = None,
    verify: bool = False,
) -> dict[str, Any]:
    """Write a `PhiForCausalLM` directory from a checkpoint.

    Memory: the largest tensor, and with `verify` one block with the embedding or the head.

    Args:
        source: checkpoint or run directory.
        out_dir: directory to create; it may exist only if it is empty.
        dtype_name: fp32, bf16 or fp16; None keeps the checkpoint's format.
        max_shard_size: most data of one safetensors file, as in `5GB`.
        score_dirs: results of `megaphi evaluate`; without any, those inside the run are used.
        name: title of the model card.
        license_id: SPDX identifier for the model card.
        verify: before publishing read everything back, compare its bits with the checkpoint's, and
            the logits of both on a fixed prompt. They must be equal where the format is kept, and
            are reported where it is not.

    Returns:
        What was written, for people and scripts.

    Raises:
        ValueError: the source is no checkpoint, `out_dir` is not free, a weight is too large for
            the format, or scores are another model's.
        CheckpointError: the checkpoint is damaged.
        RunError: what was read back differs.
    """
    from megaphi.formats.files import DTYPE_NAMES, parse_size
    from megaphi.formats.hf import exported
    from megaphi.formats.provenance import read_provenance
    from megaphi.formats.tokenizer_files import copy_tokenizer, end_of_text_id, find_tokenizer
    from megaphi.formats.weight_files import write_shards
    from megaphi.formats.weights import CheckpointWeights, is_checkpoint, resolve_model

    max_bytes = parse_size(max_shard_size)
    require_free(out_dir)
    directory = resolve_model(source)
    if not is_checkpoint(directory):
        raise ValueError(f"{directory} is a Hugging Face directory already")
    weights = CheckpointWeights(directory)
    dtype = DTYPE_NAMES[dtype_name] if dtype_name else _common_dtype(weights)
    provenance = read_provenance(directory)
    scores = _scores(directory, provenance, score_dirs)
    comparison = None
    with partial_directory(out_dir) as work:
        stream = exported(weights, weights.config, dtype)
        written = write_shards(work, stream, max_bytes=max_bytes, metadata={"format": "pt"})
        if len(set(written.files.values())) > 1:
            index = {"metadata": {"total_size": written.bytes}, "weight_map": written.files}
            _write_json(work / "model.safetensors.index.json", index)
        tokenizer_dir = find_tokenizer(directory)
        if tokenizer_dir is not None:
            copy_tokenizer(tokenizer_dir, work)
        end_of_text = end_of_text_id(tokenizer_dir, weights.config.vocab_size)
        _write_configs(work, weights.config, dtype, end_of_text)
        _write_card(work, weights.config, dtype, provenance, scores, license_id, name, out_dir)
        if verify:
            comparison = _verify_export(work, weights, dtype)
    return {
        "source": str(directory),
        "out": str(out_dir),
        "tensors": len(written.files),
        "bytes": written.bytes,
        "files": len(written.digests),
        "dtype": str(dtype).removeprefix("torch."),
        "tokenizer": tokenizer_dir is not None,
        "scores": len(scores),
        "verified": verify,
        "logits": asdict(comparison) if comparison is not None else None,
    }


def import_hugging_face(source: Path, out_dir: Path) -> dict[str, Any]:
    """Write a weights-only checkpoint from a Hugging Face phi directory.

    Memory: the largest tensor.

    Raises:
        FileNotFoundError, ValueError: there is no such directory, it is not one that we read, or
            `out_dir` is not free.
        CheckpointError: a tensor file is damaged.
    """
    from megaphi.formats.hf import HuggingFaceWeights
    from megaphi.formats.tokenizer_files import find_tokenizer
    from megaphi.formats.weights import write_weights_checkpoint

    if not source.is_dir():
        raise FileNotFoundError(
            f"{source}: no such directory (names of the Hugging Face hub are not looked up: "
            "download first)"
        )
    require_free(out_dir)
    weights = HuggingFaceWeights(source)
    tokenizer_dir = find_tokenizer(source)
    details = {"kind": "weights", "converted_from": source.resolve().name}
    written = write_weights_checkpoint(
        out_dir,
        weights.config,
        weights.pending(),
        tokenizer_dir,
        details,
    )
    return {
        "source": str(source),
        "out": str(out_dir),
        "tensors": len(written.files),
        "bytes": written.bytes,
        "files": len(written.digests),
        "dtype": " and ".join(sorted(str(d).removeprefix("torch.") for d in weights.dtypes)),
        "tokenizer": tokenizer_dir is not None,
    }


def _common_dtype(weights: "CheckpointWeights") -> "torch.dtype":
    """The one format of a checkpoint; fp32 for a mixture, which loses nothing."""
    import torch

    return next(iter(weights.dtypes)) if len(weights.dtypes) == 1 else torch.float32


def _scores(directory: Path, provenance: "Provenance", score_dirs: Sequence[Path]) -> "list[Score]":
    """The scores that were named, or else those that lie in the run."""
    from megaphi.formats.model_card import find_scores, read_scores

    if score_dirs:
        return [score for path in score_dirs for score in read_scores(path, provenance.identity)]
    resolved = directory.resolve()
    run_dir = resolved.parent if resolved.name.startswith("step-") else resolved
    return find_scores(run_dir, provenance.identity)


def _verify_export(
    directory: Path, weights: "CheckpointWeights", dtype: "torch.dtype"
) -> "LogitComparison":
    """Compare a written directory with its source: every bit, then the logits.

    Raises:
        RunError: names the tensor that differs.
    """
    from megaphi.errors import RunError
    from megaphi.formats.files import read_header, same_bits
    from megaphi.formats.hf import HuggingFaceWeights, exported
    from megaphi.formats.logit_comparison import compare_logits, fixed_prompt

    written = {
        stored.name: stored
        for path in sorted(directory.glob("*.safetensors"))
        for stored in read_header(path)[0]
    }
    for name, pending in exported(weights, weights.config, dtype):
        stored = written.pop(name, None)
        if stored is None or not same_bits(stored.read(), pending.read()):
            raise RunError(f"{name} was not written as it is in {weights.directory}; try again")
    if written:
        raise RunError(f"{next(iter(written))} was written but is not in {weights.directory}")
    # read through the whole way back: names, grouping and config.json
    tokens = fixed_prompt(weights.config)
    comparison = compare_logits(weights, HuggingFaceWeights(directory), tokens)
    if weights.dtypes == {dtype} and not comparison.max_difference == 0.0:
        raise RunError(
            f"{directory}: its logits differ by {comparison.max_difference:.3g} from those of "
            f"{weights.directory}, though every bit was written"
        )
    return comparison


def _write_configs(
    directory: Path, config: "Model", dtype: "torch.dtype", end_of_text: int | None
) -> None:
    """Write config.json and generation_config.json."""
    from megaphi.formats.hf_config import config_to_hugging_face

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


def _write_card(
    directory: Path,
    config: "Model",
    dtype: "torch.dtype",
    provenance: "Provenance",
    scores: "Sequence[Score]",
    license_id: str | None,
    name: str | None,
    out_dir: Path,
) -> None:
    """Write README.md, the model card."""
    from megaphi.formats.model_card import render_card

    card = render_card(
        config,
        dtype,
        provenance,
        scores,
        license_id=license_id,
        name=name,
        directory=out_dir.name,
    )
    (directory / "README.md").write_text(card, encoding="utf-8")
