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
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from megaphi.config import Recipe
from megaphi.data.blend import build_dataset, parse_blend
from megaphi.data.documents import Documents, find_documents
from megaphi.data.sidecar import TokenFileInfo, verify_info
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
            token remains the first token of the next document: its loss counts.
    """
    documents = None
    if eod_id is not None:
        documents = find_documents(samples[:, :-1], eod_id).to(device)
    tensor = torch.from_numpy(samples)
    if device.type == "cuda":
        tensor = tensor.pin_memory().to(device, non_blocking=True)
    return MicroBatch(tensor[:, :-1], tensor[:, 1:], first, documents)


class Loader:
    """Endless micro-batches of one process, starting after `consumed_samples`.

    `dataset_of_pass(p)` gives the data set of pass p over the plan of `planned_samples` samples;
    a run that is longer than its plan goes on with another order. With `eod_id` the micro-batches
    say where their documents are.

    `sample_at(position)` gives the sample at a position of the run, where samples are left out;
    `waiting` is entered while `next` waits for the thread.

    Raises (from `next`):
        RunError: a token id is outside the vocabulary.
    """

    def __init__(
        self,
        dataset_of_pass: Callable[[int], Dataset],
        *,
        planned_samples: int,
        consumed_samples: int,
        micro_batch_size: int,
        data_rank: int,
        data_size: int,
        vocab_size: int,
        device: torch.device,
        prefetch: int,
        eod_id: int | None = None,
        sample_at: Callable[[int], int] = lambda position: position,
        waiting: Callable[[], AbstractContextManager[None]] = nullcontext,
    ) -> None:
        self._dataset_of_pass = dataset_of_pass
        self._planned_samples = planned_samples
        self._micro_batch_size = micro_batch_size
        self._data_rank = data_rank
        self._data_size = data_size
        self._vocab_size = vocab_size
        self._device = device
        self._eod_id = eod_id
        self._sample_at = sample_at
        self._waiting = waiting
        self._queue: queue.Queue[MicroBatch | Exception] = queue.Queue(maxsize=max(1, prefetch))
        self._closed = threading.Event()
        self._thread = threading.Thread(
            target=self._read_ahead, args=(consumed_samples,), name="megaphi-loader", daemon=True
        )
        self._thread.start()

    def _micro_batches(self, consumed: int) -> Iterator[MicroBatch]:
        """This process's micro-batches, from sample `consumed` on."""
        current, dataset = -1, None
        while True:
            first = consumed + self._data_rank * self._micro_batch_size
            rows = []
            for position in range(first, first + self._micro_batch_size):
                number, index = divmod(self._sample_at(position), self._planned_samples)
                if dataset is None or number != current:
                    current, dataset = number, self._dataset_of_pass(number)
                rows.append(read_samples(dataset, index, 1, self._vocab_size))
            yield to_micro_batch(np.concatenate(rows), first, self._device, self._eod_id)
            consumed += self._micro_batch_size * self._data_size

    def _read_ahead(self, consumed: int) -> None:
        """Fill the queue until closed; an error is handed to the consumer."""
        try:
            if self._device.type == "cuda":
                torch.cuda.set_device(self._device)
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


def train_dataset(recipe: Recipe, number: int) -> Dataset:
    """The training samples of pass `number`, in Megatron's order for train.seed + number."""
    return build_dataset(
        recipe.data.train,
        split=recipe.data.split,
        which="train",
        num_samples=recipe.planned_samples,
        sequence_length=recipe.data.sequence_length,
        seed=recipe.train.seed + number,
    )


def validation_dataset(recipe: Recipe) -> Dataset | None:
    """The held-out samples, one epoch; None where the recipe names none."""
    if recipe.data.validation is None and recipe.data.split is None:
        return None
    value = recipe.data.validation or recipe.data.train
    weighted = any(weight is not None for weight, _ in parse_blend(value))
    wanted = recipe.train.evaluation_batches * recipe.train.global_batch_size
    return build_dataset(
        value,
        split=recipe.data.split,
        which="valid",
        # one epoch at most, so that no sample counts twice; a weighted blend needs a size
        num_samples=wanted if weighted else None,
        sequence_length=recipe.data.sequence_length,
        seed=recipe.train.seed,
    )


def token_file_prefixes(recipe: Recipe) -> list[str]:
    """Every token file that the recipe names, training first."""
    values = [recipe.data.train]
    if recipe.data.validation is not None:
        values.append(recipe.data.validation)
    return [prefix for value in values for _, prefix in parse_blend(value)]


def check_token_files(recipe: Recipe) -> dict[str, TokenFileInfo]:
    """Compare what stands beside the token files with the model and with each other.

    Returns:
        The sidecar of each prefix that has one (files written by Megatron have none).

    Raises:
        ValueError: a vocabulary does not fit the model, or the tokenizers differ.
        TokenFileError: a file is not the one that its sidecar describes, by size.
    """
    infos: dict[str, TokenFileInfo] = {}
    for prefix in token_file_prefixes(recipe):
        info = verify_info(Path(prefix), deep=False)
        if info is None:
            continue
        if info.vocab_size > recipe.model.vocab_size:
            raise ValueError(
                f"{prefix}: its tokenizer {info.tokenizer} has {info.vocab_size} ids, "
                f"model.vocab_size is {recipe.model.vocab_size}; set --model.vocab_size to at "
                f"least {info.vocab_size}"
            )
        for other, known in infos.items():
            if known.tokenizer_sha256 != info.tokenizer_sha256:
                raise ValueError(
                    f"{prefix} and {other} were made with different tokenizers "
                    f"({info.tokenizer}, {known.tokenizer}); tokenize them alike"
                )
        infos[prefix] = info
    return infos


def end_of_document(recipe: Recipe, infos: dict[str, TokenFileInfo]) -> int | None:
    """Id that ends a document in every token file; None where data.mask_documents is off.

    Args:
        recipe: the recipe.
        infos: what `check_token_files` found beside its token files.

    Raises:
        ValueError: a token file does not say which id it is, or they differ.
    """
    if not recipe.data.mask_documents:
        return None
    prefixes = token_file_prefixes(recipe)
    for prefix in prefixes:
        if prefix not in infos:
            raise ValueError(
                f"data.mask_documents: {prefix}.json is missing, which says what token ends a "
                "document; tokenize the data with megaphi, or set data.mask_documents to false"
            )
    eod_id = infos[prefixes[0]].eod_id
    for prefix in prefixes:
        if infos[prefix].eod_id != eod_id:
            raise ValueError(
                f"data.mask_documents: documents end with token {infos[prefix].eod_id} in "
                f"{prefix}, but with {eod_id} in {prefixes[0]}; tokenize them alike"
            )
    return eod_id
