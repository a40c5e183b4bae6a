"""`megaphi data run`: the stages of a corpus recipe, in order, as the commands that they are.

A finished stage is reused and a killed one goes on, as in each verb. What the recipe made before
and would now make otherwise, because a stage before it or an option changed, is made anew;
`run.json` in the work directory says which outputs are the recipe's. Other outputs of the same
name are never replaced.
"""

import argparse
import json
import shlex
import sys
import time
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from tools.data.options.executor import ENGINES, HelpFormatter, run_verb
from tools.data.run.estimate import estimate
from tools.data.run.recipe import CorpusRecipe, StageCall, read_recipe, unknown

STATE_NAME = "run.json"
# Paths that a stage makes: they need not be there when it begins.
_MADE = ("out", "ledger")
_TABLE = "{:<{width}}  {:<15}  {:>9}  {:>12}  {:>8}  {:>8}  {}"


def add_parser(subparsers: Any) -> None:
    """Add the verb to those of the stages, which are there already and which it runs."""
    stages: dict[str, argparse.ArgumentParser] = dict(subparsers.choices)
    text = "a recipe of stages -> a corpus: reuses what is done, goes on where it was killed"
    parser: argparse.ArgumentParser = subparsers.add_parser(
        "run",
        help=text,
        description=text,
        allow_abbrev=False,
        formatter_class=HelpFormatter,
    )
    parser.add_argument("recipe", type=Path, metavar="RECIPE.yaml")
    parser.add_argument("--work", type=Path, metavar="DIR", help="instead of the recipe's")
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="STAGE.KEY=VALUE",
        help="instead of the recipe's; variables.NAME=VALUE for a variable; may be repeated",
    )
    some = parser.add_mutually_exclusive_group()
    some.add_argument("--only", metavar="STAGE", help="run this stage alone")
    some.add_argument(
        "--from", dest="first", metavar="STAGE", help="run this stage and those that need it"
    )
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--dry-run", action="store_true", help="print the commands of the stages")
    what.add_argument(
        "--estimate", action="store_true", help="hours and dollars from the declared sizes"
    )
    parser.add_argument("--engine", choices=ENGINES, default="local", help="where shards run")
    parser.add_argument("--ray-address", metavar="HOST:PORT", help="of the Ray cluster")
    parser.add_argument(
        "--slurm-option",
        action="append",
        default=[],
        metavar="OPTION",
        help="of sbatch, such as --slurm-option=--partition=cpu; jobs are submitted and waited for",
    )
    parser.add_argument("--workers", type=int, metavar="N", help="shards at a time, see the stages")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.set_defaults(run=partial(run, stages))


def run(
    verbs: Mapping[str, argparse.ArgumentParser], arguments: argparse.Namespace
) -> tuple[dict[str, Any], str]:
    """Run the verb; returns the JSON object and the table to print.

    Raises:
        ValueError, FileNotFoundError: the recipe is wrong.
        RunError: see the verbs of the stages.
    """
    recipe = read_recipe(arguments.recipe, verbs, settings=arguments.set, work=arguments.work)
    if arguments.estimate:
        return estimate(recipe, verbs, arguments.workers)
    stages = _selected(recipe, arguments.only, arguments.first)
    commands = {
        call.name: [*call.argv, *_engine_words(call, verbs[call.verb], arguments)]
        for call in stages
    }
    if arguments.dry_run:
        lines = [f"megaphi data {shlex.join(words)}" for words in commands.values()]
        return {"verb": "run", "commands": lines}, "\n".join(lines)
    for call in stages:
        _check_files(recipe, call, verbs[call.verb])
    return _Runner(recipe, verbs, quiet=arguments.json).run(stages, commands)


def _selected(recipe: CorpusRecipe, only: str | None, first: str | None) -> list[StageCall]:
    """The stages that `--only` and `--from` leave, in order."""
    names = [call.name for call in recipe.stages]
    for name in (only, first):
        if name is not None and name not in names:
            raise ValueError(f"{recipe.path}: {unknown('stage', name, names)}")
    if only is not None:
        return [call for call in recipe.stages if call.name == only]
    if first is None:
        return recipe.stages
    chosen = {first}
    for call in recipe.stages:
        if chosen.intersection(call.inputs):
            chosen.add(call.name)
    return [call for call in recipe.stages if call.name in chosen]


def _engine_words(
    call: StageCall, parser: argparse.ArgumentParser, arguments: argparse.Namespace
) -> list[str]:
    """The options by which a stage runs where the user wants."""
    if not any(action.dest == "engine" for action in parser._actions):
        return []
    words: list[str] = []
    if arguments.workers is not None and "--workers" not in call.argv:
        words += ["--workers", str(arguments.workers)]
    if arguments.engine != "local":
        words += ["--engine", arguments.engine]
    if arguments.ray_address is not None:
        words += ["--ray-address", arguments.ray_address]
    words += [f"--slurm-option={option}" for option in arguments.slurm_option]
    return words + (["--submit", "--wait"] if arguments.engine == "slurm" else [])


