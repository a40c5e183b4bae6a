"""The loss on held-out samples, while a run trains."""

import torch

from megaphi.config import Recipe
from megaphi.data.loader import read_samples, to_micro_batch
from megaphi.data.samples import validation_dataset
from megaphi.device import HostCopy
from megaphi.parallel.mesh import Mesh
from megaphi.resilience.signals import StopRequest
from megaphi.resilience.watchdog import Watchdog
from megaphi.training.engine import Engine


class Evaluation:
    """The held-out samples of a run, and the loss of the model on them.

    Raises:
        ValueError: the validation data does not fill one micro-batch of every process.
    """

    def __init__(self, recipe: Recipe, mesh: Mesh, eod_id: int | None) -> None:
        self._recipe = recipe
        self._mesh = mesh
        self._eod_id = eod_id
        self._dataset = validation_dataset(recipe)
        self.num_batches = self._count_batches()
        """Micro-batches of an evaluation on each process; 0 without validation data."""

    def _count_batches(self) -> int:
        """How often all processes can take a micro-batch each."""
        if self._dataset is None:
            return 0
        train = self._recipe.train
        wanted = train.evaluation_batches * train.global_batch_size
        per_round = train.micro_batch_size * self._mesh.data_size
        count = min(len(self._dataset), wanted) // per_round
        if count == 0:
            raise ValueError(
                f"the validation data has {len(self._dataset)} samples of "
                f"{self._recipe.data.sequence_length} tokens; one pass needs {per_round} "
                "(train.micro_batch_size x processes). Give it more data or lower the batch"
            )
        return count

    def is_due(self, step: int) -> bool:
        """Whether a step ends with an evaluation."""
        train = self._recipe.train
        due = step == train.steps or step % train.evaluation_interval == 0
        return self.num_batches > 0 and step > 0 and due

    @torch.no_grad()
    def loss(self, engine: Engine, stop: StopRequest, watchdog: Watchdog) -> float | None:
        """Mean loss per token, without dropout.

        None if a process was asked to stop meanwhile: an evaluation may take longer than what is
        left. All processes agree on that, with a sum that travels while the next batch is computed.
        """
        assert self._dataset is not None
        mesh, size = self._mesh, self._recipe.train.micro_batch_size
        total = torch.zeros((), device=mesh.device)
        asked = HostCopy(torch.zeros(1))
        for number in range(self.num_batches):
            watchdog.enter("evaluate")
            first = (number * mesh.data_size + mesh.data_rank) * size
            samples = read_samples(self._dataset, first, size, self._recipe.model.vocab_size)
            total += engine.evaluate(to_micro_batch(samples, first, mesh.device, self._eod_id))
            if asked.values()[0] > 0:
                break
            asked = HostCopy(mesh.sum_(torch.full((1,), float(stop.requested), device=mesh.device)))
        engine.after_evaluation()
        if asked.values()[0] > 0:
            return None
        rows = self.num_batches * mesh.data_size * size
        total = mesh.sum_(total / mesh.tensor_size)
        return float(total) / (rows * self._recipe.data.sequence_length)
