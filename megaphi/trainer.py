"""The training run: what it is built from, in order, and the loop over steps."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megaphi.checkpoint.manager import CheckpointManager
from megaphi.checkpoint.resume import (
    changes,
    check_same_model,
    check_same_order,
    data_order,
    environment,
    load_weights_into,
)
from megaphi.checkpoint.tokenizer_files import copy_tokenizer
from megaphi.config import Recipe
from megaphi.data.loader import (
    Dataset,
    Loader,
    check_token_files,
    end_of_document,
    read_samples,
    to_micro_batch,
    token_file_prefixes,
    train_dataset,
    validation_dataset,
)
from megaphi.durable import write_durably
from megaphi.engine import Engine
from megaphi.errors import Preempted
from megaphi.metrics.logger import RunLogger, format_count
from megaphi.metrics.meter import Later, device_name
from megaphi.metrics.report import Reporter, StepMetrics
from megaphi.model.init import initialize
from megaphi.model.phi import num_parameters
from megaphi.optim.adamw import AdamW
from megaphi.optim.schedule import learning_rate
from megaphi.parallel.mesh import Mesh
from megaphi.resilience import StopRequest


class Trainer:
    """One process's part of a training run.

    Raises (from the constructor and `run`):
        ValueError: the recipe and its data, checkpoint or processes do not fit together.
        RunError: the run failed; CheckpointError where a checkpoint is the cause.
        Preempted: a signal asked the run to stop, and it has saved.
    """

    def __init__(self, recipe: Recipe, mesh: Mesh) -> None:
        self.recipe = recipe
        self.mesh = mesh
        self.run_dir = Path(recipe.train.run_dir)
        recipe.micro_batches(mesh.data_size)  # raises what does not divide before anything is read

        # data first: what does not fit ends the run before anything large is made
        self.token_files = check_token_files(recipe)
        self.eod_id = end_of_document(recipe, self.token_files)
        self.first_pass = train_dataset(recipe, 0)
        self.validation = validation_dataset(recipe)
        self.data_order = data_order(recipe, self.token_files)
        self.num_validation_batches = self.count_validation_batches()
        self.checkpoints = CheckpointManager(recipe, mesh)
        self.stop = StopRequest()

        self.engine = Engine(recipe, mesh)
        self.optimizer = AdamW(self.engine.named_parameters(), recipe.optimizer, mesh)
        self.reporter = Reporter(recipe, mesh, self.engine.dtype)
        self.step_number = 0
        self.resume_or_start()
        self.checkpoints.prepare(self.state_tensors())

    def run(self) -> None:
        """Train to the last step, evaluating, saving and reporting on the way."""
        recipe = self.recipe
        self.describe()
        if self.step_number >= recipe.train.steps:
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
        )
        main = self.mesh.is_main
        logger = RunLogger(recipe, self.run_dir, self.step_number) if main else None
        try:
            self.loop(loader, logger)
            self.checkpoints.wait()
        finally:
            loader.close()
            self.checkpoints.close()
            if logger is not None:
                logger.close()

    def loop(self, loader: Loader, logger: RunLogger | None) -> None:
        """Steps, each reported while the next one runs: the device never waits for the host."""
        recipe = self.recipe
        pending: StepMetrics | None = None
        while self.step_number < recipe.train.steps:
            metrics = self.train_step(loader)
            stop = self.reporter.report(pending, logger)
            pending = metrics
            last = self.step_number == recipe.train.steps
            save = last or self.step_number % recipe.checkpoint.interval == 0
            evaluate = self.num_validation_batches > 0 and (
                last or self.step_number % recipe.train.evaluation_interval == 0
            )
            if save or evaluate or stop:
                stop = self.reporter.report(pending, logger) or stop
                pending = None
            if evaluate:
                loss = self.evaluate()
                if logger is not None:
                    logger.evaluation(self.step_number, loss)
            if save or stop:
                self.save()
            if stop and not last:
                self.checkpoints.wait()
                raise Preempted(
                    f"stopped on request and saved at step {self.step_number}; run me again"
                )

    def train_step(self, loader: Loader) -> StepMetrics:
        """One optimizer step: forward, backward, clip, update. Nothing waits for the device."""
        recipe, step = self.recipe, self.step_number + 1
        self.reporter.timer.start()
        loss, data_seconds = self.engine.forward_backward(loader, step)
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

    @torch.no_grad()
    def evaluate(self) -> float:
        """Mean loss per token over the held-out samples, without dropout."""
        assert self.validation is not None
        size = self.recipe.train.micro_batch_size
        total = torch.zeros((), device=self.mesh.device)
        for number in range(self.num_validation_batches):
            first = (number * self.mesh.data_size + self.mesh.data_rank) * size
            samples = read_samples(self.validation, first, size, self.recipe.model.vocab_size)
            batch = to_micro_batch(samples, first, self.mesh.device, self.eod_id)
            total += self.engine.evaluate(batch)
        self.engine.after_evaluation()
        rows = self.num_validation_batches * self.mesh.data_size * size
        total = self.mesh.sum_(total / self.mesh.tensor_size)
        return float(total) / (rows * self.recipe.data.sequence_length)

    def save(self) -> None:
        """Publish a checkpoint of the present step, at once or in the background."""
        state = {
            "step": self.step_number,
            "consumed_samples": self.step_number * self.recipe.train.global_batch_size,
            "optimizer_updates": int(self.optimizer.updates.item()),
            "nonfinite_in_a_row": self.reporter.nonfinite_in_a_row,
            "loss_scale": self.engine.loss_scale.state(),
            "precision_tensors": sorted(self.engine.precision_tensors()),
            "data_order": self.data_order,
            "environment": environment(self.mesh, self.engine.policy.reason),
        }
        self.checkpoints.save(self.step_number, self.state_tensors(), state)

    def resume_or_start(self) -> None:
        """Load the newest verified checkpoint, or fill in the weights of a new run."""
        recipe = self.recipe
        found = self.checkpoints.find()
        if found is None:
            self.start()
        else:
            check_same_model(recipe.model, found)
            state = self.checkpoints.load(found, self.tensors_to_load)
            check_same_order(state["data_order"], self.data_order, found)
            self.step_number = state["step"]
            self.reporter.nonfinite_in_a_row = state["nonfinite_in_a_row"]
            self.optimizer.updates.fill_(state["optimizer_updates"])
            self.engine.loaded(state.get("loss_scale"))
            self.say(f"resuming from {found}")
            drift = changes(state["environment"], environment(self.mesh, self.engine.policy.reason))
            if drift:
                self.say(f"not bitwise the same as before: {', '.join(drift)}")
        if self.mesh.is_main:
            write_durably(self.run_dir / "config.yaml", recipe.to_yaml())
            tokenizer = Path(f"{token_file_prefixes(recipe)[0]}.tokenizer")
            if tokenizer.is_dir():
                copy_tokenizer(tokenizer, self.run_dir / "tokenizer")

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

    def count_validation_batches(self) -> int:
        """Micro-batches of an evaluation on each process; 0 without validation data.

        Raises:
            ValueError: the validation data does not fill one micro-batch of every process.
        """
        if self.validation is None:
            return 0
        wanted = self.recipe.train.evaluation_batches * self.recipe.train.global_batch_size
        per_round = self.recipe.train.micro_batch_size * self.mesh.data_size
        count = min(len(self.validation), wanted) // per_round
        if count == 0:
            raise ValueError(
                f"the validation data has {len(self.validation)} samples of "
                f"{self.recipe.data.sequence_length} tokens; one pass needs {per_round} "
                "(train.micro_batch_size x processes). Give it more data or lower the batch"
            )
        return count

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