def _check_files(recipe: CorpusRecipe, call: StageCall, parser: argparse.ArgumentParser) -> None:
    """Check that the files which a stage's options name are there, before the first stage runs.

    Raises:
        FileNotFoundError: one is not.
    """
    parsed = parser.parse_args(call.argv[1:])
    outputs = [other.out for other in recipe.stages]
    for action in parser._actions:
        value = getattr(parsed, action.dest, None)
        if action.type is not Path or action.dest in _MADE or value is None:
            continue
        for path in value if isinstance(value, list) else [value]:
            if path not in outputs and not path.exists():
                raise FileNotFoundError(
                    f"{recipe.path}: stage {call.name}: {action.dest.replace('_', '-')}: {path}: "
                    "no such file, and no stage makes it"
                )


class _Runner:
    """Runs stages and keeps `run.json`."""

    def __init__(
        self, recipe: CorpusRecipe, verbs: Mapping[str, argparse.ArgumentParser], quiet: bool
    ) -> None:
        self._recipe = recipe
        self._verbs = verbs
        self._quiet = quiet
        self._path = recipe.work / STATE_NAME
        self._rows: list[dict[str, Any]] = []
        self._made = self._read_made()

    def run(
        self, stages: Sequence[StageCall], commands: Mapping[str, list[str]]
    ) -> tuple[dict[str, Any], str]:
        """Run stages; returns the JSON object and the summary."""
        self._recipe.work.mkdir(parents=True, exist_ok=True)
        for number, call in enumerate(stages, start=1):
            self._say(f"[{number}/{len(stages)}] {call.name}: ", end="")
            started = time.monotonic()
            try:
                result, line = self._stage(call, commands[call.name])
            except BaseException:
                self._say("failed")
                self._row(call, {}, "failed", started)
                self._save()
                print(
                    f"stage {call.name} stopped; what is done is kept, run again to go on",
                    file=sys.stderr,
                )
                raise
            self._say(line)
            self._row(call, result, "reused" if result.get("reused") else "made", started)
            self._save()
        result = {"verb": "run", "work": str(self._recipe.work), "stages": self._rows}
        return result, "\n" + summary(self._rows)

    def _read_made(self) -> dict[str, str]:
        """The outputs that are the recipe's, by stage.

        Raises:
            ValueError: the file is something else.
        """
        if not self._path.is_file():
            return {}
        try:
            made: dict[str, str] = json.loads(self._path.read_bytes())["made"]
        except (ValueError, KeyError):
            raise ValueError(f"{self._path}: not the state of a run; move it away") from None
        return made

    def _stage(self, call: StageCall, words: list[str]) -> tuple[dict[str, Any], str]:
        """Run a stage, again with `--overwrite` where what is there is ours and out of date."""
        from data_pipeline.runner.output import OtherOutput

        parser = self._verbs[call.verb]
        ours = self._made.get(call.name) == self._key(call)
        if not ours and not _is_taken(call.out):
            self._made[call.name] = self._key(call)
            self._save()
            ours = True
        try:
            return run_verb(parser.parse_args(words[1:]), words)
        except OtherOutput:
            if not ours:
                raise
            self._say("inputs or options changed, made anew; ", end="")
            again = [*words, "--overwrite"]
            return run_verb(parser.parse_args(again[1:]), again)

    def _key(self, call: StageCall) -> str:
        return str(call.out.relative_to(self._recipe.work))

    def _row(self, call: StageCall, result: dict[str, Any], state: str, started: float) -> None:
        self._rows.append(
            {
                "stage": call.name,
                "state": state,
                "run_seconds": round(time.monotonic() - started, 3),
                **(result or {"verb": call.verb, "out": str(call.out)}),
            }
        )

    def _save(self) -> None:
        from data_pipeline.runner.output import write_json

        # Another run, with --only, may have made other stages meanwhile.
        self._made = self._read_made() | self._made
        state = {"recipe": str(self._recipe.path), "made": self._made, "stages": self._rows}
        write_json(self._path, state)

    def _say(self, text: str, end: str = "\n") -> None:
        if not self._quiet:
            print(text, end=end, flush=True)


def _is_taken(out: Path) -> bool:
    """Whether there is an output, or a token file, of this name."""
    return any(Path(f"{out}{suffix}").exists() for suffix in ("", ".bin", ".idx", ".json"))


def summary(rows: Sequence[Mapping[str, Any]]) -> str:
    """The table at the end of a run, one line a stage."""
    width = max((len(row["stage"]) for row in rows), default=5)
    width = max(width, 5)
    names = ("stage", "verb", "documents", "size", "rejected", "seconds", "state")
    lines = [_TABLE.format(*names, width=width)]
    for row in rows:
        documents = row.get("records_out", row.get("documents", row.get("texts")))
        rejected = row.get("rejected")
        size = "-"
        if "tokens" in row:
            size = f"{row['tokens'] / 1e6:,.1f} M tok"
        elif "text_bytes" in row:
            size = f"{row['text_bytes'] / 1e6:,.1f} MB"
        lines.append(
            _TABLE.format(
                row["stage"],
                row["verb"],
                f"{documents:,}" if isinstance(documents, int) else "-",
                size,
                f"{sum(rejected.values()):,}" if isinstance(rejected, dict) else "-",
                f"{row['run_seconds']:.1f}",
                row["state"],
                width=width,
            )
        )
    return "\n".join(lines)
