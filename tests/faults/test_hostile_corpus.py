"""The whole chain, ingest to tokens, over hostile files, planted secrets and unwanted licences."""

import json
import random
import subprocess
import sys
import zipfile
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from data_pipeline.ingest import stage as ingest
from data_pipeline.tokens.tokenize_records import documents_path
from data_pipeline.tokens.tokenizer import load_tokenizer
from megaphi.data.indexed import IndexedDataset
from tests.data_pipeline.record_files import read
from tests.data_pipeline.test_pipeline_ingest import hostile_tree
from tests.data_pipeline.test_secrets import planted
from tests.helpers import REPOSITORY, child_environment
from tools.data.command import main

STAGES = ("records", "examined", "unique")


def chain(source: list[str], root: Path, workers: int = 1) -> Path:
    """Run the stages through the command line; returns the prefix of the token file."""
    root.mkdir()
    records, examined, unique = (str(root / name) for name in STAGES)
    shared = ["--workers", str(workers), "--json"]
    lenient = ["--max-reject", "1", *shared]
    assert main(["ingest", *source, "--out", records, *lenient]) == 0
    assert main(["heuristics", records, "--out", examined, *lenient]) == 0
    assert main(["dedup", examined, "--out", unique, *lenient]) == 0
    prefix = str(root / "tokens")
    assert main(["tokenize", unique, "--tokenizer", "codegen", "--out", prefix, *shared]) == 0
    return root / "tokens"


# in a process of its own, so that the peak is that of the chain and its workers
MEASURED = """
import resource, sys
from pathlib import Path
from data_pipeline.ingest import stage as ingest
from megaphi.process_memory import peak_memory
from tests.faults.test_hostile_corpus import chain
ingest.SHARD_BYTES = 2**20
chain([sys.argv[1]], Path(sys.argv[2]))
workers = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024
print(max(peak_memory(), workers))
"""


def fates(root: Path) -> Counter[tuple[str, str]]:
    """(record id, `kept` or reason) of every document, over all stages."""
    found: Counter[tuple[str, str]] = Counter()
    for stage in STAGES:
        found.update((row["id"], row["reason"]) for row in read(root / stage, "rejected"))
    late = Path(f"{root / 'tokens'}.rejected.jsonl")
    if late.exists():
        found.update(
            (json.loads(line)["id"], json.loads(line)["reason"])
            for line in late.read_text().splitlines()
        )
    found.update((line["id"], "kept") for line in provenance(root / "tokens"))
    return found


def provenance(prefix: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in documents_path(prefix).read_text().splitlines()]


SPECIAL = ("<|endoftext|>", "<|fim_prefix|>", "<|im_start|>", "<|padding|>", "[INST]", "</s>")


def more_hostile_files(root: Path) -> int:
    """Files beside those of `hostile_tree`; returns how many."""
    code = "def function(argument):\n    return argument + {}\n"
    files: dict[str, bytes] = {
        f"token{number}.py": f"{code.format(number)}text = '{token}' * 3 + 'x{token}y'\n".encode()
        for number, token in enumerate(SPECIAL)
    }
    files |= {
        "lambda.py": b"f = " + b"lambda: " * 50_000 + b"1\n",
        "attributes.py": b"x = a" + b" .b" * 30_000 + b"\n",
        "comprehension.py": b"x = " + b"[ " * 5000 + b"1" + b" ]" * 5000 + b"\n",
        "dictionaries.py": b"x = " + b"{1: " * 300 + b"2" + b"}" * 300 + b"\n",
        "fstring.py": b"x = " + b"f'{" * 60 + b"1" + b"}'" * 60 + b"\n",
        "indent.py": b"".join(b" " * n + b"if x:\n" for n in range(300)),
        "tabs.py": b"\t" * 30_000 + b"x = 1\n",
        "spaces.py": b"x = 1\n" + b" " * 200_000 + b"\n",
        "newlines.py": b"\n" * 900_000,
        "backslashes.py": b"x = '" + b"\\\\ " * 50_000 + b"'\n",
        "escapes.py": b"x = '\\d \\w \\ud800 \\N{NO SUCH}'\n",
        "quotes.py": b'"""' * 100_001,
        "regex.py": b"x = '" + b"a" * 60_000 + b"!'\nemail = '" + b"a." * 30_000 + b"@'\n",
        "entropy.py": b"key = '" + random.Random(5).randbytes(30_000).hex().encode() + b"'\n",
        "comment.py": b"# " + b"word " * 60_000 + b"\n",
        "decorators.py": b"@a\n" * 30_000 + b"def f(): pass\n",
        "operators.py": b"x = 1" + b" if 1 else 2" * 20_000 + b"\n",
        "number.py": b"x = " + b"9" * 60_000 + b"\n",
        "hex.py": b"x = 0x" + b"f" * 60_000 + b"\n",
        "bidi.py": "x = '\u202e\u2066 evil \u2069'\n".encode() * 9,
        "emoji.py": ("x = '" + "👩‍👩‍👧‍👦 " * 4000 + "'\n").encode(),
        "private.py": ("# " + "\ue000\ufffe\U0010ffff " * 3000 + "\n").encode(),
        "controls.py": b"x = '\x01\x02\x1b[31m\x7f\x08'\n" * 9,
        "carriage.py": b"x = 1\ry = 2\r" * 100,
        "mixed.py": b"if x:\n\ty = 1\n        z = 2\n" * 10,
        "python2.py": b"print 'hello'\nexec 'x = 1'\n" * 10,
        "utf7.py": b"# coding: utf-7\nx = '+AGE-'\n" * 4,
        "idna.py": b"# coding: idna\nx = 1\n",
        "form_feed.py": b"\x0cdef f():\n\x0c    return 1\n" * 4,
    }
    for name, data in files.items():
        (root / name).write_bytes(data)
    return len(files)


