"""What a run leaves behind, and that the number format changes little."""

import itertools
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml

from kernels.ops import DropoutSeed
from megaphi.config import Model, Recipe
from megaphi.data.indexed import IndexedDatasetWriter
from megaphi.data.sidecar import TokenFileInfo, write_info, written_facts
from megaphi.formats.manifest import find_checkpoints
from megaphi.metrics.logger import console_line, format_count, format_duration
from megaphi.model.phi import Phi
from megaphi.recipe_file import load_recipe
from megaphi.training.compilation import compile_blocks
from tests.helpers import child_environment, curve, metrics, toy_options

Train = Callable[[list[str]], Recipe]


def test_metrics_have_one_row_a_step_with_what_users_read(
    toy_tokens: Path, tmp_path: Path, train_here: Train
) -> None:
    train_here(toy_options(toy_tokens, tmp_path / "run"))
    rows = metrics(tmp_path / "run")
    steps = [row for row in rows if "loss" in row]
    assert [row["step"] for row in steps] == list(range(1, 21))
    for row in steps:
        assert row["consumed_samples"] == 8 * row["step"]
        rate = 8 * 32 / row["seconds"]
        assert row["tokens_per_second_per_gpu"] == pytest.approx(rate)
        assert row["mfu"] is None
        assert row["lr"] > 0 or row["step"] == 20
    evaluations = [row for row in rows if "validation_loss" in row]
    assert [row["step"] for row in evaluations] == [10, 20]
    assert all(set(row) == {"step", "validation_loss"} for row in evaluations)


def test_config_yaml_reruns_the_run(toy_tokens: Path, tmp_path: Path, train_here: Train) -> None:
    train_here(toy_options(toy_tokens, tmp_path / "run"))
    train_here([str(tmp_path / "run" / "config.yaml"), f"--train.run_dir={tmp_path / 'again'}"])
    assert curve(tmp_path / "again") == curve(tmp_path / "run")
    saved = find_checkpoints(tmp_path / "run")[0]
    recipe = yaml.safe_load((saved / "config.yaml").read_text())
    assert recipe["model"]["residual_dropout"] == 0.1


def test_seeds_differ(toy_tokens: Path, tmp_path: Path, train_here: Train) -> None:
    """Otherwise the equalities that other tests look for would say nothing."""
    for seed in (1, 2):
        train_here(toy_options(toy_tokens, tmp_path / str(seed), train__seed=seed, train__steps=3))
    first, second = curve(tmp_path / "1"), curve(tmp_path / "2")
    assert all(first[key] != second[key] for key in first)


def test_bf16_follows_fp32(toy_tokens: Path, tmp_path: Path, train_here: Train) -> None:
    for dtype in ("fp32", "bf16"):
        train_here(toy_options(toy_tokens, tmp_path / dtype, precision__dtype=dtype))
    exact, rounded = curve(tmp_path / "fp32"), curve(tmp_path / "bf16")
    assert exact != rounded
    for key, values in exact.items():
        assert rounded[key][0] == pytest.approx(values[0], rel=0.01), key


def test_fp16_finds_its_loss_scale_and_resumes_with_it(
    toy_tokens: Path, tmp_path: Path, train_here: Train
) -> None:
    """Steps that overflow are skipped without counting as failures, and the factor is saved."""
    fp16 = {
        "precision__dtype": "fp16",
        "precision__initial_loss_scale": 2.0**30,
        "precision__loss_scale_interval": 4,
        "train__max_nonfinite_steps": 2,
    }
    train_here(toy_options(toy_tokens, tmp_path / "whole", **fp16))
    rows = [row for row in metrics(tmp_path / "whole") if "loss" in row]
    skipped = [row["step"] for row in rows if row["grad_norm"] is None]
    assert len(skipped) > 2
    assert skipped[0] == 1
    scales = [row["loss_scale"] for row in rows]
    assert scales[1] == scales[0] / 2
    assert any(after > before for before, after in itertools.pairwise(scales))
    halves = toy_options(
        toy_tokens, tmp_path / "halves", **fp16, data__planned_samples=160, schedule__decay_steps=20
    )
    train_here([*halves, "--train.steps=10"])
    train_here(halves)
    assert curve(tmp_path / "halves") == curve(tmp_path / "whole")


