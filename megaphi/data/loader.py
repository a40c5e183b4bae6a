"""Micro-batches in a fixed order, read ahead by a thread.

The order is Megatron's: sample k of the run is row k of the blended data set; each micro-step takes
the next micro_batch_size x data_size samples, and process r of the data axis the r-th part of them.
The whole state is therefore one integer, the number of samples consumed by all processes.
"""

import queue
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from megaphi.config import Recipe
from megaphi.data.documents import Documents, find_documents
from megaphi.device import to_device, use
from megaphi.errors import RunError


class Dataset(Protocol):
    """Samples by number: int64 arrays of sequence_length + 1 token ids."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> np.ndarray: ...


@dataclass(frozen=True)
class MicroBatch:
    """One forward and backward pass of one process."""

    tokens_bt: Tensor
    """Inputs, int64, on the device."""
    labels_bt: Tensor
    """Next tokens, int64, on the device."""
    first_sample: int
    """Number of the first row among all samples of the run; rows are consecutive."""
    documents: Documents | None = None
    """Documents of the inputs, on the device, where attention must stay inside of them."""


def read_samples(dataset: Dataset, first: int, count: int, vocab_size: int) -> np.ndarray:
    """Stack samples first … first + count - 1, int64 [count, sequence_length + 1].

    Raises:
        RunError: a token id is outside the model's vocabulary.
    """
    samples = np.stack([dataset[index] for index in range(first, first + count)])
    lowest, highest = int(samples.min()), int(samples.max())
    if lowest < 0 or highest >= vocab_size:
        raise RunError(
            f"samples {first} to {first + count - 1} hold token id "
            f"{lowest if lowest < 0 else highest}, outside the model's vocabulary of {vocab_size}; "
            "were these token files made with another tokenizer?"
        )
    return samples


def to_micro_batch(
    samples: np.ndarray, first: int, device: torch.device, eod_id: int | None = None
) -> MicroBatch:
    """Cut inputs and labels out of samples and bring them to the device, without waiting for it.

    Args:
        samples: int64 [rows, sequence_length + 1].
        first: number of the first row among all samples of the run.
        device: where the tensors go.
        eod_id: id that ends a document, if attention must stay inside of one. The label of an EOD
            token is the first token of the next document: its loss counts.
    """
    documents = None
    if eod_id is not None:
        documents = find_documents(samples[:, :-1], eod_id).to(device)
    tensor = to_device(torch.from_numpy(samples), device)
    return MicroBatch(tensor[:, :-1], tensor[:, 1:], first, documents)


@dataclass(frozen=True, kw_only=True)
class LoaderOptions:
    """What a run's loaders have in common, on every process and after every resume."""

    planned_samples: int
    """Samples of the plan, for which the order is drawn."""
    micro_batch_size: int
    """Sequences of a micro-batch."""
    vocab_size: int
    """Token ids must be below it."""
    device: torch.device
    """Where micro-batches go."""
    prefetch: int = 1
    """Micro-batches that are read ahead."""
    eod_id: int | None = None
    """Id that ends a document, if micro-batches must say where their documents are."""

    @classmethod
    def of_run(cls, recipe: Recipe, device: torch.device, eod_id: int | None) -> "LoaderOptions":
        """The options of training by a recipe."""
        return cls(
            planned_samples=recipe.planned_samples,
            micro_batch_size=recipe.train.micro_batch_size,
            vocab_size=recipe.model.vocab_size,
            device=device,
            prefetch=recipe.data.prefetch_batches,
            eod_id=eod_id,
        )


class Loader:
    """Endless micro-batches of one process.

    Args:
        dataset_of_pass: gives the data set of pass p over the plan; a run that is longer than its
            plan continues with another order.
        options: what all loaders of the run have in common.
        part: rank and size of the data axis, whose processes share the samples.
        consumed_samples: samples of the run that all processes together have had before.
        sample_at: the sample at a position of the run, where samples are left out.
        waiting: entered while `next` waits for the thread.

    Raises (from `next`):
        RunError: a token id is outside the vocabulary.
    """

    def __init__(
        self,
        dataset_of_pass: Callable[[int], Dataset],
        options: LoaderOptions,
        *,
        part: tuple[int, int] = (0, 1),
        consumed_samples: int = 0,
        sample_at: Callable[[int], int] = lambda position: position,
        waiting: Callable[[], AbstractContextManager[None]] = nullcontext,
    ) -> None:
        self._dataset_of_pass = dataset_of_pass
        self._options = options
        self._rank, self._num_parts = part
        self._sample_at = sample_at
        self._waiting = waiting
        size = max(1, options.prefetch)
        self._queue: queue.Queue[MicroBatch | Exception] = queue.Queue(maxsize=size)
        self._closed = threading.Event()
        self._thread = threading.Thread(
            target=self._read_ahead, args=(consumed_samples,), name="megaphi-loader", daemon=True
        )
        self._thread.start()

    def _micro_batches(self, consumed: int) -> Iterator[MicroBatch]:
        """This process's micro-batches, from sample `consumed` on."""
        options, current, dataset = self._options, -1, None
        while True:
            first = consumed + self._rank * options.micro_batch_size
            rows = []
            for position in range(first, first + options.micro_batch_size):
                number, index = divmod(self._sample_at(position), options.planned_samples)
                if dataset is None or number != current:
                    current, dataset = number, self._dataset_of_pass(number)
                rows.append(read_samples(dataset, index, 1, options.vocab_size))
            yield to_micro_batch(np.concatenate(rows), first, options.device, options.eod_id)
            consumed += options.micro_batch_size * self._num_parts

    def _read_ahead(self, consumed: int) -> None:
        """Fill the queue until closed; an error is handed to the consumer."""
        try:
            use(self._options.device)
            for batch in self._micro_batches(consumed):
                if not self._put(batch):
                    return
        except Exception as error:
            self._put(error)

    def _put(self, item: "MicroBatch | Exception") -> bool:
        """Queue an item; False once the loader is closed."""
        while not self._closed.is_set():
            try:
                self._queue.put(item, timeout=0.1)
                return True
            except queue.Full:
                continue
        return False

    def __next__(self) -> MicroBatch:
        with self._waiting():
            item = self._queue.get()
        if isinstance(item, Exception):
            raise item
        return item

    def close(self) -> None:
        """Stop the thread."""
        self._closed.set()
        self._thread.join()
