"""The quality filter: forest against scikit-learn, embeddings against transformers, selection."""

import hashlib
import json
import random
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from data_pipeline.quality import features as features_module
from data_pipeline.quality.embeddings import Embedder, model_spec
from data_pipeline.quality.filter import Selection, filter_records, load_filter
from data_pipeline.quality.forest import from_sklearn, load_forest
from data_pipeline.quality.metrics import (
    average_precision,
    drift,
    precision_recall,
    reference_bins,
    threshold_for_precision,
)
from data_pipeline.quality.train_filter import TrainingOptions, train_filter
from data_pipeline.runner.output import Manifest
from data_pipeline.runner.stage import Options
from megaphi.errors import RunError
from tests.data_pipeline.record_files import read, write_records
from tests.data_pipeline.test_pipeline_crash import drive
from tools import cli

sklearn_ensemble = pytest.importorskip("sklearn.ensemble")
sklearn_metrics = pytest.importorskip("sklearn.metrics")

NOUNS = ["list", "tree", "graph", "prime", "matrix", "string", "queue", "word", "path", "score"]


def lesson(draw: random.Random) -> str:
    """An educational document, as far as a toy corpus goes."""
    noun, other = draw.sample(NOUNS, 2)
    number = draw.randrange(1000)
    return (
        f"def find_{noun}_{number}(values):\n"
        f'    """Return the first {noun} of the {other}, explained step by step.\n\n'
        f"    >>> find_{noun}_{number}([{number}])\n    {number}\n"
        '    """\n'
        f"    # First we look at every {other} in turn.\n"
        "    for value in values:\n        if value:\n            return value\n"
        "    return None\n" * draw.randrange(1, 3)
    )


def junk(draw: random.Random) -> str:
    rows = [f"    ('{draw.randrange(10**6):x}', {draw.random()})," for _ in range(12)]
    return f"DATA_{draw.randrange(10**6)} = [\n" + "\n".join(rows) + "\n]\n"


def rows_of(count: int, seed: int, share: float = 0.4, noise: float = 0.1) -> list[dict[str, Any]]:
    """Documents, whether they are lessons, and for some a wrong opinion about it."""
    draw = random.Random(seed)
    rows = []
    for _ in range(count):
        good = draw.random() < share
        score = (5 if good else 1) if draw.random() >= noise else (1 if good else 5)
        rows.append({"text": lesson(draw) if good else junk(draw), "good": good, "score": score})
    return rows


