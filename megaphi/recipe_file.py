"""Recipes as people write them: YAML files, and `--section.key=value` options that override them.

jsonargparse reads both from the dataclasses of `megaphi.config`; what it would report in its own
words is checked first, so that a mistake names the file, the key and the nearest known one.
"""

import argparse
import dataclasses
import difflib
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from megaphi.config import Recipe, require

PATHS = (
    "train.run_dir",
    "data.train",
    "data.validation",
    "checkpoint.resume",
    "checkpoint.initialize_from",
)
"""Keys whose values are paths, in which `~` stands for the home directory."""


class _UniqueKeys(yaml.SafeLoader):
    """YAML in which a key that is given twice is an error, not the end of the first."""


def _mapping(loader: _UniqueKeys, node: yaml.MappingNode) -> dict[Any, Any]:
    seen: set[str] = set()
    for key, _ in node.value:
        if key.value in seen and key.value != "<<":
            raise ValueError(f"line {key.start_mark.line + 1}: {key.value} is given twice")
        seen.add(str(key.value))
    loader.flatten_mapping(node)
    return loader.construct_mapping(node, deep=True)


_UniqueKeys.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, _mapping)


def read_yaml(path: Path) -> Any:
    """The content of a YAML file.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is not YAML, or gives a key twice; file and line are named.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such recipe file")
    try:
        return yaml.load(path.read_text(encoding="utf-8"), _UniqueKeys)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: not a YAML file: {error}") from None
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def recipe_keys() -> list[str]:
    """Every dotted key of a recipe in order, from `train.run_dir` on."""
    return [
        f"{section.name}.{key.name}"
        for section in dataclasses.fields(Recipe)
        for key in dataclasses.fields(section.type)  # type: ignore[arg-type]
    ]


def load_recipe(arguments: Sequence[str]) -> Recipe:
    """Build a recipe from `RECIPE.yaml [MORE.yaml …] --section.key=value …`.

    A later file overrides the keys that it has, such as the `data` of `megaphi data blend`.

    Raises:
        ValueError: an unknown key (the nearest known one is named), a bad value, or a word that is
            neither a file nor an option.
        FileNotFoundError: a recipe file is missing.
    """
    import jsonargparse

    parser = jsonargparse.ArgumentParser(
        prog="megaphi train",
        exit_on_error=False,
        print_config=None,
        description="Train a recipe; every key of the recipe can be given as an option.",
    )
    parser.add_argument("recipe", nargs="*", help="recipe files (YAML); a later one overrides")
    jsonargparse.set_parsing_settings(docstring_parse_attribute_docstrings=True)
    for section in dataclasses.fields(Recipe):
        parser.add_class_arguments(section.type, section.name)
    for action in parser._actions:  # `--train CONFIG` and the like are not ours
        if action.dest in {section.name for section in dataclasses.fields(Recipe)}:
            action.help = argparse.SUPPRESS
    words = list(arguments)
    files: list[str] = []
    while words and not words[0].startswith("-"):
        files.append(words.pop(0))
        _check_recipe_file(files[-1])
    _check_options(words)
    if files:
        parser.add_argument("--recipe-file", action="config", help=argparse.SUPPRESS)
    words = [word for file in files for word in ("--recipe-file", file)] + words
    try:
        parsed = parser.parse_args(words)
        sections = parser.instantiate(parsed)
    except jsonargparse.ArgumentError as error:
        raise ValueError(_plain_message(str(error))) from error
    found: dict[str, Any] = {s.name: sections[s.name] for s in dataclasses.fields(Recipe)}
    for path in PATHS:
        name, key = path.split(".")
        value = getattr(found[name], key)
        require(value != "", f"{path} is empty; give a path or leave it out")
        if value is not None:
            found[name] = dataclasses.replace(found[name], **{key: _at_home(value)})
    return Recipe(**found)


def _at_home(value: Any) -> Any:
    """A path, or a list of weights and paths, with `~` replaced by the home directory."""
    if isinstance(value, list):
        return [_at_home(part) for part in value]
    return os.path.expanduser(value) if isinstance(value, str) else value


def _check_recipe_file(name: str) -> None:
    """Raise a `ValueError` that names the file and the first key that is not known."""
    path = Path(name)
    if not path.is_file() and name.partition("=")[0] in recipe_keys():
        raise ValueError(f"{name}: options begin with two dashes; write --{name}")
    tree = read_yaml(path)
    require(isinstance(tree, dict), f"{path}: a recipe is a mapping of sections, see the README")
    known = [section.name for section in dataclasses.fields(Recipe)]
    for section, values in tree.items():
        _check_key(str(section), known, f"{path}: ")
        require(isinstance(values, dict), f"{path}: section {section} is not a mapping")
        for key in values:
            _check_key(f"{section}.{key}", recipe_keys(), f"{path}: ")


def _check_options(words: Sequence[str]) -> None:
    """Raise a `ValueError` for the first word that is neither an option nor the value of one."""
    takes_value = False  # whether the word before was `--key`, without `=value`
    for word in words:
        if takes_value:
            takes_value = False
        elif word in ("--help", "-h"):
            continue
        elif word.startswith("--"):
            name, equals, _ = word[2:].partition("=")
            sections = [section.name for section in dataclasses.fields(Recipe)]
            if name in sections:
                keys = [key for key in recipe_keys() if key.startswith(f"{name}.")]
                raise ValueError(f"{word}: {name} is a section; its keys are {', '.join(keys)}")
            _check_key(name, recipe_keys())
            takes_value = not equals
        elif word.lstrip("-").partition("=")[0] in recipe_keys():
            name = word.lstrip("-")
            raise ValueError(f"{word}: options begin with two dashes; write --{name}")
        else:
            raise ValueError(
                f"{word}: not an option; recipe files come first, then --section.key=value"
            )


def _check_key(name: str, known: Sequence[str], where: str = "") -> None:
    """Raise a `ValueError` that names the nearest known key if `name` is none of them."""
    if name not in known:
        near = difflib.get_close_matches(name, known, n=1, cutoff=0.0)
        raise ValueError(f"{where}unknown key {name}; the nearest known key is {near[0]}")


def _plain_message(message: str) -> str:
    """Shorten jsonargparse's message to one line about the key and the value."""
    return re.sub(r"\s+", " ", message).strip()
