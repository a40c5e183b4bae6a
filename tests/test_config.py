"""The recipe: what is accepted, what is refused and how, and the shipped recipes' values."""

from pathlib import Path

import pytest
import yaml

from megaphi.config import Parallel
from megaphi.model.phi import num_parameters
from megaphi.parallel.mesh import grid_shape
from megaphi.recipe_file import load_recipe, recipe_keys
from tests.helpers import REPOSITORY, toy_options

RECIPES = REPOSITORY / "launch" / "recipes"
REQUIRED = ["--train.run_dir=run", "--train.steps=10", "--data.train=tokens"]


def test_command_line_surface_is_frozen() -> None:
    """Scripts rely on the names of keys; a changed list must be a deliberate change here."""
    expected = (REPOSITORY / "tests" / "assets" / "recipe_keys.txt").read_text().split()
    assert recipe_keys() == expected
    assert len(expected) < 100


@pytest.mark.parametrize(
    ("option", "words"),
    [
        ("--train.stepz=3", ["train.stepz", "train.steps"]),
        ("--model.num_layer=3", ["model.num_layer", "model.num_layers"]),
        ("--optimiser.learning_rate=1", ["optimizer.learning_rate"]),
        ("--train.steps=many", ["train.steps", "many"]),
        ("--train.steps=0", ["train.steps", "positive"]),
        ("--model.num_heads=3", ["model.hidden_size", "model.num_heads"]),
        ("--model.residual_dropout=1.5", ["model.residual_dropout", "[0, 1)"]),
        ("--precision.dtype=fp7", ["precision.dtype", "fp7"]),
        ("--data.sequence_length=4096", ["data.sequence_length", "model.max_sequence_length"]),
        ("--checkpoint.keep=1", ["checkpoint.keep", "at least 2"]),
        ("--train.global_batch_size=12", ["train.global_batch_size", "train.micro_batch_size"]),
    ],
)
def test_wrong_option_is_one_clear_error(option: str, words: list[str]) -> None:
    with pytest.raises(ValueError, match=r"\S") as error:
        load_recipe([*REQUIRED, option])
    assert all(word in str(error.value) for word in words), error.value
    assert "\n" not in str(error.value)


def test_unknown_key_in_a_file_names_file_and_nearest_key(tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text("train: {run_dir: r, steps: 1}\ndata: {train: t, sequence_lenght: 8}\n")
    with pytest.raises(ValueError, match=r"recipe\.yaml.*sequence_lenght.*data\.sequence_length"):
        load_recipe([str(path)])


def test_missing_recipe_and_missing_keys() -> None:
    with pytest.raises(FileNotFoundError, match=r"nowhere\.yaml"):
        load_recipe(["nowhere.yaml"])
    with pytest.raises(ValueError, match=r"train\.run_dir"):
        load_recipe(["--train.steps=3", "--data.train=t"])


def test_options_override_the_file_and_the_result_reloads(tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(
        "train: {run_dir: r, steps: 7}\ndata: {train: [0.5, a, 0.5, b]}\n"
        "optimizer: {learning_rate: 1e-3}\n"
    )
    recipe = load_recipe([str(path), "--train.steps=9", "--model.num_layers", "3"])
    assert (recipe.train.steps, recipe.model.num_layers) == (9, 3)
    assert recipe.optimizer.learning_rate == 1e-3
    assert recipe.data.train == [0.5, "a", 0.5, "b"]
    again = tmp_path / "again.yaml"
    again.write_text(recipe.to_yaml())
    assert load_recipe([str(again)]) == recipe


def test_phi1_recipes_have_the_papers_values() -> None:
    base = load_recipe([str(RECIPES / "phi-1-base.yaml")])
    assert base.train.global_batch_size == 1024
    assert (base.train.steps, base.schedule.warmup_steps) == (36000, 750)
    assert (base.optimizer.learning_rate, base.optimizer.weight_decay) == (1e-3, 0.1)
    assert (base.model.residual_dropout, base.model.attention_dropout) == (0.1, 0.1)
    assert 24000 % (base.checkpoint.permanent_interval or 0) == 0
    assert num_parameters(base.model) == 1_418_270_720
    finetune = load_recipe([str(RECIPES / "phi-1.yaml")])
    assert finetune.model == base.model
    assert finetune.train.global_batch_size == 256
    assert (finetune.train.steps, finetune.schedule.warmup_steps) == (6000, 50)
    assert (finetune.optimizer.learning_rate, finetune.optimizer.weight_decay) == (1e-4, 0.01)
    small = load_recipe([str(RECIPES / "phi-1-small.yaml")])
    assert num_parameters(small.model) == 356_794_368
    assert base.schedule.shape == finetune.schedule.shape == small.schedule.shape == "linear"


def test_every_shipped_recipe_loads() -> None:
    paths = sorted(p for p in RECIPES.glob("*.yaml") if not p.stem.endswith("-data"))
    assert len(paths) >= 4
    for path in paths:
        recipe = load_recipe([str(path)])
        given = yaml.safe_load(path.read_text())
        for section, values in given.items():
            for key, value in values.items():
                assert getattr(getattr(recipe, section), key) == value


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"parallel.tensor": 3}, r"parallel.tensor=3 does not divide model.num_heads = 4.* is 2"),
        ({"parallel.tensor": 2, "model.vocab_size": 511}, r"model.vocab_size = 511.* is 1"),
        ({"parallel.pipeline": 5}, r"5 pipeline stages are more than .*model.num_layers=4"),
        (
            {"parallel.pipeline": 3, "parallel.pipeline_schedule": "interleaved"},
            r"6 pipeline stages are more than .*model.num_layers=4",
        ),
        (
            {"parallel.pipeline": 2, "parallel.pipeline_schedule": "zbv"}
            | {"parallel.pipeline_stages_per_process": 3},
            r"zbv needs parallel.pipeline_stages_per_process=2",
        ),
        ({"parallel.context": 5}, r"data.sequence_length=32 does not divide into 2 x .*=5 chunks"),
        (
            {"parallel.context": 2, "data.mask_documents": "true"},
            r"data.mask_documents does not work with parallel.context above 1",
        ),
        ({"train.global_batch_size": 3, "train.micro_batch_size": 2}, r"is not a multiple of"),
    ],
)
def test_layouts_that_do_not_divide_are_refused_with_the_numbers(
    changes: dict[str, object], message: str
) -> None:
    options = toy_options(Path("tokens"), Path("run"), model__num_heads=4, model__num_layers=4)
    words = [*options, *(f"--{key}={value}" for key, value in changes.items())]
    with pytest.raises(ValueError, match=message):
        load_recipe(words)


