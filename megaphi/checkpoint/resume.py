"""What a checkpoint and a run must agree in before one continues the other.

What is refused and what is only reported is listed in `megaphi.checkpoint.drift`.
"""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import nn

from megaphi.checkpoint.drift import recipe_drift
from megaphi.config import Model, Recipe
from megaphi.data.samples import token_file_prefixes
from megaphi.data.sidecar import TokenFileInfo, verify_info
from megaphi.device import device_name
from megaphi.durable import file_sha256
from megaphi.formats.manifest import CheckpointError, read_manifest
from megaphi.formats.weights import open_weights, read_model_config, resolve_model
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
            index = file_sha256(Path(f"{prefix}.idx"))
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
        "tokenizer of the token files": next((i.tokenizer_sha256 for i in infos.values()), None),
    }


def token_file_dates(recipe: Recipe) -> list[int]:
    """When each token file was last written to, in nanoseconds."""
    paths = [Path(f"{prefix}.bin") for prefix in token_file_prefixes(recipe)]
    return [path.stat().st_mtime_ns for path in paths]


def check_token_file_dates(
    recipe: Recipe, infos: dict[str, TokenFileInfo], before: list[int]
) -> list[str]:
    """Look closer at token files whose date is another than at the checkpoint.

    Returns:
        What cannot be told: files that nothing describes.

    Raises:
        TokenFileError: the file's bytes are not those that its description records.
        CheckpointError: the dates are not those of these files.
    """
    unknown = []
    prefixes = token_file_prefixes(recipe)
    if len(before) != len(prefixes):
        raise CheckpointError(
            f"the checkpoint has {len(before)} token_file_dates, the run {len(prefixes)} token "
            "files; use another checkpoint"
        )
    for prefix, old, new in zip(prefixes, before, token_file_dates(recipe), strict=True):
        if old == new:
            continue
        if prefix in infos:
            verify_info(prefix, deep=True)
        else:
            unknown.append(f"{prefix}.bin was written to since, and nothing tells if it changed")
    return unknown


def environment(mesh: Mesh, rounding: Mapping[str, str]) -> dict[str, Any]:
    """What bitwise equality of a resumed run depends on besides the recipe.

    Args:
        mesh: the processes.
        rounding: what was decided for this machine that changes how results are rounded.
    """
    return {
        "torch": torch.__version__,
        "CUDA": torch.version.cuda,
        "device": device_name(mesh.device),
        "CPU instructions": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "processes": mesh.size,
        "layout": " x ".join(f"{axis} {mesh.axis_size(axis)}" for axis in AXES),
        **rounding,
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


STATE_KEYS = (
    "step",
    "consumed_samples",
    "optimizer_updates",
    "nonfinite_in_a_row",
    "skipped_updates",
    "spikes",
    "rewinds",
    "loss_scale",
    "precision_tensors",
    "data_order",
    "token_file_dates",
    "environment",
)
"""What the trainer saves alongside the tensors."""


def check_state(state: dict[str, Any], recipe: Recipe, directory: Path) -> None:
    """Make sure that nothing of a checkpoint's state is missing or was reset.

    Raises:
        CheckpointError: an item is missing, or contradicts another.
        ValueError: the size of the global batch is another.
    """
    missing = [key for key in STATE_KEYS if key not in state]
    if missing:
        raise CheckpointError(
            f"{directory / 'trainer.json'}: {', '.join(missing)} missing, without which the run "
            "would not go on as it was; use another checkpoint"
        )
    step = read_manifest(directory)["step"]
    updates = state["optimizer_updates"] + state["skipped_updates"]
    if not step == state["step"] == updates:
        raise CheckpointError(
            f"{directory / 'trainer.json'}: step {state['step']} and {updates} updates, done or "
            f"skipped, in a checkpoint of step {step}; use another checkpoint"
        )
    batch = recipe.train.global_batch_size
    if state["consumed_samples"] != step * batch:
        raise ValueError(
            f"{directory} has seen {state['consumed_samples']} samples in {step} steps; "
            f"train.global_batch_size={batch} does not fit that and cannot change within a run"
        )


def recipe_changes(recipe: Recipe, directory: Path) -> list[str]:
    """What of the recipe changes the numbers of a run from here on, as "key was A, is B"."""
    before = yaml.safe_load((directory / "config.yaml").read_text(encoding="utf-8"))
    drift = recipe_drift(before, recipe.to_dict(), "warn")
    return [f"{key} was {old}, is {new}" for key, (old, new) in drift.items()]


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
            f"rebatch this run set data.planned_samples={before.get('data.planned_samples')}"
        )
    raise ValueError(
        f"resuming {directory} would change the order of the data: {', '.join(different)}; {hint}"
    )
