"""What `megaphi inspect` says about checkpoints, runs and Hugging Face model directories.

torch is not imported, unless every byte is to be read: tensor files are known by their headers,
which the safetensors library reads and checks alone.
"""

import json
import math
import statistics
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megaphi.errors import RunError
from megaphi.formats.manifest import (
    CheckpointError,
    check_unlisted,
    find_checkpoints,
    read_manifest,
    verify_checkpoint,
    verify_files,
)
from megaphi.metrics.logger import METRICS_NAME, metric_rows

_TENSOR_SUFFIX = ".safetensors"
_HIGHLIGHTS = (
    "train.steps",
    "train.seed",
    "train.micro_batch_size",
    "train.global_batch_size",
    "data.train",
    "data.sequence_length",
    "optimizer.learning_rate",
    "precision.dtype",
)
_HUGGING_FACE_KEYS = (
    "model_type",
    "num_hidden_layers",
    "hidden_size",
    "num_attention_heads",
    "intermediate_size",
    "vocab_size",
    "max_position_embeddings",
)


def describe_checkpoint(directory: Path, *, deep: bool) -> dict[str, Any]:
    """Describe a checkpoint.

    Raises:
        CheckpointError: a file is damaged, missing or not in the manifest.
    """
    manifest = _verify(directory, deep=deep)
    state = _read_object(directory / "trainer.json")
    recipe = _recipe(directory / "config.yaml")
    tensors = _read_headers(sorted(directory.glob(f"*{_TENSOR_SUFFIX}")))
    weights = [tensor for tensor in tensors if tensor.name.startswith("model.")]
    files = manifest["files"]
    details = {
        key: value for key, value in manifest.items() if key not in ("format", "files", "sha256")
    }
    details.pop("step", None)
    return {
        "step": state.get("step", manifest.get("step")),
        "consumed_samples": state.get("consumed_samples"),
        "tokens_seen": _tokens(state.get("consumed_samples"), recipe),
        "parameters": sum(tensor.elements for tensor in weights),
        "dtypes": sorted({tensor.dtype for tensor in weights}),
        "model": _read_object(directory / "model.json"),
        "optimizer_state": any(tensor.name.startswith("optimizer.") for tensor in tensors),
        "tokenizer": (directory / "tokenizer" / "tokenizer.json").is_file(),
        "files": len(files),
        "bytes": sum(entry["bytes"] for entry in files.values()),
        **details,
        "recipe": recipe or None,
        "environment": state.get("environment"),
        "verified": "hashes" if deep else "sizes",
    }


def _verify(directory: Path, *, deep: bool) -> dict[str, Any]:
    """Check a checkpoint against its manifest and return that.

    Without `deep` tensor files are checked by size, all others by hash.

    Raises:
        CheckpointError: names the first file that is missing, altered or not in the manifest.
    """
    if deep:
        manifest = verify_checkpoint(directory)
        _require_finite(sorted(directory.glob(f"*{_TENSOR_SUFFIX}")))
        return manifest
    manifest = read_manifest(directory)
    check_unlisted(directory, manifest)
    tensor_files = {name for name in manifest["files"] if name.endswith(_TENSOR_SUFFIX)}
    for name in sorted(tensor_files):
        path, expected = directory / name, manifest["files"][name]["bytes"]
        if not path.is_file():
            raise CheckpointError(f"{path}: missing")
        if path.stat().st_size != expected:
            raise CheckpointError(
                f"{path}: {path.stat().st_size} bytes, the manifest says {expected}"
            )
    verify_files(directory, manifest, manifest["files"].keys() - tensor_files)
    return manifest


def _require_finite(paths: Iterable[Path]) -> None:
    """Read every tensor of some files.

    Raises:
        CheckpointError: a value is NaN or infinite.
    """
    from megaphi.formats.files import FLOAT_DTYPES, read_header, require_finite

    for path in paths:
        for stored in read_header(path)[0]:
            if stored.dtype in FLOAT_DTYPES:
                require_finite(stored.read(), f"{path}: {stored.name}")


@dataclass(frozen=True)
class _TensorHeader:
    """A tensor, or one shard of it, as the header of its file describes it."""

    name: str
    elements: int
    dtype: str


def _read_headers(paths: Iterable[Path]) -> list[_TensorHeader]:
    """List the tensors of safetensors files; no data is read.

    Raises:
        CheckpointError: a file is not a sound safetensors file.
    """
    from safetensors import SafetensorError, safe_open

    tensors = []
    for path in paths:
        try:
            with safe_open(path, framework="np") as file:
                for name in file.keys():  # noqa: SIM118 (not a mapping: it has no __iter__)
                    piece = file.get_slice(name)
                    elements = math.prod(piece.get_shape())
                    tensors.append(_TensorHeader(name, elements, piece.get_dtype()))
        except (SafetensorError, OSError, UnicodeDecodeError) as error:
            raise CheckpointError(f"{path}: not a readable safetensors file ({error})") from error
    return tensors