@pytest.mark.slow
def test_sixty_hostile_files_through_the_whole_chain(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(ingest, "SHARD_BYTES", 2**20)
    count = len(hostile_tree(tmp_path / "tree")) + more_hostile_files(tmp_path / "tree")
    assert count >= 60
    source = [str(tmp_path / "tree")]
    done = subprocess.run(
        [sys.executable, "-c", MEASURED, *source, str(tmp_path / "one")],
        env=child_environment(), cwd=REPOSITORY, capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert int(done.stdout.splitlines()[-1]) < 2**30
    one = tmp_path / "one" / "tokens"
    found = fates(tmp_path / "one")
    assert len(found) == count
    assert len({record_id for record_id, _ in found}) == count
    assert set(found.values()) == {1}
    assert "kept" in {fate for _, fate in found}

    many = chain(source, tmp_path / "many", workers=3)
    assert fates(tmp_path / "many") == found
    for suffix in (".bin", ".idx", ".documents.jsonl"):
        assert Path(f"{many}{suffix}").read_bytes() == Path(f"{one}{suffix}").read_bytes()

    # No document can speak as the tokenizer, and each comes back to the letter.
    tokenizer = load_tokenizer("codegen")
    tokens = IndexedDataset(one)
    texts = {row["id"]: row["text"] for row in read(tmp_path / "one" / "unique")}
    lines = provenance(one)
    assert len(tokens) == len(lines) == len(texts)
    seen = set()
    for index, line in enumerate(lines):
        ids = tokens[index]
        assert np.flatnonzero(ids == tokenizer.eod_id).tolist() == [len(ids) - 1]
        assert tokenizer.decode(ids[:-1]) == texts[line["id"]]
        seen |= {token for token in SPECIAL if token in texts[line["id"]]}
    assert seen == set(SPECIAL)
    capsys.readouterr()


WORDS = ("alpha", "beta", "gamma", "delta", "epsilon", "result", "counter", "window", "parser")


def test_nothing_planted_reaches_the_tokens(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Secrets of every kind, unwanted licences and opted-out repositories, down to the .bin."""
    seed = random.SystemRandom().randrange(10**6)
    print(f"seed {seed}")
    draw = random.Random(seed)
    secrets = planted(seed)
    rows, unwanted = [], {}
    for number, (name, secret) in enumerate(secrets.items()):
        body = "".join(
            f"    {draw.choice(WORDS)} = {draw.choice(WORDS)}(total)\n" for _ in range(24)
        )
        text = f'def load_{name}(total):\n{body}    key = """{secret}"""\n    return key, total\n'
        rows.append((text, f"good{number}/repo", ["MIT", "Apache-2.0"][: 1 + number % 2]))
    cases: tuple[tuple[str, list[str]], ...] = (
        *(("gpl/a", ["GPL-3.0-only"]), ("dual/a", ["MIT", "LGPL-2.1-only"]), ("none/a", [])),
        *(("gone/a", ["MIT"]), ("Left/b", ["MIT"]), ("odd/a", ["see LICENSE"])),
    )
    for repo, licenses in cases:
        marker = f"marker_{draw.randrange(10**12)}"
        unwanted[repo] = marker
        body = "".join(
            f"    {draw.choice(WORDS)} = {draw.choice(WORDS)}(total)\n" for _ in range(24)
        )
        rows.append((f"def {marker}(total):\n{body}    return total\n", repo, licenses))
    either = ("def either(a):\n    return a * 3 + 1\n" * 2, "either/a", ["GPL-2.0-only OR MIT"])
    rows.append(either)
    data = "".join(
        json.dumps(
            {
                "content": text,
                "max_stars_repo_name": repo,
                "max_stars_repo_path": "src/a.py",
                "max_stars_repo_head_hexsha": "0" * 40,
                "max_stars_repo_licenses": licenses,
            }
        )
        + "\n"
        for text, repo, licenses in rows
    )
    with zipfile.ZipFile(tmp_path / "stack.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("data.jsonl", data)
    (tmp_path / "gone.txt").write_text("gone/a\nleft/\n")
    lists = ["--licenses", "permissive", "--opt-out", str(tmp_path / "gone.txt")]
    prefix = chain([str(tmp_path / "stack.zip"), *lists], tmp_path / "out")

    rejected = Counter(row["reason"] for row in read(tmp_path / "out" / "records", "rejected"))
    assert rejected == {"license": 4, "opted_out": 2}
    tokenizer = load_tokenizer("codegen")
    stream = np.fromfile(f"{prefix}.bin", IndexedDataset(prefix).dtype)
    decoded = tokenizer.decode(stream[stream != tokenizer.eod_id])
    assert "def either(a)" in decoded
    assert "def load_github(total)" in decoded
    for name, secret in secrets.items():
        for line in secret.split("\n"):
            assert line.startswith("-----") or line not in decoded, name
    for repo, marker in unwanted.items():
        assert marker not in decoded, repo
    for entry in provenance(prefix):
        assert {"id", "source", "license", "repo", "path", "revision"} <= entry.keys()
        assert entry["repo"] not in unwanted
    # nor does anything beside the token file hold a secret
    files = [Path(f"{prefix}{suffix}") for suffix in (".documents.jsonl", ".json", ".idx")]
    texts = "".join(path.read_bytes().decode("latin-1") for path in files)
    assert not [name for name, secret in secrets.items() if secret in texts]
    capsys.readouterr()
