"""How far annotators agree, with each other and with what the text alone predicts.

Cohen's kappa (Cohen 1960) and its quadratically weighted form (Cohen 1968): agreement beyond what
the annotators' own distributions of scores would give by chance.
"""

import zlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from data_pipeline.similarity.shingles import hash_shingles, hash_words

FEATURES = 256  # hashed words and word pairs
FOLDS = 5
MIN_LABELS = 50  # below it a classifier says nothing
RIDGE = 1.0
DISAGREEMENT = 2.0  # scores apart, from which a label is flagged


@dataclass(frozen=True)
class Agreement:
    """Of two annotators, on the documents that both scored.

    Attributes:
        documents: how many.
        confusion: [score of the first][score of the second], counts.
        exact: share of equal scores.
        kappa: None where chance alone explains everything (each gave one and the same score).
        weighted_kappa: likewise, quadratic weights.
    """

    documents: int
    confusion: list[list[int]]
    exact: float
    kappa: float | None
    weighted_kappa: float | None


def agreement(first: Sequence[int], second: Sequence[int], scores: int) -> Agreement:
    """Compare two annotators.

    Args:
        first: scores from 0 to `scores` - 1.
        second: of the same documents.
        scores: how many different scores there are.
    """
    table = np.zeros((scores, scores), np.int64)
    np.add.at(table, (np.asarray(first, np.intp), np.asarray(second, np.intp)), 1)
    total = int(table.sum())
    distance = np.abs(np.subtract.outer(np.arange(scores), np.arange(scores)))
    return Agreement(
        documents=total,
        confusion=table.tolist(),
        exact=float(np.trace(table)) / max(total, 1),
        kappa=_kappa(table, (distance > 0).astype(np.float64)),
        weighted_kappa=_kappa(table, (distance**2).astype(np.float64)),
    )


def _kappa(table: NDArray[np.int64], weights: NDArray[np.float64]) -> float | None:
    """1 - (weighted disagreement seen) / (weighted disagreement expected by chance)."""
    total = table.sum()
    if total == 0:
        return None
    expected = np.outer(table.sum(axis=1), table.sum(axis=0)) / total
    chance = float((weights * expected).sum())
    return None if chance == 0 else 1 - float((weights * table).sum()) / chance


def text_features(text: str) -> NDArray[np.float32]:
    """[FEATURES] hashed counts of words and word pairs, damped and of length 1, and the length."""
    words = hash_words([text.encode("utf-8")], marks=True, lower=True)
    counts = np.zeros(FEATURES, np.float64)
    for size in (1, 2):
        hashes, _ = hash_shingles(words, size)
        np.add.at(counts, (hashes % np.uint64(FEATURES - 1)).astype(np.intp), 1)
    counts = np.log1p(counts)
    counts /= max(float(np.linalg.norm(counts)), 1e-9)
    counts[-1] = np.log1p(len(text)) / 10
    return counts.astype(np.float32)


def predicted_scores(
    ids: Sequence[str], features_df: NDArray[np.float32], scores_d: NDArray[np.float64]
) -> NDArray[np.float64]:
    """[d] the score that ridge regression on the other folds predicts for each document.

    Args:
        ids: of the documents; the fold of a document is a hash of its id.
        features_df: [d, f] their features.
        scores_d: [d] their scores.
    """
    folds = np.array([zlib.crc32(key.encode("utf-8")) % FOLDS for key in ids])
    predicted = np.full(len(ids), float(scores_d.mean()))
    x_df = features_df.astype(np.float64)
    for fold in range(FOLDS):
        held, rest = folds == fold, folds != fold
        if not held.any() or not rest.any():
            continue
        mean_f, mean = x_df[rest].mean(axis=0), scores_d[rest].mean()
        centred = x_df[rest] - mean_f
        gram = centred.T @ centred + RIDGE * np.eye(x_df.shape[1])
        weights = np.linalg.solve(gram, centred.T @ (scores_d[rest] - mean))
        predicted[held] = (x_df[held] - mean_f) @ weights + mean
    return predicted
