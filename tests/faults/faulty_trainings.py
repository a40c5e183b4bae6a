"""Trainings that meet a fault, for tests.layouts to start in several processes.

What happens is read from `<run_dir>.plan.json`; a fault hits one rank, at one step.
"""

import contextlib
import ctypes
import errno
import json
import os
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard

from megaphi import train
from megaphi.checkpoint.manager import CheckpointManager
from megaphi.config import Parallel
from megaphi.data.loader import Loader, MicroBatch
from megaphi.errors import RunError
from megaphi.optim.adamw import AdamW
from megaphi.parallel.mesh import processes
from megaphi.recipe_file import load_recipe
from megaphi.resilience import watchdog
from megaphi.resilience.replicas import check_replicas
from megaphi.resilience.spikes import Rewinds
from megaphi.resilience.watchdog import Heartbeat
from megaphi.training.engine import Engine
from megaphi.training.run_state import RunState
from megaphi.training.trainer import Trainer
from tests.helpers import before_tensor_writes

_planted = contextlib.ExitStack()  # until the process ends


def _plan(argv: list[str]) -> dict[str, Any]:
    """What is to happen, and to whom."""
    run_dir = Path(load_recipe(argv).train.run_dir)
    plan: dict[str, Any] = json.loads(run_dir.with_suffix(".plan.json").read_text())
    return plan


def _rank() -> int:
    return int(os.environ["RANK"])


def _before(owner: Any, name: str, action: Callable[..., None]) -> None:
    """Let `action` run before a method, with the method's arguments."""
    original = getattr(owner, name)

    def method(*arguments: Any, **options: Any) -> Any:
        action(*arguments, **options)
        return original(*arguments, **options)

    setattr(owner, name, method)


def _at(point: str, step: int, action: Callable[[], None]) -> None:
    """Run `action` once, the first time that the run is at a point of a step or a later one."""
    now = {"step": 0, "done": False}

    def begin(_: Trainer, *__: Any) -> None:
        now["step"] += 1

    def fire(*_: Any, **__: Any) -> None:
        if now["step"] >= step and not now["done"]:
            now["done"] = True
            action()

    original = RunState.restore

    def restore(self: RunState, found: Path) -> None:
        original(self, found)
        now["step"] = self.step

    RunState.restore = restore
    _before(Trainer, "train_step", begin)
    if point == "save":
        _planted.enter_context(before_tensor_writes(fire))
        return
    owner, name = {
        "construct": (Engine, "__init__"),
        "data": (Loader, "__next__"),
        "forward": (Engine, "forward_backward"),
        "backward": (Engine, "to_differentiate"),
        "optimizer": (AdamW, "gradient_norm"),
        "report": (Trainer, "report"),
        "evaluate": (Engine, "evaluate"),
    }[point]
    _before(owner, name, fire)


def stopped(argv: list[str]) -> int:
    """A process is stopped as by SIGSTOP; once the others have left, something else ends it."""
    plan = _plan(argv)
    heartbeats = Path(load_recipe(argv).train.run_dir) / "heartbeats"

    def stop() -> None:
        beats = [Heartbeat.decode(path.read_bytes()) for path in heartbeats.iterdir()]
        others = " ".join(str(beat.process) for beat in beats if beat.rank != plan["rank"])
        waiting = f"while kill -0 {others} 2>/dev/null; do sleep 0.05; done"
        killer = f"{waiting}; kill -KILL {os.getpid()}"
        subprocess.Popen(["timeout", "60", "sh", "-c", killer], stdout=subprocess.DEVNULL)
        os.kill(os.getpid(), signal.SIGSTOP)

    if _rank() == plan["rank"]:
        _at(plan["point"], plan["step"], stop)
    return train.main(argv)


