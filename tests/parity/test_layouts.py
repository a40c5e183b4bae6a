"""One recipe gives one loss curve, however it is spread over processes."""

import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.helpers import toy_options
from tests.layouts import Launcher
from tests.parity.test_data_parallel import assert_same_curve

RECIPE = {
    "model__num_layers": 4,
    "model__num_heads": 4,
    "train__global_batch_size": 16,
    "checkpoint__interval": 100,
}
SCHEDULES = ("1f1b", "interleaved", "interleaved-zero-bubble", "zbv")


def layouts() -> list[tuple[int, int, int, int]]:
    """(pipeline, data, context, tensor) of up to 8 processes that the toy model allows.

    4 layers and heads, 16 sequences a step in micro-batches of 2, 32 tokens a sequence.
    """
    sizes = (1, 2, 4, 8)
    every = itertools.product(sizes, repeat=4)
    return [
        (pipeline, data, context, tensor)
        for pipeline, data, context, tensor in every
        if 1 < pipeline * data * context * tensor <= 8
        and pipeline <= 4
        and tensor <= 4
        and data <= 4
    ]


@pytest.fixture(scope="module")
def launcher() -> Iterator[Launcher]:
    """Starts the trainings of this file."""
    with Launcher() as launcher:
        yield launcher


def train(launcher: Launcher, tokens: Path, folder: Path, processes: int, **overrides: Any) -> Path:
    """Train the toy recipe; returns the run directory."""
    options = toy_options(tokens, folder / "run", **{**RECIPE, **overrides})
    log = folder / "log.txt"
    statuses = launcher.train(options, processes, log)
    assert statuses == [0] * processes, log.read_text()[-3000:]
    return folder / "run"


@pytest.fixture(scope="module")
def one_process(
    launcher: Launcher, toy_tokens: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """The reference: everything on one process."""
    return train(launcher, toy_tokens, tmp_path_factory.mktemp("one"), 1)


def axes(layout: tuple[int, int, int, int]) -> dict[str, int]:
    """The keys of a recipe for a layout."""
    pipeline, _, context, tensor = layout
    return {
        "parallel__pipeline": pipeline,
        "parallel__context": context,
        "parallel__tensor": tensor,
    }


@pytest.mark.parametrize("layout", layouts(), ids=str)
def test_every_layout_gives_the_curve_of_one_process(
    launcher: Launcher,
    one_process: Path,
    toy_tokens: Path,
    tmp_path: Path,
    layout: tuple[int, int, int, int],
) -> None:
    """Residual and attention dropout, accumulation, clipping and evaluation included."""
    pipeline, data, context, tensor = layout
    run = train(launcher, toy_tokens, tmp_path, pipeline * data * context * tensor, **axes(layout))
    assert_same_curve(one_process, run)
