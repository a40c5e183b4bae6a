"""Small token files, small recipes and child processes for the tests of training."""

import contextlib
import json
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
from torch.distributed.checkpoint.filesystem import FileSystem

from megaphi.data.indexed import IndexedDatasetWriter

REPOSITORY = Path(__file__).resolve().parent.parent


def short_and_slow(short: Sequence[Any], slow: Sequence[Any]) -> list[Any]:
    """Values of a parametrized test; those in `slow` only run in `launch/test.sh --all`."""
    return [*short, *(pytest.param(value, marks=pytest.mark.slow) for value in slow)]


def write_toy_tokens(prefix: Path, *, vocab_size: int = 512, documents: int = 200) -> Path:
    """Write documents that count upwards by three: learnable, and different everywhere."""
    generator = np.random.default_rng(0)
    with IndexedDatasetWriter(prefix, np.dtype(np.uint16)) as writer:
        for _ in range(documents):
            length, start = int(generator.integers(5, 200)), int(generator.integers(0, 400))
            writer.add_document(((np.arange(length) * 3 + start) % (vocab_size - 1)).tolist())
    return prefix


def write_byte_tokenizer(folder: Path) -> Path:
    """A tokenizer of one token a byte, 256 the end of a text."""
    import tokenizers

    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {letter: number for number, letter in enumerate(alphabet)}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    tokenizer.add_special_tokens(["<|endoftext|>"])
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|endoftext|>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


def toy_options(prefix: Path, run_dir: Path, **overrides: Any) -> list[str]:
    """Options of a run that takes about a second; `section__key=value` overrides one."""
    options = {
        "train.run_dir": run_dir,
        "train.steps": 20,
        "train.micro_batch_size": 2,
        "train.global_batch_size": 8,
        "train.evaluation_interval": 10,
        "train.evaluation_batches": 1,
        "data.train": prefix,
        "data.split": "90,10,0",
        "data.sequence_length": 32,
        "model.num_layers": 2,
        "model.hidden_size": 64,
        "model.num_heads": 2,
        "model.vocab_size": 512,
        "model.max_sequence_length": 64,
        "model.residual_dropout": 0.1,
        "model.attention_dropout": 0.1,
        "precision.dtype": "fp32",
        "schedule.warmup_steps": 5,
        "checkpoint.interval": 5,
        "logging.tensorboard": "false",
    }
    options.update({key.replace("__", "."): value for key, value in overrides.items()})
    return [f"--{key}={value}" for key, value in options.items()]


def child_environment() -> dict[str, str]:
    """Environment of a child process: this checkout, one thread, no launcher's variables."""
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
    clean = {key: value for key, value in os.environ.items() if key not in names}
    return {**clean, "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"}


def train_command(options: list[str], processes: int = 1) -> list[str]:
    """Command line of a training run, under torchrun where it has several processes."""
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    return [sys.executable, *(launcher if processes > 1 else []), "-m", "megaphi.train", *options]


def metrics(run_dir: Path) -> list[dict[str, Any]]:
    """The rows of a run's metrics.jsonl."""
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def curve(run_dir: Path) -> dict[tuple[int, str], tuple[float, ...]]:
    """Everything of a run's metrics that must not depend on chance: losses and norms."""
    values: dict[tuple[int, str], tuple[float, ...]] = {}
    for row in metrics(run_dir):
        if "event" in row:
            continue
        if "validation_loss" in row:
            values[row["step"], "validation"] = (row["validation_loss"],)
        else:
            values[row["step"], "train"] = (row["loss"], row["grad_norm"])
    return values


@contextlib.contextmanager
def before_tensor_writes(action: Callable[[str], None]) -> Iterator[None]:
    """Call `action` with the path before each block that goes into a checkpoint's tensor file.

    Tensor files are written through torch's own file system, and so is this planted in it.
    """
    create_stream = FileSystem.create_stream

    class Stream:
        def __init__(self, file: Any, path: str) -> None:
            self.file, self.path = file, path

        def write(self, block: bytes) -> Any:
            action(self.path)
            return self.file.write(block)

        def __getattr__(self, name: str) -> Any:
            return getattr(self.file, name)

    @contextlib.contextmanager
    def watched(self: FileSystem, path: str | os.PathLike[str], mode: str) -> Iterator[Any]:
        with create_stream(self, path, mode) as file:
            yield Stream(file, os.fspath(path)) if "w" in mode else file

    with mock.patch.object(FileSystem, "create_stream", watched):
        yield
