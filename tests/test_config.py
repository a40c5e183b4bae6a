"""The recipe: what is accepted, what is refused and how, and the shipped recipes' values."""

from pathlib import Path

import pytest
import yaml

from megaphi.model.phi import num_parameters
from megaphi.recipe_file import load_recipe, recipe_keys
from tests.helpers import REPOSITORY

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
        ("--parallel.tensor=2", ["parallel.tensor", "not built"]),
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
    paths = sorted(RECIPES.glob("*.yaml"))
    assert len(paths) >= 4
    for path in paths:
        recipe = load_recipe([str(path)])
        given = yaml.safe_load(path.read_text())
        for section, values in given.items():
            for key, value in values.items():
                assert getattr(getattr(recipe, section), key) == value
