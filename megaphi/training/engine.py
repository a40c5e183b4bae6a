"""What computes a step on this process: its part of the model, and how micro-batches run through.

Everything that the recipe leaves to the device is decided here, once, and logged: number
formats, attention kernel, compilation, layout. The trainer above it sees losses and parameters.
"""

import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext

import torch
from torch import Tensor, nn

from kernels.ops import DropoutSeed
from megaphi.allocator import keep_freed_memory
from megaphi.config import Recipe
from megaphi.data.loader import Loader, MicroBatch
from megaphi.device import is_gpu, seed_generator
from megaphi.model.attention_backends import choose, probe, training_need
from megaphi.model.column_pair import choose_overlap
from megaphi.model.execution import Execution
from megaphi.model.linear import make_linear
from megaphi.model.phi import Phi
from megaphi.parallel.axes import axes_of
from megaphi.parallel.mesh import Mesh
from megaphi.precision.fp8_choice import fp8_layers
from megaphi.precision.loss_scale import LossScale
from megaphi.precision.policy import check_pipeline, facts_of, resolve
from megaphi.training.compilation import choose_compile, compile_blocks
from megaphi.training.one_process import cast_and_run
from megaphi.training.parallelize import parallelize, release_gathered_weights, send_gradients
from megaphi.training.pipeline import Pipeline, StageModel, split_layers, stages_of_process


