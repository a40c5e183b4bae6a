"""Which benchmark problems a document is near to, by the distance of their embeddings.

phi-1's paper (section 5) calls two pieces of code similar when the L2 distance between their
normalised CodeGen-Mono-350M embeddings is small; its threshold is not published (an example pair
that it shows is 0.16 apart). Any model that the quality filter can read will do here, and hashed
tokens where there is none (`quality/features.py`): every threshold belongs to one model.

For unit vectors a and b, ||a - b||^2 = 2 - 2 a.b, so that one matrix product [documents, problems]
in float64 gives all distances exactly. Below about 1e-7 the subtraction has no digits left;
equal embeddings then have the distance 0, or one as small as that.
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from data_pipeline.decontaminate.benchmarks import Problem
from data_pipeline.quality.features import BATCH_DOCUMENTS, HASHED, feature_spec, open_features
from data_pipeline.records.record import Json


def embedding_spec(model: str, max_tokens: int) -> dict[str, Json]:
    """Describe the embeddings of a model, with the hash of its files.

    Args:
        model: `hashed`, or a run, checkpoint or Hugging Face directory.
        max_tokens: of a text that the model reads.

    Raises:
        FileNotFoundError, ValueError: there is no such model, or a package is missing.
    """
    return feature_spec(model, max_tokens)


def problem_text(problem: Problem) -> str:
    """What stands for a problem: its statement and its solution, not its tests."""
    solution = problem.code[:1]
    statements = [text for text in problem.prose if not any(text in code for code in solution)]
    return "\n".join([*statements, *solution])


class EmbeddingTable:
    """The embeddings of problems.

    Args:
        problems: the benchmark.
        spec: see `embedding_spec`.

    Raises:
        RunError: the model is no longer the one that was described.
    """

    def __init__(self, problems: Sequence[Problem], spec: dict[str, Json]) -> None:
        self._features = open_features(spec)
        # Behind the hashed tokens stand signals of form, which would drown them in a distance.
        self._width = spec["buckets"] if spec["kind"] == HASHED else None
        self._problems_pd = self._unit([problem_text(problem) for problem in problems])

    def _unit(self, texts: Sequence[str]) -> NDArray[np.float64]:
        """[t, d] embeddings of length 1; zeros for a text that has none."""
        parts = [
            self._features(texts[start : start + BATCH_DOCUMENTS])[:, : self._width]
            for start in range(0, len(texts), BATCH_DOCUMENTS)
        ]
        embeddings_td = np.concatenate(parts).astype(np.float64)
        lengths_t = np.linalg.norm(embeddings_td, axis=1, keepdims=True)
        unit: NDArray[np.float64] = embeddings_td / np.where(lengths_t > 0, lengths_t, 1.0)
        return unit

    def near(self, texts: Sequence[str], threshold: float) -> list[dict[int, float]]:
        """For each text, the distance of each problem that is no farther than `threshold`.

        A text or problem without an embedding is near nothing.
        """
        found: list[dict[int, float]] = []
        for start in range(0, len(texts), BATCH_DOCUMENTS):
            texts_td = self._unit(texts[start : start + BATCH_DOCUMENTS])
            distances_tp = np.sqrt(np.maximum(2 - 2 * (texts_td @ self._problems_pd.T), 0))
            distances_tp[~texts_td.any(axis=1)] = np.inf
            distances_tp[:, ~self._problems_pd.any(axis=1)] = np.inf
            for row in distances_tp:
                near = np.flatnonzero(row <= threshold)
                found.append(dict(zip(near.tolist(), row[near].tolist(), strict=True)))
        return found