def add_labels(records: Path, labelled: int) -> Path:
    """A copy of a records directory with `quality.score` in its first documents."""
    out = records.with_name(records.name + "-labels")
    out.mkdir()
    manifest = json.loads((records / "manifest.json").read_bytes())
    left = labelled
    for part in manifest["parts"]:
        lines = []
        for line in (records / part["name"]).read_bytes().splitlines():
            record = json.loads(line)
            if left > 0:
                record["quality"] = {"score": record["meta"]["score"], "label": 0}
                left -= 1
            lines.append(json.dumps(record).encode() + b"\n")
        data = b"".join(lines)
        (out / part["name"]).write_bytes(data)
        part |= {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    (out / "manifest.json").write_text(json.dumps(manifest))
    return out


SMALL = TrainingOptions(trees=20)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A root with records, labels of 300 of the 500 documents, and a filter."""
    root = tmp_path_factory.mktemp("filter")
    rows = rows_of(500, 1)
    records = write_records(root, [rows[n::5] for n in range(5)])
    train_filter(add_labels(records, 300), [records], root / "filter", SMALL)
    return root


def run(root: Path, out: Path, workers: int = 1, **selection: Any) -> Manifest:
    options = Options(workers=workers, max_reject=1)
    made = load_filter(root / "filter")
    return filter_records([root / "records"], made, out, Selection(**selection), options)[0]


def test_forest_repeats_scikit_learn(tmp_path: Path) -> None:
    draw = np.random.default_rng(3)
    features = draw.normal(size=(400, 12)).astype(np.float32)
    features[:, 3] = np.round(features[:, 3])  # values that lie on thresholds
    labels = (features[:, 0] + features[:, 3] + draw.normal(size=400) > 0.5).astype(int)
    model = sklearn_ensemble.RandomForestClassifier(37, min_samples_leaf=2, random_state=5)
    model.fit(features[:200], labels[:200])
    sha256 = from_sklearn(model, 12).save(tmp_path / "a.npz")
    assert from_sklearn(model, 12).save(tmp_path / "b.npz") == sha256
    forest = load_forest(tmp_path / "a.npz", sha256)
    mine = forest.positive_share(features)
    np.testing.assert_allclose(mine, model.predict_proba(features)[:, 1], rtol=0, atol=1e-12)
    assert len(set(mine.tolist())) > 100
    with zipfile.ZipFile(tmp_path / "a.npz") as archive:
        for name in archive.namelist():
            assert archive.read(name)[:6] == b"\x93NUMPY"
            assert b"O'" not in archive.read(name)[:128]  # no objects, so nothing pickled
    features[7, 2] = np.nan
    assert np.flatnonzero(np.isnan(forest.positive_share(features))).tolist() == [7]
    with pytest.raises(ValueError, match=r"12 features.*11"):
        forest.positive_share(features[:, 1:])
    (tmp_path / "a.npz").write_bytes(b"other")
    with pytest.raises(RunError, match="manifest"):
        load_forest(tmp_path / "a.npz", sha256)


def test_curve_and_areas_are_those_of_scikit_learn() -> None:
    draw = np.random.default_rng(9)
    labels = (draw.random(300) < 0.3).astype(np.int8)
    scores = np.round(draw.random(300) * 0.6 + labels * 0.3, 2)  # with many ties
    curve = precision_recall(scores, labels)
    precision, recall, thresholds = sklearn_metrics.precision_recall_curve(labels, scores)
    for name, column in (("precision", precision[:-1]), ("recall", recall[:-1])):
        np.testing.assert_allclose(curve[name], column, atol=1e-6)
    np.testing.assert_allclose(curve["threshold"], thresholds)
    expected = sklearn_metrics.average_precision_score(labels, scores)
    assert average_precision(curve) == pytest.approx(expected, abs=1e-5)
    chosen = threshold_for_precision(curve, 0.8)
    reaching = [t for t in sorted(set(scores.tolist())) if labels[scores >= t].mean() >= 0.8]
    assert chosen == reaching[0] > min(scores)
    with pytest.raises(ValueError, match="at most 0"):
        threshold_for_precision(precision_recall(np.ones(4), np.array([0, 1, 1, 0], np.int8)), 0.9)


def test_drift_is_the_population_stability_index() -> None:
    draw = np.random.default_rng(2)
    training = draw.beta(2, 3, 5000)
    reference = reference_bins(training)
    assert max(reference["counts"]) - min(reference["counts"]) <= 1
    same = drift(reference, draw.beta(2, 3, 5000))
    other = drift(reference, draw.beta(3, 2, 5000))
    assert (same["verdict"], other["verdict"]) == ("stable", "drift")
    p, q = np.array(other["bins"]["training"]), np.array(other["bins"]["corpus"])
    assert other["psi"] == pytest.approx(sum((q - p) * np.log(q / p)), abs=1e-4)
    repeated = [drift(reference, draw.beta(2, 3, 400))["psi"] for _ in range(200)]
    chance = drift(reference, draw.beta(2, 3, 400))["expected"]
    assert np.mean(repeated) == pytest.approx(chance, rel=0.2)
    # one document says nothing about a corpus
    assert drift(reference, np.array([0.4]))["verdict"] == "too few to tell"


def test_filter_finds_what_was_labelled(trained: Path, tmp_path: Path) -> None:
    report = json.loads((trained / "filter" / "report.json").read_bytes())
    assert report["labels"] == {"given": 300, "found": 300}
    sides = report["documents"]
    assert sides["training"]["all"] + sides["held_out"]["all"] == 300
    assert 30 <= sides["held_out"]["all"] <= 90
    assert report["roc_auc"] > 0.8  # every tenth label is wrong
    all_counts = report["confusion"]["all"]
    assert sum(all_counts.values()) == sides["held_out"]["all"]
    text = (trained / "filter" / "report.txt").read_text()
    assert f"{report['suggested']['precision']:.3f}" in text
    manifest = run(trained, tmp_path / "out", threshold=0.5)
    kept, rejected = read(tmp_path / "out"), read(tmp_path / "out", "rejected")
    assert manifest.rejected == {"low_score": len(rejected)}
    assert len(kept) + len(rejected) == 500
    told = json.loads((tmp_path / "out" / "drift.json").read_bytes())
    assert told["compared"] == 500 - sides["training"]["all"]
    assert told["verdict"] == "stable"
    truth = {record["id"]: record["meta"]["good"] for record in read(trained / "records")}
    wrong = [r for r in kept if not r["meta"]["good"]] + [r for r in rejected if truth[r["id"]]]
    assert len(wrong) < 10
    made = load_filter(trained / "filter")
    forest = made.forest()
    compute = features_module.open_features(made.spec)
    scores = forest.positive_share(compute([record["text"] for record in kept]))
    assert [r["quality"]["score"] for r in kept] == np.round(scores, 6).tolist()
    assert all(r["quality"]["filter"] == made.digest for r in kept)
    assert all(float(r["detail"].split()[1].strip(",")) < 0.5 for r in rejected)


def digests(directory: Path) -> dict[str, str]:
    names = sorted(path.name for path in directory.iterdir())
    return {
        name: hashlib.sha256((directory / name).read_bytes()).hexdigest()
        for name in names
        if name != "manifest.json"
    }


def test_nothing_depends_on_the_number_of_workers(trained: Path, tmp_path: Path) -> None:
    labels = trained / "records-labels"
    train_filter(labels, [trained / "records"], tmp_path / "filter", SMALL, workers=2)
    assert digests(tmp_path / "filter") == digests(trained / "filter")
    found = []
    for workers in (1, 2):
        run(trained, tmp_path / f"out{workers}", workers, threshold=0.3)
        found.append(digests(tmp_path / f"out{workers}"))
    assert found[0] == found[1]
    assert {"drift.json", "part-00000.jsonl", "rejected-00000.jsonl"} <= set(found[0])


def test_a_budget_of_tokens_takes_the_best(trained: Path, tmp_path: Path) -> None:
    run(trained, tmp_path / "all", threshold=0)
    everything = read(tmp_path / "all")
    assert len(everything) == 500
    budget = sum(len(r["text"].encode()) for r in everything) // 4 // 3
    manifest = run(trained, tmp_path / "out", keep_tokens=budget, bytes_per_token=3)
    kept = read(tmp_path / "out")
    lowest = min(record["quality"]["score"] for record in kept)
    above = {r["id"] for r in everything if r["quality"]["score"] > lowest}
    assert above <= {record["id"] for record in kept}
    assert budget * 3 - 1500 < manifest.text_bytes <= budget * 3
    told = json.loads((tmp_path / "out" / "drift.json").read_bytes())
    assert (told["threshold"], told["kept"]) == (lowest, len(kept))
    # Filtering again replaces the score and asks for more tokens than there are.
    made = load_filter(trained / "filter")
    again, _, _ = filter_records(
        [tmp_path / "out"], made, tmp_path / "again", Selection(keep_tokens=10**9), Options()
    )
    assert again.records_out == len(kept)
    assert [r["quality"] for r in read(tmp_path / "again")] == [r["quality"] for r in kept]


def test_an_annotators_score_is_kept_aside(trained: Path, tmp_path: Path) -> None:
    made = load_filter(trained / "filter")
    filter_records(
        [trained / "records-labels"], made, tmp_path / "out", Selection(precision=0.5), Options()
    )
    annotated = [r["quality"] for r in read(tmp_path / "out") if "annotation" in r["quality"]]
    assert annotated
    assert all(set(quality) == {"score", "filter", "annotation"} for quality in annotated)
    assert {quality["annotation"]["score"] for quality in annotated} <= {1, 5}


def test_drift_of_another_corpus_is_told_and_can_stop(trained: Path, tmp_path: Path) -> None:
    made = load_filter(trained / "filter")
    other = write_records(tmp_path, [rows_of(200, 5, share=0.95)], "other")
    _, _, told = filter_records(
        [other], made, tmp_path / "out", Selection(threshold=0.1), Options(max_reject=1)
    )
    assert told["verdict"] == "drift"
    selection = Selection(threshold=0.1, max_drift=0.25)
    with pytest.raises(RunError, match="drift"):
        filter_records([other], made, tmp_path / "not", selection, Options())
    assert not (tmp_path / "not").exists()
    same = write_records(tmp_path, [rows_of(300, 6)], "same")
    _, _, told = filter_records([same], made, tmp_path / "same-out", selection, Options())
    assert told["verdict"] != "drift"


def test_copies_fall_on_one_side_of_the_split(tmp_path: Path) -> None:
    rows = rows_of(120, 8)
    copies = [row | {"text": row["text"].replace("\n", "  \n")} for row in rows]
    records = write_records(tmp_path, [rows, copies])
    made = train_filter(add_labels(records, 240), [records], tmp_path / "filter", SMALL)
    sides = made.report["documents"]
    assert sides["held_out"]["all"] % 2 == sides["training"]["all"] % 2 == 0
    assert sides["held_out"]["all"] + sides["training"]["all"] == 240


def tiny_phi(root: Path) -> Path:
    """A Hugging Face directory of a random Phi of two layers, with a tokenizer."""
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers
    from transformers import PhiConfig, PhiForCausalLM

    torch.manual_seed(0)
    config = PhiConfig(
        vocab_size=320,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=1,
        max_position_embeddings=64,
        partial_rotary_factor=0.5,
        bos_token_id=None,
        eos_token_id=None,
    )
    PhiForCausalLM(config).save_pretrained(root / "phi")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=["<|endoftext|>"],
    )
    tokenizer.train_from_iterator([lesson(random.Random(1))], trainer)
    tokenizer.save(str(root / "phi" / "tokenizer.json"))
    return root / "phi"


def test_embeddings_are_means_of_the_last_hidden_states(tmp_path: Path) -> None:
    import torch
    from tokenizers import Tokenizer
    from transformers import PhiForCausalLM

    directory = tiny_phi(tmp_path)
    draw = random.Random(4)
    texts = ["", "x", "a <|endoftext|> b", junk(draw), *(lesson(draw) for _ in range(5)), "é文"]
    spec = model_spec(directory, 48)
    mine = Embedder(spec)(texts)
    model = PhiForCausalLM.from_pretrained(directory).eval()
    tokenizer = Tokenizer.from_file(str(directory / "tokenizer.json"))
    tokenizer.encode_special_tokens = True
    for text, embedding in zip(texts, mine, strict=True):
        ids = tokenizer.encode(text).ids[:48]
        if not ids:
            assert not embedding.any()
            continue
        with torch.no_grad():
            states = model(torch.tensor([ids]), output_hidden_states=True).hidden_states[-1]
        np.testing.assert_allclose(embedding, states[0].mean(0).numpy(), atol=1e-5)
    assert cli.main(["convert", "from-hf", str(directory), str(tmp_path / "own")]) == 0
    own = model_spec(tmp_path / "own", 48)
    assert (spec["kind"], own["kind"]) == ("huggingface", "megaphi")
    np.testing.assert_allclose(Embedder(own)(texts), mine, atol=1e-5)
    # The model on the disk is the one that was described, or it is refused.
    weights = directory / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\x07")
    with pytest.raises(RunError, match="the model changed"):
        Embedder(spec)


def test_a_filter_on_embeddings_from_labels_to_records(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = tiny_phi(tmp_path)
    rows = rows_of(160, 3, noise=0)
    records = write_records(tmp_path, [rows[::2], rows[1::2]])
    labels = add_labels(records, 160)
    argv = ["data", "train-filter", str(labels), str(records), "--features", str(model)]
    argv += ["--out", str(tmp_path / "filter"), "--trees", "10", "--workers", "1", "--json"]
    assert cli.main(argv) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["roc_auc"] > 0.9
    moved = model.rename(tmp_path / "moved")
    argv = ["data", "filter", str(records), "--filter", str(tmp_path / "filter"), "--json"]
    argv += ["--threshold", "0.5", "--workers", "1", "--out", str(tmp_path / "out")]
    assert cli.main(argv) == 2
    assert "phi" in capsys.readouterr().err
    assert cli.main([*argv, "--model", str(moved)]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["records_out"] == sum(record["meta"]["good"] for record in read(tmp_path / "out"))
    (moved / "config.json").write_text((moved / "config.json").read_text() + " ")
    argv[-1] = str(tmp_path / "other")
    assert cli.main([*argv, "--model", str(moved)]) == 2
    assert "not the model" in capsys.readouterr().err


def test_wrong_calls_are_one_line_each(trained: Path, tmp_path: Path) -> None:
    records = trained / "records"
    with pytest.raises(ValueError, match=r"quality\.score"):
        train_filter(records, [records], tmp_path / "f", SMALL)
    few = add_labels(write_records(tmp_path, [rows_of(20, 2)], "few"), 20)
    with pytest.raises(ValueError, match="label more documents"):
        train_filter(few, [tmp_path / "few"], tmp_path / "f", SMALL)
    with pytest.raises(ValueError, match="none of the 300"):
        train_filter(trained / "records-labels", [tmp_path / "few"], tmp_path / "f", SMALL)
    with pytest.raises(ValueError, match="other inputs"):
        train_filter(
            trained / "records-labels", [records], trained / "filter", TrainingOptions(trees=3)
        )
    again = train_filter(trained / "records-labels", [records], trained / "filter", SMALL)
    assert again.reused
    with pytest.raises(FileNotFoundError, match="no filter there"):
        load_filter(tmp_path / "absent")
    with pytest.raises(ValueError, match="exactly one"):
        Selection(threshold=0.5, precision=0.9)
    assert not (tmp_path / "f").exists()


def test_a_text_that_gives_no_features_is_rejected(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = features_module.open_features(load_filter(trained / "filter").spec)

    def broken(texts: list[str]) -> Any:
        matrix = real(texts)
        matrix[0] = np.inf
        return matrix

    monkeypatch.setattr("data_pipeline.quality.filter.open_features", lambda spec: broken)
    manifest = run(trained, tmp_path / "out", keep_tokens=10**9)
    assert manifest.rejected == {"no_score": 5}
    assert manifest.records_out == 495


def test_killed_at_any_file_operation(trained: Path, tmp_path: Path) -> None:
    records = write_records(tmp_path, [rows_of(8, 2), rows_of(8, 3)])
    argv = ["data", "filter", str(records), "--out", str(tmp_path / "out")]
    argv += ["--filter", str(trained / "filter"), "--threshold", "0.5", "--workers", "1"]
    report = drive(tmp_path, "out", "out/manifest.json", argv)
    assert report["killed"] >= 1
    assert "out/drift.json" in str(report["files"])
