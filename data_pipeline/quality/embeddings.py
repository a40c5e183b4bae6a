"""Embeddings of documents: the mean of a causal language model's last hidden states.

The model is a megaphi run or checkpoint, or a Hugging Face directory that transformers reads from
safetensors files; nothing is downloaded, unpickled or run from the directory. A document is cut to
the first `max_tokens` tokens. One CPU thread a process, so that the rounding of the matrix products
does not depend on the number of workers; on a GPU the batches run there.
"""

import functools
import hashlib
import importlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data_pipeline.records.record import Json
from megaphi.durable import file_sha256
from megaphi.errors import RunError

BATCH_TOKENS = 8192
_CONTEXT_KEYS = ("max_position_embeddings", "n_positions", "n_ctx")


def model_spec(path: Path, max_tokens: int) -> dict[str, Json]:
    """Describe the embeddings of a model directory, with the hash of its files.

    Raises:
        FileNotFoundError: there is no such directory.
        ValueError: it is not a model, has no tokenizer, or no safetensors files.
        CheckpointError: the checkpoint is damaged.
    """
    from megaphi.formats.tokenizer_files import find_tokenizer
    from megaphi.formats.weights import is_checkpoint, resolve_model

    if max_tokens < 1:
        raise ValueError(f"`max_tokens` {max_tokens}: at least 1 is needed")
    source = resolve_model(path)
    tokenizer = find_tokenizer(source)
    if tokenizer is None:
        raise ValueError(f"{source}: has no tokenizer.json; put the model's tokenizer there")
    weights = sorted(source.glob("*.safetensors"))
    if not weights:
        raise ValueError(
            f"{source}: has no .safetensors files (pickled weights are not read); save the model "
            "again with safe serialization"
        )
    kind = "megaphi" if is_checkpoint(source) else "huggingface"
    if kind == "huggingface":
        _transformers()
    described = [*weights, *sorted(source.glob("*config.json")), tokenizer / "tokenizer.json"]
    hashes = [f"{file.name} {file_sha256(file)}" for file in described]
    return {
        "kind": kind,
        "path": str(source),
        "sha256": hashlib.sha256("\n".join(hashes).encode()).hexdigest(),
        "max_tokens": max_tokens,
    }


def _transformers() -> Any:
    try:
        return importlib.import_module("transformers")
    except ImportError:
        raise ValueError(
            "embeddings of a Hugging Face directory need transformers, which is not installed: "
            "pip install 'megaphi[filter]'"
        ) from None


class Embedder:
    """Embeds texts with the model of a description.

    Args:
        spec: see `model_spec`.

    Raises:
        RunError: the directory no longer holds the model that was described.
    """

    def __init__(self, spec: dict[str, Json]) -> None:
        from data_pipeline.tokens.tokenizer_json import read_tokenizer
        from megaphi.formats.tokenizer_files import find_tokenizer

        source = Path(spec["path"])
        if model_spec(source, spec["max_tokens"])["sha256"] != spec["sha256"]:
            raise RunError(f"{source}: the model changed since it was described; train again")
        directory = find_tokenizer(source)
        assert directory is not None
        self._tokenizer: Any = read_tokenizer(directory / "tokenizer.json")
        load = _load_megaphi if spec["kind"] == "megaphi" else _load_huggingface
        self._hidden, self._dim, context, self._vocabulary = load(source)
        self._max_tokens = min(spec["max_tokens"], context)

    def __call__(self, texts: Sequence[str]) -> NDArray[np.float32]:
        """[d, hidden size] embeddings; zeros for a text without tokens."""
        import torch

        from data_pipeline.tokens.tokenizer_json import tokenizer_errors

        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        try:
            with tokenizer_errors("the model's tokenizer.json"):
                encoded = self._tokenizer.encode_batch(list(texts), add_special_tokens=False)
            ids = [encoding.ids[: self._max_tokens] for encoding in encoded]
            result = np.zeros((len(texts), self._dim), np.float32)
            for rows in _batches(ids):
                result[rows] = self._embed([ids[row] for row in rows])
            return result
        finally:
            torch.set_num_threads(threads)

    def _embed(self, ids: list[list[int]]) -> NDArray[np.float32]:
        """[b, hidden size] of documents of at least one token."""
        import torch

        if max(map(max, ids)) >= self._vocabulary:
            raise RunError(
                f"the tokenizer gives ids up to {max(map(max, ids))}, the model has "
                f"{self._vocabulary}: they do not belong together"
            )
        lengths_b = torch.tensor([len(row) for row in ids])
        tokens_bt = torch.zeros(len(ids), int(lengths_b.max()), dtype=torch.long)
        for place, row in enumerate(ids):
            tokens_bt[place, : len(row)] = torch.tensor(row)
        mask_bt = torch.arange(tokens_bt.shape[1]) < lengths_b[:, None]
        # Causal: what stands behind a document cannot reach back into it.
        with torch.no_grad():
            hidden_btd = self._hidden(tokens_bt, mask_bt).float().cpu()
        summed_bd = (hidden_btd * mask_bt[..., None]).sum(dim=1)
        embeddings: NDArray[np.float32] = (summed_bd / lengths_b[:, None]).numpy()
        return embeddings


def _batches(ids: Sequence[Sequence[int]]) -> Iterator[list[int]]:
    """Rows of about equal length, shortest first, of at most `BATCH_TOKENS` padded tokens."""
    batch: list[int] = []
    for row in sorted(range(len(ids)), key=lambda row: (len(ids[row]), row)):
        if not ids[row]:
            continue
        if batch and (len(batch) + 1) * len(ids[row]) > BATCH_TOKENS:
            yield batch
            batch = []
        batch.append(row)
    if batch:
        yield batch


_Loaded = tuple[Callable[[Any, Any], Any], int, int, int]


@functools.cache
def _device() -> str:
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def _load_megaphi(source: Path) -> _Loaded:
    """(hidden states of tokens and mask, hidden size, longest context, vocabulary size)."""
    import torch

    from megaphi.formats.weights import load_source

    dtype = torch.float32 if _device() == "cpu" else torch.bfloat16
    loaded = load_source(source, device=_device(), dtype=dtype)

    def hidden(tokens_bt: Any, mask_bt: Any) -> Any:
        states_nd = loaded.model.hidden(tokens_bt.to(_device()))
        return states_nd.view(*tokens_bt.shape, -1)

    config = loaded.config
    return hidden, config.hidden_size, config.max_sequence_length, config.vocab_size


def _load_huggingface(source: Path) -> _Loaded:
    """The same of a directory that transformers reads."""
    import torch

    dtype = torch.float32 if _device() == "cpu" else torch.bfloat16
    model = _transformers().AutoModel.from_pretrained(
        source, local_files_only=True, use_safetensors=True, trust_remote_code=False, dtype=dtype
    )
    model = model.eval().requires_grad_(False).to(_device())
    config = model.config

    def hidden(tokens_bt: Any, mask_bt: Any) -> Any:
        output = model(
            input_ids=tokens_bt.to(_device()),
            attention_mask=mask_bt.long().to(_device()),
            use_cache=False,
        )
        return output.last_hidden_state

    contexts = [getattr(config, key, None) for key in _CONTEXT_KEYS]
    context = next((value for value in contexts if isinstance(value, int)), 2**31)
    return hidden, config.hidden_size, context, config.vocab_size
