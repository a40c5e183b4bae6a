"""What an annotation is worth: canaries, agreement, and labels that the text makes unlikely."""

import math
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from itertools import combinations

import numpy as np
from numpy.typing import NDArray

from data_pipeline.annotation.agreement import (
    DISAGREEMENT,
    MIN_LABELS,
    agreement,
    predicted_scores,
    text_features,
)
from data_pipeline.annotation.canaries import GOOD_FROM, Canary
from data_pipeline.llm.prompts import SCORES
from data_pipeline.records.record import Json, Record

FIRST_LOOK = 20  # canaries after which an annotator may be given up


@dataclass
class Annotator:
    """What one model answered.

    Attributes:
        model: its name.
        scores: by record id.
        unscored: reason by record id, where there is no score.
        canaries: (batch, canary, score or None).
    """

    model: str
    scores: dict[str, int] = field(default_factory=dict)
    unscored: dict[str, str] = field(default_factory=dict)
    canaries: list[tuple[int, Canary, int | None]] = field(default_factory=list)

    @property
    def canary_share(self) -> float:
        """Share of the canaries on the right side of the scale."""
        return self._canaries_right / max(len(self.canaries), 1)

    @property
    def _canaries_right(self) -> int:
        return sum(
            score is not None and (score >= GOOD_FROM) == canary.good
            for _, canary, score in self.canaries
        )

    def is_hopeless(self, min_canaries: float) -> bool:
        """Whether it has failed canaries for more than bad luck, so that asking on is lost money.

        Three standard deviations below what an annotator just good enough would have got right.
        """
        count = len(self.canaries)
        luck = 3 * math.sqrt(count * min_canaries * (1 - min_canaries))
        return count >= FIRST_LOOK and self._canaries_right + luck < count * min_canaries


def annotation_report(
    records: Iterable[Record], strata: dict[str, int], annotators: list[Annotator]
) -> dict[str, Json]:
    """How far the labels can be trusted.

    Args:
        records: the sample.
        strata: how many of each stratum are in it.
        annotators: what was reported about it.
    """
    agreements: list[Json] = []
    for first, second in combinations(annotators, 2):
        shared = sorted(first.scores.keys() & second.scores.keys())
        found = agreement(
            [first.scores[name] for name in shared],
            [second.scores[name] for name in shared],
            len(SCORES),
        )
        agreements.append({"first": first.model, "second": second.model, **vars(found)})
    return {
        "strata": dict(sorted(strata.items())),
        "annotators": [
            {
                "model": annotator.model,
                "scores": {
                    str(score): Counter(annotator.scores.values())[score] for score in SCORES
                },
                "unscored": dict(Counter(annotator.unscored.values())),
                "canaries": len(annotator.canaries),
                "canaries_right": annotator.canary_share,
                "canaries_wrong": [
                    {"batch": batch, "canary": canary.name, "score": score}
                    for batch, canary, score in annotator.canaries
                    if score is None or (score >= GOOD_FROM) != canary.good
                ],
            }
            for annotator in annotators
        ],
        "agreement": agreements,
        "text_classifier": _classifier_report(records, annotators),
    }


def _classifier_report(
    records: Iterable[Record], annotators: list[Annotator]
) -> dict[str, Json] | None:
    """Where the mean score is far from what the text predicts; None with too few labels."""
    ids: list[str] = []
    features: list[NDArray[np.float32]] = []
    means: list[float] = []
    for record in records:
        given = [a.scores[record["id"]] for a in annotators if record["id"] in a.scores]
        if given:
            ids.append(record["id"])
            features.append(text_features(record["text"]))
            means.append(sum(given) / len(given))
    if len(ids) < MIN_LABELS:
        return None
    scores_d = np.array(means)
    predicted_d = predicted_scores(ids, np.stack(features), scores_d)
    spread = float(scores_d.std() * predicted_d.std())
    far = np.abs(predicted_d - scores_d) >= DISAGREEMENT
    return {
        "documents": len(ids),
        "correlation": float(np.corrcoef(scores_d, predicted_d)[0, 1]) if spread > 0 else None,
        "flagged": [name for name, flag in zip(ids, far, strict=True) if flag],
    }
