"""MinHash signatures: short sketches whose agreement estimates the Jaccard similarity of texts.

One-permutation hashing (Li, Owen and Zhang, NeurIPS 2012) with optimal densification (Shrivastava,
ICML 2017): each shingle is hashed once, its upper bits choose one of `BINS` bins, and a bin keeps
the smallest of the lower bits. An empty bin takes the value of a bin that is not empty, chosen by a
fixed sequence of draws that is the same for every document, so that two signatures agree at each
bin with probability equal to the Jaccard similarity. That is one hash a shingle where the classical
scheme computes 128.

Locality-sensitive hashing cuts a signature into bands of rows; documents that agree in one whole
band are compared.
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from data_pipeline.similarity.shingles import U64, hash_shingles, hash_words, mix

BINS = 128
SHINGLE_WORDS = 5
_BIN_SHIFT = np.uint64(64 - 7)  # BINS is 2^7
_EMPTY = np.uint32(0xFFFFFFFF)
_LEAST_RECALL = 0.99

U32 = NDArray[np.uint32]


def signatures(texts: Sequence[bytes]) -> tuple[U32, NDArray[np.bool_]]:
    """MinHash signatures of texts.

    The words of a text are runs of letters, digits and underscores, and each punctuation character,
    so that code that differs in its operators differs; a shingle is `SHINGLE_WORDS` words.

    Args:
        texts: UTF-8.

    Returns:
        [d, BINS] signatures, and [d] whether the text has any word: without one there is nothing
        to compare.
    """
    words = hash_words(texts, marks=True, lower=False)
    hashes, documents = hash_shingles(words, SHINGLE_WORDS)
    slots = np.full(len(texts) * BINS, _EMPTY, np.uint32)
    keys = documents * BINS + (hashes >> _BIN_SHIFT).astype(np.int64)
    np.minimum.at(slots, keys, (hashes & np.uint64(0xFFFFFFFE)).astype(np.uint32))
    result = slots.reshape(len(texts), BINS)
    has_words = np.diff(words.bounds) > 0
    _densify(result, has_words)
    return result, has_words


def _densify(slots: U32, has_words: NDArray[np.bool_]) -> None:
    """Fill the empty bins of documents that have words, in place."""
    empty = slots == _EMPTY
    rows, bins = np.nonzero(empty & has_words[:, None])
    attempt = 0
    while rows.size:
        attempt += 1
        draws = mix((bins + attempt * BINS).astype(np.uint64)) >> _BIN_SHIFT
        found = ~empty[rows, draws]
        slots[rows[found], bins[found]] = slots[rows[found], draws[found]]
        rows, bins = rows[~found], bins[~found]


def choose_bands(threshold: float) -> tuple[int, int]:
    """(bands, rows): the most selective cut that finds 99% of the pairs at `threshold`.

    A pair of similarity s agrees in some band with probability 1 - (1 - s^rows)^bands.

    Raises:
        ValueError: the threshold is not between 0.3 and 1.
    """
    if not 0.3 <= threshold <= 1:
        raise ValueError(f"`near` {threshold:g}: must be a similarity from 0.3 to 1")
    for rows in range(BINS // 2, 0, -1):
        bands = BINS // rows
        if 1 - (1 - threshold**rows) ** bands >= _LEAST_RECALL:
            return bands, rows
    raise AssertionError("one row always finds them")


def band_keys(slots: U32, bands: int, rows: int) -> U64:
    """[bands, d] hash of each band of each signature."""
    keys = np.zeros((bands, len(slots)), np.uint64)
    for band in range(bands):
        for row in range(rows):
            keys[band] = mix(keys[band] + slots[:, band * rows + row] + np.uint64(row + 1))
    return keys


def estimate_jaccard(first: U32, second: U32) -> NDArray[np.float32]:
    """[p] estimated similarity of p pairs of signatures [p, BINS]; std sqrt(J (1 - J) / BINS)."""
    means: NDArray[np.float32] = (first == second).mean(axis=1, dtype=np.float32)
    return means
