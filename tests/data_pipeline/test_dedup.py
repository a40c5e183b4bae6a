"""Dedup against brute force: similarities, clusters, what is kept; workers and kills."""

import hashlib
import json
import random
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from data_pipeline.dedup.stage import dedup
from data_pipeline.runner.output import Manifest
from data_pipeline.runner.stage import Options
from data_pipeline.similarity.minhash import (
    BINS,
    band_keys,
    choose_bands,
    estimate_jaccard,
    signatures,
)
from data_pipeline.similarity.shingles import hash_shingles, hash_words
from tests.data_pipeline.record_files import read, write_records
from tests.data_pipeline.test_pipeline_crash import drive

WORDS = [f"{a}{b}{n}" for a in ("get", "set", "old", "new") for b in "xyz" for n in range(40)]


def run(records: list[Path], out: Path, workers: int = 1, **options: Any) -> Manifest:
    return dedup(records, out, Options(workers=workers, max_reject=1), **options)[0]


def shingle_set(text: str, size: int = 5) -> set[tuple[str, ...]]:
    """The definition, by a regular expression and sets of tuples."""
    words = re.findall(r"[A-Za-z0-9_\u0080-\U0010ffff]+|[^\sA-Za-z0-9_\u0080-\U0010ffff]", text)
    if len(words) < size:
        return {tuple(words)} if words else set()
    return {tuple(words[i : i + size]) for i in range(len(words) - size + 1)}


def jaccard(first: str, second: str) -> float:
    a, b = shingle_set(first), shingle_set(second)
    return len(a & b) / len(a | b) if a | b else 0.0


def code(draw: random.Random, words: int) -> list[str]:
    return [
        draw.choice(WORDS) + draw.choice([" ", ".", "(", ") + ", "\n    "]) for _ in range(words)
    ]


def variant(draw: random.Random, pieces: Sequence[str], edits: int) -> str:
    changed = list(pieces)
    for place in draw.sample(range(len(changed)), edits):
        changed[place] = f"edit{draw.randrange(10**6)} "
    return "".join(changed)


def test_shingles_are_those_of_the_definition() -> None:
    draw = random.Random(1)
    alphabet = "ab_Z09é文 \n\t.,(){}+=#\"'\\\x0c\x7f"
    texts = ["", " ", "a", "a b", "ab" * 40, "x" * 7 + " " + "x" * 8 + " " + "x" * 9, "文字 文"]
    texts += ["".join(draw.choices(alphabet, k=draw.randrange(200))) for _ in range(200)]
    words = hash_words([text.encode() for text in texts], marks=True, lower=False)
    hashes, documents = hash_shingles(words, 5)
    # \x7f is a mark for the hashes; the control characters below space separate.
    meaning: dict[int, tuple[str, ...]] = {}
    for number, text in enumerate(texts):
        expected = shingle_set(text)
        mine = set(hashes[documents == number].tolist())
        assert len(mine) == len(expected), text
    for text in texts[:50]:
        (words,) = [hash_words([text.encode()], marks=True, lower=False)]
        tokens = re.findall(
            r"[A-Za-z0-9_\u0080-\U0010ffff]+|[^\sA-Za-z0-9_\u0080-\U0010ffff]", text
        )
        for value, token in zip(words.hashes.tolist(), tokens, strict=True):
            assert meaning.setdefault(value, (token,)) == (token,)
    assert len(set(meaning.values())) == len(meaning) > 20


