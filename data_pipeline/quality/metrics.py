"""How good a filter is, and whether it still sees what it was trained for.

Precision and recall are of held-out documents, with "educational" as the positive class. The drift
of scores is the population stability index (PSI), sum over bins of (q - p) ln(q / p), where the
bins are the deciles of the held-out scores; 0.1 and 0.25 are its usual limits.
"""

from collections import Counter
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from data_pipeline.quality.forest import Scores
from data_pipeline.records.record import Json

Labels = NDArray[np.int8]

PSI_BINS = 10
PSI_SHIFT, PSI_DRIFT = 0.1, 0.25
_DIGITS = 6


def precision_recall(scores: Scores, labels: Labels) -> dict[str, list[float]]:
    """The whole curve: at each distinct score, ascending, what keeping scores from it on gives.

    Args:
        scores: [d] of held-out documents.
        labels: [d] 0 or 1, at least one of them 1.

    Returns:
        Lists of equal length: `threshold`, `precision`, `recall`, `f1`, `kept` (share).
    """
    order = np.argsort(-scores, kind="stable")
    ranked, hits = scores[order], np.cumsum(labels[order], dtype=np.int64)
    last = np.flatnonzero(np.concatenate([ranked[1:] != ranked[:-1], [True]]))
    kept = last + 1
    precision, recall = hits[last] / kept, hits[last] / hits[-1]
    f1 = 2 * hits[last] / (kept + hits[-1])
    columns = {
        "threshold": ranked[last],
        "precision": precision,
        "recall": recall,
        "f1": f1,
        "kept": kept / len(scores),
    }
    return {name: np.round(column[::-1], _DIGITS).tolist() for name, column in columns.items()}


def average_precision(curve: dict[str, list[float]]) -> float:
    """Area under the curve as a sum of steps: precision times the recall gained at a threshold."""
    recall = np.array(curve["recall"])
    gained = recall - np.append(recall[1:], 0.0)
    return round(float((np.array(curve["precision"]) * gained).sum()), _DIGITS)


def best_f1(curve: dict[str, list[float]]) -> int:
    """Place on the curve of the largest F1; the highest threshold of several."""
    f1 = np.array(curve["f1"])
    return int(np.flatnonzero(f1 == f1.max())[-1])


def threshold_for_precision(curve: dict[str, list[float]], precision: float) -> float:
    """The lowest threshold at which held-out precision is at least `precision`.

    Raises:
        ValueError: no threshold reaches it; the best is named.
    """
    if not 0 < precision <= 1:
        raise ValueError(f"`precision` {precision:g}: must be above 0 and at most 1")
    for threshold, reached in zip(curve["threshold"], curve["precision"], strict=True):
        if reached >= precision:
            return threshold
    best = max(curve["precision"])
    raise ValueError(
        f"`precision` {precision:g}: the filter reaches at most {best:.3f} on held-out documents"
    )


def confusion(
    scores: Scores, labels: Labels, sources: Sequence[str], threshold: float
) -> dict[str, dict[str, int]]:
    """Counts of right and wrong decisions at a threshold, all together and by source."""
    table: dict[str, Counter[str]] = {"all": Counter()}
    for score, label, source in zip(scores.tolist(), labels.tolist(), sources, strict=True):
        name = f"{'true' if (score >= threshold) == label else 'false'}_"
        name += "positive" if score >= threshold else "negative"
        table["all"][name] += 1
        table.setdefault(source, Counter())[name] += 1
    names = ("true_positive", "false_positive", "true_negative", "false_negative")
    return {source: {name: counts[name] for name in names} for source, counts in table.items()}


def reference_bins(scores: Scores) -> dict[str, list[float]]:
    """The bins of the drift check: `edges` between them and `counts` of held-out scores."""
    edges = np.unique(np.quantile(scores, np.arange(1, PSI_BINS) / PSI_BINS))
    counts = np.bincount(np.searchsorted(edges, scores, side="left"), minlength=len(edges) + 1)
    return {"edges": edges.tolist(), "counts": counts.tolist()}


def drift(reference: dict[str, list[float]], scores: Scores) -> dict[str, Json]:
    """Compare the scores of a corpus with those of the training sample's held-out part.

    Half a document is added to each bin, so that an empty one has a logarithm. Samples that were
    drawn from one distribution give about (bins - 1) (1 / n + 1 / m), `expected`: the verdict is
    about what is above it. Where that alone is as much as a drift, nothing can be told.

    Returns:
        `psi`, `expected`, `verdict` (`stable`, `shift`, `drift`, `too few to tell`), and `bins`
        with the shares.
    """
    edges = np.array(reference["edges"])
    before = np.array(reference["counts"], np.float64)
    after = np.bincount(np.searchsorted(edges, scores, side="left"), minlength=len(before)).astype(
        np.float64
    )
    expected = (len(before) - 1) * (1 / before.sum() + 1 / max(after.sum(), 1))
    shares = [(counts + 0.5) / (counts.sum() + 0.5 * len(counts)) for counts in (before, after)]
    psi = float(((shares[1] - shares[0]) * np.log(shares[1] / shares[0])).sum())
    above = psi - expected
    verdict = "stable" if above < PSI_SHIFT else "shift" if above < PSI_DRIFT else "drift"
    if verdict != "drift" and expected >= PSI_DRIFT:
        verdict = "too few to tell"
    return {
        "psi": round(psi, _DIGITS),
        "expected": round(float(expected), _DIGITS),
        "verdict": verdict,
        "bins": {
            "edges": np.round(edges, _DIGITS).tolist(),
            "training": np.round(shares[0], _DIGITS).tolist(),
            "corpus": np.round(shares[1], _DIGITS).tolist(),
        },
    }
