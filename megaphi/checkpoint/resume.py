"""What a checkpoint and a run must agree in before one continues the other."""

import hashlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from megaphi.checkpoint.weights import open_weights, read_model_config, resolve_model
from megaphi.config import Model, Recipe
from megaphi.data.loader import token_file_prefixes
from megaphi.data.sidecar import TokenFileInfo
from megaphi.metrics.meter import device_name
from megaphi.model.init import assign
from megaphi.parallel.mesh import AXES, Mesh

# What changes a model's training but not its weights' shape or meaning.
_FREE_MODEL_KEYS = {"residual_dropout", "attention_dropout", "initializer_range"}


def data_order(recipe: Recipe, infos: dict[str, TokenFileInfo]) -> dict[str, Any]:
    """All that determines which sample comes when.

    Token files are known by content (digest of the index; of the tokens where a sidecar has it,
    else their size), so that they may move but not change.
    """
    files: list[list[str | int]] = []
    for prefix in token_file_prefixes(recipe):
        info = infos.get(prefix)
        if info is not None:
            files.append([info.idx_sha256, info.bin_sha256])
        else:
            index = hashlib.sha256(Path(f"{prefix}.idx").read_bytes()).hexdigest()
            files.append([index, Path(f"{prefix}.bin").stat().st_size])
    value = recipe.data.train
    weights = [] if isinstance(value, str) else [v for v in value if isinstance(v, int | float)]
    return {
        "train.seed": recipe.train.seed,
        "data.planned_samples": recipe.planned_samples,
        "data.sequence_length": recipe.data.sequence_length,
        "data.split": recipe.data.split,
        "weights of data.train": weights,
        "content of the token files": files,
    }


def environment(mesh: Mesh, precision: str) -> dict[str, Any]:
    """What bitwise equality of a resumed run depends on besides the recipe."""
    return {
        "torch": torch.__version__,
        "device": device_name(mesh.device),
        "threads": torch.get_num_threads(),
        "processes": mesh.size,
        "layout": " x ".join(f"{axis} {mesh.axis_size(axis)}" for axis in AXES),
        "precision": precision,
    }


def changes(before: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """The keys whose values differ, as "key was A, is B"; long values are not printed."""
    found = []
    for key in now:
        old, new = before.get(key), now[key]
        if old != new:
            short = len(f"{old}{new}") < 120
            found.append(f"{key} was {old}, is {new}" if short else f"{key} changed")
    return found


def check_same_model(model: Model, directory: Path) -> None:
    """Raise a `ValueError` unless a checkpoint's model has the recipe's shape."""
    _check_shape(read_model_config(directory), model, directory)


def _check_shape(saved: Model, own: Model, directory: Path) -> None:
    """Raise a `ValueError` that names the keys in which two models' shapes differ."""
    before, now = (
        {key: value for key, value in vars(model).items() if key not in _FREE_MODEL_KEYS}
        | {"intermediate_size": model.ffn_size}
        for model in (saved, own)
    )
    different = changes(before, now)
    if different:
        raise ValueError(
            f"{directory} is of another model: {', '.join(f'model.{text}' for text in different)}; "
            "use its values, or another model"
        )


def load_weights_into(
    named_parameters: Iterable[tuple[str, nn.Parameter]], config: Model, path: str
) -> Path:
    """Start a new run from the weights of another: no optimizer state, no position in the data.

    Args:
        named_parameters: sharded or not; each process reads the full tensors and keeps its part.
        config: the model's shape.
        path: run, checkpoint or Hugging Face directory.

    Returns:
        The directory whose weights were taken.

    Raises:
        ValueError: the model there has another shape, or it is no model.
        CheckpointError: it is damaged.
    """
    source = resolve_model(path)
    weights = open_weights(source)
    _check_shape(weights.config, config, source)
    for name, parameter in named_parameters:
        assign(parameter, weights[name].float())
    return source


def check_same_order(before: dict[str, Any], now: dict[str, Any], directory: Path) -> None:
    """Raise a `ValueError` if resuming would change the order of the data."""
    different = changes(before, now)
    if not different:
        return
    hint = "choose another train.run_dir for a new run"
    if before.get("data.planned_samples") != now["data.planned_samples"]:
        hint = (
            "the order is drawn for train.steps x train.global_batch_size samples; to lengthen or "
            f"rebatch this run add --data.planned_samples={before.get('data.planned_samples')}"
        )
    raise ValueError(
        f"resuming {directory} would change the order of the data: {', '.join(different)}; {hint}"
    )