def _read_object(path: Path) -> dict[str, Any]:
    """A JSON object; empty if there is no such file.

    Raises:
        CheckpointError: the file is not a JSON object.
    """
    if not path.is_file():
        return {}
    try:
        values = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: not readable as JSON ({error})") from None
    if not isinstance(values, dict):
        raise CheckpointError(f"{path}: not a JSON object")
    return values


def _recipe(path: Path) -> dict[str, Any]:
    """The keys of a saved recipe that people ask for; empty if there is no such file.

    Raises:
        RunError: the file is not a recipe.
    """
    import yaml

    if not path.is_file():
        return {}
    try:
        tree = yaml.safe_load(path.read_bytes())
        sections = {key: key.split(".") for key in _HIGHLIGHTS}
        return {key: tree[section][name] for key, (section, name) in sections.items()}
    except (yaml.YAMLError, KeyError, TypeError, RecursionError) as error:
        reason = " ".join(str(error).split())
        raise RunError(f"{path}: not the recipe of a run ({reason})") from None


def _tokens(samples: int | None, recipe: dict[str, Any]) -> int | None:
    """Tokens of so many samples; None where either is not known."""
    if samples is None or not recipe:
        return None
    return int(samples * recipe["data.sequence_length"])


def describe_run_directory(directory: Path, *, deep: bool) -> dict[str, Any]:
    """Describe a run: where it stands, and each of its checkpoints.

    A damaged checkpoint does not hide the others: its entry has a `problem`. Restarts are those
    that the metrics tell of; one from before a checkpoint that was gone back to is not among them.

    Raises:
        RunError: the recipe of the run is not readable.
    """
    recipe = _recipe(directory / "config.yaml")
    metrics = _read_metrics(directory / METRICS_NAME)
    latest = directory / "latest"
    return {
        "last_step": metrics["last_step"],
        "planned_steps": recipe.get("train.steps"),
        "loss": metrics["loss"],
        "validation_loss": metrics["validation_loss"],
        "validation_step": metrics["validation_step"],
        "nonfinite_steps": metrics["nonfinite_steps"],
        "tokens_seen": _tokens(metrics["consumed_samples"], recipe),
        "median_tokens_per_second_per_gpu": metrics["median_tokens_per_second_per_gpu"],
        "restarts": metrics["restarts"],
        "latest": latest.read_text("utf-8", "replace").strip() if latest.is_file() else None,
        "set_aside": sorted(path.name for path in directory.glob("step-*.corrupt-*")),
        "recipe": recipe or None,
        "checkpoints": [_short(path, deep=deep) for path in find_checkpoints(directory)],
    }


def _short(checkpoint: Path, *, deep: bool) -> dict[str, Any]:
    """A checkpoint of a run on one line: whole, or what is wrong with it."""
    entry: dict[str, Any] = {"name": checkpoint.name, "step": int(checkpoint.name[len("step-") :])}
    try:
        files = _verify(checkpoint, deep=deep)["files"]
    except CheckpointError as error:
        return entry | {"verified": None, "problem": str(error)}
    size = sum(file["bytes"] for file in files.values())
    return entry | {"bytes": size, "verified": "hashes" if deep else "sizes"}


def _read_metrics(path: Path) -> dict[str, Any]:
    """Sum up metrics.jsonl, line by line."""
    last: dict[str, Any] = {}
    validation: dict[str, Any] = {}
    rates: list[float] = []
    nonfinite = restarts = 0
    for _, row in metric_rows(path):
        if "event" in row:
            restarts += row["event"] == "resume"
            continue
        if "validation_loss" in row:
            validation = row
            continue
        last = row
        rates.append(row["tokens_per_second_per_gpu"])
        nonfinite += row["loss"] is None
    return {
        "last_step": last.get("step"),
        "loss": last.get("loss"),
        "consumed_samples": last.get("consumed_samples"),
        "validation_loss": validation.get("validation_loss"),
        "validation_step": validation.get("step"),
        "nonfinite_steps": nonfinite,
        "restarts": restarts,
        "median_tokens_per_second_per_gpu": statistics.median(rates) if rates else None,
    }


def describe_hugging_face(directory: Path, *, deep: bool) -> dict[str, Any]:
    """Describe a Hugging Face model directory by config.json and the headers of its tensors.

    Such a directory has no manifest, so there is nothing to verify it against; `deep` reads its
    tensors.

    Raises:
        ValueError: it has no safetensors file.
        CheckpointError: a file is damaged.
    """
    paths = sorted(directory.glob(f"*{_TENSOR_SUFFIX}"))
    if not paths:
        raise ValueError(f"{directory}: has a config.json but no *{_TENSOR_SUFFIX} file")
    config = _read_object(directory / "config.json")
    tensors = {tensor.name: tensor for tensor in _read_headers(paths)}
    if deep:
        _require_finite(paths)
    return {
        "model": {key: config.get(key) for key in _HUGGING_FACE_KEYS},
        "parameters": sum(tensor.elements for tensor in tensors.values()),
        "dtypes": sorted({tensor.dtype for tensor in tensors.values()}),
        "tensors": len(tensors),
        "files": len(paths),
        "bytes": sum(path.stat().st_size for path in paths),
        "tokenizer": (directory / "tokenizer.json").is_file(),
    }