@pytest.mark.parametrize("size", [30, 150, 3000])
def test_estimates_are_unbiased(size: int) -> None:
    draw = random.Random(size)
    errors, scaled = [], []
    for trial in range(150):
        pieces = code(draw, size)
        first, second = "".join(pieces), variant(draw, pieces, trial % 10 * size // 100 + 1)
        slots, worded = signatures([first.encode(), second.encode()])
        assert worded.all()
        truth = jaccard(first, second)
        error = float(estimate_jaccard(slots[:1], slots[1:])[0]) - truth
        errors.append(error)
        scaled.append(error / max((truth * (1 - truth) / BINS) ** 0.5, 0.01))
    assert abs(np.mean(errors)) < 0.015
    # Documents of fewer shingles than bins repeat values: their estimates scatter more.
    assert np.std(scaled) < (1.3 if size >= 3000 else 3)


@pytest.mark.parametrize("near", [0.3, 0.5, 0.7, 0.8, 0.85, 0.9, 0.99, 1.0])
def test_bands_find_pairs_at_the_threshold(near: float) -> None:
    bands, rows = choose_bands(near)
    assert bands * rows <= BINS
    assert 1 - (1 - near**rows) ** bands >= 0.99
    with pytest.raises(ValueError, match="near"):
        choose_bands(near + 1)


def corpus(seed: int, families: int = 40) -> list[str]:
    """Families of near duplicates of known similarity, exact copies, and unrelated texts."""
    draw = random.Random(seed)
    texts = []
    for family in range(families):
        pieces = code(draw, 400)
        texts.append("".join(pieces))
        for _ in range(family % 4):
            texts.append(variant(draw, pieces, 1 + family % 12))
        if family % 5 == 0:
            texts.append("".join(pieces).replace("\n", "  \n") + "\n\n")
    draw.shuffle(texts)
    return texts


def components(texts: list[str], near: float) -> list[set[int]]:
    """Clusters by brute force: of connected components of the pairs of at least `near`."""
    sets = [shingle_set(text) for text in texts]
    groups = [{i} for i in range(len(texts))]
    for i in range(len(texts)):
        for j in range(i):
            if (
                len(sets[i] & sets[j]) / len(sets[i] | sets[j]) >= near
                and groups[i] is not groups[j]
            ):
                groups[i] |= groups[j]
                for member in groups[j]:
                    groups[member] = groups[i]
    found = []
    for group in {id(g): g for g in groups if len(g) > 1}.values():
        # the longest is kept and takes those that are near it; then the next of what is left
        left = sorted(group, key=lambda i: -len(texts[i].encode()))
        while left:
            near_it = {
                i
                for i in left
                if len(sets[i] & sets[left[0]]) / len(sets[i] | sets[left[0]]) >= near
            }
            found.append(near_it)
            left = [i for i in left if i not in near_it]
    return sorted((group for group in found if len(group) > 1), key=min)


def test_clusters_are_those_of_brute_force(tmp_path: Path) -> None:
    texts = corpus(3)
    near = 0.8
    rows = [{"text": text, "n": n} for n, text in enumerate(texts)]
    records = write_records(tmp_path, [rows[n::3] for n in range(3)])
    numbers = {r["id"]: r["meta"]["n"] for r in read(records)}
    manifest = run([records], tmp_path / "out", near=near)
    table = [json.loads(line) for line in (tmp_path / "out" / "clusters.jsonl").open()]
    found = [{numbers[c["kept"]], *(numbers[d["id"]] for d in c["dropped"])} for c in table]
    expected = components(texts, near)
    assert len(expected) > 20
    agreeing = sum(group in found for group in expected)
    assert agreeing >= 0.95 * len(expected)
    assert len(found) <= 1.05 * len(expected)
    for cluster in table:
        assert cluster["size"] == 1 + len(cluster["dropped"])
        for dropped in cluster["dropped"]:
            truth = jaccard(texts[numbers[cluster["kept"]]], texts[numbers[dropped["id"]]])
            assert dropped["jaccard"] == pytest.approx(truth, abs=0.15)
    # Every document is in exactly one place, and the rejects name what was kept.
    rejects = read(tmp_path / "out", "rejected")
    kept = read(tmp_path / "out")
    assert sorted([r["id"] for r in kept + rejects]) == sorted(numbers)
    named = {r["id"]: re.match(r"of (\w+), ", r["detail"])[1] for r in rejects}
    assert named == {d["id"]: c["kept"] for c in table for d in c["dropped"]}
    assert manifest.rejected["duplicate"] >= 5
    sizes = {r["id"]: r["dup"]["size"] for r in kept if "dup" in r}
    assert sizes == {c["kept"]: c["size"] for c in table}


def test_nothing_is_dropped_that_is_not_near_what_is_kept(tmp_path: Path) -> None:
    """Chains: each text is near its neighbours, the ends are not near each other."""
    draw = random.Random(11)
    texts = []
    for _ in range(5):
        pieces = code(draw, 400)
        for step in range(12):
            texts.append("".join(pieces))
            for place in draw.sample(range(len(pieces)), 4):
                pieces[place] = f"step{step}x{place} "
    draw.shuffle(texts)
    near = 0.85
    records = write_records(tmp_path, [[{"text": text} for text in texts]])
    run([records], tmp_path / "out", near=near)
    by_id = {record["id"]: record["text"] for record in read(records)}
    kept = {record["id"] for record in read(tmp_path / "out")}
    rejects = read(tmp_path / "out", "rejected")
    assert len(rejects) > 15
    for reject in rejects:
        found = re.match(r"of (\w+), ", reject["detail"])
        assert found is not None
        assert found[1] in kept
        # an estimate from 128 values: three standard deviations
        assert jaccard(by_id[found[1]], by_id[reject["id"]]) > near - 0.1
    apart = [jaccard(by_id[a], by_id[b]) for a in kept for b in kept if a < b]
    assert max(apart) < near + 0.1, "nor are two kept that are near each other"


def test_recall_at_and_above_the_threshold() -> None:
    draw = random.Random(5)
    near, bands_rows = 0.85, choose_bands(0.85)
    found = total = 0
    for _ in range(150):
        pieces = code(draw, 500)
        first, second = "".join(pieces), variant(draw, pieces, 4)
        if jaccard(first, second) < near + 0.02:
            continue
        slots, _ = signatures([first.encode(), second.encode()])
        keys = band_keys(slots, *bands_rows)
        total += 1
        found += bool((keys[:, 0] == keys[:, 1]).any())
    assert total > 100
    assert found >= 0.97 * total


def test_the_best_of_a_cluster_is_kept(tmp_path: Path) -> None:
    draw = random.Random(7)
    pieces = [code(draw, 300) for _ in range(4)]
    rows = [
        {"text": "".join(pieces[0]), "n": "a", "max_stars_count": 900},
        {"text": "".join(pieces[0]) + " tail", "n": "b", "quality": {"score": 3}},
        {"text": "".join(pieces[0]), "n": "c", "quality": {"score": 7.5}},
        {"text": "".join(pieces[1]) + " tail", "n": "d", "max_stars_count": 5},
        {"text": "".join(pieces[1]), "n": "e", "max_stars_count": 50},
        {"text": "".join(pieces[2]), "n": "f"},
        {"text": "".join(pieces[2]) + " long tail", "n": "g"},
        {"text": "".join(pieces[3]), "n": "h", "quality": {"score": "high"}},
        {"text": "".join(pieces[3]), "n": "i", "quality": {"score": None}},
    ]
    records = write_records(tmp_path, [rows[:4], rows[4:]])
    run([records], tmp_path / "out")
    ids = {r["meta"]["n"]: r["id"] for r in read(records)}
    first = min("hi", key=ids.__getitem__)
    assert {r["meta"]["n"] for r in read(tmp_path / "out")} == {"c", "e", "g", first}


def test_exact_only_and_texts_without_words(tmp_path: Path) -> None:
    draw = random.Random(8)
    pieces = code(draw, 200)
    texts = ["".join(pieces), "".join(pieces) + " more", "".join(pieces) + "\n\n", "\x01", "\x02"]
    records = write_records(tmp_path, [[{"text": text} for text in texts]])
    assert run([records], tmp_path / "exact", near=None).rejected == {"duplicate": 1}
    near = run([records], tmp_path / "near")
    # The longest is kept, of which the two equal ones are near duplicates.
    assert near.rejected == {"near_duplicate": 2}
    other = write_records(tmp_path, [[{"text": texts[0]}]], "other")
    assert run([records, other], tmp_path / "both").rejected == {"near_duplicate": 3}
    with pytest.raises(ValueError, match="given twice"):
        run([records, records], tmp_path / "twice")


def contents(out: Path) -> dict[str, str]:
    return {
        p.name: hashlib.sha256(p.read_bytes()).hexdigest()
        for p in sorted(out.iterdir())
        if p.name != "manifest.json"
    }


def test_output_does_not_depend_on_the_number_of_workers(tmp_path: Path) -> None:
    rows = [{"text": text} for text in corpus(9)]
    records = write_records(tmp_path, [rows[n::5] for n in range(5)])
    found = []
    for workers in (1, 2, 3):
        run([records], tmp_path / f"out{workers}", workers)
        found.append(contents(tmp_path / f"out{workers}"))
    assert found[0] == found[1] == found[2]
    assert "clusters.jsonl" in found[0]
    assert not list(tmp_path.glob("*.partial"))
    _, reused = dedup([records], tmp_path / "out1", Options(max_reject=1))
    assert reused


def test_killed_at_any_file_operation(tmp_path: Path) -> None:
    rows = [{"text": text} for text in corpus(10, 8)]
    records = write_records(tmp_path, [rows[::2], rows[1::2]])
    argv = ["data", "dedup", str(records), "--out", str(tmp_path / "out"), "--workers", "1"]
    report = drive(tmp_path, "out", "out/manifest.json", argv)
    assert report["killed"] >= 1
    assert "out/clusters.jsonl" in str(report["files"])
