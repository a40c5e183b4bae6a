"""The training run: what it is built from, in order, and the loop over steps."""

import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megaphi.checkpoint.manager import CheckpointManager
from megaphi.checkpoint.resume import (
    changes,
    check_same_model,
    check_same_order,
    check_state,
    check_token_file_dates,
    data_order,
    environment,
    load_weights_into,
    recipe_changes,
    token_file_dates,
)
from megaphi.config import Recipe
from megaphi.data.loader import (
    Dataset,
    Loader,
    check_token_files,
    end_of_document,
    token_file_prefixes,
    train_dataset,
)
from megaphi.durable import write_durably
from megaphi.errors import Preempted
from megaphi.formats.tokenizer_files import copy_tokenizer
from megaphi.metrics.logger import RunLogger, format_count, has_evaluation
from megaphi.metrics.meter import Later, device_name
from megaphi.model.init import initialize
from megaphi.model.phi import num_parameters
from megaphi.optim.adamw import AdamW
from megaphi.optim.schedule import learning_rate
from megaphi.parallel.mesh import Mesh
from megaphi.resilience.replicas import check_replicas
from megaphi.resilience.signals import StopRequest
from megaphi.resilience.spikes import Rewinds
from megaphi.resilience.watchdog import Watchdog
from megaphi.training.engine import Engine
from megaphi.training.evaluation import Evaluation
from megaphi.training.reporter import Reporter, StepMetrics


