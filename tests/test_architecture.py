"""The direction of imports: the contract of pyproject.toml holds, and sees what breaks it."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from megaphi.own_packages import ROOT

PACKAGES = ("kernels", "megaphi", "data_pipeline", "tools")


def check(root: Path) -> subprocess.CompletedProcess[str]:
    """Run the linter on a tree of sources."""
    program = "from importlinter.cli import lint_imports_command; lint_imports_command()"
    return subprocess.run(
        [sys.executable, "-c", program, "--no-cache"],
        cwd=root,
        env={"PYTHONPATH": str(root), "PATH": "", "NO_COLOR": "1"},
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the sources that a test may break."""
    root = tmp_path_factory.mktemp("sources")
    for package in PACKAGES:
        shutil.copytree(
            ROOT / package, root / package, ignore=shutil.ignore_patterns("__pycache__")
        )
    shutil.copy(ROOT / "pyproject.toml", root)
    return root


def test_contract_holds(sources: Path) -> None:
    done = check(sources)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize(
    ("file", "line"),
    [
        ("kernels/reference.py", "import megaphi.config"),
        ("megaphi/config.py", "import data_pipeline.records.record"),
        ("data_pipeline/records/record.py", "import tools.cli"),
        ("megaphi/model/phi.py", "import megaphi.training.trainer"),
        # a circle between two folders that no layer forbids
        ("data_pipeline/records/record.py", "import data_pipeline.runner.stage"),
        # and between two files of one folder
        ("data_pipeline/runner/output.py", "import data_pipeline.runner.stage"),
    ],
)
def test_wrong_import_is_seen(sources: Path, file: str, line: str) -> None:
    path = sources / file
    before = path.read_text(encoding="utf-8")
    try:
        path.write_text(f"{before}\n{line}\n", encoding="utf-8")
        done = check(sources)
        assert done.returncode != 0, f"{line} in {file} was not seen"
        assert line.removeprefix("import ").split(".")[1] in done.stdout
    finally:
        path.write_text(before, encoding="utf-8")
