"""Runs of words that benchmark problems have, by their hashes."""

import re
from collections import Counter
from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from data_pipeline.decontaminate.benchmarks import Problem
from data_pipeline.decontaminate.options import SHORT_STATEMENT
from data_pipeline.similarity.shingles import U64, Words, hash_shingles, hash_words

_FILTER_BITS = 20
_WORD = re.compile(rb"[0-9A-Za-z_\x80-\xff]+")  # as `shingles` divides texts


class NgramTable:
    """Runs of words of the problems, by their hashes.

    Args:
        problems: the benchmark.
        size: words of a run.
    """

    def __init__(self, problems: Sequence[Problem], size: int) -> None:
        self._owners: dict[int, dict[int, set[int]]] = {}  # words -> hash -> problems
        self.totals = np.zeros(len(problems), np.int64)  # runs of each problem
        for number, problem in enumerate(problems):
            for text in (*problem.prose, *problem.code):
                words = hash_words([text.encode("utf-8", "replace")], marks=False, lower=True)
                count = len(words.hashes)
                own = size if count >= size else count
                if own == size or (text in problem.prose and count >= SHORT_STATEMENT):
                    owners = self._owners.setdefault(own, {})
                    hashes = hash_shingles(words, own)[0]
                    for value in hashes[_mostly_words(text, own)].tolist():
                        owners.setdefault(value, set()).add(number)
        for owners in self._owners.values():
            for numbers in owners.values():
                for number in numbers:
                    self.totals[number] += 1
        self._sorted = {
            n: np.sort(np.array(list(owners), np.uint64))
            for n, owners in self._owners.items()
            if owners
        }
        # Nearly every run of a document is ruled out by a look at one byte of this filter.
        self._filters = {n: _bit_filter(hashes) for n, hashes in self._sorted.items()}

    def hits(self, texts: Sequence[str]) -> list[Counter[int]]:
        """For each text the number of distinct runs that it shares with each problem."""
        words = hash_words([t.encode("utf-8", "replace") for t in texts], marks=False, lower=True)
        counters: list[Counter[int]] = [Counter() for _ in texts]
        for size, known in self._sorted.items():
            for document, value in self._shared(words, size, known):
                counters[document].update(self._owners[size][value])
        return counters

    def _shared(self, words: Words, size: int, known: U64) -> Iterator[tuple[int, int]]:
        """Distinct (document, hash) of the runs that are in the table."""
        hashes, documents = hash_shingles(words, size)
        maybe = np.flatnonzero(self._filters[size][_low_bits(hashes)])
        hashes, documents = hashes[maybe], documents[maybe]
        places = np.minimum(np.searchsorted(known, hashes), len(known) - 1)
        equal = known[places] == hashes
        yield from sorted(set(zip(documents[equal].tolist(), hashes[equal].tolist(), strict=True)))


def _mostly_words(text: str, size: int) -> NDArray[np.bool_]:
    """[s] whether at least half of a run's words have a letter: runs of numbers are no evidence."""
    words = _WORD.findall(text.encode("utf-8", "replace"))
    letters = np.array([not word.isdigit() for word in words], np.int64)
    return np.convolve(letters, np.ones(size, np.int64), "valid") * 2 >= size


def _low_bits(hashes: U64) -> NDArray[np.int64]:
    return (hashes & np.uint64((1 << _FILTER_BITS) - 1)).astype(np.int64)


def _bit_filter(hashes: U64) -> NDArray[np.bool_]:
    table = np.zeros(1 << _FILTER_BITS, np.bool_)
    table[_low_bits(hashes)] = True
    return table