class Trainer:
    """One process's part of a training run.

    Args:
        recipe: the run.
        mesh: its processes.
        stop: what remembers signals, if it was made before.

    Raises (from the constructor and `run`):
        ValueError: the recipe and its data, checkpoint or processes do not fit together.
        RunError: the run failed; CheckpointError where a checkpoint is the cause.
        Preempted: a signal asked the run to stop, and it has saved.
    """

    def __init__(self, recipe: Recipe, mesh: Mesh, stop: StopRequest | None = None) -> None:
        self.recipe = recipe
        self.mesh = mesh
        self.stop = stop or StopRequest()
        self.run_dir = Path(recipe.train.run_dir)
        recipe.micro_batches(mesh.data_size)  # raises what does not divide before anything is read

        # data first: what does not fit ends the run before anything large is made
        self.token_files = check_token_files(recipe)
        self.eod_id = end_of_document(recipe, self.token_files)
        self.first_pass = train_dataset(recipe, 0)
        self.evaluation = Evaluation(recipe, mesh, self.eod_id)
        self.data_order = data_order(recipe, self.token_files)
        self.token_file_dates = token_file_dates(recipe)
        self.checkpoints = CheckpointManager(recipe, mesh)
        self.watchdog = Watchdog(self.run_dir, mesh.rank, mesh.size, recipe.train.hang_seconds)
        try:
            self.build()
        except BaseException:
            self.watchdog.close()
            raise

    def build(self) -> None:
        """Make the model and its optimizer, and give them the values to start or go on with."""
        recipe, mesh = self.recipe, self.mesh
        self.engine = Engine(recipe, mesh)
        self.optimizer = AdamW(self.engine.named_parameters(), recipe.optimizer, mesh)
        self.reporter = Reporter(recipe, mesh, self.engine.dtype)
        self.step_number = 0
        self.resumed_from: Path | None = None
        self.rewinds = Rewinds(self.run_dir)
        self.resume_or_start()
        self.checkpoints.prepare(self.state_tensors())

    def run(self) -> None:
        """Train to the last step, evaluating, saving and reporting on the way."""
        try:
            self.describe()
            # the last moment at which leaving costs nothing; from here on the loop looks
            self.stop.check(self.step_number, asked=self.mesh.any(self.stop.requested))
            while True:
                self.check_replicas()  # also those of a checkpoint just loaded
                self.train()
                if self.reporter.spike is None:
                    break
                self.rewind()
            self.checkpoints.wait()
        finally:
            self.checkpoints.close()
            self.watchdog.close()

    def train(self) -> None:
        """Train from the present step to the last one, or to a loss spike."""
        recipe = self.recipe
        evaluate = self.lacks_evaluation()
        if self.step_number >= recipe.train.steps and not evaluate:
            self.say(f"nothing to do: step {self.step_number} of {recipe.train.steps} is done")
            return
        loader = Loader(
            self.dataset_of_pass,
            planned_samples=recipe.planned_samples,
            consumed_samples=self.step_number * recipe.train.global_batch_size,
            micro_batch_size=recipe.train.micro_batch_size,
            data_rank=self.mesh.data_rank,
            data_size=self.mesh.data_size,
            vocab_size=recipe.model.vocab_size,
            device=self.mesh.device,
            prefetch=recipe.data.prefetch_batches,
            eod_id=self.eod_id,
            sample_at=self.rewinds.sample_at,
            waiting=lambda: self.watchdog.phase("data"),
        )
        logger = self.open_logger() if self.mesh.is_main else None
        try:
            if evaluate and not self.evaluate(logger):
                self.leave()
            self.loop(loader, logger)
        finally:
            loader.close()
            if logger is not None:
                logger.close()

    def loop(self, loader: Loader, logger: RunLogger | None) -> None:
        """Steps, each reported while the next one runs: the device never waits for the host."""
        recipe = self.recipe
        pending: StepMetrics | None = None
        while self.step_number < recipe.train.steps:
            metrics = self.train_step(loader)
            stop = self.report(pending, logger)
            pending = metrics
            last = self.step_number == recipe.train.steps
            save = last or self.step_number % recipe.checkpoint.interval == 0
            evaluate = self.evaluation.is_due(self.step_number)
            if save or evaluate or stop:
                stop = self.report(pending, logger) or stop
                pending = None
            if self.reporter.spike is not None:
                return
            # weights that only give non-finite steps must not replace the checkpoints from before
            save = save and (last or self.reporter.nonfinite_in_a_row == 0)
            if save or stop:
                self.save()
            if self.step_number % (recipe.train.replica_check_interval or recipe.train.steps) == 0:
                self.check_replicas()
            if stop and not last:
                self.leave()
            if evaluate and not self.evaluate(logger):
                if not save:
                    self.save()
                self.leave()

    def leave(self) -> None:
        """End a run that was asked to stop and whose present step is being saved."""
        self.checkpoints.wait()
        raise Preempted(f"stopped on request and saved at step {self.step_number}; run me again")

    def train_step(self, loader: Loader) -> StepMetrics:
        """One optimizer step: forward, backward, clip, update. Nothing waits for the device."""
        recipe, step = self.recipe, self.step_number + 1
        self.watchdog.enter("forward_backward", step)
        self.reporter.timer.start()
        loss, data_seconds = self.engine.forward_backward(loader, step)
        self.watchdog.enter("optimizer")
        rate = learning_rate(recipe, step)
        norm, counted = self.optimizer.step(rate, self.engine.gradient_divisor)
        loss_scale = self.engine.loss_scale.value.clone()
        self.engine.after_step(counted)
        # a failed save stops the run too, on all processes at the same step; `save` then says why
        stop = self.stop.requested or self.checkpoints.failed
        stop_asked = torch.full_like(loss, float(stop))
        # every process of the tensor axis has the same loss
        loss = loss / self.mesh.tensor_size
        loss, stop_asked = self.mesh.sum_(torch.stack((loss, stop_asked)))
        self.step_number = step
        self.reporter.timer.stop()
        numbers = Later(torch.stack((loss, norm, counted.float(), stop_asked, loss_scale)))
        return StepMetrics(step, rate, data_seconds, numbers)

    def report(self, metrics: StepMetrics | None, logger: RunLogger | None) -> bool:
        """Write a step's row; return whether any process was asked to stop."""
        self.watchdog.enter("report")
        return self.reporter.report(metrics, logger)

    def evaluate(self, logger: RunLogger | None) -> bool:
        """Evaluate and log; False if a request to stop ended it early, on all processes alike."""
        loss = self.evaluation.loss(self.engine, self.stop, self.watchdog)
        if loss is not None and logger is not None:
            logger.evaluation(self.step_number, loss)
        return loss is not None

    def lacks_evaluation(self) -> bool:
        """Whether a run that goes on was ended between a save and the evaluation after it."""
        step = self.step_number
        return self.evaluation.is_due(step) and not self.mesh.any(
            self.mesh.is_main and has_evaluation(self.run_dir, step)
        )

    def check_replicas(self) -> None:
        """Compare what several processes must hold alike, unless that is turned off."""
        if self.recipe.train.replica_check_interval > 0:
            self.watchdog.enter("replicas")
            counts = {"optimizer.updates": self.optimizer.updates}
            check_replicas({**self.state_tensors(), **counts}, self.mesh, self.step_number)

    def save(self) -> None:
        """Publish a checkpoint of the present step, at once or in the background."""
        self.watchdog.enter("save")
        state = {
            "step": self.step_number,
            "consumed_samples": self.step_number * self.recipe.train.global_batch_size,
            "optimizer_updates": int(self.optimizer.updates.item()),
            **self.reporter.state(),
            "rewinds": self.rewinds.state(),
            "loss_scale": self.engine.loss_scale.state(),
            "precision_tensors": sorted(self.engine.precision_tensors()),
            "data_order": self.data_order,
            "token_file_dates": self.token_file_dates,
            "environment": environment(self.mesh, self.engine.policy.reason),
        }
        self.checkpoints.save(self.step_number, self.state_tensors(), state)

    def rewind(self) -> None:
        """Answer a loss spike: go back to a checkpoint, and on without the data around the spike.

        What is decided is on the disk before anything is deleted: a run that is killed in between
        goes on here when it is resumed.
        """
        spike = self.reporter.spike
        assert spike is not None
        self.watchdog.enter("rewind")
        self.checkpoints.wait()
        self.rewinds = self.rewinds.after(spike, self.recipe.train)
        self.say(
            f"the loss spiked at steps {spike.first_step} to {spike.last_step} ({spike.loss:.3f}, "
            f"before {spike.mean:.3f}); going back"
        )
        found: Path = self.mesh.on_main(self.rewinds.find_checkpoint)
        self.mesh.on_main(self.rewinds.write)
        self.mesh.on_main(self.rewinds.drop_void_checkpoints)
        self.reporter = Reporter(self.recipe, self.mesh, self.engine.dtype)
        self.restore(found)
        self.resumed_from = None  # the run was not started again

    def resume_or_start(self) -> None:
        """Load the newest verified checkpoint, or fill in the weights of a new run."""
        recipe = self.recipe
        self.rewinds = self.mesh.on_main(lambda: Rewinds.read(self.run_dir))
        self.mesh.on_main(self.rewinds.drop_void_checkpoints)
        found = self.checkpoints.find()
        if found is None:
            self.start()
        else:
            self.restore(found)
        if self.mesh.is_main:
            write_durably(self.run_dir / "config.yaml", recipe.to_yaml())
            tokenizer = Path(f"{token_file_prefixes(recipe)[0]}.tokenizer")
            if tokenizer.is_dir():
                copy_tokenizer(tokenizer, self.run_dir / "tokenizer")

    def restore(self, found: Path) -> None:
        """Go on from a verified checkpoint, and say what is not as it was."""
        recipe = self.recipe
        check_same_model(recipe.model, found)
        state = self.checkpoints.load(found, self.tensors_to_load)
        check_state(state, recipe, found)
        check_same_order(state["data_order"], self.data_order, found)
        drift = self.mesh.on_main(
            lambda: check_token_file_dates(recipe, self.token_files, state["token_file_dates"])
        )
        self.rewinds = self.rewinds.joined(state["rewinds"], found)
        self.mesh.on_main(self.rewinds.write)
        self.step_number = state["step"]
        self.resumed_from = found
        self.reporter.load_state(state)
        self.optimizer.updates.fill_(state["optimizer_updates"])
        self.engine.loaded(state["loss_scale"])
        self.say(f"resuming from {found}")
        now = environment(self.mesh, self.engine.policy.reason)
        drift = [*changes(state["environment"], now), *drift]
        if drift:
            self.say(f"not bitwise the same as before: {', '.join(drift)}")
        different = recipe_changes(recipe, found)
        if different:
            self.say(f"going on with other settings: {', '.join(different)}")

    def open_logger(self) -> RunLogger:
        """The metrics of this run, cut to the present step, with what led here."""
        logger = RunLogger(self.recipe, self.run_dir, self.step_number)
        for record in self.rewinds.state():
            logger.event(min(record["void_after"], self.step_number), "rewind", **record)
        if self.resumed_from is not None:
            now = time.strftime("%Y-%m-%dT%H:%M:%S%z")
            name = self.resumed_from.name
            logger.event(self.step_number, "resume", checkpoint=name, time=now)
        return logger

    def start(self) -> None:
        """Give a new run its weights: drawn from the seed, or those of another model."""
        recipe = self.recipe
        if recipe.checkpoint.initialize_from is None:
            initialize(self.engine.named_parameters(), recipe.model, recipe.train.seed)
            return
        source = load_weights_into(
            self.engine.named_parameters(), recipe.model, recipe.checkpoint.initialize_from
        )
        self.say(f"new run from the weights of {source}")

    def state_tensors(self) -> dict[str, Tensor]:
        """Model and optimizer tensors under their checkpoint names."""
        weights = {f"model.{name}": p.detach() for name, p in self.optimizer.parameters.items()}
        return {**weights, **self.optimizer.state_tensors(), **self.engine.precision_tensors()}

    def tensors_to_load(self, state: dict[str, Any]) -> dict[str, Tensor]:
        """Those of `state_tensors` that a checkpoint has; another number format keeps others."""
        missing = self.engine.precision_tensors().keys() - state.get("precision_tensors", [])
        return {name: t for name, t in self.state_tensors().items() if name not in missing}

    def dataset_of_pass(self, number: int) -> Dataset:
        """Training samples of pass `number` over the plan."""
        return self.first_pass if number == 0 else train_dataset(self.recipe, number)

    def describe(self) -> None:
        """Print what is about to run."""
        recipe = self.recipe
        self.say("recipe:\n" + "".join(f"  {line}\n" for line in recipe.to_yaml().splitlines()))
        self.say(
            f"{format_count(num_parameters(recipe.model))} parameters, "
            f"{self.mesh.size} process(es) on {device_name(self.mesh.device)}, "
            f"{str(self.engine.dtype).removeprefix('torch.')}, "
            f"{self.engine.num_micro_batches} micro-batch(es) a step, "
            f"{format_count(self.engine.tokens_per_step)} tokens a step"
        )
        for line in (*self.engine.describe(), self.checkpoints.describe()):
            self.say(line)

    def say(self, message: str) -> None:
        """Print a line for people, once."""
        if self.mesh.is_main:
            print(message, flush=True)
