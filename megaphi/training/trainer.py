"""The training run: what it is built from, in order, and the loop over steps."""

from pathlib import Path

import torch

from megaphi.checkpoint.manager import CheckpointManager
from megaphi.checkpoint.resume import load_weights_into
from megaphi.config import Recipe
from megaphi.data.loader import Loader, LoaderOptions
from megaphi.device import HostCopy
from megaphi.errors import Preempted, RunError
from megaphi.metrics.logger import RunLogger, has_evaluation
from megaphi.model.init import initialize
from megaphi.optim.adamw import AdamW
from megaphi.optim.schedule import learning_rate
from megaphi.parallel.mesh import Mesh
from megaphi.resilience.replicas import check_replicas
from megaphi.resilience.signals import StopRequest
from megaphi.resilience.watchdog import Watchdog
from megaphi.training.description import describe_run
from megaphi.training.engine import Engine
from megaphi.training.evaluation import Evaluation
from megaphi.training.reporter import StepMetrics
from megaphi.training.run_state import RunState
from megaphi.training.training_data import TrainingData


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
        recipe.micro_batches(mesh.data_size)  # raises what does not divide before anything is read

        # data first: what does not fit ends the run before anything large is built
        self.data = TrainingData(recipe)
        self.evaluation = Evaluation(recipe, mesh, self.data.eod_id)
        self.checkpoints = CheckpointManager(recipe, mesh)
        run_dir = Path(recipe.train.run_dir)
        self.watchdog = Watchdog(run_dir, mesh.rank, mesh.size, recipe.train.hang_seconds)
        try:
            self.engine = Engine(recipe, mesh)
            self.optimizer = AdamW(self.engine.named_parameters(), recipe.optimizer, mesh)
            parts = (self.data, self.checkpoints, self.engine, self.optimizer)
            self.state = RunState(recipe, mesh, *parts, self.say)
            if not self.state.resume():
                self.initialize()
            self.checkpoints.prepare(self.state.tensors())
        except BaseException:
            self.checkpoints.close()
            self.watchdog.close()
            raise

    def initialize(self) -> None:
        """Give a new run its weights: drawn from the seed, or those of another model."""
        recipe, source = self.recipe, self.recipe.checkpoint.initialize_from
        if source is None:
            initialize(self.engine.named_parameters(), recipe.model, recipe.train.seed)
            return
        found = load_weights_into(self.engine.named_parameters(), recipe.model, source)
        self.say(f"new run from the weights of {found}")

    def run(self) -> None:
        """Train to the last step, evaluating, saving and reporting on the way."""
        try:
            for line in describe_run(self.recipe, self.mesh, self.engine):
                self.say(line)
            self.say(self.checkpoints.describe())
            # the last moment at which leaving costs nothing; from here on the loop looks
            self.stop.check(self.state.step, asked=self.mesh.any(self.stop.requested))
            while True:
                self.check_replicas()  # also those of a checkpoint just loaded
                self.train()
                if self.state.reporter.spike is None:
                    break
                self.watchdog.enter("rewind")
                self.state.rewind()
            self.checkpoints.wait()
        finally:
            self.checkpoints.close()
            self.watchdog.close()

    def train(self) -> None:
        """Train from the present step to the last one, or to a loss spike."""
        recipe, step = self.recipe, self.state.step
        evaluate = self.lacks_evaluation()
        if step >= recipe.train.steps and not evaluate:
            self.say(f"nothing to do: step {step} of {recipe.train.steps} is done")
            return
        if self.mesh.is_main:
            self.state.write_settings()
        loader = Loader(
            self.data.of_pass,
            LoaderOptions.of_run(recipe, self.mesh.device, self.data.eod_id),
            part=(self.mesh.data_rank, self.mesh.data_size),
            consumed_samples=step * recipe.train.global_batch_size,
            sample_at=self.state.rewinds.sample_at,
            waiting=lambda: self.watchdog.phase("data"),
        )
        logger = self.state.open_logger() if self.mesh.is_main else None
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
        recipe, state = self.recipe, self.state
        pending: StepMetrics | None = None
        while state.step < recipe.train.steps:
            metrics = self.train_step(loader)
            stop = self.report(pending, logger)
            pending = metrics
            last = state.step == recipe.train.steps
            save = last or state.step % recipe.checkpoint.interval == 0
            evaluate = self.evaluation.is_due(state.step)
            if save or evaluate or stop:
                stop = self.report(pending, logger) or stop
                pending = None
            if state.reporter.spike is not None:
                return
            # weights that only give non-finite steps must not replace the checkpoints from before
            save = save and (last or state.reporter.nonfinite_in_a_row == 0)
            if last and state.reporter.nonfinite_in_a_row >= state.step:
                raise RunError(
                    f"none of {state.step} steps had finite gradients: nothing was learned, and "
                    "nothing is saved; lower optimizer.learning_rate, or look at the data and the "
                    "initial weights"
                )
            if save or stop:
                self.save()
            if state.step % (recipe.train.replica_check_interval or recipe.train.steps) == 0:
                self.check_replicas()
            if stop and not last:
                self.leave()
            if evaluate and not self.evaluate(logger):
                if not save:
                    self.save()
                self.leave()

    def train_step(self, loader: Loader) -> StepMetrics:
        """One optimizer step: forward, backward, clip, update. Nothing waits for the device."""
        recipe, step, timer = self.recipe, self.state.step + 1, self.state.reporter.timer
        self.watchdog.enter("forward_backward", step)
        timer.start()
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
        self.state.step = step
        timer.stop()
        numbers = HostCopy(torch.stack((loss, norm, counted.float(), stop_asked, loss_scale)))
        return StepMetrics(step, rate, data_seconds, numbers)

    def report(self, metrics: StepMetrics | None, logger: RunLogger | None) -> bool:
        """Write a step's row; return whether any process was asked to stop."""
        self.watchdog.enter("report")
        return self.state.reporter.report(metrics, logger)

    def save(self) -> None:
        """Publish a checkpoint of the present step, at once or in the background."""
        self.watchdog.enter("save")
        self.state.save()

    def evaluate(self, logger: RunLogger | None) -> bool:
        """Evaluate and log; False if a request to stop ended it early, on all processes alike."""
        loss = self.evaluation.loss(self.engine, self.stop, self.watchdog)
        if loss is not None and logger is not None:
            logger.evaluation(self.state.step, loss)
        return loss is not None

    def lacks_evaluation(self) -> bool:
        """Whether a run that is resumed was ended between a save and the evaluation after it."""
        step = self.state.step
        return self.evaluation.is_due(step) and not self.mesh.any(
            self.mesh.is_main and has_evaluation(self.state.run_dir, step)
        )

    def check_replicas(self) -> None:
        """Compare what several processes must hold alike, unless that is turned off."""
        if self.recipe.train.replica_check_interval > 0:
            self.watchdog.enter("replicas")
            counts = {"optimizer.updates": self.optimizer.updates}
            check_replicas({**self.state.tensors(), **counts}, self.mesh, self.state.step)

    def leave(self) -> None:
        """End a run that was asked to stop and whose present step is being saved."""
        self.checkpoints.wait()
        raise Preempted(f"stopped on request and saved at step {self.state.step}; run me again")

    def say(self, message: str) -> None:
        """Print a line for people, once."""
        if self.mesh.is_main:
            print(message, flush=True)
