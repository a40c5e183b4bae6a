"""Corpus recipes: a YAML file of stages, turned into the options of each.

    work: DIR                        outputs lie here, named after their stages
    variables: {NAME: VALUE}         for ${NAME} in options
    prices: {cpu_hour: DOLLARS}      for --estimate
    stages:
      NAME:
        verb: VERB                   of `megaphi data`
        inputs: [NAME, ...]          stages whose outputs are the last positional arguments
        out: PATH                    within work, instead of NAME
        expect: {gigabytes: N, ...}  for --estimate
        OPTION: VALUE                of the verb, with _ or -; true for a flag, a list for several

`${NAME}` of a stage stands for its output, and makes that stage an input. Everything is checked
before anything runs, by the dataclass of the stage.
"""

import difflib
import graphlib
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from megaphi.recipe_file import read_yaml
from tools.data.parser import STAGES
from tools.data.stage_options import Option, keys_of_stage, options_of, read_options
from tools.option_names import translated

SECTIONS = ("work", "variables", "prices", "stages")
# What stands alongside the options of a verb.
KEYS = ("verb", "inputs", "out", "expect")
# Options that `megaphi data run` gives itself.
OWN_OPTIONS = ("overwrite", "json", "engine", "ray-address", "submit", "wait", "slice", "estimate")
EXPECTED = ("gigabytes", "tokens", "prompt_tokens", "completion_tokens")
_SUFFIXES = {"plan-generation": ".jsonl", "blend": ".yaml"}
_REFERENCE = re.compile(r"\$\{([^}]*)\}")


@dataclass(frozen=True)
class StageCall:
    """A stage of a recipe.

    Attributes:
        name: its name.
        verb: of `megaphi data`.
        inputs: stages that come before it.
        out: what it makes.
        options: of the stage, an object of its dataclass.
        expect: declared sizes of its output.
    """

    name: str
    verb: str
    inputs: tuple[str, ...]
    out: Path
    options: Any
    expect: dict[str, float]


@dataclass(frozen=True)
class CorpusRecipe:
    """A checked recipe: its file, its work directory, its stages in an order that works, prices."""

    path: Path
    work: Path
    stages: list[StageCall]
    prices: dict[str, float]


def unknown(kind: str, name: str, known: Sequence[str]) -> str:
    """Say that `name` is no `kind`, and which of `known` is nearest."""
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.0)
    return f"unknown {kind} {name}" + (f"; the nearest known {kind} is {near[0]}" if near else "")


def read_recipe(
    path: Path,
    *,
    settings: Sequence[str] = (),
    work: Path | None = None,
) -> CorpusRecipe:
    """Read and check a recipe.

    Args:
        path: the YAML file.
        settings: `stage.key=value` or `variables.name=value`, which replace what the file says.
        work: instead of the recipe's.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is not a recipe; file, stage and key are named.
    """
    tree = read_yaml(path)
    return _Reader(path).read(tree, settings, work)


