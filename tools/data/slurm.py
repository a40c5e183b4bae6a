"""The jobs of a stage on a Slurm cluster.

The command prepares its work directory and prints (or submits) a script of two jobs. The tasks of
an array job run the same command with `--slice I/N`, which does a share of the shards of the first
parallel phase; the second job, once all of them succeeded, runs the plain command, which finds the
shards done, does what is left and publishes. Submitting again after tasks were lost does what is
missing.
"""

import shlex
import subprocess
import sys
from dataclasses import fields
from pathlib import Path
from typing import Any

from data_pipeline.runner.executors import cores
from data_pipeline.runner.options import EngineOptions
from megaphi.errors import EXIT_REJECTS, RunError, TooManyRejects
from tools.data.stage_options import argv_of, changed

HERE = {field.name: field.default for field in fields(EngineOptions)}
"""The values by which a stage runs in the process that is asked."""


def script(verb: str, options: Any, missing: int) -> str:
    """The shell script that submits the jobs of a stage.

    Args:
        verb: of `megaphi data`.
        options: of its dataclass; the jobs get them without those of the engine.
        missing: shards that are not done.
    """
    out, engine = options.output.out, options.engine
    name, logs = f"megaphi-{verb}", f"{out}.slurm"
    plain = [sys.executable, "-m", "megaphi", "data", verb, *argv_of(changed(options, **HERE))]
    workers = '--workers "${SLURM_CPUS_PER_TASK:-1}"'
    tasks = min(missing, engine.workers or cores())
    of_sbatch = "".join(f" {shlex.quote(option)}" for option in engine.slurm_option)

    def sbatch(job: str, log: str, more: str, command: str) -> str:
        output = shlex.quote(f"--output={logs}/{log}")
        return (
            f"sbatch --parsable --job-name={job}{more} {output}{of_sbatch} \\\n"
            f"    --wrap={shlex.quote(command)}"
        )

    last = f"{shlex.join(plain)} {workers}"
    wait = " --wait" if engine.wait else ""
    head = (
        f"# {missing} shards of {out}; logs in {logs}\n"
        f"set -euo pipefail\nmkdir -p {shlex.quote(logs)}\n"
    )
    if not tasks:
        return f"{head}{sbatch(name, '%j.log', wait, last)}\n"
    share = f'{shlex.join(plain)} --slice "$SLURM_ARRAY_TASK_ID/{tasks}" {workers}'
    array = sbatch(name, "%A-%a.log", f" --array=0-{tasks - 1}", share)
    after = ' --dependency="afterok:${array%%;*}" --kill-on-invalid-dep=yes' + wait
    final = sbatch(f"{name}-last", "%j.log", after, last)
    return f'{head}array="$({array})"\necho "$array"\n{final}\n'


def submit(script: str, out: Path) -> list[str]:
    """Run the script; returns the job numbers that it printed.

    Raises:
        RunError: sbatch refused, or a job that was waited for failed.
    """
    done = subprocess.run(["bash", "-c", script], capture_output=True, text=True)
    jobs = [line.split(";")[0] for line in done.stdout.split()]
    if done.returncode == 0:
        return jobs
    reason = " ".join(done.stderr.split()) or f"status {done.returncode}"
    if len(jobs) < 2:
        raise RunError(f"sbatch: {reason}; without `submit` the script is printed")
    message = f"{out}: job {jobs[-1]} failed ({reason}); see {out}.slurm"
    if done.returncode == EXIT_REJECTS:
        raise TooManyRejects(message)
    raise RunError(message + ", and run again to do what is missing")
