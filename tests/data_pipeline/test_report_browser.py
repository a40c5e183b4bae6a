"""The corpus report in a real browser: its script runs under its own policy, and only that one."""

import re
import shutil
import subprocess
from pathlib import Path
from urllib.parse import quote

import pytest

from tools.cli import main

BROWSER = shutil.which("chromium") or shutil.which("google-chrome")
pytestmark = pytest.mark.skipif(BROWSER is None, reason="no Chromium on this machine")

TEXTS = {
    "rabbits": "def rabbits(n):\n    return n * 2\n",
    "turtles": "def turtles(n):\n    return [n, n + 1]\n",
    "hostile": "x = '</pre><script>document.title = \"taken over\"</script>'\n",
}


def opened(page: Path, profile: Path, fragment: str) -> str:
    """The page's document after its script has run."""
    assert BROWSER is not None
    done = subprocess.run(
        [
            BROWSER, "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic",
            "--no-first-run", "--disable-background-networking", "--disable-component-update",
            "--disable-sync", f"--user-data-dir={profile}", "--dump-dom",
            f"{page.as_uri()}#{quote(fragment)}",
        ],
        capture_output=True, text=True, check=True, timeout=120,
    )  # fmt: skip
    return done.stdout


def test_the_report_in_a_browser(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "source").mkdir()
    for name, text in TEXTS.items():
        (tmp_path / "source" / f"{name}.py").write_text(text)
    records, out = str(tmp_path / "records"), tmp_path / "report"
    assert main(["data", "ingest", str(tmp_path / "source"), "--out", records]) == 0
    assert main(["data", "report", records, "--workers", "1", "--out", str(out)]) == 0
    capsys.readouterr()

    everything = opened(out / "report.html", tmp_path / "profile", "")
    assert ">3 of 3<" in everything  # only the page's script writes this
    assert "<title>Corpus report</title>" in everything
    assert "<svg" in everything
    found = opened(out / "report.html", tmp_path / "profile", "rabbits RETURN")
    assert ">1 of 3<" in found
    hidden = re.findall(r'<details class="example" hidden="">.*?</details>', found, re.DOTALL)
    assert len(hidden) == 2
    assert not any("rabbits" in example for example in hidden)
