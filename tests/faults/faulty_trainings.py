"""Trainings that meet a fault, for tests.layouts to start in several processes.

What happens is read from `<run_dir>.plan.json`; a fault hits one rank, at one step.
"""

import json
import os
import signal
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megaphi import train
from megaphi.checkpoint import shards
from megaphi.checkpoint.manager import CheckpointManager
from megaphi.data.loader import Loader, MicroBatch
from megaphi.engine import Engine
from megaphi.optim.adamw import AdamW
from megaphi.recipe_file import load_recipe
from megaphi.resilience.spikes import Rewinds
from megaphi.trainer import Trainer


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

    original = Trainer.restore

    def restore(self: Trainer, found: Path) -> None:
        original(self, found)
        now["step"] = self.step_number

    Trainer.restore = restore
    _before(Trainer, "train_step", begin)
    owner, name = {
        "construct": (Engine, "__init__"),
        "data": (Loader, "__next__"),
        "forward": (Engine, "forward_backward"),
        "backward": (Engine, "to_differentiate"),
        "optimizer": (AdamW, "gradient_norm"),
        "report": (Trainer, "report"),
        "evaluate": (Engine, "evaluate"),
        "save": (shards._HashingStream, "write"),
    }[point]
    _before(owner, name, fire)


def stopped(argv: list[str]) -> int:
    """A process is stopped as by SIGSTOP; something else ends it later, as torchrun would."""
    plan = _plan(argv)

    def stop() -> None:
        killer = f"sleep {plan['killed_after']}; kill -KILL {os.getpid()}"
        subprocess.Popen(["sh", "-c", killer], stdout=subprocess.DEVNULL)
        os.kill(os.getpid(), signal.SIGSTOP)

    if _rank() == plan["rank"]:
        _at(plan["point"], plan["step"], stop)
    return train.run(argv)


def signalled(argv: list[str]) -> int:
    """Processes are asked to stop, once or several times."""
    plan = _plan(argv)

    def ask() -> None:
        for name in plan["signals"]:
            os.kill(os.getpid(), getattr(signal, name))

    if _rank() in plan["ranks"]:
        _at(plan["point"], plan["step"], ask)
    return train.run(argv)


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
    return train.run(argv)


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
        noted = Noting(batches, trainers[-1].first_pass)
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
    return train.run(argv)


def flipped(argv: list[str]) -> int:
    """One bit of one tensor flips on one process, before a step or when the state is loaded."""
    plan = _plan(argv)

    def flip(trainer: Trainer) -> None:
        tensor = trainer.state_tensors()[plan["tensor"]]
        part = tensor.to_local() if hasattr(tensor, "to_local") else tensor
        part.view(-1)[-1:].view(torch.int32).bitwise_xor_(1 << plan["bit"])

    def before_step(trainer: Trainer, *_: Any) -> None:
        if trainer.step_number + 1 == plan["step"]:
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
        else:
            _before(Trainer, "train_step", before_step)
    return train.run(argv)
