"""An option of a corpus stage is defined once: command line, recipe and help follow from it."""

import ast
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from data_pipeline.runner.options import Form
from tools.cli import main
from tools.data.parser import STAGES, VERBS, parse
from tools.data.stage_options import argv_of, options_of

ROOT = Path(__file__).parents[2]
# One value of each option that is not its default, where the type alone does not give one.
VALUES = {
    "base_url": "http://127.0.0.1:1/v1",
    "embedding_model": "hashed",
    "engine": "slurm",
    "stop_below": "0.5",
    "slice": None,  # belongs to another engine than the other options
    "ray_address": None,
    "keep_tokens": None,  # excludes the threshold
    "precision": None,
    "exact_only": None,
    "shuffle": None,
    "min_bytes": "2",
    "max_bytes": "9000",
    "max_reject": "0.25",
    "ngram": "11",
    "rename": "seed=dice",
    "tokens": "1000",
}


def every_option(name: str) -> list[str]:
    """A command line that gives as many options of a verb as fit together."""
    words = [name]
    for option in options_of(STAGES[name].stage).values():
        value: Any = VALUES.get(option.name, "")
        if value is None:
            continue
        if not value:
            value = (
                option.choices[-1] if option.choices else "0.75" if option.kind is float else "7"
            )
        if option.positional:
            words.insert(1, f"{option.name}-{value}")
        else:
            words += [f"--{option.key}"] + ([] if option.is_flag else [value])
    return words


# what the options of compose are worth depends on its kind: none takes all of them
@pytest.mark.parametrize("name", [name for name in STAGES if name != "compose"])
def test_options_become_the_words_that_stand_for_them(name: str) -> None:
    """What a Slurm job is started with is what the user asked for."""
    options, as_json = parse(STAGES[name], every_option(name))
    assert not as_json
    assert parse(STAGES[name], [name, *argv_of(options)])[0] == options
    assert len(argv_of(options)) >= len(every_option(name)) - 1


@pytest.mark.parametrize("name", [*STAGES, "run"])
def test_every_option_has_help(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["data", name, "--help"])
    shown = " ".join(capsys.readouterr().out.split())
    options = shown.split("options: ", 1)[1]
    for option in options_of(VERBS[name].stage).values():
        if option.positional:
            continue
        flag = f"--{option.key}"
        usage = flag if option.is_flag else f"{flag} {option.placeholder}"
        if option.form is Form.SEVERAL:
            usage += f" [{option.placeholder} ...]"
        text = options.split(f" {usage} ", 1)[1]
        assert text[:1].isalpha(), f"{name} {flag} says nothing"


def test_help_imports_no_package_that_takes_long() -> None:
    code = (
        "import sys, tools.cli\n"
        "try: tools.cli.main(['data', sys.argv[1], '--help'])\n"
        "except SystemExit: pass\n"
        "slow = {'numpy', 'openai', 'torch', 'yaml', 'jsonargparse', 'tokenizers'}\n"
        "print(*sorted(slow & set(sys.modules)), file=sys.stderr)\n"
    )
    for name in ("ingest", "annotate", "decontaminate", "run"):
        ran = subprocess.run([sys.executable, "-c", code, name], capture_output=True, text=True)
        assert ran.returncode == 0, ran.stderr
        assert ran.stderr.split() == []


def test_options_that_exclude_each_other(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    dedup = ["data", "dedup", "x", "--out", str(tmp_path / "out"), "--near", "0.85"]
    assert main([*dedup, "--exact-only"]) == 2
    assert "give --near or --exact-only, not both" in capsys.readouterr().err
    tokenize = ["data", "tokenize", "x", "--tokenizer", "codegen", "--out", str(tmp_path / "t")]
    assert main([*tokenize, "--shuffle-seed", "1234", "--no-shuffle"]) == 2
    assert "--no-shuffle" in capsys.readouterr().err


def test_a_recipe_names_its_key_where_the_command_line_names_its_option(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["data", "ingest", "x", "--out", str(tmp_path / "o"), "--max-answers", "0"]) == 2
    assert "--max-answers 0: must be" in capsys.readouterr().err
    recipe = tmp_path / "recipe.yaml"
    for key in ("max_answers", "max-answers"):
        recipe.write_text(f"work: w\nstages: {{a: {{verb: ingest, sources: [x], {key}: 0}}}}\n")
        assert main(["data", "run", str(recipe)]) == 2
        assert f"{recipe}: stage a: max_answers 0: must be" in capsys.readouterr().err


def test_the_library_names_no_option_of_the_command_line() -> None:
    """Of its own command line: those of bubblewrap, pip and `megaphi train` are other programs'."""
    others = ("sandbox/bubblewrap.py", "sandbox/sandbox.py", "tokens/blend.py", "runner/options.py")
    found = []
    for path in sorted((ROOT / "data_pipeline").rglob("*.py")):
        if str(path).endswith(others):
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                words = node.value.replace("`", " ").replace("(", " ").split()
                found += [f"{path}: {w}" for w in words if w[:2] == "--" and w[2:3].isalpha()]
    assert found == []