class Engine:
    """The model of a run on this process, on its device but without values yet.

    Raises:
        ValueError: the device or the installation cannot do what the recipe asks for.
    """

    def __init__(self, recipe: Recipe, mesh: Mesh) -> None:
        self.recipe = recipe
        self.mesh = mesh
        self.num_micro_batches = recipe.micro_batches(mesh.data_size)
        self.tokens_per_step = recipe.train.global_batch_size * recipe.data.sequence_length
        self.num_addends = self.num_micro_batches * mesh.data_size
        self.policy = resolve(recipe.precision, facts_of(mesh.device))
        self.layers_of_stages: list[range] = []
        if recipe.parallel.pipeline > 1:
            check_pipeline(self.policy, recipe.precision)
            self.layers_of_stages = split_layers(recipe.model, recipe.parallel.num_stages)
        self.dtype = self.policy.compute_dtype
        self.fp8 = fp8_layers(self.policy, recipe.precision)
        self.loss_scale = LossScale(recipe.precision, mesh.device, enabled=self.policy.loss_scaling)
        self.attention = choose(
            training_need(recipe, self.dtype), probe(mesh.device), recipe.compute.attention
        )
        fp8_names = () if self.fp8 is None else self.fp8.names
        self.overlap = choose_overlap(recipe.parallel, fp8_names)
        alone_on_cpu = mesh.size == 1 and not is_gpu(mesh.device) and self.fp8 is None
        self.compilation = choose_compile(recipe, alone_on_cpu)
        # blocks that are compiled one by one have FSDP2's casts around them
        self.alone_on_cpu = alone_on_cpu and self.compilation.scope != "blocks"
        if not is_gpu(mesh.device):
            keep_freed_memory()
        with torch.device("meta"):
            self.parts = self._build()
        for part in self.parts:
            if self.compilation.scope == "blocks":
                compile_blocks(part)
            if not self.alone_on_cpu:
                parallelize(part, mesh, recipe.parallel, self.dtype)
            part.to_empty(device=mesh.device)
        self.model: Callable[..., Tensor] = self.parts[0]
        if self.alone_on_cpu:
            self.model = cast_and_run(self.parts[0], self.dtype)
        if self.compilation.scope == "model":
            self.model = torch.compile(self.model)
        if self.fp8 is not None:
            self.fp8.attach(nn.ModuleList(self.parts), mesh.device)
        self.pipeline: Pipeline | None = None
        if recipe.parallel.pipeline > 1:
            stages = [part for part in self.parts if isinstance(part, StageModel)]
            self.pipeline = Pipeline(recipe, mesh, stages, self.dtype)

    def _build(self) -> list[Phi]:
        """The whole model, or the stages that this process runs."""
        config, parallel = self.recipe.model, self.recipe.parallel
        execution = Execution(
            make=make_linear if self.fp8 is None else self.fp8.make,
            attention=self.attention.backend,
            axes=axes_of(self.mesh, self.overlap.enabled),
            recompute=parallel.recompute,
        )
        if parallel.pipeline == 1:
            return [Phi(config, execution)]
        numbers = stages_of_process(parallel, self.mesh.axis_rank("pipeline"))
        return [StageModel(config, execution, self.layers_of_stages[number]) for number in numbers]

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """The parameters of this process, under their names in the whole model."""
        for part in self.parts:
            yield from part.named_parameters()

    def forward_backward(self, batches: Loader, step: int) -> tuple[Tensor, float]:
        """All micro-batches of a step; their gradients are summed over processes with the last.

        Args:
            batches: the loader.
            step: number of the step, from 1 on.

        Returns:
            This process's share of the mean loss per token, on the device, and the seconds in which
            it waited for data. The gradients are those of the mean, times `gradient_divisor`.
        """
        if self.pipeline is not None:
            began = time.perf_counter()
            taken = [next(batches) for _ in range(self.num_micro_batches)]
            waited = time.perf_counter() - began
            seeds = [self.dropout_seed(step, batch.first_sample) for batch in taken]
            total = self.pipeline.step(taken, seeds, self.to_differentiate)
            divisor = self.gradient_divisor
            return (total if divisor is None else total / divisor), waited
        loss, waited = torch.zeros((), device=self.mesh.device), 0.0
        for number in range(self.num_micro_batches):
            began = time.perf_counter()
            batch = next(batches)
            waited += time.perf_counter() - began
            # gradients travel between processes once a step, with the last micro-batch
            last = number == self.num_micro_batches - 1
            if not self.alone_on_cpu:
                send_gradients(self.parts[0], last, self.recipe.parallel)
            batch_loss = self.loss(batch, self.dropout_seed(step, batch.first_sample), number == 0)
            self.to_differentiate(batch_loss).backward()  # type: ignore[no-untyped-call]
            loss += batch_loss.detach()
        return loss / self.tokens_per_step, waited

    def loss(
        self, batch: MicroBatch, dropout: DropoutSeed | None, is_first: bool | None = None
    ) -> Tensor:
        """Sum of a micro-batch's losses, with the whole model on this process."""
        with nullcontext() if self.fp8 is None else self.fp8.forward_pass(is_first):
            return self.model(
                batch.tokens_bt, batch.labels_bt, dropout=dropout, documents=batch.documents
            )

    def to_differentiate(self, loss: Tensor) -> Tensor:
        """From the sum of a micro-batch's losses to what the backward pass starts from.

        That is its share of the mean over the global batch; where gradients are scaled, the mean
        over the micro-batch times the loss scale.
        """
        if not self.loss_scale.enabled:
            return loss / self.tokens_per_step
        return loss * (self.loss_scale.value * self.num_addends / self.tokens_per_step)

    @property
    def gradient_divisor(self) -> Tensor | None:
        """What the gradients are too large by, fp32 scalar on the device; None where it is 1."""
        if not self.loss_scale.enabled:
            return None
        return self.loss_scale.value * self.num_addends

    @torch.no_grad()
    def evaluate(self, batch: MicroBatch) -> Tensor:
        """Sum of a micro-batch's losses without dropout, or this process's share of it."""
        if self.pipeline is not None:
            return self.pipeline.evaluate(batch)
        return self.loss(batch, None)

    def after_evaluation(self) -> None:
        """Free the weights that were gathered for it."""
        for part in self.parts:
            release_gathered_weights(part)

    def after_step(self, finite: Tensor) -> None:
        """Tell the number formats that the weights changed and whether the gradients were finite.

        Args:
            finite: bool scalar on the device.
        """
        self.loss_scale.update(finite)
        if self.fp8 is not None:
            self.fp8.after_step(torch.distributed.group.WORLD)

    def dropout_seed(self, step: int, first_sample: int) -> DropoutSeed:
        """Where a micro-batch of a step stands in the run's random numbers.

        Fused attention kernels draw from the device's generator instead; it is seeded alike.
        """
        first_of_step = (step - 1) * self.recipe.train.global_batch_size
        dropout = DropoutSeed(
            seed=self.recipe.train.seed,
            step=step,
            first_token=(first_sample - first_of_step) * self.recipe.data.sequence_length,
        )
        if self.recipe.model.attention_dropout > 0:
            seed = hash((dropout.seed, dropout.step, dropout.first_token))
            seed_generator(self.mesh.device, seed)
        return dropout

    @property
    def rounding(self) -> dict[str, str]:
        """What was decided on that changes how results are rounded."""
        return {
            "precision": self.policy.reason,
            "attention": self.attention.backend,
            "compiled": self.compilation.scope,
        }

    def precision_tensors(self) -> dict[str, Tensor]:
        """What the number formats keep in a checkpoint, equal on every process."""
        return {} if self.fp8 is None else self.fp8.state_tensors()

    def loaded(self, loss_scale: dict[str, float] | None) -> None:
        """Weights and `precision_tensors` came from a checkpoint; so does the loss scale."""
        if loss_scale is not None:
            self.loss_scale.load_state(loss_scale)
        if self.fp8 is not None:
            self.fp8.weights_changed()
