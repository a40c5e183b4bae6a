"""The command itself: what it answers without importing anything heavy, and how it fails."""

import importlib
import subprocess
import sys
from pathlib import Path

import pytest

from megaphi.errors import Preempted, RunError, TooManyRejects, run_main
from tests.helpers import child_environment
from tools.cli import VERBS, main


@pytest.mark.parametrize("arguments", [["--help"], ["--version"], ["data", "--help"]])
def test_help_imports_nothing_heavy(arguments: list[str]) -> None:
    program = (
        "import sys\nfrom tools.cli import main\n"
        f"try:\n    main({arguments})\nexcept SystemExit as stop:\n    assert stop.code == 0\n"
        "heavy = {'torch', 'numpy', 'transformers', 'jsonargparse'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program],
        env=child_environment(),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(("usage: megaphi", "megaphi "))


def test_every_verb_is_there(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--help"])
    text = capsys.readouterr().out
    for verb, (module, description) in VERBS.items():
        assert verb in text
        assert description in text
        assert callable(importlib.import_module(module).main)


def test_unknown_verb_is_a_wrong_call(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["trian"])
    assert stop.value.code == 2
    assert "trian" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (ValueError("bad\nvalue"), 2),
        (FileNotFoundError("x: no such file"), 2),
        (RunError("broken"), 1),
        (TooManyRejects("half"), 3),
        (Preempted("saved"), 75),
        (KeyboardInterrupt(), 130),
        (OSError(28, "No space left on device"), 1),
        (ZeroDivisionError("division by zero"), 1),
    ],
)
def test_errors_are_one_line_and_a_status(
    error: BaseException, status: int, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(argv: list[str]) -> int:
        raise error

    assert run_main(fail, []) == status
    text = capsys.readouterr().err
    assert text.count("\n") == 1
    assert "Traceback" not in text
    if isinstance(error, Exception) and status != 75:
        run_main(fail, ["--debug"])
        assert "Traceback" in capsys.readouterr().err


def test_a_foreign_kernels_package_is_named(tmp_path: Path) -> None:
    (tmp_path / "kernels").mkdir()
    (tmp_path / "kernels" / "__init__.py").write_text("")
    environment = child_environment()
    environment["PYTHONPATH"] = f"{tmp_path}:{environment['PYTHONPATH']}"
    program = "import sys; from tools.cli import main; sys.exit(main(sys.argv[1:]))"
    options = ["train", "--train.run_dir=r", "--train.steps=1", "--data.train=t"]
    done = subprocess.run(
        [sys.executable, "-c", program, *options],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
        cwd=tmp_path,
    )
    assert done.returncode == 1
    assert "another package called kernels" in done.stderr
    assert str(tmp_path / "kernels") in done.stderr
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize("name", ["tools", "kernels", "data_pipeline"])
def test_a_folder_with_a_package_of_the_same_name(name: str, tmp_path: Path) -> None:
    (tmp_path / name).mkdir()
    (tmp_path / name / "__init__.py").write_text("raise SystemExit('not ours')")
    done = subprocess.run(
        [sys.executable, "-m", "megaphi", "inspect", "nothing"],
        env=child_environment(),
        capture_output=True,
        text=True,
        check=False,
        cwd=tmp_path,
    )
    assert done.returncode == 2, done.stderr
    assert "nothing" in done.stderr
