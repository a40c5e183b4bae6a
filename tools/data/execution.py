"""Runs a verb of `megaphi data`: progress, a full disk, and the jobs of a Slurm array."""

import contextlib
import errno
import sys
from pathlib import Path
from typing import Any

from data_pipeline.runner.executors import ShardsPlanned, SliceDone
from data_pipeline.runner.finished import Finished
from data_pipeline.runner.options import EngineOptions
from megaphi.errors import RunError
from tools.data import slurm
from tools.data.parser import Verb
from tools.data.progress import progress
from tools.data.stage_options import changed, options_of, values_of


def run_verb(name: str, verb: Verb, options: Any) -> Finished:
    """Run a verb with its engine.

    Args:
        name: of the verb.
        verb: as in the table.
        options: of its dataclass.

    Raises:
        ValueError: an output to be replaced is to be read; or see the verb.
        RunError: a job that was waited for failed, the disk is full; or see the verb.
    """
    _check_inputs_stay(options)
    engine = getattr(options, "engine", None)
    try:
        with contextlib.ExitStack() as stack:
            show = stack.enter_context(progress(name, verb.unit))
            if isinstance(engine, EngineOptions) and engine.engine == "ray":
                # Ray prints what befalls its nodes to stdout, which is the result's.
                stack.enter_context(contextlib.redirect_stdout(sys.stderr))
            return verb.run(options, show)
    except OSError as error:
        # Raised by a write, these name no file.
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        values = values_of(options)
        where = values.get("out") or values.get("work") or "output"
        raise RunError(
            f"{where}: {error.strerror}; make room and run again, what is done is kept"
        ) from None
    except SliceDone as left:
        assert engine is not None
        out = options.output.out
        line = (
            f"slice {engine.slice} of {out}: {left.done} of {left.total} shards done here; "
            "a run without `slice` publishes"
        )
        result = {"out": str(out), "slice": engine.slice, "shards": left.done, "of": left.total}
        return Finished(result, line)
    except ShardsPlanned as plan:
        assert engine is not None
        out = options.output.out
        script = slurm.script(name, options, plan.missing)
        if not engine.submit:
            return Finished({"shards": plan.missing, "script": script}, script.rstrip("\n"))
        jobs = slurm.submit(script, out)
        if engine.wait:
            # it is there: what is left to do is to say what it is
            return verb.run(changed(options, overwrite=False, **slurm.HERE), show)
        line = f"submitted {out}: {plan.missing} shards, jobs {' '.join(jobs)}"
        return Finished({"out": str(out), "jobs": jobs, "shards": plan.missing}, line)


def _check_inputs_stay(options: Any) -> None:
    """Check that the output does not replace a folder that is read, or one that holds it.

    Raises:
        ValueError: it does.
    """
    stage: type = type(options)
    values, known = values_of(options), options_of(stage)
    # A token file is alongside a folder of its name, which it does not replace.
    if not values.get("overwrite") or known["out"].placeholder == "PREFIX":
        return
    out: Path = values["out"]
    if not out.is_dir():
        return
    for name, value in values.items():
        if name in ("out", "ledger"):
            continue
        for each in value if isinstance(value, tuple) else [value]:
            is_source = isinstance(each, Path) or known[name].positional
            if is_source and out.resolve() in (Path(each).resolve(), *Path(each).resolve().parents):
                raise ValueError(
                    f"{each}: is read, and `overwrite` of {out} would remove it; "
                    "choose another `out`"
                )
