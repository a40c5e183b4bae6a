"""Completions of problems: generated in batches by a model, cut where the answer ends, or read.

phi models run through `megaphi.generate`; other architectures through `transformers`, from local
safetensors only and without code of the directory.
"""

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol

from tools.evaluation.store import Key
from tools.evaluation.suites import Problem

if TYPE_CHECKING:
    import torch

# A stop text has at most this many tokens, however it is cut.
_TAIL_TOKENS = 16


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How completions are drawn."""

    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0
    max_new_tokens: int = 512
    batch_size: int = 32
    cuda_graphs: Literal["auto", "never"] = "auto"

    def row_seed(self, key: Key) -> int:
        """Seed of one completion; it depends on neither batch nor order."""
        text = f"{self.seed}/{key[0]}/{key[1]}"
        return int.from_bytes(hashlib.sha256(text.encode()).digest()[:7], "little")


def truncate(text: str, stops: Sequence[str]) -> str:
    """The text up to the first of the stop texts."""
    places = [place for stop in stops if (place := text.find(stop)) >= 0]
    return text[: min(places)] if places else text


class Backend(Protocol):
    """A model that continues token sequences."""

    context: int
    """Longest sequence, prompt and completion."""

    def encode(self, text: str) -> list[int]:
        """Token ids of a prompt."""
        ...

    def decode(self, ids: Sequence[int]) -> str:
        """Text of token ids."""
        ...

    def generate(
        self,
        prompts: list[list[int]],
        stops: Sequence[Sequence[str]],
        seeds: Sequence[int],
        max_new_tokens: int,
        sampling: Sampling,
    ) -> list[list[int]]:
        """New tokens of each row, which may go past its stop texts."""
        ...


def complete(
    backend: Backend, wanted: Iterable[tuple[Key, Problem]], sampling: Sampling
) -> Iterator[dict[str, Any]]:
    """Generate completions; one row each, in batches of prompts of similar length.

    Yields:
        `task_id`, `sample`, `completion`, `tokens` and `finish`: stop, length (the limit of tokens
        or the model's context came first), or prompt (no room for a completion).
    """
    encoded: dict[str, list[int]] = {}
    rows = []
    for key, problem in wanted:
        if problem.task_id not in encoded:
            encoded[problem.task_id] = backend.encode(problem.prompt)
        ids = encoded[problem.task_id]
        room = min(sampling.max_new_tokens, backend.context - len(ids))
        if room < 1:
            yield _row(key, "", 0, "prompt")
            continue
        rows.append((room, len(ids), key, problem))
    rows.sort(key=lambda row: (-row[0], row[1]))
    while rows:
        # one limit a batch: a long prompt must not shorten the others' completions
        room = rows[0][0]
        batch = [row for row in rows[: sampling.batch_size] if row[0] == room]
        del rows[: len(batch)]
        results = backend.generate(
            [encoded[problem.task_id] for _, _, _, problem in batch],
            [problem.stops for _, _, _, problem in batch],
            [sampling.row_seed(key) for _, _, key, _ in batch],
            room,
            sampling,
        )
        for (_, _, key, problem), tokens in zip(batch, results, strict=True):
            text = backend.decode(tokens)
            cut = truncate(text, problem.stops)
            ended = len(cut) < len(text) or len(tokens) < room
            yield _row(key, cut, len(tokens), "stop" if ended else "length")


def _row(key: Key, completion: str, tokens: int, finish: str) -> dict[str, Any]:
    return {
        "task_id": key[0],
        "sample": key[1],
        "completion": completion,
        "tokens": tokens,
        "finish": finish,
    }


class PhiBackend:
    """A phi model through `megaphi.generate`.

    Args:
        source: a directory that `resolve_model` returned.
        device, dtype: where and in which format it runs.
        tokenizer_dir: instead of the model's own tokenizer.
    """

    def __init__(
        self,
        source: Path,
        device: "torch.device",
        dtype: "torch.dtype",
        tokenizer_dir: Path | None,
    ) -> None:
        from data_pipeline.tokens.tokenizer_json import read_tokenizer
        from megaphi.formats.tokenizer_files import end_of_text_id, find_tokenizer
        from megaphi.formats.weights import load_source
        from tools.model_options import tokenizer_file

        folder = tokenizer_dir or find_tokenizer(source)
        self._tokenizer = read_tokenizer(tokenizer_file(folder or source))
        loaded = load_source(source, device=device, dtype=dtype)
        self._model = loaded.model
        self._eos_id = end_of_text_id(folder, loaded.config.vocab_size)
        self.context = loaded.config.max_sequence_length

    def encode(self, text: str) -> list[int]:
        """Token ids of a prompt."""
        ids: list[int] = self._tokenizer.encode(text, add_special_tokens=False).ids
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        """Text of token ids."""
        text: str = self._tokenizer.decode(list(ids), skip_special_tokens=False)
        return text

    def generate(
        self,
        prompts: list[list[int]],
        stops: Sequence[Sequence[str]],
        seeds: Sequence[int],
        max_new_tokens: int,
        sampling: Sampling,
    ) -> list[list[int]]:
        """New tokens of each row; a row ends when a stop text appears."""
        from megaphi.generate import TextRow, generate

        texts = [TextRow(self.decode, stops_of_row) for stops_of_row in stops]

        def stop(row: int, tokens: list[int]) -> bool:
            texts[row].add(tokens[-1])
            return texts[row].stopped

        return generate(
            self._model,
            prompts,
            max_new_tokens=max_new_tokens,
            temperature=sampling.temperature,
            top_p=sampling.top_p,
            seed=seeds,
            eos_id=self._eos_id,
            stop=stop,
            cuda_graphs=sampling.cuda_graphs,
        )


class TransformersBackend:
    """A causal language model of any architecture through `transformers`.

    Its samples depend on how rows share a batch: `transformers` has one random stream for all.

    Raises:
        ValueError: `transformers` is not installed or does not load the directory.
    """

    def __init__(
        self,
        source: Path,
        device: "torch.device",
        dtype: "torch.dtype",
        tokenizer_dir: Path | None = None,
    ) -> None:
        try:
            from transformers import AutoModelForCausalLM, AutoTokenizer
        except ImportError:
            raise ValueError(
                f"{source}: not a phi model; others need transformers: pip install 'megaphi[eval]'"
            ) from None
        try:
            options = {"local_files_only": True, "trust_remote_code": False}
            self._tokenizer = AutoTokenizer.from_pretrained(tokenizer_dir or source, **options)
            model: Any = AutoModelForCausalLM.from_pretrained(
                source, dtype=dtype, use_safetensors=True, **options
            )
        except (OSError, ValueError, ImportError, KeyError) as error:
            reason = " ".join(str(error).split())[:300]
            raise ValueError(f"{source}: transformers does not load it: {reason}") from None
        from megaphi.formats.files import require_finite

        for name, parameter in model.named_parameters():
            require_finite(parameter, f"{source}: {name} as {dtype}")
        self._model = model.to(device).eval()
        self.context = int(getattr(model.config, "max_position_embeddings", 2048))

    def encode(self, text: str) -> list[int]:
        """Token ids of a prompt, with the special tokens that its model expects before it."""
        return list(self._tokenizer(text).input_ids)

    def decode(self, ids: Sequence[int]) -> str:
        """Text of token ids."""
        return str(
            self._tokenizer.decode(
                list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False
            )
        )

    def generate(
        self,
        prompts: list[list[int]],
        stops: Sequence[Sequence[str]],
        seeds: Sequence[int],
        max_new_tokens: int,
        sampling: Sampling,
    ) -> list[list[int]]:
        """New tokens of each row."""
        import torch
        from transformers import StoppingCriteriaList

        def stopped(ids: torch.Tensor, _: object, **__: object) -> torch.Tensor:
            tails = ids[:, longest:][:, -_TAIL_TOKENS:].tolist()
            texts = [self.decode(tail) for tail in tails]
            found = [
                any(stop in text for stop in wanted)
                for text, wanted in zip(texts, stops, strict=True)
            ]
            return torch.tensor(found, device=ids.device)

        end = self._tokenizer.eos_token_id
        padding = self._tokenizer.pad_token_id if end is None else end
        padding = 0 if padding is None else padding
        longest = max(map(len, prompts))
        rows = [[padding] * (longest - len(prompt)) + prompt for prompt in prompts]
        mask = [[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts]
        torch.manual_seed(seeds[0])
        drawn: dict[str, Any] = {"do_sample": False, "temperature": None, "top_p": None}
        if sampling.temperature > 0:
            drawn = {
                "do_sample": True,
                "temperature": sampling.temperature,
                "top_p": sampling.top_p,
            }
        with torch.no_grad():
            output = self._model.generate(
                input_ids=torch.tensor(rows, device=self._model.device),
                attention_mask=torch.tensor(mask, device=self._model.device),
                max_new_tokens=max_new_tokens,
                pad_token_id=padding,
                stopping_criteria=StoppingCriteriaList([stopped]),
                top_k=0 if sampling.temperature > 0 else None,
                **drawn,
            )
        new = [row[longest:].tolist() for row in output]
        return [row[: row.index(end)] if end in row else row for row in new]


def open_backend(
    source: Path, device: "torch.device", dtype: "torch.dtype", tokenizer_dir: Path | None
) -> Backend:
    """The way to run a directory that `resolve_model` returned.

    Raises:
        ValueError: see the two classes.
    """
    from megaphi.formats.files import read_json_object
    from megaphi.formats.weights import is_checkpoint

    if not is_checkpoint(source):
        kind = read_json_object(source / "config.json").get("model_type")
        if not str(kind).startswith(("phi", "mixformer")) or str(kind) in ("phi3", "phimoe"):
            return TransformersBackend(source, device, dtype, tokenizer_dir)
    return PhiBackend(source, device, dtype, tokenizer_dir)
