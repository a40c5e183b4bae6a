"""Whether a launcher should start a run again that has crashed or hung.

    python -m megaphi.resilience.restarts begin RECIPE [--section.key=value …]
    python -m megaphi.resilience.restarts decide ATTEMPT LIMIT STATUS REACHED RECIPE […]

`begin` prints the step from which the run continues. `decide` exits with 0 if it should be started
again, and prints the step that it got to, the REACHED of the next time; else it says why not and
exits with 1. A run that fails where it failed before is not started again: it would not get further
for a third time. Each restart is a line of `<run_dir>/restarts.jsonl`. torch is not imported.
"""

import json
import socket
import sys
import time
from pathlib import Path

from megaphi.errors import EXIT_FAILED, EXIT_OK, run_main
from megaphi.formats.manifest import find_checkpoints
from megaphi.metrics.logger import last_step
from megaphi.recipe_file import load_recipe

RESTARTS_NAME = "restarts.jsonl"


def newest_checkpoint(run_dir: Path) -> int:
    """Step of the newest checkpoint, 0 without any."""
    found = find_checkpoints(run_dir)
    return int(found[0].name.removeprefix("step-")) if found else 0


def refusal(attempt: int, limit: int, reached: int, step: int) -> str | None:
    """Why a run should not be started again; None if it should.

    Args:
        attempt: number of this restart, from 1 on.
        limit: restarts allowed.
        reached: the furthest step before.
        step: the step that it got to now.
    """
    if attempt > limit:
        return f"the limit of {limit} restarts is reached" if limit else "RESTARTS=0"
    if step <= reached:
        return f"it got to step {step}, no further than before (step {reached})"
    return None


def main(arguments: list[str]) -> int:
    """Run one of the two commands; returns the exit status."""
    command, *rest = arguments
    if command == "begin":
        print(newest_checkpoint(Path(load_recipe(rest).train.run_dir)))
        return EXIT_OK
    attempt, limit, status, reached = map(int, rest[:4])
    run_dir = Path(load_recipe(rest[4:]).train.run_dir)
    step = max(last_step(run_dir), newest_checkpoint(run_dir))
    reason = refusal(attempt, limit, reached, step)
    if reason is not None:
        print(f"megaphi: not started again after status {status}: {reason}", file=sys.stderr)
        return EXIT_FAILED
    print(
        f"megaphi: status {status} at step {step}; restart {attempt} of {limit} continues from "
        f"step {newest_checkpoint(run_dir)}",
        file=sys.stderr,
    )
    row = {
        "restart": attempt,
        "status": status,
        "step": step,
        "from_step": newest_checkpoint(run_dir),
        "host": socket.gethostname(),
        "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
    }
    with (run_dir / RESTARTS_NAME).open("a", encoding="utf-8") as file:
        file.write(json.dumps(row) + "\n")
    print(step)
    return EXIT_OK


if __name__ == "__main__":
    sys.exit(run_main(main, sys.argv[1:]))