class _Reader:
    """Turns the tree of a recipe into calls."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def error(self, message: str) -> ValueError:
        return ValueError(f"{self.path}: {message}")

    def read(self, tree: Any, settings: Sequence[str], work: Path | None) -> CorpusRecipe:
        """See `read_recipe`."""
        if not isinstance(tree, dict) or not isinstance(tree.get("stages"), dict):
            raise self.error("a corpus recipe is a mapping with `work` and `stages`")
        for section in tree:
            if section not in SECTIONS:
                raise self.error(unknown("section", str(section), SECTIONS))
        variables, prices = tree.get("variables") or {}, tree.get("prices") or {}
        for name, section in (("variables", variables), ("prices", prices)):
            if not isinstance(section, dict):
                raise self.error(f"section {name} is not a mapping")
        self._apply(settings, tree["stages"], variables)
        for name, stage in tree["stages"].items():
            self._check_keys(name, stage)
        if work is None and not isinstance(tree.get("work"), str):
            raise self.error("`work` names the directory of the outputs; it is missing")
        place = work or Path(tree["work"])
        outs = self._outputs(tree["stages"], place)
        clash = sorted(set(outs) & set(variables))
        if clash:
            raise self.error(f"{clash[0]} is both a variable and a stage; rename one")
        calls = {
            name: self._call(name, stage, outs, variables) for name, stage in tree["stages"].items()
        }
        return CorpusRecipe(self.path, place, self._sorted(calls), self._numbers("prices", prices))

    def _apply(
        self, settings: Sequence[str], stages: dict[str, Any], variables: dict[str, Any]
    ) -> None:
        """Put `--set` values in."""
        for setting in settings:
            target, equals, text = setting.partition("=")
            section, dot, key = target.rpartition(".")
            if not (equals and dot and key):
                raise ValueError(f"--set {setting}: must be STAGE.KEY=VALUE")
            value = yaml.safe_load(text)
            if section == "variables":
                if key not in variables:
                    raise self.error(f"--set: {unknown('variable', key, [*variables])}")
                variables[key] = value
            elif isinstance(stages.get(section), dict):
                stages[section][key] = value
            else:
                raise self.error(f"--set: {unknown('stage', section, [*stages])}")

    def _check_keys(self, name: Any, stage: Any) -> None:
        """Check name, verb and keys of a stage."""
        if not isinstance(name, str) or not re.fullmatch(r"[\w.-]+", name) or name == "variables":
            raise self.error(f"stage {name}: a name is letters, digits, `-`, `_` and `.`")
        if not isinstance(stage, dict) or "verb" not in stage:
            raise self.error(f"stage {name}: expected a mapping with `verb`")
        verb = str(stage["verb"])
        if verb not in STAGES:
            raise self.error(f"stage {name}: {unknown('verb', verb, [*STAGES])}")
        known = [*KEYS, *(key for key in _keys(verb) if key not in (*OWN_OPTIONS, "out"))]
        for key in stage:
            if _dashed(key) in OWN_OPTIONS:
                raise self.error(f"stage {name}: {key} is given by `megaphi data run`")
            if _dashed(key) not in known:
                raise self.error(f"stage {name}: {unknown('key', str(key), known)} ({verb})")

    def _outputs(self, stages: dict[str, Any], work: Path) -> dict[str, Path]:
        """The output of each stage."""
        outs: dict[str, Path] = {}
        for name, stage in stages.items():
            local = Path(str(stage.get("out", name + _SUFFIXES.get(str(stage["verb"]), ""))))
            if local.is_absolute() or ".." in local.parts or not local.parts:
                raise self.error(f"stage {name}: out {local} must lie within work")
            other = next((known for known, out in outs.items() if out == work / local), None)
            if other is not None:
                raise self.error(f"stages {other} and {name} make the same output {local}")
            outs[name] = work / local
        return outs

    def _call(
        self, name: str, stage: dict[str, Any], outs: dict[str, Path], variables: dict[str, Any]
    ) -> StageCall:
        """A stage with its options, which are checked here."""
        verb = str(stage["verb"])
        inputs = stage.get("inputs", [])
        inputs = [inputs] if isinstance(inputs, str) else inputs
        if not isinstance(inputs, list):
            raise self.error(f"stage {name}: inputs is a list of stages")
        for other in inputs:
            if other not in outs:
                raise self.error(f"stage {name}: inputs: {unknown('stage', str(other), [*outs])}")
        before = list(inputs)

        def expand(value: Any, key: str) -> str:
            def replace(match: re.Match[str]) -> str:
                what = match[1]
                if what in outs:
                    before.append(what)
                    return str(outs[what])
                if what not in variables:
                    known = [*outs, *variables]
                    raise self.error(f"stage {name}: {key}: {unknown('name', what, known)}")
                return str(variables[what])

            return _REFERENCE.sub(replace, str(value))

        given = {"out": [str(outs[name])]}
        for key, value in stage.items():
            option = _keys(verb).get(_dashed(key))
            if option is not None and key not in KEYS:
                words = self._words(name, option, value)
                if words is not None:
                    given[option.name] = [expand(word, str(key)) for word in words]
        self._add_inputs(name, verb, given, [str(outs[other]) for other in inputs])
        try:
            with translated(keys_of_stage(STAGES[verb].stage)):
                options = read_options(STAGES[verb].stage, given)
        except ValueError as error:
            raise self.error(f"stage {name}: {error}; see `megaphi data {verb} --help`") from None
        expect = self._numbers(f"stage {name}: expect", stage.get("expect", {}))
        for key in expect:
            if key not in EXPECTED:
                raise self.error(f"stage {name}: expect: {unknown('key', key, EXPECTED)}")
        return StageCall(name, verb, tuple(dict.fromkeys(before)), outs[name], options, expect)

    def _words(self, name: str, option: Option, value: Any) -> list[Any] | None:
        """The values of an option; None for a flag that is not set."""
        key = _key(option)
        if option.is_flag:
            if not isinstance(value, bool):
                raise self.error(f"stage {name}: {key} is true or false, not {value}")
            return [] if value else None
        if value is None or isinstance(value, bool | dict):
            raise self.error(f"stage {name}: {key} needs a value, not {value}")
        return value if isinstance(value, list) else [value]

    def _add_inputs(
        self, name: str, verb: str, given: dict[str, list[str]], inputs: list[str]
    ) -> None:
        """Give the outputs of other stages to the last positional option."""
        last = [option for option in _keys(verb).values() if option.positional][-1:]
        for option in last:
            if inputs and option.name in given:
                raise self.error(f"stage {name}: give either inputs or {_key(option)}, not both")
            if not inputs and not given.get(option.name):
                raise self.error(f"stage {name}: {_key(option)} or inputs is missing")
        if inputs and not last:
            raise self.error(f"stage {name}: {verb} reads no output of another stage; drop inputs")
        if inputs:
            given[last[0].name] = inputs

    def _numbers(self, where: str, values: Any) -> dict[str, float]:
        if not isinstance(values, dict):
            raise self.error(f"{where} is not a mapping")
        for key, value in values.items():
            if isinstance(value, bool) or not isinstance(value, int | float) or value < 0:
                raise self.error(f"{where}: {key} is not a number from 0 on")
        return {str(key): float(value) for key, value in values.items()}

    def _sorted(self, calls: dict[str, StageCall]) -> list[StageCall]:
        """The stages in the order of the file as far as inputs come first."""
        sorter = graphlib.TopologicalSorter({name: call.inputs for name, call in calls.items()})
        try:
            sorter.prepare()
        except graphlib.CycleError as error:
            circle = " -> ".join(reversed(error.args[1]))
            raise self.error(f"stages depend on each other in a circle: {circle}") from None
        places = {name: place for place, name in enumerate(calls)}
        order: list[StageCall] = []
        ready: list[str] = []
        while sorter.is_active():
            ready = sorted([*ready, *sorter.get_ready()], key=places.__getitem__)
            order.append(calls[ready[0]])
            sorter.done(ready.pop(0))
        return order


def _dashed(key: Any) -> str:
    return str(key).replace("_", "-")


def _key(option: Option) -> str:
    """An option as it stands in a recipe."""
    return option.key.replace("-", "_")


def _keys(verb: str) -> dict[str, Option]:
    """The options of a verb by their keys, with dashes."""
    return {option.key: option for option in options_of(STAGES[verb].stage).values()}
