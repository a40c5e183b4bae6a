"""The measurements of `megaphi bench data`, each taken in a process of its own.

A fresh process for every single measurement means that no cache of a tokenizer is warm, nothing was
allocated by the one before, and a peer's slow or noisy import cannot disturb anybody. The peers
that run in memory are here; Megatron-Core's are in `megatron_peer.py`.

Called as `python -m tools.bench.data.measures REQUEST.json`: the request names the measurement
and its sizes, and where the result goes.
"""

import hashlib
import json
import os
import resource
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from megaphi.process_memory import peak_memory, reset_peak_memory

SEED = 1234
SEQUENCE_LENGTH = 2048
MICRO_BATCH_SIZE = 8
# phi-1's pretraining mix: 6 billion tokens of code, 1 billion of textbooks
BLEND_WEIGHTS = (6 / 7, 1 / 7)
_COMPARED_SAMPLES = 64

Request = dict[str, Any]


class Measure(NamedTuple):
    """One measurement, prepared.

    Attributes:
        amount: bytes, tokens or samples that `work` gets through.
        work: what is timed.
        digest: of its result, to be compared between tools; not timed.
        warm_up: do the work once before it is timed. For work that is mostly memory: the first
            touch of fresh memory can cost a virtual machine several times the work itself.
    """

    amount: int
    work: Callable[[], Any]
    digest: Callable[[Any], str]
    warm_up: bool


def run_request(measures: Mapping[str, Callable[[Request], Measure]], path: Path) -> None:
    """Take the measurement that a request names and write the result alongside it."""
    request: Request = json.loads(path.read_bytes())
    measure = measures[request["measure"]](request)
    memory_before = reset_peak_memory()
    if measure.warm_up:
        measure.work()
    cpu_before, started = _cpu_seconds(), time.perf_counter()
    result = measure.work()
    seconds, cpu_seconds = time.perf_counter() - started, _cpu_seconds() - cpu_before
    extra = None if memory_before is None else peak_memory() - memory_before
    values = {
        "amount": measure.amount,
        "seconds": seconds,
        "cpu_seconds": cpu_seconds,
        "extra_memory_mib": None if extra is None else round(extra / 2**20, 1),
        "digest": measure.digest(result),
    }
    Path(request["result"]).write_text(json.dumps(values), encoding="utf-8")


def _cpu_seconds() -> float:
    """Processor time of this process and of the children it has waited for."""
    usages = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(usage.ru_utime + usage.ru_stime for usage in usages)


def digest_arrays(arrays: Iterable[NDArray[Any]]) -> str:
    """SHA-256 over the bytes of arrays."""
    digest = hashlib.sha256()
    for array in arrays:
        digest.update(np.ascontiguousarray(array).tobytes())
    return digest.hexdigest()


def digest_documents(documents: Iterable[Any]) -> str:
    """SHA-256 over the ids of documents, whatever their order."""
    single = sorted(
        hashlib.sha256(np.asarray(ids).astype("<i4").tobytes()).digest() for ids in documents
    )
    return hashlib.sha256(b"".join(single)).hexdigest()


