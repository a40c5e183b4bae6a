"""The corpus stage in docs/architecture.md does what the page says, as its text stands there."""

import json
import re
import sys
from pathlib import Path

import pytest

from tests.data_pipeline.record_files import read, write_records
from tests.helpers import REPOSITORY
from tools.cli import main
from tools.data import parser


@pytest.fixture
def line_count(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The verb, its two files in a folder of their own and its row in the table."""
    page = (REPOSITORY / "docs" / "architecture.md").read_text(encoding="utf-8")
    blocks = re.findall(r"^```python\n(.*?)^```", page, flags=re.DOTALL | re.MULTILINE)
    options, function, row = blocks
    room = tmp_path / "code"
    room.mkdir()
    here = function.replace("data_pipeline.heuristics.options", "documented_options")
    assert here != function
    (room / "documented_options.py").write_text(options)
    (room / "documented_stage.py").write_text(here)
    found = re.fullmatch(r'\s*"(.+)": _verb\("heuristics", "(\w+)", "line_count:(\w+)"\),\n', row)
    assert found is not None, row
    name, options_class, function_name = found.groups()
    monkeypatch.syspath_prepend(str(room))
    verb = parser.Verb(f"documented_options:{options_class}", f"documented_stage:{function_name}")
    for table in (parser.STAGES, parser.VERBS):
        monkeypatch.setitem(table, name, verb)
    for module in ("documented_options", "documented_stage"):
        monkeypatch.delitem(sys.modules, module, raising=False)
    return name


def test_documented_stage_works_as_a_verb_and_in_a_recipe(
    line_count: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    records = write_records(tmp_path, [[{"text": "x = 1\n" * n} for n in (1, 2, 3, 4, 5)]])
    out = tmp_path / "out"
    bounds = ["--min-lines", "2", "--max-lines", "4"]
    assert main(["data", line_count, str(records), *bounds, "--out", str(out), "--workers=1"]) == 0
    assert [row["text"].count("\n") for row in read(out)] == [2, 3, 4]
    assert [row["detail"] for row in read(out, "rejected")] == ["1 lines", "5 lines"]
    for wrong in (["--min-lines", "9", "--max-lines", "4"], ["--min-line", "2"]):
        assert main(["data", line_count, str(records), *wrong, "--out", str(tmp_path / "no")]) == 2

    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        f"work: {tmp_path / 'work'}\n"
        "stages:\n"
        f"  raw: {{verb: ingest, sources: ['{tmp_path / 'records-raw'}'], source: test}}\n"
        f"  bounded: {{verb: {line_count}, inputs: [raw], min_lines: 2}}\n"
    )
    capsys.readouterr()
    states = []
    for _ in range(2):
        assert main(["data", "run", str(recipe), "--workers", "1", "--json"]) == 0
        stages = json.loads(capsys.readouterr().out)["stages"]
        states.append([row["state"] for row in stages])
    assert states == [["made", "made"], ["reused", "reused"]]
    assert len(read(tmp_path / "work" / "bounded")) == 4
