"""One recipe gives one loss curve, however it is spread over processes."""

import itertools
import math
import shutil
import signal
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.torch_version import TorchVersion

from tests.helpers import curve, short_and_slow, toy_options
from tests.layouts import Launcher
from tests.parity.test_data_parallel import assert_same_curve

RECIPE = {
    "model__num_layers": 4,
    "model__num_heads": 4,
    "train__global_batch_size": 16,
    "train__steps": 6,
    "train__evaluation_interval": 3,
    "schedule__warmup_steps": 2,
    "checkpoint__interval": 100,
}
SCHEDULES = ("1f1b", "interleaved", "interleaved-zero-bubble", "zbv")


def micro_batches(pipeline: int) -> int:
    """Micro-batches a step on a process: as few as show accumulation and fill the pipeline."""
    return 2 if pipeline <= 2 else 4


def layouts() -> list[tuple[int, int, int, int]]:
    """(pipeline, data, context, tensor) of up to 8 processes that the toy model allows.

    4 layers and heads, 16 sequences a step, 32 tokens a sequence.
    """
    every = itertools.product(range(1, 9), repeat=4)
    return [
        (pipeline, data, context, tensor)
        for pipeline, data, context, tensor in every
        if 1 < pipeline * data * context * tensor <= 8
        and pipeline <= 4
        and data in (1, 2, 4, 8)
        and context in (1, 2, 4, 8)
        and tensor in (1, 2, 4)
        and 16 % (data * micro_batches(pipeline)) == 0
    ]


def train(launcher: Launcher, tokens: Path, folder: Path, processes: int, **overrides: Any) -> Path:
    """Train the toy recipe; returns the run directory.

    A process that glibc aborts ("malloc(): unaligned tcache chunk detected") is forgiven once, and
    said: gloo 2.13 does that now and then with eight processes on two busy cores. A program that
    calls nothing but torch.distributed's collectives died of it too, in gloo's threads; nothing
    that megaphi runs on a CPU is native code.
    """
    folder.mkdir(exist_ok=True)
    options = toy_options(tokens, folder / "run", **{**RECIPE, **overrides})
    log = folder / "log.txt"
    statuses = launcher.train(options, processes, log)
    if -signal.SIGABRT in statuses and "malloc(): unaligned tcache" in log.read_text():
        warnings.warn(f"gloo aborted, statuses {statuses}: tried again", stacklevel=1)
        shutil.rmtree(folder)
        folder.mkdir()
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
    pipeline, data, context, tensor = layout
    return {
        "train__micro_batch_size": 16 // (data * micro_batches(pipeline)),
        "parallel__pipeline": pipeline,
        "parallel__context": context,
        "parallel__tensor": tensor,
    }


# each axis and each pair of axes, two processes wide
SHORT = [layout for layout in layouts() if max(layout) == 2 and sorted(layout)[:2] == [1, 1]]
LONG = [layout for layout in layouts() if layout not in SHORT]


@pytest.mark.parametrize("layout", short_and_slow(SHORT, LONG), ids=str)
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


@pytest.mark.parametrize("schedule", SCHEDULES[1:])
@pytest.mark.parametrize("tensor", short_and_slow([1], [2]))
def test_every_schedule_gives_the_curve_of_one_process(
    launcher: Launcher,
    one_process: Path,
    toy_tokens: Path,
    tmp_path: Path,
    schedule: str,
    tensor: int,
) -> None:
    """Several stages a process, in a loop or there and back, with the weights' gradients apart."""
    if schedule != "interleaved" and torch.__version__ < TorchVersion("2.13"):
        pytest.skip("PyTorch 2.13 is the first that runs this schedule")
    run = train(
        launcher,
        toy_tokens,
        tmp_path,
        2 * tensor,
        parallel__pipeline=2,
        parallel__tensor=tensor,
        parallel__pipeline_schedule=schedule,
    )
    assert_same_curve(one_process, run)


@pytest.mark.slow
@pytest.mark.parametrize("recompute", ["selective", "full"])
@pytest.mark.parametrize("reshard", ["false", "true"])
def test_recomputation_and_full_sharding_change_nothing(
    launcher: Launcher,
    one_process: Path,
    toy_tokens: Path,
    tmp_path: Path,
    recompute: str,
    reshard: str,
) -> None:
    """Pipeline, tensor and data parallelism together."""
    run = train(
        launcher,
        toy_tokens,
        tmp_path,
        8,
        **axes((2, 2, 1, 2)),
        parallel__recompute=recompute,
        parallel__reshard_after_forward=reshard,
    )
    assert_same_curve(one_process, run)


@pytest.mark.parametrize(
    "layout",
    short_and_slow([(1, 2, 1, 1)], [(1, 4, 1, 1), (1, 2, 2, 1), (1, 2, 1, 2), (2, 2, 1, 1)]),
    ids=str,
)
def test_groups_with_whole_sets_of_shards_change_nothing(
    launcher: Launcher,
    one_process: Path,
    toy_tokens: Path,
    tmp_path: Path,
    layout: tuple[int, int, int, int],
) -> None:
    """Hybrid sharding: weights are gathered inside of a group, gradients summed over groups."""
    processes = math.prod(layout)
    run = train(launcher, toy_tokens, tmp_path, processes, **axes(layout), parallel__replicate=2)
    assert_same_curve(one_process, run)


def test_stages_of_unequal_size(launcher: Launcher, toy_tokens: Path, tmp_path: Path) -> None:
    """Three blocks on two processes."""
    one = train(launcher, toy_tokens, tmp_path / "one", 1, model__num_layers=3)
    two = train(
        launcher, toy_tokens, tmp_path / "two", 2, model__num_layers=3, parallel__pipeline=2
    )
    assert_same_curve(one, two)


@pytest.mark.parametrize("dtype", short_and_slow(["bf16"], ["fp16", "fp32"]))
def test_number_formats_agree_under_every_axis(
    launcher: Launcher, one_process: Path, toy_tokens: Path, tmp_path: Path, dtype: str
) -> None:
    """16-bit numbers stay as near to fp32 on 4 processes as rounding allows."""
    run = train(launcher, toy_tokens, tmp_path, 4, **axes((2, 1, 1, 2)), precision__dtype=dtype)
    exact, rounded = curve(one_process), curve(run)
    for key, values in exact.items():
        assert rounded[key][0] == pytest.approx(values[0], rel=0.01), key
