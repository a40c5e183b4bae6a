"""`megaphi data run`: the stages of a corpus recipe, in order.

A finished stage is reused and a killed one continues, as in each verb. What the recipe made before
and would now make otherwise, because a stage before it or an option changed, is made anew;
`run.json` in the work directory says which outputs are the recipe's. Other outputs of the same
name are never replaced.
"""

import json
import shlex
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from data_pipeline.runner.finished import Finished, Show
from data_pipeline.runner.options import EngineOptions
from data_pipeline.runner.output import OtherOutput, write_json
from tools.data.execution import run_verb
from tools.data.parser import STAGES
from tools.data.run.estimate import estimate
from tools.data.run.options import RecipeRun
from tools.data.run.recipe import CorpusRecipe, StageCall, read_recipe, unknown
from tools.data.stage_options import argv_of, changed, keys_of_stage, values_of
from tools.option_names import translate, translated

STATE_NAME = "run.json"
# Paths that a stage makes: they need not be there when it begins.
_MADE = ("out", "ledger")
_TABLE = "{:<{width}}  {:<15}  {:>9}  {:>12}  {:>8}  {:>8}  {}"


def run(run: RecipeRun, show: Show) -> Finished:
    """Run the stages of a recipe.

    Raises:
        ValueError, FileNotFoundError: the recipe is wrong.
        RunError: see the stages.
    """
    recipe = read_recipe(run.recipe, settings=run.set, work=run.work)
    if run.estimate:
        return estimate(recipe, run.engine.workers)
    stages = [_placed(call, run) for call in _selected(recipe, run.only, run.from_)]
    if run.dry_run:
        words = [["megaphi", "data", call.verb, *argv_of(call.options)] for call in stages]
        lines = [shlex.join(command) for command in words]
        return Finished({"commands": lines}, "\n".join(lines))
    for call in stages:
        _check_files(recipe, call)
    return _Runner(recipe, quiet=run.json).run(stages)


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


def _placed(call: StageCall, run: RecipeRun) -> StageCall:
    """The stage where the user wants it to run."""
    own = getattr(call.options, "engine", None)
    if not isinstance(own, EngineOptions):
        return call
    engine = {name: value for name, value in vars(run.engine).items() if name != "workers"}
    if run.engine.workers is not None and own.workers is None:
        engine["workers"] = run.engine.workers
    is_slurm = run.engine.engine == "slurm"
    return replace(call, options=changed(call.options, submit=is_slurm, wait=is_slurm, **engine))


def _check_files(recipe: CorpusRecipe, call: StageCall) -> None:
    """Check that the files which a stage's options name are there, before the first stage runs.

    Raises:
        FileNotFoundError: one is not.
    """
    outputs = [other.out for other in recipe.stages]
    for name, value in values_of(call.options).items():
        for path in value if isinstance(value, tuple) else [value]:
            if name in _MADE or not isinstance(path, Path) or path in outputs or path.exists():
                continue
            raise FileNotFoundError(
                f"{recipe.path}: stage {call.name}: {name}: {path}: no such file, and no stage "
                "makes it"
            )


class _Runner:
    """Runs stages and keeps `run.json`."""

    def __init__(self, recipe: CorpusRecipe, quiet: bool) -> None:
        self._recipe = recipe
        self._quiet = quiet
        self._path = recipe.work / STATE_NAME
        self._rows: list[dict[str, Any]] = []
        self._made = self._read_made()

    def run(self, stages: Sequence[StageCall]) -> Finished:
        """Run stages; says what became of each."""
        self._recipe.work.mkdir(parents=True, exist_ok=True)
        for number, call in enumerate(stages, start=1):
            self._say(f"[{number}/{len(stages)}] {call.name}: ", end="")
            started = time.monotonic()
            try:
                done = self._stage(call)
            except BaseException:
                self._say("failed")
                self._row(call, {}, "failed", started)
                self._save()
                print(
                    f"stage {call.name} stopped; what is done is kept, run again to go on",
                    file=sys.stderr,
                )
                raise
            self._say(translate(done.line, keys_of_stage(type(call.options))))
            result = {"verb": call.verb, **done.result}
            self._row(call, result, "reused" if result.get("reused") else "made", started)
            self._save()
        result = {"work": str(self._recipe.work), "stages": self._rows}
        return Finished(result, "\n" + summary(self._rows))

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

    def _stage(self, call: StageCall) -> Finished:
        """Run a stage; what is there is replaced where it is ours and out of date."""
        verb = STAGES[call.verb]
        ours = self._made.get(call.name) == self._key(call)
        if not ours and not _is_taken(call.out):
            self._made[call.name] = self._key(call)
            self._save()
            ours = True
        with translated(keys_of_stage(verb.stage)):
            try:
                return run_verb(call.verb, verb, call.options)
            except OtherOutput:
                if not ours:
                    raise
                self._say("inputs or options changed, made anew; ", end="")
                return run_verb(call.verb, verb, changed(call.options, overwrite=True))

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
