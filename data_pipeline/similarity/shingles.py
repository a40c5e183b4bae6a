"""Hashes of the words of many texts at once, and of runs of consecutive words (shingles).

Everything is vectorised over a batch of texts, which are laid end to end as UTF-8 bytes; a word is
read eight bytes at a time. Two hashes of different words are equal with probability about 2^-64.

Legend of shapes: b bytes of the batch, w words, s shingles, d documents.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

U64 = NDArray[np.uint64]

BATCH_BYTES = 2**18  # the arrays of a batch then fit the caches, which is twice as fast
_SPACE, _WORD, _MARK = 0, 1, 2


def _byte_classes(marks: bool) -> NDArray[np.uint8]:
    """Class of each byte: ASCII letters, digits, `_` and all of non-ASCII are parts of words."""
    classes = np.full(256, _MARK if marks else _SPACE, np.uint8)
    classes[: ord(" ") + 1] = _SPACE
    for first, last in ("09", "AZ", "az", "__"):
        classes[ord(first) : ord(last) + 1] = _WORD
    classes[128:] = _WORD
    return classes


_WITH_MARKS, _WORDS_ONLY = _byte_classes(True), _byte_classes(False)
_LOWER = np.arange(256, dtype=np.uint8)
_LOWER[ord("A") : ord("Z") + 1] += ord("a") - ord("A")
_MASKS = np.array([(1 << (8 * n)) - 1 for n in range(9)], np.uint64)  # the first n bytes


@dataclass(frozen=True)
class Words:
    """The words of a batch.

    Attributes:
        hashes: [w] hash of each word, in order.
        bounds: [d + 1] the words of document i are `bounds[i]` to `bounds[i + 1]`.
    """

    hashes: U64
    bounds: NDArray[np.int64]


def mix(values: U64) -> U64:
    """The finaliser of splitmix64: a bijection of 64 bits that spreads every bit over all."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


def hash_words(texts: Sequence[bytes], *, marks: bool, lower: bool) -> Words:
    """Hash the words of texts.

    Args:
        texts: UTF-8.
        marks: each punctuation character is a word; otherwise it separates words, as space does.
        lower: ASCII letters count as their lower case.
    """
    # A space after each text keeps words apart, eight at the end let words be read whole.
    joined = np.frombuffer(b" ".join([*texts, b" " * 8]), np.uint8)
    if lower:
        joined = _LOWER[joined]
    classes = (_WITH_MARKS if marks else _WORDS_ONLY)[joined]
    in_word = classes == _WORD
    mark = classes == _MARK
    first, last = in_word.copy(), in_word.copy()
    first[1:] &= ~in_word[:-1]
    last[:-1] &= ~in_word[1:]
    starts_w = np.flatnonzero(first | mark)
    lengths_w = np.flatnonzero(last | mark) + 1 - starts_w
    ends_d = np.cumsum([0, *(len(text) + 1 for text in texts)])
    bounds = np.searchsorted(starts_w, ends_d).astype(np.int64)
    return Words(_hash_runs(joined, starts_w, lengths_w), bounds)


def _hash_runs(
    joined: NDArray[np.uint8], starts: NDArray[np.intp], lengths: NDArray[np.intp]
) -> U64:
    """[w] hashes of the given runs of bytes."""
    octets: U64 = np.ndarray(len(joined) - 7, "<u8", joined.data, strides=(1,))
    hashes = mix(octets[starts] & _MASKS[np.minimum(lengths, 8)])
    hashes += lengths.astype(np.uint64)
    rest = np.flatnonzero(lengths > 8)
    offset = 8
    while rest.size:
        more = octets[starts[rest] + offset] & _MASKS[np.minimum(lengths[rest] - offset, 8)]
        hashes[rest] = mix(hashes[rest] ^ more) * np.uint64(0x9E3779B97F4A7C15)
        offset += 8
        rest = rest[lengths[rest] > offset]
    return hashes


def hash_shingles(words: Words, size: int) -> tuple[U64, NDArray[np.int64]]:
    """Hash each run of `size` words that is within one document.

    A document of fewer words, but at least one, has one shingle: all of them.

    Returns:
        [s] hashes and [s] indices of their documents; those of the short documents come last.
    """
    multipliers = _multipliers(size)
    counts = np.diff(words.bounds)
    document_w = np.repeat(np.arange(len(counts)), counts)
    total = len(words.hashes) - size + 1
    hashes = np.zeros(max(total, 0), np.uint64)
    for offset, multiplier in enumerate(multipliers):
        hashes += words.hashes[offset : offset + max(total, 0)] * multiplier
    documents = document_w[: len(hashes)]
    whole = documents == document_w[size - 1 : size - 1 + len(hashes)]
    hashes, documents = hashes[whole], documents[whole]
    short = np.flatnonzero((counts > 0) & (counts < size))
    if short.size:
        sums = [
            (words.hashes[words.bounds[i] : words.bounds[i + 1]] * multipliers[: counts[i]]).sum(
                dtype=np.uint64
            )
            for i in short
        ]
        hashes = np.concatenate([hashes, np.array(sums, np.uint64)])
        documents = np.concatenate([documents, short])
    return mix(hashes), documents


def _multipliers(size: int) -> U64:
    """[size] odd numbers, one for each place in a shingle."""
    return mix(np.arange(1, size + 1, dtype=np.uint64)) | np.uint64(1)