def compared_samples(count: int) -> int:
    """How many of `count` loaded samples are compared between tools: at most 64."""
    return min(_COMPARED_SAMPLES, count // MICRO_BATCH_SIZE * MICRO_BATCH_SIZE)


def made_up_lengths(num_tokens: int) -> NDArray[np.int32]:
    """Document lengths that sum to at least `num_tokens`: log-normal, about 1,000 tokens each."""
    generator = np.random.default_rng(SEED)
    count = 100 + num_tokens // 700
    lengths = generator.lognormal(6.3, 1.1, count).clip(2, 1e6).astype(np.int32)
    enough = int(np.searchsorted(np.cumsum(lengths, dtype=np.int64), num_tokens))
    assert enough < count, "the mean length is well above 700"
    return lengths[: enough + 1]


# ---------------------------------------------------------------- tokenizing


def texts_of(request: Request) -> list[str]:
    """All texts of the records directory, in memory."""
    from data_pipeline.records.record import read_part
    from data_pipeline.runner.output import read_manifest

    records = Path(request["records"])
    parts = [records / part.name for part in read_manifest(records).parts]
    return [record["text"] for part in parts for _, record in read_part(part)]


def num_bytes(texts: Iterable[str]) -> int:
    """Bytes of texts in UTF-8."""
    return sum(len(text.encode("utf-8")) for text in texts)


def tokenize_megaphi(request: Request) -> Measure:
    """Our whole way: read the records, encode, write, hash and publish the token file."""
    from data_pipeline.tokens.tokenize_records import tokenize_records
    from megaphi.data.indexed import IndexedDataset
    from megaphi.data.sidecar import read_info

    prefix = Path(request["prefix"])

    def work() -> None:
        tokenize_records(
            Path(request["records"]),
            request["tokenizer"],
            prefix,
            workers=request["workers"],
            overwrite=True,
        )

    def digest(_: None) -> str:
        indexed, info = IndexedDataset(prefix), read_info(prefix)
        assert info is not None
        documents = [indexed[i] for i in range(len(indexed))]
        assert all(ids[-1] == info.eod_id for ids in documents)
        return digest_documents(ids[:-1] for ids in documents)

    return Measure(num_bytes(texts_of(request)), work, digest, warm_up=False)


def tokenize_tokenizers(request: Request) -> Measure:
    """`tokenizers` on texts in memory, with all its threads; nothing is written."""
    from tokenizers import Tokenizer

    os.environ["TOKENIZERS_PARALLELISM"] = "true"
    tokenizer = Tokenizer.from_file(request["tokenizer_file"])
    tokenizer.encode_special_tokens = True  # as we do: a document is data
    texts = texts_of(request)
    return Measure(
        num_bytes(texts),
        lambda: tokenizer.encode_batch_fast(texts, add_special_tokens=False),
        lambda encodings: digest_documents(encoding.ids for encoding in encodings),
        warm_up=False,
    )


def tokenize_gigatoken(request: Request) -> Measure:
    """`gigatoken` on texts in memory, with all its threads; nothing is written."""
    import gigatoken

    tokenizer = gigatoken.Tokenizer.from_json(Path(request["tokenizer_file"]).read_text("utf-8"))
    texts = texts_of(request)
    encoded = [text.encode("utf-8") for text in texts]
    return Measure(
        sum(map(len, encoded)),
        lambda: tokenizer.encode_batch(encoded),
        digest_documents,
        warm_up=False,
    )


# ---------------------------------------------------------------- orders and loading


def index_megaphi(request: Request) -> Measure:
    """The sample order of one epoch of made-up documents."""
    from megaphi.data.dataset import build_sample_order

    lengths = made_up_lengths(request["index_tokens"])
    ids = range(len(lengths))
    return Measure(
        int(lengths.sum(dtype=np.int64)),
        lambda: build_sample_order(lengths, ids, None, SEQUENCE_LENGTH, SEED),
        digest_arrays,
        warm_up=True,
    )


def blend_megaphi(request: Request) -> Measure:
    """The order of a blend."""
    from megaphi.data.blend import blend_order

    size = request["blend_samples"]
    return Measure(size, lambda: blend_order(BLEND_WEIGHTS, size), digest_arrays, warm_up=True)


def loader_megaphi(request: Request) -> Measure:
    """Micro-batches out of the training loader, on the CPU."""
    import torch

    from megaphi.data.dataset import GPTDataset
    from megaphi.data.indexed import IndexedDataset
    from megaphi.data.loader import Loader, LoaderOptions

    count = request["loader_samples"]
    dataset = GPTDataset(
        IndexedDataset(request["prefix"]),
        num_samples=count,
        sequence_length=SEQUENCE_LENGTH,
        seed=SEED,
    )

    def start() -> Loader:
        return Loader(
            lambda _: dataset,
            LoaderOptions(
                planned_samples=count,
                micro_batch_size=MICRO_BATCH_SIZE,
                vocab_size=int(np.iinfo(np.int32).max),
                device=torch.device("cpu"),
                prefetch=4,
            ),
        )

    def work() -> None:
        loader = start()
        for _ in range(count // MICRO_BATCH_SIZE):
            next(loader)
        loader.close()

    def digest(_: None) -> str:
        loader = start()
        batches = [next(loader) for _ in range(compared_samples(count) // MICRO_BATCH_SIZE)]
        loader.close()
        rows = [torch.cat([b.tokens_bt, b.labels_bt[:, -1:]], dim=1).numpy() for b in batches]
        return digest_arrays(rows)

    return Measure(count // MICRO_BATCH_SIZE * MICRO_BATCH_SIZE, work, digest, warm_up=True)


MEASURES: dict[str, Callable[[Request], Measure]] = {
    measure.__name__: measure
    for measure in (
        tokenize_megaphi,
        tokenize_tokenizers,
        tokenize_gigatoken,
        index_megaphi,
        blend_megaphi,
        loader_megaphi,
    )
}

if __name__ == "__main__":
    run_request(MEASURES, Path(sys.argv[1]))