def interpreter_stuck(argv: list[str]) -> int:
    """No thread of Python gets to run any more, as when a library keeps the interpreter's lock."""
    watchdog.LAST_RESORT_SECONDS = 0.5
    dog = watchdog.Watchdog(Path(argv[0]), 0, 1, 0.2)
    for step in (1, 2):
        dog.enter("forward_backward", step)
        time.sleep(0.1)
    ctypes.PyDLL(None).sleep(20)
    return 0


def suspended(argv: list[str]) -> int:
    """The machine stands still for an hour, and with it every clock but the one on the wall."""
    looks: list[float] = []

    class Clock:
        """Stands in for the module `time`."""

        def monotonic(self) -> float:
            looks.append(time.monotonic() + (3600.0 if len(looks) > 3 else 0.0))
            return looks[-1]

        def time(self) -> float:
            raise AssertionError("the clock that people set may go backwards")

        def __getattr__(self, name: str) -> Any:
            return getattr(time, name)

    watchdog.time = Clock()
    dog = watchdog.Watchdog(Path(argv[0]), 0, 1, 8.0)
    for step in (1, 2):
        dog.enter("forward_backward", step)
    deadline = time.monotonic() + 60
    while len(looks) < 6 and time.monotonic() < deadline:
        time.sleep(0.01)
    dog.close()
    return 0 if len(looks) >= 6 else 1


def signalled(argv: list[str]) -> int:
    """Processes are asked to stop, once or several times."""
    plan = _plan(argv)

    def ask() -> None:
        for name in plan["signals"]:
            os.kill(os.getpid(), getattr(signal, name))

    if _rank() in plan["ranks"]:
        _at(plan["point"], plan["step"], ask)
    return train.main(argv)


def nonfinite(argv: list[str]) -> int:
    """From a step on, for some steps, something of a process is not a number."""
    plan = _plan(argv)
    steps = range(plan["step"], plan["step"] + plan["steps"])
    now = {"step": 0, "batch": 0}
    forward_backward, differentiate = Engine.forward_backward, Engine.to_differentiate

    def with_fault(self: Engine, batches: Loader, step: int) -> tuple[Tensor, float]:
        now.update(step=step, batch=0)
        result = forward_backward(self, batches, step)
        if plan["where"] == "gradient" and step in steps:
            gradient = next(p.grad for _, p in self.named_parameters() if p.grad is not None)
            gradient.to_local().view(-1)[0] = float(plan["value"])
        return result

    def spoiled(self: Engine, loss: Tensor) -> Tensor:
        now["batch"] += 1
        hit = plan["where"] == "loss" or (plan["where"] == "micro-batch" and now["batch"] == 1)
        value = differentiate(self, loss)
        return value * float(plan["value"]) if hit and now["step"] in steps else value

    if _rank() == plan["rank"]:
        Engine.forward_backward = with_fault
        Engine.to_differentiate = spoiled
    return train.main(argv)


def spiking(argv: list[str]) -> int:
    """The loss of some samples is far too high; notes which samples each step was given."""
    plan = _plan(argv)
    recipe = load_recipe(argv)
    run_dir = Path(recipe.train.run_dir)
    forward_backward = Engine.forward_backward
    known: dict[bytes, int] = {}

    class Noting:
        """Hands micro-batches on and remembers their samples by content."""

        def __init__(self, batches: Loader, dataset: Any) -> None:
            self.batches, self.numbers = batches, list[int]()
            if not known:
                known.update({dataset[n][:-1].tobytes(): n for n in range(len(dataset))})

        def __next__(self) -> MicroBatch:
            batch = next(self.batches)
            rows = batch.tokens_bt.numpy()
            self.numbers += [known[rows[n].tobytes()] for n in range(len(rows))]
            return batch

    trainers: list[Trainer] = []
    _before(Trainer, "train", lambda self: trainers.append(self))

    def noting(self: Engine, batches: Loader, step: int) -> tuple[Tensor, float]:
        noted = Noting(batches, trainers[-1].data.of_pass(0))
        loss, seconds = forward_backward(self, noted, step)  # type: ignore[arg-type]
        with run_dir.with_suffix(f".samples-{_rank()}").open("a") as file:
            file.write(json.dumps([step, noted.numbers]) + "\n")
        return loss + 10.0 * bool(set(noted.numbers) & set(plan["bad"])), seconds

    def die(*_: Any) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    Engine.forward_backward = noting
    if plan.get("killed") and _rank() == 0:
        name = plan["killed"]
        original = getattr(Rewinds, name)

        def killed(self: Rewinds) -> Any:
            return die() if self.records else original(self)

        setattr(Rewinds, name, killed)
    return train.main(argv)


