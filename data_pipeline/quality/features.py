"""What the random forest sees of a document: hashed tokens, or a language model's embedding.

`hashed` needs nothing but scikit-learn: counts of code tokens and their pairs, hashed into a fixed
number of columns (`HashingVectorizer`), and a few signals of form. A model directory gives the mean
of the model's last hidden states, as phi-1's paper used CodeGen's (`embeddings.py`).

Either way the features of a document are a function of its text alone, up to the rounding of a
batch of matrix products; batches are cut by part file, so that the number of workers is not seen.
"""

import functools
import importlib
import json
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from data_pipeline.quality.embeddings import Embedder, model_spec
from data_pipeline.quality.forest import Matrix
from data_pipeline.records.record import Json

HASHED = "hashed"
HASHED_VERSION = 1
BUCKETS = 1024
MAX_CHARS = 16_384  # of a document that are looked at
BATCH_DOCUMENTS = 256

_TOKENS = r"\w+|[^\w\s]"
_SIGNAL_PATTERNS = (
    re.compile(r"^[ \t]*#", re.MULTILINE),
    re.compile(r'"""|\'\'\''),
    re.compile(r"^[ \t]*(?:async )?def ", re.MULTILINE),
    re.compile(r"^[ \t]*class ", re.MULTILINE),
    re.compile(r"^[ \t]*(?:import|from) ", re.MULTILINE),
    re.compile(r"^[ \t]+\S", re.MULTILINE),
    re.compile(r">>> "),
)

Features = Callable[[Sequence[str]], Matrix]


def feature_spec(name: str, max_tokens: int) -> dict[str, Json]:
    """Describe the features that option `features` asks for.

    Args:
        name: `hashed`, or a run, checkpoint or Hugging Face directory.
        max_tokens: of a document that a model reads.

    Raises:
        FileNotFoundError, ValueError: see `model_spec`.
    """
    if name == HASHED:
        sklearn("feature_extraction.text")
        return {
            "kind": HASHED,
            "version": HASHED_VERSION,
            "buckets": BUCKETS,
            "max_chars": MAX_CHARS,
        }
    return model_spec(Path(name), max_tokens)


def open_features(spec: dict[str, Json]) -> Features:
    """The features of a description; a model is loaded once a process."""
    return _open(json.dumps(spec, sort_keys=True))


@functools.lru_cache(maxsize=1)
def _open(spec_text: str) -> Features:
    spec = json.loads(spec_text)
    return _Hashed(spec) if spec["kind"] == HASHED else Embedder(spec)


def sklearn(module: str) -> Any:
    """A module of the optional package scikit-learn.

    Raises:
        ValueError: it is not installed.
    """
    try:
        return importlib.import_module(f"sklearn.{module}")
    except ImportError:
        raise ValueError(
            "the quality filter needs scikit-learn, which is not installed: "
            "pip install 'megaphi[filter]'"
        ) from None


class _Hashed:
    """Hashed tokens and signals of form, float32 [d, buckets + signals]."""

    def __init__(self, spec: dict[str, Json]) -> None:
        self._max_chars = spec["max_chars"]
        self._vectorizer = sklearn("feature_extraction.text").HashingVectorizer(
            token_pattern=_TOKENS,
            lowercase=False,
            ngram_range=(1, 2),
            n_features=spec["buckets"],
            alternate_sign=False,
            dtype=np.float32,
        )

    def __call__(self, texts: Sequence[str]) -> Matrix:
        shown = [text[: self._max_chars] for text in texts]
        hashed: Matrix = self._vectorizer.transform(shown).toarray()
        signals = np.array([_signals(text) for text in shown], np.float32)
        return np.hstack([hashed, signals])


def _signals(text: str) -> list[float]:
    """Length, form of the lines, and marks of documentation and structure, each a line."""
    lines = [line for line in text.split("\n") if line and not line.isspace()]
    count = max(len(lines), 1)
    return [
        float(np.log1p(len(text))),
        sum(map(len, lines)) / count,
        float(max(map(len, lines), default=0)),
        sum(map(str.isalpha, text)) / max(len(text), 1),
        sum(map(str.isdigit, text)) / max(len(text), 1),
        *(len(pattern.findall(text)) / count for pattern in _SIGNAL_PATTERNS),
    ]