def test_compiled_model_gives_the_same_losses(
    toy_tokens: Path, tmp_path: Path, train_here: Train
) -> None:
    """Also bitwise, when the compiled run is resumed."""
    options: dict[str, Any] = {
        "train__steps": 6,
        "train__micro_batch_size": 4,  # two micro-batches a step
        "model__residual_dropout": 0.0,
        "model__attention_dropout": 0.0,
        "compute__compile": "true",
        "schedule__decay_steps": 6,
        "data__planned_samples": 48,
        "checkpoint__interval": 3,
        "train__evaluation_interval": 3,
    }
    train_here(toy_options(toy_tokens, tmp_path / "compiled", **options))
    halves = toy_options(toy_tokens, tmp_path / "halves", **options)
    train_here([*halves, "--train.steps=3"])
    train_here(halves)
    assert curve(tmp_path / "halves") == curve(tmp_path / "compiled")
    options["compute__compile"] = "false"
    train_here(toy_options(toy_tokens, tmp_path / "eager", **options))
    eager, compiled = curve(tmp_path / "eager"), curve(tmp_path / "compiled")
    for key, values in eager.items():
        assert compiled[key] == pytest.approx(values, rel=1e-4), key


@pytest.mark.parametrize("compiler", ["works", "/bin/false"])
def test_auto_compiles_long_runs_where_there_is_a_compiler(
    compiler: str, toy_tokens: Path, tmp_path: Path
) -> None:
    """Each answer of a machine with a compiler, and of one without."""
    program = """if True:
        import sys
        from megaphi.recipe_file import load_recipe
        from megaphi.training.compilation import choose_compile

        for extra in (["--train.steps=10"], ["--train.steps=10000000"]):
            choice = choose_compile(load_recipe([*sys.argv[1:], *extra]), alone_on_cpu=True)
            print(choice.scope)
        try:
            asked = load_recipe([*sys.argv[1:], "--compute.compile=true"])
            print(choose_compile(asked, alone_on_cpu=True).scope)
        except ValueError as error:
            print("refused", "C++" in str(error))
        print(choose_compile(asked, alone_on_cpu=False).scope)
    """
    environment = child_environment() | {"TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "cache")}
    if compiler != "works":
        environment["CXX"] = compiler
    no_dropout = {"model__residual_dropout": 0.0, "model__attention_dropout": 0.0}
    options = toy_options(toy_tokens, tmp_path / "run", **no_dropout)
    done = subprocess.run(
        [sys.executable, "-c", program, *options],
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    )
    works = ["nothing", "model", "model", "blocks"]
    expected = works if compiler == "works" else ["nothing", "nothing", "refused True", "blocks"]
    assert done.stdout.splitlines() == expected


def test_all_blocks_share_a_graph() -> None:
    """More blocks than torch.compile keeps versions of a function, over several steps."""
    config = Model(
        num_layers=12, hidden_size=32, num_heads=2, vocab_size=64, max_sequence_length=16
    )
    eager, compiled = Phi(config), Phi(config)
    compiled.load_state_dict(eager.state_dict())
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    compile_blocks(compiled, backend="aot_eager")
    for step in range(1, 5):
        tokens_bt = torch.randint(0, 64, (2, 17))
        dropout = DropoutSeed(seed=1, step=step, first_token=32 * step)
        losses = [
            model(tokens_bt[:, :-1], tokens_bt[:, 1:], dropout=dropout)
            for model in (eager, compiled)
        ]
        losses[1].backward()
        torch.testing.assert_close(*losses)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] <= 6
    assert not torch._dynamo.utils.counters["graph_break"]