@pytest.mark.parametrize(
    ("pipeline", "schedule", "processes", "message"),
    [
        (2, "1f1b", 4, None),
        (2, "interleaved", 4, None),
        (4, "1f1b", 2, r"2 micro-batch\(es\).*parallel.pipeline=4.*global_batch_size is 16"),
        (2, "interleaved", 8, r"1 micro-batch\(es\).*global_batch_size is 32"),
    ],
)
def test_a_pipeline_needs_enough_micro_batches(
    pipeline: int, schedule: str, processes: int, message: str | None
) -> None:
    changes = {
        "model__num_layers": 4,
        "train__global_batch_size": 16 if processes > 2 else 8,
        "parallel__pipeline": pipeline,
        "parallel__pipeline_schedule": schedule,
    }
    recipe = load_recipe(toy_options(Path("tokens"), Path("run"), **changes))
    if message is None:
        recipe.micro_batches(processes)
        return
    with pytest.raises(ValueError, match=message):
        recipe.micro_batches(processes)


def test_processes_that_do_not_divide_are_refused_with_the_nearest_count() -> None:
    parallel = Parallel(pipeline=2, tensor=2)
    assert grid_shape(parallel, 8) == (2, 2, 1, 2)
    with pytest.raises(ValueError, match=r"6 processes.*4 or 8"):
        grid_shape(parallel, 6)
    with pytest.raises(ValueError, match=r"2 processes.*4"):
        grid_shape(parallel, 2)
    with pytest.raises(ValueError, match=r"replicate=4.*6"):
        grid_shape(Parallel(replicate=4), 6)


@pytest.mark.parametrize(
    ("words", "fact"),
    [
        (["train.steps=5"], "--train.steps=5"),
        (["--train.steps=5", "train.seed=1"], "--train.seed=1"),
        (["--train.steps", "5", "stray"], "stray"),
        (["-train.steps=5"], "--train.steps=5"),
        (["--train.run_dir="], "train.run_dir"),
        (["--data.train="], "data.train"),
        (["--data", "mix.yaml"], "data.sequence_length"),
        (["missing.yaml"], "missing.yaml"),
    ],
)
def test_every_word_is_used_or_refused(words: list[str], fact: str, tmp_path: Path) -> None:
    path = tmp_path / "r.yaml"
    path.write_text("train: {run_dir: r, steps: 3}\ndata: {train: t}\n", encoding="utf-8")
    with pytest.raises((ValueError, FileNotFoundError)) as refused:
        load_recipe([str(path), *words])
    assert fact in str(refused.value)


def test_a_second_recipe_overrides_what_it_has(tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_text(
        "train: {run_dir: r, steps: 3}\ndata: {train: t, sequence_length: 64}\n", encoding="utf-8"
    )
    (tmp_path / "mix.yaml").write_text(
        "data: {train: [0.5, a, 0.5, ~/b], split: '9,1,0'}\n", encoding="utf-8"
    )
    recipe = load_recipe([str(tmp_path / "r.yaml"), str(tmp_path / "mix.yaml")])
    assert recipe.data.train == [0.5, "a", 0.5, str(Path.home() / "b")]
    assert (recipe.data.split, recipe.data.sequence_length) == ("9,1,0", 64)
    assert (recipe.train.run_dir, recipe.train.steps) == ("r", 3)


def test_a_key_given_twice_is_refused_with_its_line(tmp_path: Path) -> None:
    path = tmp_path / "r.yaml"
    path.write_text("train:\n  run_dir: r\n  steps: 3\n  steps: 4\n", encoding="utf-8")
    with pytest.raises(ValueError, match=r"line 4.*steps"):
        load_recipe([str(path)])
