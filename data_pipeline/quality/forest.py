"""A random forest as plain arrays: saved without pickle, evaluated with numpy alone.

scikit-learn grows the trees; what it has grown is a table of nodes. `positive_share` repeats its
`predict_proba` on that table: features are float32, a node sends a document left when its feature
is at most the threshold (float64), and the forest's answer is the mean of its trees' leaves.
"""

from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megaphi.durable import file_sha256, sync
from megaphi.errors import RunError

Scores = NDArray[np.float64]
Matrix = NDArray[np.float32]


@dataclass(frozen=True)
class Forest:
    """The nodes of all trees, n in all, one tree after the other.

    Attributes:
        roots: int32 [t] node at which each tree starts.
        feature: int32 [n] column that a node looks at; -1 at leaves.
        threshold: float64 [n] values up to it go left.
        left: int32 [n] node for those; a leaf leads to itself.
        right: int32 [n] node for the others; a leaf leads to itself.
        positive: float64 [n] share of positive training documents that reached the node.
        num_features: int32 [] columns of the matrix that the forest was trained on.
    """

    roots: NDArray[np.int32]
    feature: NDArray[np.int32]
    threshold: NDArray[np.float64]
    left: NDArray[np.int32]
    right: NDArray[np.int32]
    positive: NDArray[np.float64]
    num_features: NDArray[np.int32]

    def positive_share(self, features_df: Matrix) -> Scores:
        """[d] probability that each document is positive; NaN where a feature is not finite."""
        if features_df.shape[1] != int(self.num_features):
            raise ValueError(
                f"the forest was trained on {int(self.num_features)} features, these are "
                f"{features_df.shape[1]}: the filter belongs to another model or version"
            )
        total = np.zeros(len(features_df))
        rows = np.arange(len(features_df))
        for root in self.roots:
            node = np.full(len(features_df), root, np.int32)
            while True:
                column = self.feature[node]
                inner = column >= 0
                if not inner.any():
                    break
                goes_left = features_df[rows, column] <= self.threshold[node]
                node = np.where(goes_left, self.left[node], self.right[node])
            total += self.positive[node]
        total /= len(self.roots)
        total[~np.isfinite(features_df).all(axis=1)] = np.nan
        return total

    def save(self, path: Path) -> str:
        """Write the arrays to an .npz file, the same bytes for the same forest; its SHA-256."""
        np.savez(path, **vars(self))
        sync(path)
        return file_sha256(path)


def from_sklearn(model: Any, num_features: int) -> Forest:
    """The arrays of a fitted `RandomForestClassifier` of the classes 0 and 1."""
    assert list(model.classes_) == [0, 1]
    tables: dict[str, list[NDArray[Any]]] = {
        name: [] for name in ("feature", "threshold", "left", "right", "positive")
    }
    roots, start = [], 0
    for estimator in model.estimators_:
        tree = estimator.tree_
        own = np.arange(tree.node_count)
        is_leaf = tree.children_left < 0
        value = tree.value[:, 0, :]
        roots.append(start)
        tables["feature"].append(np.where(is_leaf, -1, tree.feature).astype(np.int32))
        tables["threshold"].append(tree.threshold.astype(np.float64))
        for name, children in (("left", tree.children_left), ("right", tree.children_right)):
            tables[name].append((np.where(is_leaf, own, children) + start).astype(np.int32))
        tables["positive"].append(value[:, 1] / value.sum(axis=1))
        start += tree.node_count
    return Forest(
        roots=np.array(roots, np.int32),
        num_features=np.array(num_features, np.int32),
        **{name: np.concatenate(parts) for name, parts in tables.items()},
    )


def load_forest(path: Path, sha256: str) -> Forest:
    """Read the arrays of a forest.

    Raises:
        RunError: the file is missing or not the one that was written, or holds other arrays.
    """
    if not path.is_file() or file_sha256(path) != sha256:
        raise RunError(f"{path}: missing or differs from its manifest (SHA-256); train it again")
    with np.load(path, allow_pickle=False) as arrays:
        names = {field.name for field in fields(Forest)}
        if set(arrays.files) != names:
            raise RunError(f"{path}: not a forest of this version; train the filter again")
        return Forest(**{name: arrays[name] for name in names})
