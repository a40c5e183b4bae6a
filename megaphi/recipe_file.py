"""Recipes as people write them: a YAML file, and `--section.key=value` options that override it.

jsonargparse reads both from the dataclasses of `megaphi.config`; what it would report in its own
words is checked first, so that a mistake names the file, the key and the nearest known one.
"""

import dataclasses
import difflib
import re
from collections.abc import Sequence
from pathlib import Path

from megaphi.config import Recipe, require


def recipe_keys() -> list[str]:
    """Every dotted key of a recipe in order, from `train.run_dir` on."""
    return [
        f"{section.name}.{key.name}"
        for section in dataclasses.fields(Recipe)
        for key in dataclasses.fields(section.type)  # type: ignore[arg-type]
    ]


def load_recipe(arguments: Sequence[str]) -> Recipe:
    """Build a recipe from `RECIPE.yaml --section.key=value …`.

    Raises:
        ValueError: an unknown key (the nearest known one is named) or a bad value.
        FileNotFoundError: the recipe file is missing.
    """
    import jsonargparse

    parser = jsonargparse.ArgumentParser(
        prog="megaphi train",
        exit_on_error=False,
        print_config=None,
        description="Train a recipe; every key of the recipe can be given as an option.",
    )
    parser.add_argument("recipe", nargs="?", help="recipe file (YAML)")
    jsonargparse.set_parsing_settings(docstring_parse_attribute_docstrings=True)
    for section in dataclasses.fields(Recipe):
        parser.add_class_arguments(section.type, section.name)
    words = list(arguments)
    if words and not words[0].startswith("-"):
        path = Path(words.pop(0))
        if not path.is_file():
            raise FileNotFoundError(f"{path}: no such recipe file")
        _check_recipe_file(path)
        parser.add_argument("--recipe-file", action="config")
        words = ["--recipe-file", str(path), *words]
    _check_option_names(words)
    try:
        parsed = parser.parse_args(words)
        sections = parser.instantiate(parsed)
    except jsonargparse.ArgumentError as error:
        raise ValueError(_plain_message(str(error))) from error
    return Recipe(**{s.name: sections[s.name] for s in dataclasses.fields(Recipe)})


def _check_recipe_file(path: Path) -> None:
    """Raise a `ValueError` that names the file and the first key that is not known."""
    import yaml

    try:
        tree = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: not a YAML file: {error}") from error
    require(isinstance(tree, dict), f"{path}: a recipe is a mapping of sections, see the README")
    known = [section.name for section in dataclasses.fields(Recipe)]
    for section, values in tree.items():
        _check_key(str(section), known, f"{path}: ")
        require(isinstance(values, dict), f"{path}: section {section} is not a mapping")
        for key in values:
            _check_key(f"{section}.{key}", recipe_keys(), f"{path}: ")


def _check_option_names(words: Sequence[str]) -> None:
    """Raise a `ValueError` for the first option that is not a key of a recipe."""
    for word in words:
        if word.startswith("--") and word not in ("--help", "--recipe-file"):
            _check_key(word[2:].split("=", 1)[0], recipe_keys())


def _check_key(name: str, known: Sequence[str], where: str = "") -> None:
    """Raise a `ValueError` that names the nearest known key if `name` is none of them."""
    if name not in known:
        near = difflib.get_close_matches(name, known, n=1, cutoff=0.0)
        raise ValueError(f"{where}unknown key {name}; the nearest known key is {near[0]}")


def _plain_message(message: str) -> str:
    """Shorten jsonargparse's message to one line about the key and the value."""
    return re.sub(r"\s+", " ", message).strip()