def flipped(argv: list[str]) -> int:
    """One bit of one tensor flips on one process.

    The plan's `step` says when: before that step, `load` as the state is loaded, or `check` just
    before the comparison of step 8, so that nothing else differs.
    """
    plan = _plan(argv)

    def flip(trainer: Trainer) -> None:
        tensors = {**trainer.state.tensors(), "optimizer.updates": trainer.optimizer.updates}
        tensor = tensors[plan["tensor"]]
        part = tensor.to_local() if isinstance(tensor, DTensor) else tensor
        part.view(-1)[-1:].view(torch.int32).bitwise_xor_(1 << plan["bit"])

    def before_step(trainer: Trainer, *_: Any) -> None:
        if trainer.state.step + 1 == plan["step"]:
            flip(trainer)

    def before_check(trainer: Trainer) -> None:
        if trainer.state.step == 8:
            flip(trainer)

    load = CheckpointManager.load

    def after_load(self: CheckpointManager, *arguments: Any) -> Any:
        state = load(self, *arguments)
        tensors = arguments[1](state)
        tensors[plan["tensor"]].to_local().view(-1)[:1].add_(1.0)
        return state

    if _rank() == plan["rank"]:
        if plan["step"] == "load":
            CheckpointManager.load = after_load
        elif plan["step"] == "check":
            _before(Trainer, "check_replicas", before_check)
        else:
            _before(Trainer, "train_step", before_step)
    return train.main(argv)


def copies_of_four(_: list[str]) -> int:
    """Four processes, two by two, compare copies; each says what it is told of each case."""
    both = [Replicate(), Replicate()]
    # which ranks hold another value of what: [placements, ranks]; None is a plain tensor
    cases: dict[str, tuple[list[Any] | None, set[int]]] = {
        "sound": (both, set()),
        "seen by two": ([Shard(0), Replicate()], {3}),
        "a column": (both, {1, 3}),
        "a row": (both, {2, 3}),
        "plain": (None, {2}),
    }
    with processes(Parallel(tensor=2)) as mesh:
        grid = init_device_mesh("cpu", (2, 2))
        for case, (placements, odd) in cases.items():
            value = torch.ones(4) + float(mesh.rank in odd)
            checked = value if placements is None else DTensor.from_local(value, grid, placements)
            sound = DTensor.from_local(torch.ones(4), grid, both)
            try:
                check_replicas({case: checked, "another": sound}, mesh, 1)
                said = "equal"
            except RunError as error:
                said = str(error)
            # one write, so that lines of several processes do not mix
            os.write(1, f"rank {mesh.rank}, {case}: {said}\n".encode())
    return 0


def failed_save(argv: list[str]) -> int:
    """Rank 1 cannot write a checkpoint in the background; step 12 waits until that is known."""
    full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def refused(path: str) -> None:
        if ".step-00000010" in path and _rank() == 1:
            raise full

    def wait(trainer: Trainer, *_: Any) -> None:
        while trainer.state.step == 11 and not trainer.checkpoints.failed:
            time.sleep(0.001)

    _before(Trainer, "train_step", wait)
    with before_tensor_writes(refused):
        return train.main(argv)


def unread(argv: list[str]) -> int:
    """Nobody reads what is printed."""
    reading, writing = os.pipe()
    for stream in (1, 2):
        os.dup2(writing, stream)
    os.close(reading)
    return train.main(argv)