def test_attention_stays_inside_documents_on_request(
    toy_tokens: Path, tmp_path: Path, train_here: Train
) -> None:
    """The token file must say what ends a document; then the loss is another from step 1 on."""
    options = toy_options(toy_tokens, tmp_path / "masked", data__mask_documents="true")
    with pytest.raises(ValueError, match="ends a document"):
        train_here(options)
    prefix = tmp_path / "ended"
    with IndexedDatasetWriter(prefix, np.dtype(np.uint16)) as writer:
        for start in range(200):
            writer.add_document([*((np.arange(11) * 3 + start) % 500).tolist(), 511])
    info = TokenFileInfo(
        tokenizer="test",
        tokenizer_sha256="ab" * 32,
        vocab_size=512,
        eod_id=511,
        recipe={},
        **written_facts(writer),
    )
    write_info(prefix, info)
    for mask in ("false", "true"):
        options = toy_options(prefix, tmp_path / mask, data__mask_documents=mask, train__steps=3)
        train_here(options)
    seen, hidden = curve(tmp_path / "false"), curve(tmp_path / "true")
    assert all(seen[key] != hidden[key] for key in seen)


def test_tensorboard_has_the_losses(toy_tokens: Path, tmp_path: Path, train_here: Train) -> None:
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    options = toy_options(
        toy_tokens, tmp_path / "run", logging__tensorboard="true", logging__interval=5
    )
    train_here(options)
    board = accumulator.EventAccumulator(str(tmp_path / "run" / "tensorboard")).Reload()
    points = {event.step: event.value for event in board.Scalars("train/loss")}
    rows = {row["step"]: row["loss"] for row in metrics(tmp_path / "run") if "loss" in row}
    assert points == {step: pytest.approx(rows[step], rel=1e-6) for step in (1, 5, 10, 15, 20)}
    assert [event.step for event in board.Scalars("validation/validation_loss")] == [10, 20]


def test_permanent_checkpoints_stay(toy_tokens: Path, tmp_path: Path, train_here: Train) -> None:
    train_here(
        toy_options(
            toy_tokens, tmp_path / "run", checkpoint__interval=2, checkpoint__permanent_interval=6
        )
    )
    names = [path.name for path in find_checkpoints(tmp_path / "run")]
    assert names == [f"step-{step:08d}" for step in (20, 18, 12, 6)]
    trainer = json.loads((tmp_path / "run" / names[0] / "trainer.json").read_text())
    assert (trainer["step"], trainer["consumed_samples"]) == (20, 160)


def test_separate_validation_files(toy_tokens: Path, tmp_path: Path, train_here: Train) -> None:
    """Evaluated on its own training data without dropout, the loss is about the training loss."""
    options = [o for o in toy_options(toy_tokens, tmp_path / "run") if "data.split" not in o]
    train_here([*options, f"--data.validation={toy_tokens}"])
    values = curve(tmp_path / "run")
    assert values[20, "validation"][0] == pytest.approx(values[20, "train"][0], rel=0.1)
    with pytest.raises(ValueError, match=r"data\.validation and data\.split"):
        load_recipe([*options, f"--data.validation={toy_tokens}", "--data.split=9,1"])


def test_console_line() -> None:
    row = {
        "step": 1200, "loss": 2.4131, "grad_norm": 0.42, "lr": 1e-3, "mfu": 0.652,
        "tokens_per_second_per_gpu": 22400.0, "memory_gib": 61.3, "data_wait": 0.002,
        "eta_seconds": 51 * 3600.0,
    }  # fmt: skip
    assert console_line(row, 24000) == (
        "step 1200/24000 | loss 2.413 | gnorm 0.42 | lr 1.0e-03 | 22.4k tok/s/gpu | 65.2% MFU | "
        "61.3 GiB | data 0.2% | eta 2d03h"
    )
    unknown = {**row, "mfu": None, "loss": None, "grad_norm": None}
    assert "loss non-finite, step skipped | gnorm n/a" in console_line(unknown, 24000)
    assert "n/a MFU" in console_line(unknown, 24000)


@pytest.mark.parametrize(
    ("seconds", "text"), [(4.6, "0m05s"), (62, "1m02s"), (3720, "1h02m"), (90000, "1d01h")]
)
def test_durations(seconds: float, text: str) -> None:
    assert format_duration(seconds) == text


def test_counts() -> None:
    assert [format_count(n) for n in (987, 22400, 1.3e6, 1.418e9)] == [
        "987",
        "22.4k",
        "1.3M",
        "1.4B",
    ]
